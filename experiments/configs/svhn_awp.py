"""AT-AWP on SVHN.

Method: Madry et al., ICLR 2018.
AWP: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020.

  python experiments/main.py --config=experiments/configs/svhn_awp.py

Arguments: `:L2` (128/255), `:WRN-34-10`, or `:L2,WRN-34-10`.
Cost: a step takes about 27 forward passes of its batch.

Expected, from the authors' logs of seed 0, PreActResNet-18 (PGD-20, percent:
best, mean of the last six epochs, natural accuracy at best):
  L_inf  59.12  55.87  91.76
  L_2    72.57  67.73  94.83
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """AT-AWP; `argument` as above."""
  config = parts.start(parts.svhn, argument)
  warmup = 5 if config.threat.norm == 'Linf' else 0
  parts.awp(config, gamma=0.01, warmup_epochs=warmup)
  return config
