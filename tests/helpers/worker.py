"""Runs main.py with a network that compiles fast, for tests of processes.

  python tests/helpers/worker.py FAULT MODES [flags of main.py]

MODES are run in turn, separated by commas. FAULT is 'none', or 'step:what':
after this step of training the process gets a signal, 'SIGTERM' or 'SIGKILL',
or raises an 'error'.
"""

import importlib
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import app, flags

from experiments import main
from experiments.config import networks
from experiments.parallel import watch
from experiments.reports import page
from experiments.runs import reading
from experiments.training import loop
from tests.experiments.modes.train_test import TinyNet


def fail_at(step, what):
  """Makes the process fail after a step of training."""
  usual = loop.Loop.take_step

  def take_step(self, step_fn):
    usual(self, step_fn)
    if self.step == step:
      if what == 'error':
        raise RuntimeError('a fault of the test')
      signal.raise_signal(getattr(signal, what))

  loop.Loop.take_step = take_step


def run_modes(modes):
  """Makes main.py run several modes in one process."""
  run_mode = main._run_mode

  def run_all(*_):
    for mode in modes.split(','):
      flags.FLAGS.mode = mode
      run_mode(*main._setting())

  main._run_mode = run_all


def import_tensorboard():
  """Without PyTorch, which it imports if it can and which takes a second."""
  sys.modules['torch'] = None
  importlib.import_module('tensorboardX')
  del sys.modules['torch']


if __name__ == '__main__':
  fault, modes = sys.argv.pop(1), sys.argv.pop(1)
  if fault != 'none':
    when, _, kind = fault.partition(':')
    fail_at(int(when), kind)
  run_modes(modes)
  import_tensorboard()
  watch.PATIENCE = 5.0
  # Reports have their own tests. As they do, one process reads a checkpoint.
  page.write_or_warn = lambda run, mode: reading.Reader(
      run.workdir, 'last').read()
  networks.build = lambda config, dataset: TinyNet()
  app.run(main.main, flags_parser=main.parse)
