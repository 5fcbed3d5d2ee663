"""Natural training on CIFAR-10: no adversary.

For pseudo-labels (`experiments/pseudo_labels.py`), and as a baseline.

  python experiments/main.py --config=experiments/configs/cifar10_natural.py

Arguments: `:WRN-28-10`, `:WRN-34-10`.
Cost: a step takes 3 forward passes of its batch.

Expected: no robust accuracy at 8/255.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """CE(f(x), y); `argument` as above."""
  config = parts.start(parts.cifar10, argument)
  parts.natural(config)
  return config
