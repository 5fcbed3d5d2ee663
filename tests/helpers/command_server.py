"""Runs `experiments/main.py` for many command lines, each in a fork.

A process per command would import jax every time. This one imports everything
once, before jax has started a thread, and forks for each line of JSON on stdin.
It answers with a line of JSON: the exit status and what was printed. Training
itself is replaced by a line, so a command ends once everything is checked.

  python -m tests.helpers.command_server
"""

import json
import os
import pathlib
import resource
import signal
import sys
import tempfile
import warnings

#: Seconds after which a command hangs, and the memory that it may take.
SECONDS, BYTES = 60, 4 * 2**30


def command(argv, folder):
  """Runs a command as `main.py` does, up to the first step."""
  from absl import app

  from experiments import main
  from experiments.runs import run as run_lib

  resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
  os.chdir(folder)
  main._train = lambda run: print('ready', isinstance(run, run_lib.Run))
  sys.argv[:] = [str(main.ROOT / 'experiments' / 'main.py'), *argv]
  app.run(main.main, flags_parser=main.parse)


def run(argv, folder):
  """Runs a command in a fork; returns its exit status and outputs."""
  out, err = (pathlib.Path(folder) / name for name in ('out.txt', 'err.txt'))
  child = os.fork()
  if not child:
    signal.alarm(SECONDS)
    for stream, path in ((1, out), (2, err)):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    work = pathlib.Path(folder) / 'work'
    work.mkdir(exist_ok=True)
    code = 1
    try:
      command(argv, work)
    except SystemExit as error:
      code = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
      import traceback
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code or 0)
  _, status = os.waitpid(child, 0)
  return {'code': os.waitstatus_to_exitcode(status),
          'out': out.read_text(errors='replace'),
          'err': err.read_text(errors='replace')}


def main():
  """Answers requests until stdin ends."""
  warnings.simplefilter('ignore')  # jax warns of forks
  import absl.app  # noqa: F401
  import sklearn.datasets  # noqa: F401

  import experiments.main
  import experiments.modes.landscape
  import experiments.modes.train
  import experiments.runs.run  # noqa: F401

  for line in sys.stdin:
    with tempfile.TemporaryDirectory(prefix='awp_jax_command_') as folder:
      print(json.dumps(run(json.loads(line), folder)), flush=True)


if __name__ == '__main__':
  main()
