"""Runs `experiments/main.py` without the time of its imports.

A process of its own imports everything once, before jax has started a thread,
and forks for each command.
"""

import json
import os
import pathlib
import resource
import runpy
import signal
import subprocess
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAIN = ROOT / 'experiments' / 'main.py'

#: Seconds after which a command hangs, and the memory that it may take.
SECONDS, BYTES = 120, 6 * 2**30


class Server:
  """Starts commands in a folder."""

  def __init__(self, folder, environment):
    self.folder = folder
    self._process = subprocess.Popen(
        [sys.executable, __file__], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL)

  def finish(self, *arguments, trains=True):
    """Exit status and both outputs of `main.py` with these arguments.

    Args:
      *arguments: of the command.
      trains: whether to train; otherwise a run that is ready prints 'ready'.
    """
    out, err = (self.folder / name for name in ('out.txt', 'err.txt'))
    self._process.stdin.write(
        json.dumps([arguments, str(out), str(err), trains]) + '\n')
    self._process.stdin.flush()
    code = int(self._process.stdout.readline())
    return code, *(path.read_text(errors='replace') for path in (out, err))

  def close(self):
    self._process.communicate()


def run(arguments, out, err, trains):
  """Becomes the command; does not return."""
  signal.alarm(SECONDS)
  resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
  for number, path in enumerate((out, err), 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.argv = [str(MAIN), *arguments]
  code = 0
  try:
    if trains:
      runpy.run_path(str(MAIN), run_name='__main__')
    else:
      from absl import app

      from experiments import main
      main._train = lambda run: print('ready')
      app.run(main.main, flags_parser=main.parse)
  except SystemExit as leave:
    code = leave.code if isinstance(leave.code, int) else bool(leave.code)
  except BaseException:
    traceback.print_exc()
    code = 1
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve():
  """Answers a line of JSON with an exit status, until stdin ends."""
  sys.path[0] = str(ROOT)
  import sklearn.datasets  # noqa: F401

  from experiments.modes import evaluate, landscape, train  # noqa: F401
  for line in sys.stdin:
    child = os.fork()
    if not child:
      run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == '__main__':
  serve()
