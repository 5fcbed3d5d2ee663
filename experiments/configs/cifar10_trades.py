"""TRADES on CIFAR-10.

Method: Zhang et al., ICML 2019.

  python experiments/main.py --config=experiments/configs/cifar10_trades.py

Behind the file: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step is worth about 27 forward passes of its batch.

Expected: below its AWP sibling; the authors published no log of it.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """TRADES; `argument` as above."""
  config = parts.start(parts.cifar10, argument)
  parts.trades(config)
  return config
