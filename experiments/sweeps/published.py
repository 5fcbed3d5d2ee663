"""Published accuracies by config, in percent.

Those of PreActResNet-18 are computed from the training logs in the authors'
repository: seed 0, PGD-20 on all test images after every epoch. `last` is the
mean of the last six epochs, which reproduces the paper's column. AutoAttack
accuracies are those published for the released checkpoints, with the natural
accuracy of the same checkpoint.

  >>> find('cifar10_awp')['best']
  55.39
  >>> find('cifar10_awp:WRN-34-10,L2') is None
  True
"""

from typing import Any

_LOG = 'training log of seed 0, csdongxian/AWP'
_LOG_AND_AA = f'{_LOG}; natural and AutoAttack of the released checkpoint'
_AA = 'AutoAttack of the released checkpoint'


def _log(best: float, last: float, natural: float) -> dict[str, Any]:
  return {'best': best, 'last': last, 'natural': natural, 'source': _LOG}


def _checkpoint(natural: float, autoattack: float) -> dict[str, Any]:
  return {'natural': natural, 'autoattack': autoattack, 'source': _AA}


#: Label of a config -> 'source', and those known of 'best', 'last', 'natural'
#: (at the best epoch) and 'autoattack'.
PUBLISHED: dict[str, dict[str, Any]] = {
    'cifar10_at': _log(52.79, 44.44, 81.70),
    'cifar10_awp': _log(55.39, 54.73, 81.18),
    'cifar10_at:L2': _log(69.15, 65.93, 88.80),
    'cifar10_awp:L2': _log(72.69, 72.08, 90.11),
    'cifar100_at': _log(27.77, 20.82, 53.48),
    'cifar100_awp': _log(30.71, 30.28, 54.19),
    'cifar100_at:L2': _log(41.33, 35.27, 62.26),
    'cifar100_awp:L2': _log(45.60, 44.66, 64.44),
    'svhn_at': _log(53.36, 44.49, 89.85),
    'svhn_awp': _log(59.12, 55.87, 91.76),
    'svhn_at:L2': _log(66.87, 65.03, 92.96),
    'svhn_awp:L2': _log(72.57, 67.73, 94.83),
    'cifar10_awp:WRN-34-10': {
        'best': 58.30, 'natural': 86.23, 'autoattack': 53.97,
        'source': _LOG_AND_AA},
    'cifar10_trades_awp:WRN-34-10': _checkpoint(85.36, 56.17),
    'cifar10_mart_awp:WRN-34-10': _checkpoint(84.43, 54.23),
    # WRN-28-10 is the default of these configs.
    'cifar10_pretrained_awp': _checkpoint(88.33, 57.39),
    'cifar10_pretrained_awp:WRN-28-10': _checkpoint(88.33, 57.39),
    'cifar10_rst_awp': _checkpoint(88.25, 60.04),
    'cifar10_rst_awp:WRN-28-10': _checkpoint(88.25, 60.04),
}


def find(label: str) -> dict[str, Any] | None:
  """Looks up the published accuracies of a config.

  Args:
    label: the stem of the config's file, or the stem, a colon and the argument.
      The order of the argument's parts does not matter.

  Returns:
    An entry of `PUBLISHED`, or None if nothing was published.
  """
  stem, _, argument = label.partition(':')
  key = stem, sorted(filter(None, argument.split(',')))
  for known, entry in PUBLISHED.items():
    stem, _, argument = known.partition(':')
    if key == (stem, sorted(filter(None, argument.split(',')))):
      return entry
  return None
