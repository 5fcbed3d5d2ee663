"""Evaluation of a finished run, or of a PyTorch checkpoint, by strong attacks.

Every evaluation of the config's list starts from all test images. One may be a
single attack ('fgsm', 'pgd-20', 'cw-100', 'spsa', 'square', ...) or a version
of AutoAttack ('aa-standard', 'aa-fast', ...), whose attacks each see what those
before left standing. What is finished is on disk: a process killed at any
moment and started again goes on behind the last finished group of examples,
with the same result.
"""

from collections.abc import Sequence
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import awp_jax
from awp_jax.attacks import autoattack, fixed_step, spsa
from awp_jax.core import checks, loops
from awp_jax.evaluation import evaluate as evaluate_lib
from awp_jax.evaluation import fingerprint
from awp_jax.evaluation.protocol import AttackSpec
from experiments.data import batches, datasets
from experiments.evaluation import records as records_lib
from experiments.runs import precision, restore
from experiments.runs import run as run_lib
from experiments.util import atomic, console, digests
from experiments.util.errors import UserError, user_errors

#: Prefix of the versions of AutoAttack in a config's list.
_AUTO = 'aa-'

#: Groups of examples on disk hold this many batches.
_BATCHES_PER_GROUP = 8

_STEPPED = re.compile(r'(pgd|cw)-([1-9][0-9]*)')


def allowed_names() -> list[str]:
  """What a config's list of evaluations may hold; N stands for a number."""
  return ['fgsm', 'pgd-N', 'cw-N', 'spsa', *autoattack.ATTACKS,
          *(_AUTO + version for version in autoattack.VERSIONS
            if version != 'rand')]


@user_errors()
def check_names(names: Sequence[str]) -> None:
  """Raises ValueError for an empty list or a name that is not allowed."""
  if not names:
    raise ValueError(
        'evaluation.attacks is empty; it may hold '
        f'{", ".join(allowed_names())}.')
  if len(set(names)) != len(names):
    raise ValueError(f'evaluation.attacks names one twice: {tuple(names)}.')
  for name in names:
    if name == f'{_AUTO}rand':
      raise ValueError(
          f'evaluation.attacks: {name!r} is for randomised models; this one '
          'gives the same logits for the same image. Use '
          f'{_AUTO + "standard"!r}.')
    if not _STEPPED.fullmatch(name):
      checks.one_of('evaluation.attacks', name, allowed_names())
    if name.endswith('-N'):
      raise ValueError(
          f'evaluation.attacks: {name!r} needs a number for N, like '
          f'{name[:-1] + "20"!r}.')


