"""A network: two convolutions and a linear layer."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


class Net(nn.Module):
  """A small convolutional network.

  The experiments pass `num_classes` and, since it is a field, `dtype`. Other
  fields are set by `model.kwargs`. Images are normalized before the call,
  unless the module has fields `mean` and `std`.

  Attributes:
    num_classes: number of classes C.
    hidden: number of channels.
    dtype: of the computations. Evaluations replace it by float32.
  """

  num_classes: int
  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Images [B, H, W, 1] -> logits [B, C]."""
    for number in range(2):
      x = nn.Conv(
          self.hidden, (3, 3), strides=2, use_bias=False, dtype=self.dtype,
          name=f'conv{number}')(x)
      x = nn.BatchNorm(
          use_running_average=not train, momentum=0.9, dtype=self.dtype,
          name=f'norm{number}')(x)
      x = nn.relu(x)
    x = x.mean((1, 2)).astype(jnp.float32)
    return nn.Dense(self.num_classes, name='out')(x)
