"""AT-AWP on scikit-learn's handwritten digits: no download, no accelerator.

Trains in half a minute on two cores. The network memorizes its 200 training
images, so the robust generalization gap is large.

  python experiments/main.py
"""

import ml_collections

from experiments.configs import base, parts


def get_config() -> ml_collections.ConfigDict:
  """AT-AWP on 8 x 8 gray images, a narrow network, a short schedule."""
  config = base.get_config()
  parts.awp(config, gamma=0.01)
  config.dataset = 'digits'
  config.num_train = 200
  config.num_test = 300
  config.augmentation.pad = 0
  config.augmentation.flip = False
  config.model.name = 'wide_resnet'
  config.model.depth = 10
  config.model.width = 1
  config.threat.epsilon = 0.2
  config.attack.step_size = 0.08
  config.attack.num_steps = 5
  config.eval.step_size = 0.025
  config.eval.num_train = 100
  config.eval.batch_size = 100
  config.eval.every_epochs = 4
  config.landscape.num_train = 100
  config.landscape.num_test = 100
  config.landscape.num_directions = 2
  config.landscape.points = 11
  config.landscape.plane_points = 7
  config.epochs = 80
  config.batch_size = 50
  config.log_every_steps = 1000
  return config