@user_errors()
def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Raises ValueError for what cannot be evaluated, before data are read."""
  settings = config.evaluation
  check_names(settings.attacks)
  checks.count('evaluation.num_examples', settings.num_examples, minimum=0)
  checks.count('evaluation.batch_size', settings.batch_size, minimum=0)
  path = settings.torch_checkpoint
  if path and not pathlib.Path(path).is_file():
    raise ValueError(
        f'evaluation.torch_checkpoint={path!r}: there is no such file.')
  if not path and not (workdir / 'checkpoints').is_dir():
    raise ValueError(
        f'{str(workdir)!r} holds no checkpoints: train there first, or name a '
        'PyTorch file by --config.evaluation.torch_checkpoint.')


def make_specs(
    name: str, config: ml_collections.ConfigDict
) -> tuple[AttackSpec, ...]:
  """The attacks of one evaluation, in their order."""
  norm, epsilon = config.threat.norm, config.threat.epsilon
  if name.startswith(_AUTO):
    version: Any = name.removeprefix(_AUTO)
    return autoattack.make_specs(
        autoattack.VERSIONS[version], norm, version)
  if name in autoattack.ATTACKS:
    return autoattack.make_specs((name,), norm, 'standard')
  if name == 'spsa':
    return (spsa.spsa_spec(),)
  if name == 'fgsm':
    return (fixed_step.pgd_spec(
        name, step_size=epsilon, num_steps=1, random_start=False),)
  kind, steps = name.split('-')
  return (fixed_step.pgd_spec(
      name, step_size=config.eval.step_size, num_steps=int(steps),
      loss='margin' if kind == 'cw' else 'ce'),)


def _facts(
    run: run_lib.Run, subject: restore.RestoredModel, name: str,
    test_set: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
  """All that the records of an evaluation depend on.

  Contents, not places: a data folder that moves changes nothing. The library
  refuses records of other batch sizes and versions, so they have their own.
  """
  return subject.facts | {
      'evaluation': name, 'threat': run.config.threat.to_dict(),
      'step_size': run.config.eval.step_size, 'seed': run.config.seed,
      'test_set': digests.of_arrays(test_set),
      'precision': precision.PRECISION, 'batch_size': _batch_size(run),
      'versions': fingerprint.versions()}


def _test_set(run: run_lib.Run) -> tuple[np.ndarray, np.ndarray]:
  there = len(run.dataset.y_test)
  count = run.config.evaluation.num_examples or there
  if count > there:
    raise UserError(
        f'evaluation.num_examples={count}: there are {there} test images; 0 '
        'takes all of them.')
  images = run.dataset.x_test[:count]
  pixels = batches.to_pixels(jnp.asarray(images), jnp.dtype(jnp.float32))
  return np.asarray(pixels), run.dataset.y_test[:count]


def _batch_size(run: run_lib.Run) -> int:
  """Examples on the devices at a time."""
  if run.config.evaluation.batch_size:
    return run.config.evaluation.batch_size
  size = 64 if loops.unrolls() else 512
  return -(-size // run.num_devices) * run.num_devices


def _evaluate_one(
    run: run_lib.Run, subject: restore.RestoredModel, name: str,
    test_set: tuple[np.ndarray, np.ndarray], correct: int
) -> tuple[awp_jax.AttackResult, list[dict[str, Any]]]:
  """One evaluation of one model, from its records if there are any.

  Args:
    run: the run.
    subject: the model.
    name: of the evaluation.
    test_set: images in [0, 1] and labels.
    correct: how many images are classified right without an attack.

  Returns:
    The result, and the precisions, devices and versions that judged.
  """
  images, labels = test_set
  batch_size = _batch_size(run)
  records = records_lib.Records(
      run.workdir / 'evaluation', name, _facts(run, subject, name, test_set))
  shown = records_lib.Progress(f'{subject.name} {name}', len(labels), correct)
  done = tuple(records.done)
  for record in done:
    shown.add(record)

  def progress(record: awp_jax.BatchResult) -> None:
    records.append(record)
    shown.add(record)

  options = evaluate_lib.EvalOptions(
      batch_size=batch_size, group_size=_BATCHES_PER_GROUP * batch_size,
      devices=jax.devices() if jax.device_count() > 1 else None,
      progress=progress, done=done)
  try:
    result = evaluate_lib.evaluate(
        jax.random.key(run.config.seed), subject.logits_fn, images, labels,
        run.setup.threat, make_specs(name, run.config), options=options)
  finally:
    shown.close()
  return result, records.judged_by or [precision.judged_by()]


def _count_correct(
    subject: restore.RestoredModel, images: np.ndarray, labels: np.ndarray,
    size: int = 256) -> int:
  logits_fn, correct = jax.jit(subject.logits_fn), 0
  for begin in range(0, len(labels), size):
    part = images[begin:begin + size]
    padded = np.pad(
        part, [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1))
    logits = np.asarray(logits_fn(padded))[:len(part)]
    is_right = logits.argmax(axis=-1) == labels[begin:begin + size]
    correct += int(np.sum(is_right & np.isfinite(logits).all(axis=-1)))
  return correct


def _accuracy(hits: np.ndarray) -> dict[str, Any]:
  low, high = awp_jax.confidence_interval(int(hits.sum()), hits.size)
  return {'accuracy': float(hits.mean()), 'interval_95': [low, high]}


def report(result: awp_jax.AttackResult) -> dict[str, Any]:
  """An evaluation's entry in `evaluation.json`."""
  return {
      'robust': _accuracy(result.robust),
      'seconds': sum(attack.seconds for attack in result.attacks),
      'largest_distance': max(a.largest_distance for a in result.attacks),
      'attacks': [
          {'name': attack.name, 'seconds': attack.seconds,
           'robust_accuracy_after': attack.robust_accuracy,
           'largest_distance': attack.largest_distance,
           'broken': attack.broken.tolist(),
           'anomalies': attack.anomalies._asdict()}
          for attack in result.attacks],
      'warnings': [warning._asdict() for warning in result.warnings]}


