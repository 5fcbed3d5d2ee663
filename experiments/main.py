"""Trains, evaluates, or measures the landscape of a network.

  python experiments/main.py --config=experiments/configs/cifar10_awp.py

`--help` lists the flags and every field of the config.
"""

import argparse
import contextlib
import pathlib
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

# Lets the command above find the packages without an installation.
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging
import ml_collections
from ml_collections import config_flags

if TYPE_CHECKING:
  from experiments.runs import run as run_lib
  from experiments.util import paths

CONFIGS = ROOT / 'experiments' / 'configs'
DEFAULT = CONFIGS / 'digits_awp.py'

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, f'Config file; by default {DEFAULT.name}.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run, local or gs://bucket/... or '
    's3://bucket/...; by default runs/<config name>.')
_MODE = flags.DEFINE_enum(
    'mode', 'train', ['train', 'evaluate', 'landscape', 'compile'],
    'What to run.')
_TARGET = flags.DEFINE_string(
    'target', None,
    'With --mode=compile: the chips to compile for, such as v5e:2x4 or '
    'h100:8. They need not be there.')
_JSON = flags.DEFINE_bool(
    'json', False, 'With --mode=compile: print one line of JSON.')
_COMPARE_TO = flags.DEFINE_list(
    'compare_to', [],
    'With --mode=landscape: comma-separated folders of other finished runs to '
    'measure and draw in the same figure.')
_TRUST_RUN = flags.DEFINE_bool(
    'trust_run', False,
    'With --mode=evaluate or landscape: run the code of other packages that '
    'the stored config of a run names.')
_DEBUG = flags.DEFINE_bool(
    'debug', False, 'Show the traceback of every error.')
_CACHE = flags.DEFINE_string(
    'compilation_cache', None,
    'Folder that caches compiled programs for later runs; by default '
    '$JAX_COMPILATION_CACHE_DIR, or in float32 ~/.cache/awp_jax/programs, up '
    'to 4 GB. Empty: none.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False,
    'Run over the processes that the cluster started (Cloud TPU, Slurm, ...).')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None,
    'Without a cluster: host:port of process 0, where the processes meet.')
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Without a cluster: number of processes.')
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Without a cluster: number of this process, from 0.')


def _fail(error: object, code: int = 2) -> NoReturn:
  """Exits with one line on stderr, after the traceback with --debug."""
  # Flags have no values before they are parsed.
  is_debug = _DEBUG.value if flags.FLAGS.is_parsed() else (
      '--debug' in sys.argv)
  if is_debug and sys.exc_info()[0]:
    traceback.print_exc()
  message = ' '.join(str(error).split())
  print('error:', message, file=sys.stderr)
  if flags.FLAGS.is_parsed():
    from experiments.parallel import processes
    processes.fail(message, code)
  sys.exit(code)


def _without_traceback(message: str) -> str:
  """The message of an error in a config, in which ml_collections prints more.

  Args:
    message: of any error.

  Returns:
    The flag and the error that the config raised; others as they are.
  """
  head, _, trace = message.partition(
      ': Error whilst parsing config file:')
  lines = trace.rstrip().splitlines()
  frames = [i for i, line in enumerate(lines) if line.startswith(' ')]
  if not frames:
    return message
  found = ' '.join(lines[frames[-1] + 1:])
  if 'get_config() takes 0 positional arguments' in found:
    found = "this config takes no argument after ':'."
  return f'{head}: {found}'


def parse(argv: list[str]) -> list[str]:
  """Parses the flags; exits with one line for a wrong one."""
  # ml_collections reads sys.argv and finds --config.NAME only after --config.
  sys.argv[:] = argv = _config_first(argv)
  if {'--help', '-help', '-h', '--helpshort', '--helpfull'} & set(argv):
    _help()
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, LookupError, OSError, TypeError,
          ValueError) as error:
    _check_names(argv, error)
    # The text of a KeyError would be that of a string literal.
    _fail(_without_traceback(str(
        error.args[0] if isinstance(error, KeyError) and error.args
        else error)))
  if rest[1:]:
    _fail(f'unknown arguments: {" ".join(rest[1:])}')
  if flags.FLAGS['verbosity'].using_default_value:
    # Orbax logs verbosely at INFO, the default of app.run.
    flags.FLAGS['verbosity'].value = logging.WARNING
    flags.FLAGS['verbosity'].using_default_value = False
  return rest


