"""The run that the tests of evaluations share."""

import pytest

from experiments.config import networks
from experiments.modes import evaluate, train
from experiments.runs import run as run_lib
from tests.experiments.modes import train_test
from tests.experiments.modes.evaluated_run import ATTACKS, HalfNet


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """A bfloat16 run with a moving average, evaluated on 20 images."""
  folder = tmp_path_factory.mktemp('evaluate')
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=4, eval__every_epochs=4, ema_decay=0.7, threat__epsilon=0.3,
      awp__gamma=0.0,
      model__dtype='bfloat16', model__param_dtype='bfloat16',
      evaluation__attacks=ATTACKS, evaluation__batch_size=16,
      evaluation__save_examples=True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(
        networks, 'build', lambda config, dataset: HalfNet())
    train_test.without_report(monkeypatch)
    train.train(run_lib.prepare(config, folder / 'run'))
    run = run_lib.reopen(config, folder / 'run')
  return run, evaluate.evaluate(run)
