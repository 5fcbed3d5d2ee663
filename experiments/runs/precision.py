"""Evaluates trained networks in float32, and records the precision.

Robust accuracy depends on rounding. In bfloat16 the largest logits of many
images tie. By default JAX computes 'float32' matrix products in TensorFloat-32
on recent GPUs and by bfloat16 passes on TPUs. Every evaluation therefore uses
`logits`, which is float32 throughout, whatever the training precision. Attacks
may use another type (`ATTACK_DTYPES`); float32 decides what they broke.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from awp_jax.types import Array
from experiments.util import environment

#: Precision of evaluations, also for `jax.default_matmul_precision`.
PRECISION = 'float32'

#: Allowed `config.evaluation.attack_dtype`.
ATTACK_DTYPES = ('float32', 'bfloat16')


def network(model: nn.Module, dtype: str = PRECISION) -> nn.Module:
  """The network with float32 parameters, by default also computed in float32.

  Args:
    model: a network whose fields `dtype` and `param_dtype`, if present, set the
      types of its computations and parameters.
    dtype: the type of the computations.

  Returns:
    A copy that differs in these fields only; equal networks have equal copies.
  """
  fields: dict[str, Any] = {
      name: jnp.dtype(value) for name, value in (
          ('dtype', dtype), ('param_dtype', PRECISION))
      if hasattr(model, name)}
  return model.clone(**fields)


def variables(stored: Mapping[str, Any]) -> dict[str, Any]:
  """The variables of a checkpoint in float32; integers are unchanged."""
  return jax.tree.map(
      lambda leaf: leaf.astype(jnp.float32)
      if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, dict(stored))


def logits(model: nn.Module, variables: Any, images: Array) -> Array:
  """Logits with running statistics and float32 matrix products.

  The precision is set here, where the network is traced. The setting is local
  to a thread, so other threads would not inherit it from the caller.

  Args:
    model: from `network`.
    variables: from `variables`.
    images: [B, ...], in [0, 1].

  Returns:
    Logits [B, C].
  """
  with jax.default_matmul_precision(PRECISION):
    found: Any = model.apply(variables, images, train=False)
  return found


def judged_by() -> dict[str, Any]:
  """Precision, devices and versions of this process, for records."""
  return {'precision': PRECISION, 'matmul_precision': PRECISION,
          'devices': environment.devices(), 'versions': environment.versions()}
