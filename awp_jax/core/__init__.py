"""Foundations: argument checks, safe norms, short loops, array sharding.

Every other package imports from here; this one imports `awp_jax.types` only.
"""
