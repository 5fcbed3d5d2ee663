"""Trains the network of this folder on its data by its loss."""

import ml_collections

from experiments.configs import base


def get_config() -> ml_collections.ConfigDict:
  """Every field of `experiments/configs/base.py` can be set here."""
  config = base.get_config()
  config.dataset = 'my_data:stripes(noise=0.25)'
  config.model.name = 'my_network:Net'
  config.model.kwargs.hidden = 16
  config.objective = 'my_loss:half_natural'
  config.weight_perturbation = 'my_perturbation:in_convolutions'
  config.awp.gamma = 0.02  # passed to it
  config.evaluation.attacks = ('pgd-20', 'my_attack:corner', 'aa-standard')

  # Fields of your own, for parts with an argument `config`.
  config.user.natural_weight = 0.5

  config.threat.epsilon = 0.06
  config.attack.step_size = 0.015
  config.attack.num_steps = 5
  config.eval.step_size = 0.015
  config.eval.num_train = 200
  config.augmentation.pad = 0
  config.augmentation.flip = False
  config.optimizer.learning_rate = 0.05
  config.epochs = 20
  config.batch_size = 40
  config.eval.batch_size = 200
  config.landscape.points = 5
  return config