def _help() -> NoReturn:
  """Prints the flags and the fields of the config, and exits."""
  from experiments.config import help

  print(__doc__)
  print(flags.FLAGS.module_help(sys.modules[__name__]))
  print('\nFields of the config, with the defaults of configs/base.py:\n')
  print(help.text())
  sys.exit(0)


def _config_first(argv: list[str]) -> list[str]:
  """Moves --config to the front, or adds the default."""
  parser = argparse.ArgumentParser(
      add_help=False, allow_abbrev=False, exit_on_error=False)
  parser.add_argument('--config', '-config', default=str(DEFAULT))
  try:
    known, rest = parser.parse_known_args(argv[1:])
  except argparse.ArgumentError as error:
    _fail(f'--config: {error.message}; it names a file.')
  if not pathlib.Path(known.config.partition(':')[0]).is_file():
    available = sorted(
        path.name for path in CONFIGS.glob('*.py') if path.stem != '__init__')
    _fail(
        f'--config={known.config}: there is no such file; {CONFIGS} has '
        f'{", ".join(available)}.')
  from experiments.util import named

  named.search_here(known.config.partition(':')[0])
  return [argv[0], f'--config={known.config}', *rest]


def _check_names(argv: list[str], error: Exception) -> None:
  """Exits with the nearest name for an unknown --config.NAME.

  Args:
    argv: the command line.
    error: what parsing it raised.
  """
  from experiments.config import schema
  from experiments.configs import base

  known = schema.flatten(base.get_config())
  for argument in argv[1:]:
    flag, _, name = argument.partition('=')[0].lstrip('-').partition('.')
    if flag == 'config' and schema.is_free(name) and isinstance(
        error, AttributeError | LookupError) and any(
            repr(part) in str(error) for part in name.split('.')):
      _fail(
          f'this config has no field {name!r}. Fields of your own are set in '
          'a config file before a flag can change them.')
    if flag == 'config' and name and not schema.is_free(f'{name}.') and not any(
        f'{field}.'.startswith(f'{name}.') for field in known):
      _fail(schema.unknown(name, known))


def _run_name() -> str:
  """`cifar10_awp`, or `cifar10_awp+L2` for a config with an argument."""
  path, _, argument = config_flags.get_config_filename(
      flags.FLAGS['config']).partition(':')
  return '+'.join(filter(None, (pathlib.Path(path).stem, argument)))


def _of_run(
    config: ml_collections.ConfigDict, workdir: 'paths.Path'
) -> ml_collections.ConfigDict:
  """The config for reading the run in `workdir`."""
  from experiments.runs import workdirs

  flag = flags.FLAGS['config']
  is_default = config_flags.get_config_filename(flag) == str(DEFAULT)
  return workdirs.reader_config(
      workdir, config,
      config_flags.get_override_values(flag) if is_default else None,
      is_trusted=_TRUST_RUN.value)


def main(argv: list[str]) -> None:
  """Runs the mode in the flags, together with the other processes."""
  del argv
  from experiments.parallel import processes
  from experiments.util import console, xla
  from experiments.util.errors import UserError

  try:
    config, workdir = _setting()
    if 'bfloat16' in (config.model.dtype, config.evaluation.attack_dtype):
      xla.use_onednn()
    processes.start(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value,
        automatic=_DISTRIBUTED.value, catches_sigterm=_MODE.value == 'train')
  except (UserError, OSError) as error:
    _fail(error)
  is_alone = processes.count() == 1 and _MODE.value != 'compile'
  with processes.together(), (
      console.ended_by_signals(workdir) if is_alone
      else contextlib.nullcontext()):
    _run_mode(config, workdir)


