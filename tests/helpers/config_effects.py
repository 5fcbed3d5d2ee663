"""The effects of a config as plain values, for tests that change one field.

`effects(config)` builds a run, traces its training and its evaluation step, and
goes through the training loop, an evaluation and a landscape, with spies where
the library begins. Nothing is compiled but a few additions.
"""

import contextlib
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from experiments.config import networks, optimizers
from experiments.data import augmentation, batches, datasets, extra_images
from experiments.modes import train
from experiments.parallel import placement
from experiments.reports import curves, page
from experiments.runs import checkpoints, metrics, reading, warm_start
from experiments.runs import run as run_lib
from experiments.training import collapse, guard, loop, training_data
from experiments.training import step as step_lib
from experiments.util import atomic, environment
from tests.experiments.modes.train_test import TinyNet
from tests.helpers.evaluation_effects import (
  Spy,
  of_evaluation,
  of_landscape,
  plain,
)

LOGITS = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
LABELS = np.arange(6) % 4
#: Robust accuracies after epochs 1, 2, ... of every run.
TEST, VALIDATION = (0.1, 0.5, 0.2, 0.3), (0.1, 0.2, 0.5, 0.3)


def fake_dataset():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (80, 8, 8, 3), np.uint8)
  y = (np.arange(80) % 4).astype(np.int32)
  return datasets.Dataset(
      'fake', x[:56], y[:56], x[56:], y[56:], 4, (0.5,) * 3, (0.25,) * 3,
      'memory')


class Stores:
  """Replaces checkpoints on disk."""

  def __init__(self):
    self.kept, self.saved = {}, []

  def __call__(self, workdir, kind):
    stores = self

    class Store:
      folder = pathlib.Path(workdir, kind)

      def step(self):
        return stores.kept.get(kind, (None,))[0]

      def save(self, step, tree, notes):
        if self.step() != step:
          stores.saved.append((kind, step))
        stores.kept[kind] = step, jax.tree.map(np.array, tree), notes

      def finish(self):
        pass

      def load(self, like):
        del like
        if kind not in stores.kept:
          raise reading.NoCheckpoint('none')
        return stores.kept[kind][1:]

      def drop_unusable(self, newest):
        assert (self.step() or 0) <= newest
        kept = stores.kept.get(kind)
        return kept and reading.Stored(*kept)

      def close(self):
        pass

    return Store()


class Lines:
  """Replaces `metrics.jsonl` and `steps.jsonl`."""

  kept: list
  names: tuple

  def __init__(
      self, workdir, completed, steps, names, config, checksums, best):
    del workdir, steps, checksums, best
    self.lost, self.lost_steps = [], False
    assert config['awp.gamma'] is not None
    type(self).names = names
    self.lines = type(self).kept[:] = [
        line for line in type(self).kept if line['epoch'] <= completed]

  def append(self, line):
    self.lines.append(line)
    type(self).kept.append(line)

  def exclude_lost(self, kept, present, select_on):
    del present
    assert metrics.best_line(self.lines, select_on) is None or kept
    return False

  def checksums(self):
    return {}

  def append_step(self, line):
    assert line['step'] > 0 and line['images'] > 0

  def close(self):
    pass


def small_state(run):
  params = {'w': np.ones((2, 2))}
  return awp_jax.TrainState.create(
      apply_fn=run.model.apply, params=params, tx=optax.identity(),
      batch_stats={})


def of_objective(objective):
  """The losses of an objective, and the passes that it needs."""
  adv, natural = LOGITS
  found = {
      f'objective.{name}': getattr(objective, name)
      for name in ('name', 'attack_mode', 'passes', 'reference_passes')}
  return found | {
      'train_loss': objective.train_loss(adv, natural, LABELS),
      'attack_loss': objective.attack_loss and objective.attack_loss(
          adv, natural, LABELS)}


@jax.enable_x64(True)
def of_optimizer(tx):
  """The first eight updates of a kernel and a bias, [8, 27].

  Step k's gradient is cos((3 + k) w), at the same parameters w.
  """
  params = {'kernel': jnp.asarray(LOGITS[0], float), 'bias': jnp.ones(3)}
  state, seen = tx.init(params), []
  for step in range(8):
    gradients = {
        name: jnp.cos((3 + step) * w) for name, w in params.items()}
    updates, state = tx.update(gradients, state, params)
    seen.append(np.concatenate([updates['kernel'].ravel(), updates['bias']]))
  return np.stack(seen)


def of_model(config):
  model = networks.build(config, fake_dataset())
  return {f'model.{field.name}': getattr(model, field.name)
          for field in dataclasses.fields(model)
          if field.name not in ('parent', 'name')} | {
              'model': type(model).__name__}


