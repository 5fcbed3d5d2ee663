"""Arguments passed to the library by evaluations, as plain values."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax import landscape as landscape_lib
from awp_jax.attacks import fixed_step
from awp_jax.evaluation import evaluate as evaluate_lib
from awp_jax.evaluation import results
from awp_jax.models import torch_exchange
from experiments.evaluation import attacks, landscape_records, probe
from experiments.evaluation import landscape as evaluation_landscape
from experiments.modes import evaluate, landscape
from experiments.runs import precision, restore


class Spy:
  """Records its calls and returns a fixed answer."""

  def __init__(self, answer=None):
    self.calls, self.answer = [], answer

  def __call__(self, *args, **kwargs):
    self.calls.append((args, kwargs))
    return self.answer(*args, **kwargs) if self.answer else None


def plain(value):
  """Converts nested dataclasses to dictionaries."""
  if dataclasses.is_dataclass(value):
    return {field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)}
  return value


def flat_curve(*args, **_):
  """A curve at 1 over the epsilons of `robust_curve`'s arguments."""
  one = np.ones(len(args[5]))
  return awp_jax.RobustCurve(
      np.array(args[5]), one, np.stack([one, one], 1), np.ones(1, bool),
      np.ones(1), (None,) * len(one))


def of_evaluation(run, monkeypatch):
  """The arguments of the library's `evaluate`."""
  asked = []

  def judge(key, logits_fn, images, labels, threat, specs, *, options):
    asked.append((
        [spec.name for spec in specs], len(labels), options.batch_size,
        plain(threat), np.asarray(jax.random.key_data(key)),
        options.attack_fn and options.attack_fn.args[0]))
    stands = np.ones(len(labels), bool)
    result = SimpleNamespace(
        name='a', seconds=0.0, robust_accuracy=1.0, broken=stands,
        largest_distance=0.0, anomalies=results.Anomalies())
    return SimpleNamespace(
        robust=stands, natural=stands, attacks=(result,), warnings=(),
        adversarial=images)

  curves = Spy(flat_curve)
  fixed = Spy(fixed_step.pgd_spec)
  with monkeypatch.context() as patch:
    for owner, name, value in (
        (awp_jax, 'robust_curve', curves),
        (evaluate_lib, 'evaluate', judge), (fixed_step, 'pgd_spec', fixed),
        (restore, 'load_variables', lambda *_: [('best', 1, {})]),
        (precision, 'network', lambda model, dtype=None: dtype or model),
        (attacks, '_count_correct', lambda *_: 1),
        (torch_exchange, 'read_state_dict', lambda path: {}),
        (torch_exchange, 'normalization', lambda _: None),
        (torch_exchange, 'model_from_torch',
         lambda *_, **__: SimpleNamespace(num_classes=4)),
        (torch_exchange, 'from_torch', lambda *_: {}),
        (np, 'savez_compressed', Spy())):
      patch.setattr(owner, name, value)
    evaluate.check(run.config, run.workdir)
    found = evaluate.evaluate(run)
    saved = len(np.savez_compressed.calls)
  specs, images, batch_size, threat, key, types = zip(*asked, strict=True)
  return {
      'judged.specs': specs, 'judged.images': images, 'judged.saved': saved,
      'judged.batch_size': batch_size, 'judged.threat': threat,
      'judged.attack_types': types,
      'judged.key': key, 'judged.curves': [
          (args[4], args[5], [spec.name for spec in kwargs['attacks']],
           len(args[3])) for args, kwargs in curves.calls],
      'judged.subjects': list(found['subjects']),
      'judged.steps': [
          kwargs['step_size'] for _, kwargs in fixed.calls]}


def of_landscape(run, monkeypatch):
  """The arguments of the library's `evaluate_points` and its measure."""
  asked, gradients = [], Spy(lambda *_, **__: {'w': np.ones((2, 2))})

  def points_of(
      key, measure, variables, directions, points, images, *, batch_size,
      devices, progress):
    reach = max(abs(value) for point in points for value in point)
    asked.append((
        len(directions), len(points), reach, len(images[1]), batch_size,
        np.asarray(jax.random.key_data(key))))
    for number in range(len(points)):
      progress(number, dict.fromkeys(landscape_records.METRICS, 1.0))

  measure = Spy(lambda *_, **__: None)
  variables = {'params': {'w': jnp.ones((2, 2))}, 'batch_stats': {}}
  evaluation_landscape._measure.cache_clear()
  with monkeypatch.context() as patch:
    for owner, name, value in (
        (landscape_lib, 'evaluate_points', points_of),
        (landscape_lib, 'robust_measure', measure),
        (landscape_lib, 'random_direction',
         lambda key, params, filter_axis: params),
        (probe, 'robust_gradient', gradients),
        (restore, 'load_variables',
         lambda *_: [('best', 1, variables)])):
      patch.setattr(owner, name, value)
    landscape.check(run.config, run.workdir)
    landscape.measure(run)
  (((_, threat), asked_for),) = measure.calls
  names = ('directions', 'points', 'reach', 'images', 'batch_size', 'key')
  found = {f'landscape.{name}': values
           for name, values in zip(names, zip(*asked, strict=True),
                                   strict=True)}
  found['landscape.threat'] = plain(threat)
  found['landscape.gradient.threat'] = [
      plain(args[5]) for args, _ in gradients.calls]
  return found | {
      f'landscape.{name}': asked_for[name]
      for name in ('step_size', 'num_steps')} | {
          f'landscape.gradient.{name}': [
              kwargs[name] for _, kwargs in gradients.calls]
          for name in ('step_size', 'num_steps', 'batch_size')}