def _setting() -> 'tuple[ml_collections.ConfigDict, paths.Path]':
  """The config and the workdir; to read a run, its stored config."""
  from experiments.config import schema
  from experiments.configs import base
  from experiments.util import paths
  from experiments.util.errors import UserError

  config = _CONFIG.value
  schema.check(config, base.get_config())
  if _WORKDIR.value == '':  # an unset variable of the shell
    raise UserError('--workdir= is empty.')
  workdir = paths.parse(_WORKDIR.value or f'runs/{_run_name()}')
  if _COMPARE_TO.value and _MODE.value != 'landscape':
    raise UserError('--compare_to requires --mode=landscape.')
  if _TRUST_RUN.value and _MODE.value not in ('evaluate', 'landscape'):
    raise UserError('--trust_run requires --mode=evaluate or landscape.')
  if _MODE.value in ('evaluate', 'landscape') and not _TARGET.value:
    config = _of_run(config, workdir)
  return config, workdir


def _run_mode(
    config: ml_collections.ConfigDict, workdir: 'paths.Path') -> None:
  """Runs the mode in the flags."""
  from experiments.modes import landscape
  from experiments.runs import run as run_lib
  from experiments.util import xla
  from experiments.util.errors import UserError

  try:
    xla.use_cache(_CACHE.value)
    if _MODE.value == 'compile' or _TARGET.value:
      _compile(config)
      return
    if _MODE.value == 'landscape':
      landscape.run_all(
          config, workdir, _COMPARE_TO.value, is_trusted=_TRUST_RUN.value)
      return
    if _MODE.value == 'evaluate':
      _evaluate(config, workdir)
      return
    run = run_lib.prepare(config, workdir)
  except (UserError, OSError) as error:
    _fail(error)
  _train(run)


def _compile(config: ml_collections.ConfigDict) -> None:
  """Compiles the config for the chips in the flags."""
  from experiments.ahead import targets
  from experiments.modes import compile
  from experiments.util.errors import UserError

  if _MODE.value != 'compile' or not _TARGET.value:
    raise UserError(
        '--mode=compile and --target require each other: --target names the '
        f'chips, for instance {targets.EXAMPLES}.')
  compile.compile_for(config, _TARGET.value, _JSON.value)


def _evaluate(
    config: ml_collections.ConfigDict, workdir: 'paths.Path') -> None:
  """Evaluates the run in `workdir` or a PyTorch file; writes the report."""
  from experiments.modes import evaluate
  from experiments.parallel import processes
  from experiments.reports import page
  from experiments.runs import run as run_lib
  from experiments.runs import workdirs

  evaluate.check(config, workdir)
  run = run_lib.reopen(config, workdir)

  def claim() -> None:
    if not (workdir / 'config.json').exists():  # a PyTorch file without a run
      workdirs.claim(workdirs.open_workdir(workdir, config), config)

  processes.on_main(claim)
  evaluate.evaluate(run)
  processes.on_main(lambda: page.write_or_warn(run, 'evaluate'))
  print(f'\nresults: {run.workdir / "evaluation.json"} and report.html')


def _train(run: 'run_lib.Run') -> None:
  """Trains and prints the robust accuracy; exits on errors."""
  from experiments.modes import train
  from experiments.util.errors import UserError

  try:
    summary = train.train(run)
  except UserError as error:
    _fail(error)
  except train.Diverged as error:
    _fail(error, code=1)
  except OSError as error:
    _fail(
        f'{error}. Once this is fixed, run the same command to resume from the '
        'last checkpoint.', code=1)
  if summary is not None:
    best, last = summary['best'], summary['last']
    print(
        f'robust accuracy: best {best["robust_accuracy"]:.4f} (epoch '
        f'{best["epoch"]}), last {last["robust_accuracy"]:.4f}; results in '
        f'{run.workdir}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
