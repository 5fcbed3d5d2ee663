"""Runs main.py with a network that compiles fast, for tests of processes.

  python tests/helpers/worker.py FAULT [flags of main.py]

FAULT is 'none', or 'step:what': after this step of training the process gets a
signal, as 'SIGTERM' or 'SIGKILL', or raises an 'error'.
"""

import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import app

from experiments import main
from experiments.config import build
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


if __name__ == '__main__':
  fault = sys.argv.pop(1)
  if fault != 'none':
    when, _, what = fault.partition(':')
    fail_at(int(when), what)
  build.build_model = lambda config, dataset: TinyNet()
  app.run(main.main, flags_parser=main.parse)
