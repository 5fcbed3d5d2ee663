"""AT-AWP on scikit-learn's handwritten digits: what runs where there is nothing.

No download, no accelerator. The setting shows robust overfitting in a minute:
few training images and a network that can learn them by heart.

  python experiments/main.py
"""

import ml_collections

from experiments.configs import cifar10_awp


def get_config() -> ml_collections.ConfigDict:
  """`cifar10_awp` on 8 x 8 grey images, a narrow network, a short schedule."""
  config = cifar10_awp.get_config()
  config.dataset = 'digits'
  config.num_train = 400
  config.augmentation.pad = 0
  config.augmentation.flip = False
  config.model.name = 'wide_resnet'
  config.model.depth = 10
  config.model.width = 1
  config.threat.epsilon = 0.15
  config.attack.step_size = 0.0375
  config.eval.step_size = 0.02
  config.eval.num_train = 400
  config.eval.batch_size = 400
  config.epochs = 60
  config.batch_size = 100
  config.log_every_steps = 1000
  return config