def of_preparation(run, spies):
  ((names, kwargs),) = spies['load'].calls
  found = {'load.name': names[0], 'keys': np.stack([
      jax.random.key_data(key) for key in run_lib.keys(run.config).values()])}
  found |= {f'load.{name}': value for name, value in kwargs.items()
            if name != 'progress'}
  found['validation'] = [args[1:] for args, _ in spies['split'].calls]
  found['extra'] = [args for args, _ in spies['extra'].calls]
  found['init_from'] = [args for args, _ in spies['read'].calls]
  state = jax.eval_shape(lambda: run_lib.initial_state(run))
  found['schedule'] = optimizers.build_schedule(run.config, 3)(
      jnp.arange(3 * run.config.epochs))
  found['updates'] = of_optimizer(state.tx)
  found['average'] = state.average is not None
  found['memory'] = bool(jax.tree.leaves(state.memory))
  return found


def of_train_step(run, monkeypatch):
  step, policy = Spy(lambda state, *_, **__: (state, zeros)), Spy()
  zeros = awp_jax.TrainMetrics(*(
      jnp.zeros(()) for _ in awp_jax.TrainMetrics._fields))
  decay = Spy(lambda *_: 0.5)
  policy.answer = lambda draws, images, _: images
  mixed = Spy(batches.mixed_batch_indices)
  with monkeypatch.context() as patch:
    patch.setattr(awp_jax, 'train_step', step)
    patch.setattr(awp_jax, 'ema_decay', decay)
    patch.setattr(augmentation, 'apply', policy)
    patch.setattr(batches, 'mixed_batch_indices', mixed)
    state = jax.eval_shape(lambda: run_lib.initial_state(run))
    size, is_streamed = run.batch_sizes[0], training_data.is_streamed(run)
    source, order = training_data.of_run(run), np.arange(
        len(run.dataset.y_train))
    if is_streamed:
      source, order = placement.split(training_data.Rows(
          source.images[:size], source.labels[:size])), None
    jax.eval_shape(
        step_lib.make_train_fn(run, size, 1.0), state, step_lib.zero_sums(),
        source, order, run_lib.keys(run.config), placement.device_numbers())
  ((args, kwargs),) = step.calls
  images, labels = args[1]
  found = {
      'batch': images.shape, 'pixels': str(images.dtype),
      'labels': labels.shape, 'decay': [call[0][0] for call in decay.calls],
      'mixed': [args[-2:] for args, _ in mixed.calls],
      'statistics': kwargs['statistics'],
      'accumulate': kwargs['accumulate'], 'streamed': is_streamed}
  found |= {f'policy.{name}': value
            for name, value in policy.calls[0][0][2]._asdict().items()}
  found |= {f'threat.{name}': value
            for name, value in plain(kwargs['threat']).items()}
  found |= {f'attack.{name}': value
            for name, value in kwargs['attack']._asdict().items()}
  method = kwargs['perturbation']
  found['alternations'] = kwargs['alternations']
  return found | of_objective(kwargs['objective']) | {
      'method.name': method.name, 'method.size': method.ball.size,
      'method.num_steps': method.num_steps,
      'method.update_at': method.update_at}


def of_eval_step(run, monkeypatch):
  step = Spy(lambda *_, **__: awp_jax.EvalMetrics(*(
      jnp.ones(()) for _ in awp_jax.EvalMetrics._fields)))
  counts = Spy(lambda run, fn, state, images, labels, key, stops: {
      'n': len(images), 'key': np.asarray(jax.random.key_data(key))})
  with monkeypatch.context() as patch:
    patch.setattr(awp_jax, 'eval_step', step)
    state = jax.eval_shape(lambda: run_lib.initial_state(run))
    size = run.config.eval.batch_size // run.num_devices
    jax.eval_shape(
        step_lib.make_eval_fn(run), state,
        np.zeros((run.num_devices, size, 8, 8, 3), np.uint8),
        np.zeros((run.num_devices, size), int),
        np.ones((run.num_devices, size), bool), jax.random.key(0))
    patch.setattr(step_lib, 'evaluate_split', counts)
    found = step_lib.evaluate(run, None, small_state(run).replace(step=5))
  ((args, kwargs),) = step.calls
  found |= {f'eval.threat.{name}': value
            for name, value in plain(kwargs['threat']).items()}
  found |= {f'eval.{name}': value
            for name, value in kwargs['attack']._asdict().items()}
  return found | {'eval.batch': args[1][0].shape[0] * run.num_devices}


def fake_train_fn(made, diverge_at):
  """Replaces the compiled step; `made` receives step, batch size and factor."""

  def make_train_fn(run, size, factor):
    def step(state, sums, *_):
      made.append((int(state.step), size, factor))
      if diverge_at == int(state.step):
        raise collapse.Diverged('it diverged.')
      sums = step_lib.Sums(*(
          np.float32(total + size * value) for total, value in zip(
              sums, (1.0, 0.9, 1.0, 0.0, 1.0), strict=True)))
      return state.replace(step=state.step + 1), sums

    compiled = Spy()
    compiled.lower = lambda *_: compiled
    compiled.compile = lambda: step
    return compiled

  return make_train_fn


