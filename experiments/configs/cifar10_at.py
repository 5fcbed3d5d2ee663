"""AT on CIFAR-10, L_inf 8/255, PreActResNet-18: the paper's baseline.

Paper: Wu, Xia, Wang, NeurIPS 2020; the method is Madry et al., ICLR 2018.

  python experiments/main.py --config=experiments/configs/cifar10_at.py

Expected, from the authors' log of seed 0 (PGD-20 robust accuracy, per cent):
best 52.79, mean of the last six epochs 44.44, natural accuracy at best 81.70.
Their run took 276 s of training and 98 s of testing an epoch.
"""

import ml_collections

from experiments.configs import cifar10_awp


def get_config() -> ml_collections.ConfigDict:
  """`cifar10_awp` without the weight perturbation."""
  config = cifar10_awp.get_config()
  config.awp.gamma = 0.0
  return config
