"""How a trained network is judged: in float32, and the record that says so.

Robust accuracy depends on rounding. In bfloat16 the largest logits of many
images tie, and 'float32' matrix products mean TensorFloat-32 on recent GPUs and
bfloat16 passes on TPUs unless JAX is told otherwise. Whatever a network was
trained in, every number about it is computed by `logits`: float32 throughout.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from awp_jax.types import Array
from experiments.util import environment
from experiments.runs import metrics

#: What networks are judged in, for `jax.default_matmul_precision` too.
PRECISION = 'float32'


def network(model: nn.Module) -> nn.Module:
  """The network with float32 in place of the type that it was trained in.

  Args:
    model: a network whose fields `dtype` and `param_dtype`, where it has them,
      set the types of its computations and parameters.

  Returns:
    An equal network but for these fields; equal networks give equal ones.
  """
  fields: dict[str, Any] = {
      name: jnp.float32 for name in ('dtype', 'param_dtype')
      if hasattr(model, name)}
  return model.clone(**fields)


def variables(stored: Mapping[str, Any]) -> dict[str, Any]:
  """The variables of a checkpoint in float32; integers stay as they are."""
  return jax.tree.map(
      lambda leaf: leaf.astype(jnp.float32)
      if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, dict(stored))


def logits(model: nn.Module, variables: Any, images: Array) -> Array:
  """Logits by running statistics, with float32 matrix products.

  The precision is set inside, where the network is traced: threads and compiled
  functions of the caller do not inherit the setting of a thread around them.

  Args:
    model: of `network`.
    variables: of `variables`.
    images: [B, ...], in [0, 1].

  Returns:
    Logits [B, C].
  """
  with jax.default_matmul_precision(PRECISION):
    found: Any = model.apply(variables, images, train=False)
  return found


def judged_by() -> dict[str, Any]:
  """Precision, devices and versions of this process, for a record."""
  return {'precision': PRECISION, 'matmul_precision': PRECISION,
          'devices': environment.devices(), 'versions': environment.versions()}
