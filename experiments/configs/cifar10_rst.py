r"""RST on CIFAR-10: TRADES with 500,000 pseudo-labelled extra images.

Method: Carmon et al., NeurIPS 2019; the file of extra images is theirs, or one
that `experiments/pseudo_labels.py` makes.

  python experiments/main.py \
    --config=experiments/configs/cifar10_rst.py \
    --config.extra.path=ti_500K_pseudo_labeled.pickle

Behind the file: `:PreActResNet-18`, `:WRN-34-10`, `:L2`; WRN-28-10 by itself.
Cost: a step is worth about 27 forward passes of 256 images.

Expected: below RST-AWP, 88.25 natural and 60.04 robust (AutoAttack).
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """Half of each batch is extra; `argument` as above."""
  config = parts.start(parts.cifar10, argument, 'WRN-28-10')
  parts.self_training(config, 'ti_500K_pseudo_labeled.pickle')
  return config
