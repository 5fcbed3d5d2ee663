"""MART in the small setting of CIFAR-10, which overfits in minutes.

  python experiments/main.py \
    --config=experiments/configs/cifar10_small_mart.py

The setting is `parts.cifar10_small`; `docs/results/evidence.md` has results.
"""

import ml_collections

from experiments.configs import base, parts


def get_config() -> ml_collections.ConfigDict:
  """MART on 2,500 images."""
  config = base.get_config()
  parts.cifar10_small(config)
  parts.objective(config, 'MART', beta=5.0)
  return config
