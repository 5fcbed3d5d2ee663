"""Evaluation of a finished run, or of a PyTorch checkpoint, by strong attacks.

Every evaluation of the config's list starts from all test images. One may be a
single attack ('fgsm', 'pgd-20', 'cw-100', 'spsa', 'square', ...) or a version
of AutoAttack ('aa-standard', 'aa-fast', ...), whose attacks each see what those
before left standing. What is finished is on disk: a process killed at any
moment and started again goes on behind the last finished group of examples,
with the same result.
"""

from collections.abc import Callable, Iterator, Sequence
import hashlib
import json
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

import awp_jax
from awp_jax import checks
from awp_jax.attacks import autoattack, fixed_step, spsa
from awp_jax.attacks import evaluation as evaluation_lib
from awp_jax.attacks.engine import AttackSpec
from awp_jax.models import torch_exchange
from experiments import checkpoints, data, pipeline, results, runs, steps

#: Prefix of the versions of AutoAttack in a config's list.
_AUTO = 'aa-'
_STEPPED = re.compile(r'(pgd|cw)-([1-9][0-9]*)')


class Subject(NamedTuple):
  """A model under evaluation.

  Attributes:
    name: 'best', 'last', or the stem of a PyTorch file.
    origin: which checkpoint it is, as plain values.
    logits_fn: images [B, ...] -> logits [B, C].
  """

  name: str
  origin: dict[str, Any]
  logits_fn: Callable[[Any], Any]


