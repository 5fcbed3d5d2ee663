"""AT-AWP in the small setting of CIFAR-10, which overfits in minutes.

  python experiments/main.py \
    --config=experiments/configs/cifar10_small_awp.py

The setting is `parts.cifar10_small`; `docs/results/evidence.md` has results.
"""

import ml_collections

from experiments.configs import base, parts


def get_config() -> ml_collections.ConfigDict:
  """AT-AWP on 2,500 images."""
  config = base.get_config()
  parts.cifar10_small(config)
  parts.awp(config, gamma=0.01)
  return config
