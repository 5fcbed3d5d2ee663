"""AT on SVHN.

Method: Madry et al., ICLR 2018.

  python experiments/main.py --config=experiments/configs/svhn_at.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 24 forward passes of its batch.

Expected, from the authors' logs of seed 0, PreActResNet-18 (PGD-20, percent:
best, mean of the last six epochs, natural accuracy at best):
  L_inf  53.36  44.49  89.85
  L_2    66.87  65.03  92.96
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """AT; `argument` as above."""
  config = parts.start(parts.svhn, argument)
  return config
