"""The changes from `base` to a setting of the paper, one function each.

A config file only calls these functions. Its argument, after a colon on the
command line, selects the threat model and the network:

  --config=experiments/configs/cifar10_awp.py:L2
  --config=experiments/configs/cifar10_awp.py:L2,WRN-34-10
"""

from collections.abc import Callable

from ml_collections import ConfigDict as Config

from experiments.configs import base

#: Names of networks -> (model, depth, width).
NETWORKS = {
    'PreActResNet-18': ('preact_resnet', 18, 64),
    'WRN-28-10': ('wide_resnet', 28, 10),
    'WRN-34-10': ('wide_resnet', 34, 10),
}
NORMS = ('Linf', 'L2')


def start(
    dataset: Callable[[Config], None], argument: str = '',
    default: str = 'PreActResNet-18') -> Config:
  """`base` on a data set, with the threat model and network of `argument`.

  Args:
    dataset: `cifar10`, `cifar100` or `svhn`.
    argument: comma-separated names from `NORMS` and `NETWORKS`; empty selects
      L_inf and the default network.
    default: the network if `argument` names none.

  Returns:
    A config for AT.

  Raises:
    ValueError: for an unknown name.
  """
  config = base.get_config()
  dataset(config)
  network(config, default)
  names = [name for name in argument.split(',') if name]
  for name in names:
    if name not in NORMS and name not in NETWORKS:
      raise ValueError(
          f'the argument of a config may name {", ".join(NORMS)} and '
          f'{", ".join(NETWORKS)}, got {name!r}.')
    if name in NETWORKS:
      network(config, name)
  if 'L2' in names:
    l2(config)
  return config


def cifar10(config: Config) -> None:
  """CIFAR-10: `base` unchanged."""
  config.dataset = 'cifar10'


def cifar10_small(config: Config) -> None:
  """CIFAR-10 so small that networks overfit in minutes on two cores.

  2,500 training images at 16 x 16 pixels without augmentation, and a
  PreActResNet-18 of width 16 in bfloat16, for 40 epochs of batches of 100.
  """
  config.dataset = 'cifar10'
  config.image_size = 16
  config.num_train = 2500
  config.num_test = 3000
  config.augmentation.pad = 0
  config.augmentation.flip = False
  config.model.width = 16
  config.model.dtype = 'bfloat16'
  config.epochs = 40
  config.batch_size = 100
  config.eval.num_steps = 10
  config.eval.num_train = 500
  config.eval.batch_size = 250
  config.eval.every_epochs = 2


def cifar100(config: Config) -> None:
  """CIFAR-100: zero padding, and rotations by up to 15 degrees."""
  config.dataset = 'cifar100'
  config.augmentation.pad_mode = 'constant'
  config.augmentation.rotation = 15.0


def svhn(config: Config) -> None:
  """SVHN: no augmentation, smaller attack steps and learning rate."""
  config.dataset = 'svhn'
  config.augmentation.pad = 0
  config.augmentation.flip = False
  config.attack.step_size = 1 / 255
  config.eval.step_size = 1 / 255
  config.optimizer.learning_rate = 0.01


def l2(config: Config) -> None:
  """The L_2 ball of 128/255, in steps of 15/255."""
  config.threat.norm = 'L2'
  config.threat.epsilon = 128 / 255
  config.attack.step_size = 15 / 255
  config.eval.step_size = 15 / 255


def network(config: Config, name: str) -> None:
  """One of `NETWORKS`."""
  model, depth, width = NETWORKS[name]
  config.model.update({'name': model, 'depth': depth, 'width': width})


def awp(config: Config, gamma: float, warmup_epochs: int = 0) -> None:
  """Adversarial weight perturbation."""
  config.awp.gamma = gamma
  config.awp.warmup_epochs = warmup_epochs


def objective(config: Config, name: str, beta: float) -> None:
  """TRADES or MART, and how both attack; the rest stays that of AT."""
  config.objective = name
  config.beta = beta
  config.attack.start = 'gaussian'
  config.attack.mode = 'eval'


def trades(config: Config) -> None:
  """TRADES as released: raw pixels, running statistics in the attack.

  The rate drops before the first step of epochs 100 and 150, counted from 1.
  """
  objective(config, 'TRADES', beta=6.0)
  config.model.normalize = False
  if config.augmentation.pad:
    config.augmentation.pad_mode = 'constant'
  if config.threat.norm == 'Linf':
    config.threat.epsilon = 0.031
    config.attack.step_size = 0.007
  else:
    config.attack.step_size = (
        2 * config.threat.epsilon / config.attack.num_steps)
  config.optimizer.schedule = 'epochs'
  config.optimizer.decay_at = (99 / 200, 149 / 200)


def mart(config: Config) -> None:
  """MART as released; wide networks have another recipe."""
  trades(config)
  config.objective = 'MART'
  if config.model.name == 'wide_resnet':
    config.beta, config.epochs = 6.0, 90
    config.optimizer.weight_decay = 7e-4
    config.optimizer.decay_at = (74 / 90,)
    return
  config.beta, config.epochs = 5.0, 120
  config.optimizer.learning_rate = 0.01
  config.optimizer.weight_decay = 3.5e-3
  config.optimizer.decay_at = (74 / 120, 89 / 120, 99 / 120)


def self_training(config: Config, path: str) -> None:
  """RST: TRADES on batches with half of the images from `path`."""
  trades(config)
  config.extra.path = path
  config.extra.fraction = 0.5
  config.batch_size = 256
  config.optimizer.nesterov = True
  config.optimizer.schedule = 'cosine'


def tuning(config: Config, path: str) -> None:
  """Fine-tuning: a few epochs from a checkpoint of another data set."""
  config.init_from = path
  config.epochs = 5
  config.optimizer.learning_rate = 0.001
  config.optimizer.schedule = 'cosine'


def natural(config: Config) -> None:
  """Natural training: for pseudo-labels, or as a baseline."""
  config.objective = 'natural'
  config.optimizer.schedule = 'cosine'
  config.optimizer.nesterov = True


def modern(config: Config) -> None:
  """TRADES with the common elements of strong recipes since 2020.

  SiLU, Nesterov momentum, decay of weights only, label smoothing, a moving
  average of the weights, a cosine schedule with a short warm-up, statistics of
  the perturbed pass only, and model selection on held-out training images.
  """
  trades(config)
  config.model.activation = 'silu'
  config.model.normalize = True
  config.label_smoothing = 0.1
  config.ema_decay = 0.995
  config.num_validation = 1024
  config.select_on = 'validation'
  config.statistics = 'perturbed'
  config.optimizer.nesterov = True
  config.optimizer.decay = 'weights'
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 5.0
