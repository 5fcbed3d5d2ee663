"""Helpers that every other package may use: atomic files, errors, console.

Nothing here depends on configs, data or training.
"""
