r"""Pre-training on CIFAR-10: a few epochs of AT from a checkpoint.

Method: Hendrycks, Lee, Mazeika, ICML 2019. The checkpoint is from adversarial
training on a larger data set; its classifier is discarded.

  python experiments/main.py \
    --config=experiments/configs/cifar10_pretrained.py \
    --config.init_from=wrn-28-10-imagenet32.pt

Arguments: `:PreActResNet-18`, `:WRN-34-10`, `:L2`; default WRN-28-10.
Cost: five epochs.

Expected: below Pre-training-AWP, 88.33 natural and 57.39 robust (AutoAttack).
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """From `init_from`; `argument` as above."""
  config = parts.start(parts.cifar10, argument, 'WRN-28-10')
  parts.tuning(config, 'wrn-28-10-imagenet32.pt')
  return config