def allowed_names() -> list[str]:
  """What a config's list of evaluations may hold; N stands for a number."""
  return ['fgsm', 'pgd-N', 'cw-N', 'spsa', *autoattack.ATTACKS,
          *(_AUTO + version for version in autoattack.VERSIONS)]


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError for an empty list or a name that is not allowed."""
  if not names:
    raise ValueError(
        'evaluation.attacks is empty; it may hold '
        f'{", ".join(allowed_names())}.')
  if len(set(names)) != len(names):
    raise ValueError(f'evaluation.attacks names one twice: {tuple(names)}.')
  for name in names:
    if not _STEPPED.fullmatch(name):
      checks.one_of('evaluation.attacks', name, allowed_names())
    if name.endswith('-N'):
      raise ValueError(
          f'evaluation.attacks: {name!r} needs a number for N, like '
          f'{name[:-1] + "20"!r}.')


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


def _variables_fn(
    model: Any, variables: Any) -> Callable[[Any], Any]:
  return lambda images: model.apply(variables, images, train=False)


def load_subjects(run: runs.Run) -> Iterator[Subject]:
  """The models to evaluate, each loaded when its turn comes.

  Raises:
    ValueError: if a checkpoint is not there, or cannot be read.
  """
  settings = run.config.evaluation
  if settings.torch_checkpoint:
    yield _torch_subject(run, pathlib.Path(settings.torch_checkpoint))
    return
  for kind, step, variables in load_variables(run):
    yield Subject(
        kind, {'checkpoint': kind, 'step': step},
        _variables_fn(run.model, variables))


def load_variables(
    run: runs.Run, kinds: Sequence[str] = checkpoints.KINDS
) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
  """The kind, the step and the judged variables of a run's checkpoints.

  Raises:
    ValueError: if a checkpoint is not there, or cannot be read.
  """

  def initial() -> tuple[awp_jax.TrainState, Any]:
    state = runs.initial_state(run)
    return state, steps.to_tree(state, steps.zero_sums())

  # Shapes suffice: initialising a network to be overwritten takes seconds.
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state, like = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=place), jax.eval_shape(initial))
  for kind in kinds:
    store = checkpoints.Checkpoints(run.workdir, kind)
    try:
      tree, _ = store.load(like)
      step = store.step()
    finally:
      store.close()
    judged = steps.evaluated(steps.from_tree(state, tree)[0])
    yield kind, step, {
        'params': judged.params, 'batch_stats': judged.batch_stats}


def _torch_subject(run: runs.Run, path: pathlib.Path) -> Subject:
  state_dict = torch_exchange.read_state_dict(path)
  mean, std = torch_exchange.normalisation(state_dict) or (
      tuple(run.dataset.mean), tuple(run.dataset.std))
  model = torch_exchange.model_from_torch(state_dict, mean=mean, std=std)
  classes = getattr(model, 'num_classes', None)
  if classes != run.dataset.num_classes:
    raise ValueError(
        f'{path} classifies into {classes} classes, {run.dataset.name} has '
        f'{run.dataset.num_classes}.')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return Subject(
      path.stem, {'torch_checkpoint': path.name, 'sha256': digest},
      _variables_fn(model, torch_exchange.from_torch(state_dict, model)))


class _Records:
  """Finished groups of one evaluation on disk, in their order."""

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    self.done = [self._read(path) for path in self._paths()]

  def _paths(self) -> Iterator[pathlib.Path]:
    number = 0
    while (path := self._folder / f'{number:05d}.npz').exists():
      yield path
      number += 1

  def _read(self, path: pathlib.Path) -> awp_jax.BatchResult:
    with np.load(path, allow_pickle=False) as archive:
      fields = {name: archive[name] for name in archive.files}
    return awp_jax.BatchResult(
        str(fields['attack']), fields['indices'], fields['broken'],
        fields['adversarial'], fields['distances'], int(fields['flat']),
        float(fields['seconds']))

  def append(self, record: awp_jax.BatchResult) -> None:
    """Writes a record whole or not at all."""
    path = self._folder / f'{len(self.done):05d}.npz'
    temporary = path.with_suffix('.tmp.npz')
    np.savez(temporary, **record._asdict())
    temporary.replace(path)
    self.done.append(record)


def _identity(
    run: runs.Run, subject: Subject, name: str, num_examples: int
) -> dict[str, Any]:
  """All that the records of an evaluation depend on."""
  return {
      'subject': subject.origin, 'evaluation': name,
      'threat': run.config.threat.to_dict(),
      'step_size': run.config.eval.step_size, 'seed': run.config.seed,
      'dataset': data.describe(run.dataset),
      'num_examples': num_examples,
      'batch_size': run.config.evaluation.batch_size}


def _test_set(run: runs.Run) -> tuple[np.ndarray, np.ndarray]:
  count = run.config.evaluation.num_examples or len(run.dataset.y_test)
  images = run.dataset.x_test[:count]
  pixels = pipeline.to_pixels(jnp.asarray(images), jnp.dtype(jnp.float32))
  return np.asarray(pixels), run.dataset.y_test[:count]


class _Teller:
  """A bar in a terminal, a line a group elsewhere."""

  def __init__(self, label: str, total: int, correct: int) -> None:
    self._label, self._total, self._robust = label, total, correct
    self._seconds = 0.0
    self._bar = tqdm.tqdm(
        total=None, unit='example', desc=label,
        disable=not sys.stderr.isatty())

  def heard(self, record: awp_jax.BatchResult) -> None:
    self._robust -= int(record.broken.sum())
    self._seconds += record.seconds
    text = (f'{record.attack}: {self._robust} of {self._total} stand '
            f'({100 * self._robust / self._total:.2f} %), '
            f'{self._seconds:.0f} s')
    self._bar.update(len(record.indices))
    self._bar.set_postfix_str(text)
    if self._bar.disable:
      print(f'{self._label}  {text}', flush=True)

  def close(self) -> None:
    self._bar.close()


def _evaluate_one(
    run: runs.Run, subject: Subject, name: str,
    test_set: tuple[np.ndarray, np.ndarray], correct: int
) -> awp_jax.AttackResult:
  """One evaluation of one model, from its records if there are any.

  `correct` of the test set's images are classified right without an attack.
  """
  images, labels = test_set
  settings = run.config.evaluation
  identity = json.dumps(
      _identity(run, subject, name, len(labels)), sort_keys=True)
  digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
  records = _Records(
      run.workdir / 'evaluation' / f'{subject.name}-{name}-{digest}')
  teller = _Teller(f'{subject.name} {name}', len(labels), correct)
  done = tuple(records.done)
  for record in done:
    teller.heard(record)

  def progress(record: awp_jax.BatchResult) -> None:
    records.append(record)
    teller.heard(record)

  devices = jax.devices() if jax.device_count() > 1 else None
  options = evaluation_lib.EvalOptions(
      batch_size=settings.batch_size or None, devices=devices,
      progress=progress, done=done)
  try:
    return evaluation_lib.evaluate(
        jax.random.key(run.config.seed), subject.logits_fn, images, labels,
        run.setup.threat, make_specs(name, run.config), options=options)
  finally:
    teller.close()


def _count_correct(
    subject: Subject, images: np.ndarray, labels: np.ndarray,
    size: int = 256) -> int:
  logits_fn, correct = jax.jit(subject.logits_fn), 0
  for begin in range(0, len(labels), size):
    part = images[begin:begin + size]
    padded = np.pad(
        part, [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1))
    predicted = np.asarray(logits_fn(padded)).argmax(axis=-1)[:len(part)]
    correct += int(np.sum(predicted == labels[begin:begin + size]))
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
           'broken': attack.broken.tolist()}
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
  return results.table(rows)


def evaluate(run: runs.Run) -> dict[str, Any]:
  """Evaluates the models of a run and writes `evaluation.json`.

  Args:
    run: of `runs.prepare`, whose workdir holds checkpoints unless the config
      names a PyTorch checkpoint.

  Returns:
    The contents of `evaluation.json`: per model its natural accuracy and per
    evaluation the robust accuracy (fractions, with 95 % Wilson intervals),
    seconds, who broke which example, the largest distance and warnings.

  Raises:
    ValueError: for a checkpoint that cannot be read.
  """
  config = run.config
  test_set = _test_set(run)
  subjects: dict[str, Any] = {}
  for subject in load_subjects(run):
    correct = _count_correct(subject, *test_set)
    entry: dict[str, Any] = {'origin': subject.origin, 'evaluations': {}}
    for name in config.evaluation.attacks:
      result = _evaluate_one(run, subject, name, test_set, correct)
      entry['natural'] = _accuracy(result.natural)
      entry['evaluations'][name] = report(result)
      if result.adversarial is not None and config.evaluation.save_examples:
        np.savez_compressed(
            run.workdir / 'evaluation' / f'{subject.name}-{name}.npz',
            adversarial=result.adversarial, robust=result.robust,
            natural=result.natural)
    subjects[subject.name] = entry
  num_examples = len(test_set[1])
  values = {
      'threat': config.threat.to_dict(), 'num_examples': num_examples,
      'dataset': data.describe(run.dataset), 'seed': config.seed,
      'subjects': subjects, 'devices': results.devices(),
      'versions': results.versions()}
  results.write_json(run.workdir / 'evaluation.json', values)
  print(f'\n{run.dataset.name}, {config.threat.norm}, epsilon '
        f'{config.threat.epsilon:.4f}, {num_examples} test images\n')
  print(_table(subjects))
  return values