def _table(subjects: dict[str, Any]) -> str:
  rows = [['model', 'evaluation', 'accuracy', '95 % interval', 'seconds']]
  for name, entry in subjects.items():
    lines = [('natural', entry['natural'], 0.0)] + [
        (label, values['robust'], values['seconds'])
        for label, values in entry['evaluations'].items()]
    for label, values, seconds in lines:
      low, high = (100 * bound for bound in values['interval_95'])
      rows.append([
          name, label, f'{100 * values["accuracy"]:.2f} %',
          f'{low:.2f} - {high:.2f}', f'{seconds:.0f}'])
  return console.table(rows)


def evaluate(run: run_lib.Run) -> dict[str, Any]:
  """Evaluates the models of a run and writes `evaluation.json`.

  Args:
    run: of `runs.reopen`, whose workdir holds checkpoints unless the config
      names a PyTorch checkpoint. It may be training.

  Returns:
    The contents of `evaluation.json`: per model its natural accuracy and per
    evaluation the robust accuracy (fractions, with 95 % Wilson intervals),
    seconds, who broke which example, the largest distance, warnings, and the
    precision, devices and versions that judged. Where the best and the last
    checkpoint have the same weights they are attacked once. Attacks of an
    earlier call on the same models, images and threat model are kept.

  Raises:
    ValueError: for a checkpoint that cannot be read.
  """
  config = run.config
  test_set = _test_set(run)
  subjects: dict[str, Any] = {}
  names: dict[str, str] = {}
  for subject in restore.restore_models(run):
    weights = subject.facts['weights']
    if weights in names:
      # The best is the last: one evaluation, stated for both.
      same = names[weights]
      subjects[subject.name] = subjects[same] | {
          'origin': subject.origin, 'same_weights_as': same}
      continue
    names[weights] = subject.name
    subjects[subject.name] = _evaluate_subject(run, subject, test_set)
  num_examples = len(test_set[1])
  values = {
      'threat': config.threat.to_dict(), 'num_examples': num_examples,
      'dataset': datasets.describe(run.dataset), 'seed': config.seed,
      'subjects': subjects}
  _keep_others(values, run.workdir / 'evaluation.json')
  atomic.write_json(run.workdir / 'evaluation.json', values)
  print(f'\n{run.dataset.name}, {config.threat.norm}, epsilon '
        f'{config.threat.epsilon:.4f}, {num_examples} test images, judged in '
        f'{precision.PRECISION}\n')
  print(_table(subjects))
  return values


def _keep_others(values: dict[str, Any], path: pathlib.Path) -> None:
  """Adds earlier evaluations of these and other models on the same images."""

  def facts(values: dict[str, Any]) -> dict[str, Any]:
    # Where the images lie is not what they are.
    dataset = {name: value for name, value in values['dataset'].items()
               if name != 'source'}
    return {**values, 'dataset': dataset, 'subjects': None}

  if not path.exists():
    return
  before = json.loads(path.read_text())
  if facts(before) != facts(values):
    return
  for name, entry in values['subjects'].items():
    old = before['subjects'].get(name, {})
    if old.get('weights') == entry['weights']:
      entry['evaluations'] = {
          **old['evaluations'], **entry['evaluations']}
  values['subjects'] = {**before['subjects'], **values['subjects']}


def _evaluate_subject(
    run: run_lib.Run, subject: restore.RestoredModel,
    test_set: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
  """A model's entry in `evaluation.json`."""
  correct = _count_correct(subject, *test_set)
  entry: dict[str, Any] = {
      'origin': subject.origin, 'weights': subject.facts['weights'],
      'evaluations': {}}
  for name in run.config.evaluation.attacks:
    result, judged_by = _evaluate_one(run, subject, name, test_set, correct)
    entry['natural'] = _accuracy(result.natural) | {
        'judged_by': [precision.judged_by()]}
    entry['evaluations'][name] = report(result) | {'judged_by': judged_by}
    if result.adversarial is not None and run.config.evaluation.save_examples:
      path = run.workdir / 'evaluation' / f'{subject.name}-{name}.npz'
      with atomic.replacing(path) as file:
        np.savez_compressed(
            file, adversarial=result.adversarial, robust=result.robust,
            natural=result.natural)
      entry['evaluations'][name]['examples'] = str(
          path.relative_to(run.workdir))
  return entry
