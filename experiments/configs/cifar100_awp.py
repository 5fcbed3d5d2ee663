"""AT-AWP on CIFAR-100.

Method: Madry et al., ICLR 2018.
AWP: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020.

  python experiments/main.py --config=experiments/configs/cifar100_awp.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 27 forward passes of its batch.

Expected, from the authors' logs of seed 0, PreActResNet-18 (PGD-20, percent:
best, mean of the last six epochs, natural accuracy at best):
  L_inf  30.71  30.28  54.19
  L_2    45.60  44.66  64.44
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """AT-AWP; `argument` as above."""
  config = parts.start(parts.cifar100, argument)
  parts.awp(config, gamma=0.01)
  return config
