"""Other ways to write models: flax.nnx modules and Equinox modules.

`nnx` and `equinox` are not imported by `awp_jax`. Equinox must be installed for
the second.
"""
