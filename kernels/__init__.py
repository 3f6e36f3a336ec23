"""Backends compiled by Numba, each a module with the functions that every backend has."""
