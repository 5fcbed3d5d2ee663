"""Strong attacks on a trained model: their names, one evaluation, its records.

An evaluation is a single attack ('fgsm', 'pgd-20', 'cw-100', 'spsa', 'square',
...) or a version of AutoAttack ('aa-standard', 'aa-fast', ...), in which each
attack sees the examples that survived the earlier attacks. Finished groups of
examples are on disk. A process that was killed resumes after the last one and
gets the same result. Several processes divide the examples.
"""

from collections.abc import Sequence
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
from awp_jax.evaluation.results import OtherEvaluation, Share
from experiments.data import batches
from experiments.evaluation import attack_records
from experiments.parallel import placement, processes
from experiments.runs import precision, restore
from experiments.runs import run as run_lib
from experiments.util import atomic, digests, named, paths
from experiments.util.errors import UserError, user_errors

#: Prefix of the versions of AutoAttack in a config's list.
_AUTO = 'aa-'

#: Batches per group of examples on disk.
_BATCHES_PER_GROUP = 8

_STEPPED = re.compile(r'(pgd|cw)-([1-9][0-9]*)')


def allowed_names() -> list[str]:
  """Names allowed in `config.evaluation.attacks`; N is a number of steps."""
  return ['fgsm', 'pgd-N', 'cw-N', 'spsa', *autoattack.ATTACKS,
          *(_AUTO + version for version in autoattack.VERSIONS
            if version != 'rand')]


@user_errors()
def check_names(names: Sequence[str]) -> None:
  """Raises ValueError for an empty list, a duplicate or an unknown name."""
  if not names:
    raise ValueError(
        'evaluation.attacks is empty; allowed are '
        f'{", ".join(allowed_names())}.')
  if len(set(names)) != len(names):
    raise ValueError(
        f'evaluation.attacks contains a duplicate: {tuple(names)}.')
  for name in names:
    if named.is_external(name):
      continue
    if name == f'{_AUTO}rand':
      raise ValueError(
          f'evaluation.attacks: {name!r} is for randomized models, but this '
          f'model is deterministic. Use {_AUTO + "standard"!r}.')
    if not _STEPPED.fullmatch(name):
      checks.one_of('evaluation.attacks', name, allowed_names())
    if name.endswith('-N'):
      raise ValueError(
          f'evaluation.attacks: {name!r} needs a number for N, as in '
          f'{name[:-1] + "20"!r}.')


def make_specs(
    name: str, config: ml_collections.ConfigDict
) -> tuple[AttackSpec, ...]:
  """The attacks of one evaluation, in order."""
  norm, epsilon = config.threat.norm, config.threat.epsilon
  if named.is_external(name):
    return (_external(name, config),)
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


def _external(text: str, config: ml_collections.ConfigDict) -> AttackSpec:
  """The attack of a function in another package."""
  field = 'evaluation.attacks'
  name, options = named.parse_call(text, field)
  made = named.call(
      field, named.load(field, name), name, options=options, offered={
          'step_size': config.eval.step_size,
          'config': ml_collections.FrozenConfigDict(config)})
  if not isinstance(made, AttackSpec):
    raise UserError(
        f'{field}: {text!r} must return an awp_jax.AttackSpec, got '
        f'{type(made).__name__}.')
  # Records of another version of the code are not taken over.
  return made if made.settings is None else made._replace(settings={
      **made.settings, 'source': named.digest(named.load(field, name))})


def load_test_set(run: run_lib.Run) -> tuple[np.ndarray, np.ndarray]:
  """The first `evaluation.num_examples` test images and their labels.

  Args:
    run: the run.

  Returns:
    Images [N, H, W, C], float32 in [0, 1], and labels [N].

  Raises:
    UserError: if the test set has fewer images.
  """
  available = len(run.dataset.y_test)
  count = run.config.evaluation.num_examples or available
  if count > available:
    raise UserError(
        f'evaluation.num_examples={count}: there are {available} test images; '
        '0 uses all of them.')
  images = run.dataset.x_test[:count]
  pixels = batches.to_pixels(jnp.asarray(images), jnp.dtype(jnp.float32))
  return np.asarray(pixels), run.dataset.y_test[:count]


