r"""RST-AWP on CIFAR-10: TRADES-AWP with 500,000 pseudo-labelled extra images.

Method: Carmon et al., NeurIPS 2019; the file of extra images is theirs, or one
that `experiments/pseudo_labels.py` makes.

  python experiments/main.py \
    --config=experiments/configs/cifar10_rst_awp.py \
    --config.extra.path=ti_500K_pseudo_labeled.pickle

Behind the file: `:PreActResNet-18`, `:WRN-34-10`, `:L2`; WRN-28-10 by itself.
Cost: a step is worth about 33 forward passes of 256 images.

Expected, from the authors: 88.25 natural, 60.04 robust accuracy (AutoAttack).
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """Half of each batch is extra; `argument` as above."""
  config = parts.start(parts.cifar10, argument, 'WRN-28-10')
  parts.self_training(config, 'ti_500K_pseudo_labeled.pickle')
  parts.awp(config, gamma=0.005, warmup_epochs=10)
  return config
