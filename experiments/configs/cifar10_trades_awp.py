"""TRADES-AWP on CIFAR-10.

Method: Zhang et al., ICML 2019.
AWP: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020.

  python experiments/main.py --config=experiments/configs/cifar10_trades_awp.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 33 forward passes of its batch.

Expected, from the authors, WRN-34-10: 85.36 natural, 56.17 robust accuracy
(AutoAttack, L_inf). No log of PreActResNet-18 exists.
gamma and warm-up are those of the released code.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """TRADES-AWP; `argument` as above."""
  config = parts.start(parts.cifar10, argument)
  parts.trades(config)
  parts.awp(config, gamma=0.005, warmup_epochs=10)
  return config
