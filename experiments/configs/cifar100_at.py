"""AT on CIFAR-100.

Method: Madry et al., ICLR 2018.

  python experiments/main.py --config=experiments/configs/cifar100_at.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 24 forward passes of its batch.

Expected, from the authors' logs of seed 0, PreActResNet-18 (PGD-20, percent:
best, mean of the last six epochs, natural accuracy at best):
  L_inf  27.77  20.82  53.48
  L_2    41.33  35.27  62.26
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """AT; `argument` as above."""
  config = parts.start(parts.cifar100, argument)
  return config
