"""Tests of runs that are stopped at various moments and resumed."""

import shutil
import signal

import jax
import numpy as np
import pytest

from experiments.config import optimizers
from experiments.modes import train
from experiments.parallel import placement
from experiments.reports import curves
from experiments.runs import checkpoints, metrics, reading
from experiments.runs import run as run_lib
from experiments.training import loop, saving, signals, training_data
from experiments.training import step as step_lib
from experiments.util.errors import UserError
from tests.experiments.modes import train_test

NET = train_test.TinyNet()


class Killed(BaseException):
  """Simulates a process that ends without saving."""


class Compiled:
  """A training step compiled once for all runs of this file."""

  def __init__(self, step):
    self.step, self.compiled = step, None

  def lower(self, *arguments):
    if self.compiled is None:
      self.compiled = self.step.lower(*arguments).compile()
    return self

  def compile(self):
    return self.compiled


def stop_after(patch, step):
  """Sends SIGTERM to this process after a step of training."""
  usual = loop.Loop.take_step

  def take_step(self, step_fn):
    usual(self, step_fn)
    if self.step == step:
      signal.raise_signal(signal.SIGTERM)

  patch.setattr(loop.Loop, 'take_step', take_step)


def shared(patch, owner, name, wrap=lambda made: made):
  """Caches `owner.name` by number of devices and further arguments.

  All runs of this file share a config except for the seed, which is an argument
  of the compiled steps.
  """
  known, make = {}, getattr(owner, name)

  def get(run_or_config, *key):
    key = jax.device_count(), *key
    if key not in known:
      known[key] = wrap(make(run_or_config, *key[1:]))
    return known[key]

  patch.setattr(owner, name, get)


def shared_start(patch):
  """Initializes the network once for each seed."""
  known, make = {}, run_lib.initial_state

  def get(run):
    seed = run.config.seed
    if seed not in known:
      known[seed] = jax.device_get(make(run))
    return jax.tree.map(np.copy, known[seed])

  patch.setattr(run_lib, 'initial_state', get)


@pytest.fixture(scope='module', autouse=True)
def one_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
        'experiments.config.networks.build', lambda config, dataset: NET)
    train_test.without_report(patch)
    shared(patch, step_lib, 'make_train_fn', Compiled)
    shared(patch, step_lib, 'make_eval_fn')
    shared(patch, optimizers, 'build_optimizer')
    shared_start(patch)
    patch.setattr(curves, 'plot_curves', lambda *_: None)
    yield


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  return train_test.write_images(
      tmp_path_factory.mktemp('resume') / 'mine.npz', num_train=32)


def config_of(images, **fields):
  return train_test.small(
      dataset='npz', npz_path=images, epochs=3, attack__num_steps=1,
      eval__num_steps=1, awp__gamma=0.01, **fields)


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
  """An uninterrupted run with two steps per epoch."""
  run = run_lib.prepare(config_of(images), tmp_path_factory.mktemp('whole'))
  train.train(run)
  return run


def last_of(run):
  store = checkpoints.Checkpoints(run.workdir, 'last')
  step = store.step()
  store.close()
  return step


def arrays_of(run, kind):
  store = checkpoints.Checkpoints(run.workdir, kind)
  tree, _ = store.load(
      step_lib.to_tree(run_lib.initial_state(run), step_lib.zero_sums()))
  store.close()
  return tree


def without_times(run):
  return [
      {name: value for name, value in line.items()
       if name not in metrics.TIMING_FIELDS}
      for line in metrics.read_metrics(run.workdir)]


def assert_same(run, wanted):
  """The same lines of epochs and, with a line per step, of steps."""
  ours, theirs = (metrics.read_lines(each.workdir / 'steps.jsonl', 'step')
                  for each in (run, wanted))
  assert ours == theirs and len(ours) > 3
  assert without_times(run) == without_times(wanted)
  for kind in reading.KINDS:
    jax.tree.map(
        np.testing.assert_array_equal, arrays_of(run, kind),
        arrays_of(wanted, kind))


@pytest.mark.parametrize('owner, name', [
    (step_lib, 'evaluate'), (checkpoints.Checkpoints, 'save'),
    (metrics.MetricsLog, 'append')])
