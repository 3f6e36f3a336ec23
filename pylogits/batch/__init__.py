"""Batch scoring of files: what ``pylogits score`` is made of."""
