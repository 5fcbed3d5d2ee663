"""A weight perturbation: AWP of the convolutions alone."""

import awp_jax


def in_convolutions(gamma: float) -> awp_jax.Method:
  """AWP whose v is zero except in kernels of layers named conv.

  Args:
    gamma: |v_l| / |w_l| of every kernel.
  """
  return awp_jax.methods.awp(gamma, mask='conv*/kernel')
