"""Attacks on inputs, a module each; `awp_jax` exports their functions."""
