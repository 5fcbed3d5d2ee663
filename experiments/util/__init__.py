"""Shared helpers: atomic files, errors, console, digests, environment.

Nothing here depends on configs, data or training.
"""
