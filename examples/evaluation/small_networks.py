"""Loads the networks of `docs/results/evidence` for `evaluate_model.py`.

  cd examples/evaluation
  python ../../experiments/evaluate_model.py \
    --model='small_networks:load(name="awp")' --workdir=../../runs/small_awp \
    --dataset=cifar10 --image_size=16 --num_test=3000

They are PreActResNet-18 of width 16, trained by AT and AT-AWP on CIFAR-10 at
16 x 16 pixels, stored as flat Flax variables (docs/results/evidence.md).
"""

from collections.abc import Callable
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.models import PreActResNet

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'docs/results/evidence'

#: Of CIFAR-10, in units of [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2471, 0.2435, 0.2616)


def load(name: str) -> Callable[[jax.Array], jax.Array]:
  """Returns the classifier of images [B, 16, 16, 3] in [0, 1].

  Args:
    name: 'at' or 'awp'.
  """
  model = PreActResNet(10, width=16, mean=MEAN, std=STD)
  with np.load(FOLDER / f'network_{name}.npz', allow_pickle=False) as archive:
    variables = traverse_util.unflatten_dict(
        {path: jnp.asarray(archive[path], jnp.float32) for path in archive},
        sep='/')

  def logits(images: jax.Array) -> jax.Array:
    found: Any = model.apply(variables, images, train=False)
    return found

  return logits