def of_loop(run, monkeypatch, diverge_at=None):
  """Steps, checks, saves and evaluations, also after a divergence."""
  stores, made, looked, evaluated = Stores(), [], [], []
  detector = Spy(collapse.Detector)

  log = type('Log', (Lines,), {'kept': []})

  def evaluate(run, fn, state, is_stopping):
    assert not is_stopping()
    epoch = int(state.step) // run.steps_per_epoch - 1
    evaluated.append(int(state.step))
    return {f'{split}_{kind}': values[epoch % 4]
            for kind in ('natural_accuracy', 'robust_accuracy')
            for split, values in (
                ('train', TEST), ('test', TEST), ('validation', VALIDATION))}

  def look(self):
    looked.append(self.step)
    return real_look(self)

  real_look = loop.Loop.look
  with monkeypatch.context() as patch:
    for owner, name, value in (
        (checkpoints, 'Checkpoints', stores), (metrics, 'MetricsLog', log),
        (step_lib, 'make_train_fn', fake_train_fn(made, diverge_at)),
        (step_lib, 'evaluate', evaluate),
        (training_data, 'make_order_fn', lambda run, *_: Spy(
            lambda *_: np.arange(len(run.dataset.y_train)))),
        (placement, 'replicate', lambda tree: tree),
        (guard, '_all_finite', lambda state: True),
        (loop.Loop, 'look', look), (collapse, 'Detector', detector),
        (run_lib, 'initial_state', small_state),
        (run_lib, 'first_state', lambda run: (small_state(run), '')),
        (curves, 'plot_curves', Spy()), (atomic, 'write_json', Spy()),
        (page, 'write_or_warn', Spy())):
      patch.setattr(owner, name, value)
    error, summary = '', None
    try:
      summary = train.train(run)
    except collapse.Diverged as raised:
      error = str(raised)
  settings, _, first, *_ = detector.calls[0][0]
  return {
      'steps': [step for step, *_ in made], 'sizes': [made[-1][1]],
      'factors': [factor for *_, factor in made],
      'looks': looked, 'saves': stores.saved, 'evaluations': evaluated,
      'best': summary and summary['best']['epoch'],
      'watch.first': first, 'watch.stretch': settings.stretch_steps,
      'rates': [line['learning_rate'] for line in log.kept],
      'loggers': log.names, 'error': error}


def prepared(config, folder, monkeypatch):
  """A run on data in memory, and the spies used in its preparation."""
  dataset = fake_dataset()
  extra = extra_images.ExtraData(
      dataset.x_train[:8], dataset.y_train[:8], 'memory')
  spies = {
      'load': Spy(lambda *_, **__: dataset),
      'split': Spy(datasets.split_validation),
      'extra': Spy(lambda *_, **__: extra),
      'read': Spy(lambda source: {})}
  with monkeypatch.context() as patch:
    patch.setattr(datasets, 'load', spies['load'])
    patch.setattr(datasets, 'split_validation', spies['split'])
    patch.setattr(extra_images, 'load', spies['extra'])
    patch.setattr(warm_start, 'check', lambda path: None)
    patch.setattr(warm_start, 'read', spies['read'])
    patch.setattr(warm_start, 'graft', lambda variables, *_: (variables, []))
    patch.setattr(networks, 'build', lambda config, dataset: TinyNet())
    run = run_lib.prepare(config, folder)
    jax.eval_shape(lambda: run_lib.first_state(run)[0])
  return run, spies


def effects(config):
  """All recorded effects of a config, by name."""
  with contextlib.ExitStack() as stack:
    monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.enter_context(contextlib.redirect_stdout(None))
    run, spies = prepared(config, pathlib.Path(folder, 'run'), monkeypatch)
    found = of_model(config)
    monkeypatch.setattr(networks, 'build', lambda config, dataset: TinyNet())
    found |= of_preparation(run, spies)
    monkeypatch.setattr(environment, 'versions', dict)  # slow to look up
    found |= of_train_step(run, monkeypatch) | of_eval_step(run, monkeypatch)
    found |= of_loop(run, monkeypatch)
    trouble = of_loop(run, monkeypatch, diverge_at=6)
    found['after trouble'] = trouble['factors']
    (run.workdir / 'checkpoints').mkdir()
    found |= of_evaluation(run, monkeypatch) | of_landscape(run, monkeypatch)
  return found


def same(a, b):
  """Whether two effects are equal; numbers up to float32 precision."""
  if isinstance(a, dict):
    return isinstance(b, dict) and a.keys() == b.keys() and all(
        same(a[name], b[name]) for name in a)
  if isinstance(a, str | bool | None) or callable(a):
    return a == b
  if isinstance(a, list | tuple) and isinstance(b, list | tuple):
    return len(a) == len(b) and all(map(same, a, b))
  a, b = np.asarray(a), np.asarray(b)
  return a.shape == b.shape and (
      np.allclose(a, b, rtol=1e-5, atol=1e-9)
      if a.dtype.kind in 'fiub' else bool((a == b).all()))
