r"""RST-AWP on CIFAR-10: TRADES-AWP with 500,000 pseudo-labeled extra images.

Method: Carmon et al., NeurIPS 2019. The extra images are theirs, or a file
written by `experiments/pseudo_labels.py`.

  python experiments/main.py \
    --config=experiments/configs/cifar10_rst_awp.py \
    --config.extra.path=ti_500K_pseudo_labeled.pickle

Arguments: `:PreActResNet-18`, `:WRN-34-10`, `:L2`; default WRN-28-10.
Cost: a step takes about 33 forward passes of 256 images.

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
