"""Runs an experiment: flags, and one call.

  python experiments/main.py --config=experiments/configs/cifar10_awp.py
"""

import pathlib
import sys

# So that the command above finds the packages beside this folder as well.
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

CONFIGS = ROOT / 'experiments' / 'configs'

_CONFIG = config_flags.DEFINE_config_file(
    'config', str(CONFIGS / 'digits_awp.py'), 'File with the config.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; by default runs/<name of the config>.')
_MODE = flags.DEFINE_enum(
    'mode', 'train', ['train', 'evaluate', 'landscape'], 'What to do.')


def main(argv: list[str]) -> None:
  """Trains as the flags say."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
  if _MODE.value != 'train':
    sys.exit(
        f'error: --mode={_MODE.value} is not there yet; --mode=train reports '
        'natural and PGD-20 robust accuracy after every epoch.')
  from experiments import setup
  from experiments import train
  from experiments.configs import cifar10_awp

  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']))
  config = _CONFIG.value
  try:
    setup.check_fields(config, cifar10_awp.get_config())
    run = train.prepare(config, _WORKDIR.value or f'runs/{name.stem}')
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  try:
    summary = train.train(run)
  except train.Diverged as error:
    sys.exit(f'error: {error}')
  if summary is not None:
    best, last = summary['best'], summary['last']
    print(
        f'robust accuracy: best {best["robust_accuracy"]:.4f} (epoch '
        f'{best["epoch"]}), last {last["robust_accuracy"]:.4f}; everything is '
        f'in {run.workdir}')


if __name__ == '__main__':
  app.run(main)
