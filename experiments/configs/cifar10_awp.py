"""AT-AWP on CIFAR-10: the paper's main setting.

Method: Madry et al., ICLR 2018.
AWP: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020.

  python experiments/main.py --config=experiments/configs/cifar10_awp.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 27 forward passes of its batch.
The authors' run took 302 s of training and 98 s of testing per epoch, on
unspecified hardware of 2020.

Expected, from the authors' logs of seed 0, PreActResNet-18 (PGD-20, percent:
best, mean of the last six epochs, natural accuracy at best):
  L_inf  55.39  54.73  81.18
  L_2    72.69  72.08  90.11
WRN-34-10: 86.23 natural, 53.97 robust (AutoAttack, L_inf).
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """AT-AWP; `argument` as above."""
  config = parts.start(parts.cifar10, argument)
  parts.awp(config, gamma=0.01)
  return config