def evaluate_model(
    run: run_lib.Run, model: restore.RestoredModel,
    test_set: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
  """Runs all evaluations of the config on one model.

  Args:
    run: the run.
    model: the restored model.
    test_set: images in [0, 1] and labels.

  Returns:
    The model's entry in `evaluation.json`.
  """
  correct = _count_correct(model, *test_set)
  entry: dict[str, Any] = {
      'origin': model.origin, 'weights': model.facts['weights'],
      'evaluations': {}}
  dtype = run.config.evaluation.attack_dtype
  for attack in run.config.evaluation.attacks:
    result, judged_by = _evaluate_one(run, model, attack, test_set, correct)
    # A weaker evaluation must not replace that of the same attack in float32.
    name = attack if dtype == precision.PRECISION else f'{attack}-{dtype}'
    entry['natural'] = _accuracy(result.natural) | {
        'judged_by': [precision.judged_by()]}
    entry['evaluations'][name] = _summarize(result) | {'judged_by': judged_by}
    if run.config.evaluation.save_examples:
      path = run.workdir / 'evaluation' / (
          f'{model.name}-{paths.file_name(name)}.npz')
      if processes.is_main():
        _save_examples(path, result)
      entry['evaluations'][name]['examples'] = str(
          path.relative_to(run.workdir))
  if run.config.evaluation.epsilons:
    entry['curve'] = _curve(run, model, test_set)
  return entry


def _curve(
    run: run_lib.Run, model: restore.RestoredModel,
    test_set: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
  """Robust accuracy over `evaluation.epsilons`; resumes after a kill."""
  settings, threat = run.config.evaluation, run.setup.threat
  specs = [spec for name in settings.curve_attacks
           for spec in make_specs(name, run.config)]
  print(f'{model.name}: robust accuracy at {len(settings.epsilons)} epsilons',
        flush=True)
  found = awp_jax.robust_curve(
      jax.random.key(run.config.seed), model.logits_fn, *test_set, threat.norm,
      settings.epsilons, attacks=specs, lower=threat.lower, upper=threat.upper,
      options=evaluate_lib.EvalOptions(
          batch_size=_batch_size(run), devices=placement.own_devices(),
          store=run.workdir / 'evaluation' / 'curve', verbose=True))
  return {
      'norm': threat.norm, 'attacks': [spec.name for spec in specs],
      'epsilons': found.epsilons.tolist(),
      'robust_accuracy': found.robust_accuracy.tolist(),
      'interval_95': found.intervals.tolist(),
      'seconds': [sum(attack.seconds for attack in result.attacks)
                  if result else 0.0 for result in found.results],
      'judged_by': precision.judged_by()}


def _save_examples(path: paths.Path, result: awp_jax.AttackResult) -> None:
  assert result.adversarial is not None
  with atomic.replacing(path) as file:
    np.savez_compressed(
        file, adversarial=result.adversarial, robust=result.robust,
        natural=result.natural)


def _evaluate_one(
    run: run_lib.Run, model: restore.RestoredModel, name: str,
    test_set: tuple[np.ndarray, np.ndarray], correct: int
) -> tuple[awp_jax.AttackResult, list[dict[str, Any]]]:
  """One evaluation of one model; finished groups are read from disk.

  Args:
    run: the run.
    model: the restored model.
    name: of the evaluation.
    test_set: images in [0, 1] and labels.
    correct: number of images classified correctly without an attack.

  Returns:
    The result, and the distinct precisions, devices and versions used.
  """
  images, labels = test_set
  batch_size = _batch_size(run)
  records = attack_records.Records(
      run.workdir / 'evaluation', name, _facts(run, model, name, test_set),
      _judged_by(run))
  bar = attack_records.Progress(f'{model.name} {name}', len(labels), correct)
  done = tuple(records.done)
  for record in done:
    bar.add(record)

  def progress(record: awp_jax.BatchResult) -> None:
    records.append(record)
    bar.add(record)

  def exchange(
      own: Sequence[awp_jax.BatchResult]) -> Sequence[awp_jax.BatchResult]:
    found = records.exchange(own)
    for record in found[len(own):]:  # of other processes
      bar.add(record)
    return found

  options = evaluate_lib.EvalOptions(
      batch_size=batch_size, group_size=_group_size(batch_size, len(labels)),
      devices=placement.own_devices(), progress=progress, done=done,
      attack_fn=model.attack_fn(run.config.evaluation.attack_dtype),
      share=None if processes.count() == 1 else Share(
          processes.index(), processes.count(), exchange))
  try:
    result = evaluate_lib.evaluate(
        jax.random.key(run.config.seed), model.logits_fn, images, labels,
        run.setup.threat, make_specs(name, run.config), options=options)
  except OtherEvaluation as error:
    raise UserError(
        f'the records of {name} in {run.workdir / "evaluation"} are of another '
        f'evaluation: remove them. {error}') from error
  finally:
    bar.close()
  return result, records.judged_by or [_judged_by(run)]


def _judged_by(run: run_lib.Run) -> dict[str, Any]:
  """Precision, devices and versions of an evaluation, for its records."""
  return precision.judged_by() | {
      'attack_dtype': run.config.evaluation.attack_dtype}


def _facts(
    run: run_lib.Run, model: restore.RestoredModel, name: str,
    test_set: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
  """Everything that the records of an evaluation depend on.

  The images are identified by content, not by path, so the data may move. Batch
  size and versions are included because the library rejects records of others.
  """
  source = {}
  if named.is_external(name):  # its settings hold the digest of its code
    (spec,) = make_specs(name, run.config)
    source = {'attack_source': (spec.settings or {}).get('source')}
  return model.facts | source | {
      'evaluation': name, 'threat': run.config.threat.to_dict(),
      'step_size': run.config.eval.step_size, 'seed': run.config.seed,
      'test_set': digests.of_arrays(test_set),
      'attack_dtype': run.config.evaluation.attack_dtype,
      'precision': precision.PRECISION, 'batch_size': _batch_size(run),
      'versions': fingerprint.versions()}


def _group_size(batch_size: int, num_examples: int) -> int:
  """Examples per record: at most a share of a process, in whole batches."""
  share = -(-num_examples // (processes.count() * batch_size))
  return batch_size * min(_BATCHES_PER_GROUP, share)


def _batch_size(run: run_lib.Run) -> int:
  """Examples per batch of a process, over its devices."""
  if run.config.evaluation.batch_size:
    return run.config.evaluation.batch_size
  size = 64 if loops.unrolls() else 512
  return placement.rounded(size)


def _count_correct(
    model: restore.RestoredModel, images: np.ndarray, labels: np.ndarray,
    size: int = 256) -> int:
  """Correctly classified images; non-finite logits count as wrong."""
  logits_fn, correct = jax.jit(model.logits_fn), 0
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


def _summarize(result: awp_jax.AttackResult) -> dict[str, Any]:
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
