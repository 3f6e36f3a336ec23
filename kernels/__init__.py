"""Backends compiled by Numba; each is a module with the functions of every backend, and imports only numba and numpy."""
