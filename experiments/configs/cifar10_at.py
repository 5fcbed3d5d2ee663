"""AT on CIFAR-10.

Method: Madry et al., ICLR 2018.

  python experiments/main.py --config=experiments/configs/cifar10_at.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 24 forward passes of its batch.
The authors' run took 276 s of training and 98 s of testing per epoch, on
unspecified hardware of 2020.

Expected, from the authors' logs of seed 0, PreActResNet-18 (PGD-20, percent:
best, mean of the last six epochs, natural accuracy at best):
  L_inf  52.79  44.44  81.70
  L_2    69.15  65.93  88.80
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """AT; `argument` as above."""
  config = parts.start(parts.cifar10, argument)
  return config
