"""TRADES on SVHN.

Method: Zhang et al., ICML 2019.

  python experiments/main.py --config=experiments/configs/svhn_trades.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 27 forward passes of its batch.

Expected: unknown; no log of this setting was published.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """TRADES; `argument` as above."""
  config = parts.start(parts.svhn, argument)
  parts.trades(config)
  return config
