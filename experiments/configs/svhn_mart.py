"""MART on SVHN.

Method: Wang et al., ICLR 2020.

  python experiments/main.py --config=experiments/configs/svhn_mart.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 26 forward passes of its batch.

Expected: unknown; no log of this setting was published.

Recipe of MART's code: 120 epochs for PreActResNet-18, 90 for a wide
network.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """MART; `argument` as above."""
  config = parts.start(parts.svhn, argument)
  parts.mart(config)
  return config
