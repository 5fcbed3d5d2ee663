"""Foundations: argument checks, safe norms, short loops, array sharding.

All other packages may import this one. It imports only `awp_jax.types`.
"""
