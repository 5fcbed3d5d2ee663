"""MART-AWP on CIFAR-100.

Method: Wang et al., ICLR 2020.
AWP: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020.

  python experiments/main.py --config=experiments/configs/cifar100_mart_awp.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 32 forward passes of its batch.

Expected: unknown; no log of this setting was published.

Recipe of MART's code: 120 epochs for PreActResNet-18, 90 for a wide
network.
gamma and warm-up are those of the released TRADES-AWP.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """MART-AWP; `argument` as above."""
  config = parts.start(parts.cifar100, argument)
  parts.mart(config)
  parts.awp(config, gamma=0.005, warmup_epochs=10)
  return config
