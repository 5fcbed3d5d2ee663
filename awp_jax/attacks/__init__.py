"""Attacks on inputs, one per module; `awp_jax` exports their functions."""