def test_a_kill_during_an_evaluation_costs_the_evaluation_alone(
    owner, name, images, whole, tmp_path):
  run = run_lib.prepare(config_of(images), tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    usual = getattr(owner, name)

    def hooked(first, *args):
      # The second of each: an epoch's evaluation, its line, its best state.
      hooked.seen += not (name == 'save' and first.folder.name == 'last')
      if hooked.seen == 2:
        raise Killed
      return usual(first, *args)

    hooked.seen = 0
    patch.setattr(owner, name, hooked)
    with pytest.raises(Killed):
      train.train(run)
  epochs = len(metrics.read_metrics(tmp_path))
  assert last_of(run) == 2 * (epochs + 1) >= 4
  assert train.train(run)['last']['epoch'] == 3
  assert_same(run, whole)


def test_ctrl_c_ends_an_evaluation_early(images, whole, tmp_path, capsys):
  run = run_lib.prepare(config_of(images), tmp_path)
  batches = []
  with pytest.MonkeyPatch.context() as patch:
    usual = step_lib.evaluate

    def evaluate(run, eval_fn, state, is_stopping):
      def batch(*arguments):
        batches.append(int(state.step))
        if batches.count(4) == 1:
          signal.raise_signal(signal.SIGINT)
        return eval_fn(*arguments)
      return usual(run, batch, state, is_stopping)

    patch.setattr(step_lib, 'evaluate', evaluate)
    assert train.train(run) is None
  assert 'SIGINT: saved step 4 of 6' in capsys.readouterr().out
  assert [line['epoch'] for line in without_times(run)] == [1]
  assert batches.count(2) > batches.count(4) == 1
  train.train(run)
  assert_same(run, whole)


def test_a_signal_in_the_last_step_leaves_the_evaluation_for_later(
    images, whole, tmp_path):
  run = run_lib.prepare(config_of(images), tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, 6)
    assert train.train(run) is None
  assert last_of(run) == 6
  assert [line['epoch'] for line in without_times(run)] == [1, 2]
  assert not (tmp_path / 'summary.json').exists()
  train.train(run)
  assert_same(run, whole)


def test_a_lost_line_without_its_sums_is_one_error(
    images, whole, tmp_path, monkeypatch):
  """Its means would be those of no images."""
  folder = tmp_path / 'run'
  shutil.copytree(whole.workdir, folder)
  path = folder / 'metrics.jsonl'
  path.write_text(''.join(path.read_text().splitlines(keepends=True)[:-1]))
  usual = saving.Saving.restore

  def restore(self):
    state, sums, notes = usual(self)
    self.best_line = {}  # it would replace the lost one
    return state, jax.tree.map(lambda total: 0 * total, sums), notes

  monkeypatch.setattr(saving.Saving, 'restore', restore)
  with pytest.raises(reading.CheckpointError, match='cannot be made again'):
    train.train(run_lib.prepare(config_of(images), folder))


@pytest.mark.parametrize('step', [1, 2, 4])
def test_a_removed_workdir_is_one_error(
    step, images, tmp_path, monkeypatch):
  """The run would go on in a folder that lacks what was before."""
  usual = loop.Loop.take_step

  def take_step(self, step_fn):
    usual(self, step_fn)
    if self.step == step:
      shutil.rmtree(self.run.workdir)

  run = run_lib.prepare(config_of(images), tmp_path / 'run')
  with monkeypatch.context() as patch:
    patch.setattr(loop.Loop, 'take_step', take_step)
    with pytest.raises(UserError, match='was removed while a run wrote there'):
      train.train(run)
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_acts_as_usual(number):
  came = []
  usual = signal.signal(number, lambda *_: came.append(1))
  try:
    with signals.StopRequest() as stop:
      assert stop.name is None
      signal.raise_signal(number)
      assert stop.name == number.name and not came
      signal.raise_signal(number)
      assert came == [1]
    signal.raise_signal(number)
    assert came == [1, 1]
    with signals.StopRequest():
      pass
    signal.raise_signal(number)
    assert came == [1, 1, 1]
  finally:
    signal.signal(number, usual)


def test_another_number_of_devices_goes_on_and_says_so(
    images, whole, tmp_path, capsys):
  run = run_lib.prepare(config_of(images), tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, 3)
    assert train.train(run) is None
  devices = jax.devices()[:2]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *_: devices)
    patch.setattr(jax, 'device_count', lambda *_: 2)
    run = run_lib.prepare(config_of(images), tmp_path)
    assert run.num_devices == 2
    summary = train.train(run)
    assert 'with 2 devices instead of 8' in capsys.readouterr().out
    assert len(summary['devices']) == 2
  # The first epoch is unchanged; later noise is per device.
  lines, wanted = without_times(run), without_times(whole)
  assert [line['epoch'] for line in lines] == [1, 2, 3]
  assert lines[0] == wanted[0] and lines[1] != wanted[1]


def test_an_evaluation_that_is_not_finite_is_no_reason_to_go_back(
    images, tmp_path):
  run = run_lib.prepare(config_of(images, guard__action='shrink'), tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    usual = step_lib.evaluate
    patch.setattr(step_lib, 'evaluate', lambda *args: usual(*args) | {
        'test_robust_loss': float('nan')})
    with pytest.raises(train.Diverged, match='test_robust_loss not finite'):
      train.train(run)
  assert last_of(run) == 2 and not metrics.read_metrics(tmp_path)


def test_another_seed_changes_no_data_and_another_data_seed_does(
    images, tmp_path):
  def data_of(**fields):
    run = run_lib.prepare(
        config_of(images, num_train=24, num_test=12, num_validation=8,
                  **fields), tmp_path / str(fields))
    return [
        run.dataset.x_train, run.dataset.x_test, *run.validation]

  plain, seeded, other = (
      data_of(), data_of(seed=5), data_of(data_seed=5))
  for first, second in zip(plain, seeded, strict=True):
    np.testing.assert_array_equal(first, second)
  assert all(
      (first != second).any()
      for first, second in zip(plain[:3], other[:3], strict=True))
  assert len({str(run_lib.keys(config_of(images, seed=s))['init'])
              for s in (0, 5)}) == 2


def test_a_seed_is_an_argument_of_the_compiled_step(images, tmp_path):
  def program(seed):
    run = run_lib.prepare(config_of(images, seed=seed), tmp_path / str(seed))
    keys = run_lib.keys(run.config)
    data = training_data.of_run(run)
    # The whole program, as the compilation cache sees it.
    return step_lib.make_train_fn(run, 16, 1.0).step.lower(
        run_lib.initial_state(run), step_lib.zero_sums(), data,
        np.arange(len(data.labels)), keys,
        placement.device_numbers()).as_text()

  assert program(0) == program(7)
