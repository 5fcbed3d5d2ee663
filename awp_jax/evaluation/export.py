"""Results of evaluations as files: adversarial examples, and a summary."""

from collections.abc import Mapping
import os
from typing import Any, NamedTuple

import numpy as np

from awp_jax.evaluation.results import AttackResult, confidence_interval
from awp_jax.threat import ThreatModel


class SavedExamples(NamedTuple):
  """The adversarial examples of an evaluation.

  In an .npz file these are the names of the arrays.

  Attributes:
    adversarial: [N, ...]; the natural image where no attack succeeded.
    robust: which examples survived all attacks, [N].
    natural: which natural images are classified correctly, [N].
    broken_by: number of the attack that broke the example, from 0; -1 for none,
      [N].
    attacks: names of the attacks in order.
  """

  adversarial: np.ndarray
  robust: np.ndarray
  natural: np.ndarray
  broken_by: np.ndarray
  attacks: tuple[str, ...]


def saved_examples(result: AttackResult) -> SavedExamples:
  """The examples of a result.

  Raises:
    ValueError: if the evaluation ran without `EvalOptions.keep_images`.
  """
  if result.adversarial is None:
    raise ValueError(
        'the result has no adversarial examples: evaluate with '
        'EvalOptions(keep_images=True).')
  broken_by = np.full(len(result.robust), -1, np.int32)
  for number, report in enumerate(result.attacks):
    broken_by[report.broken] = number
  return SavedExamples(
      result.adversarial, result.robust, result.natural, broken_by,
      tuple(report.name for report in result.attacks))


def save_examples(
    path: str | os.PathLike[str] | Any, result: AttackResult) -> None:
  """Writes the examples of a result as a compressed .npz file.

  Args:
    path: of the file, or a binary file to write to.
    result: of an evaluation that kept its images.

  Raises:
    ValueError: as `saved_examples`.
  """
  examples: dict[str, Any] = saved_examples(result)._asdict()
  if hasattr(path, 'write'):
    np.savez_compressed(path, **examples)
    return
  # Given a path without the suffix .npz, NumPy would write to another file.
  with open(path, 'wb') as file:
    np.savez_compressed(file, **examples)


def load_examples(path: str | os.PathLike[str] | Any) -> SavedExamples:
  """Reads a file of `save_examples`.

  Args:
    path: of the file, or a binary file to read from.

  Returns:
    The examples.

  Raises:
    ValueError: if the file is not one of `save_examples`.
  """
  if hasattr(path, 'read'):
    return _read(path)
  with open(path, 'rb') as file:
    return _read(file)


def _read(file: Any) -> SavedExamples:
  try:
    with np.load(file, allow_pickle=False) as archive:
      fields = {name: archive[name] for name in SavedExamples._fields}
  except Exception as error:  # zipfile and NumPy have many for broken files
    name = getattr(file, 'name', None) or 'this'
    raise ValueError(
        f'{name} is not a file of adversarial examples '
        f'({type(error).__name__}: {error}).') from error
  return SavedExamples(**fields)._replace(
      attacks=tuple(map(str, fields['attacks'])))


def result_to_dict(
    result: AttackResult, threat: ThreatModel, *, name: str, dataset: str,
    about: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """A summary of plain values.

  'name', 'dataset', 'eps', 'clean_acc' and 'autoattack_acc' are keys of
  RobustBench's model cards. There eps is text such as '8/255', and name the
  title of a paper.

  Args:
    result: of the evaluation.
    threat: its threat model.
    name: of the model.
    dataset: of the images.
    about: further entries, such as 'weights_sha256', 'link' or 'architecture'.

  Returns:
    These keys, with accuracies in percent as text; 'norm', 'num_examples',
    intervals, 'attacks', 'warnings' and 'judged'; and `about`.

  Raises:
    ValueError: if `about` has one of the other keys.
  """
  count = len(result.robust)

  def interval(hits: np.ndarray) -> list[float]:
    return [100 * bound for bound in confidence_interval(
        int(hits.sum()), count)]

  found = {
      'name': name, 'dataset': dataset, 'norm': threat.norm,
      'eps': float(threat.epsilon),
      'clean_acc': f'{100 * result.natural_accuracy:.2f}',
      'autoattack_acc': f'{100 * result.robust_accuracy:.2f}',
      'num_examples': count,
      'clean_acc_interval_95': interval(result.natural),
      'autoattack_acc_interval_95': interval(result.robust),
      'attacks': [
          {'name': report.name, 'num_broken': len(report.broken),
           'robust_accuracy_after': 100 * report.robust_accuracy,
           'largest_distance': report.largest_distance,
           'seconds': report.seconds} for report in result.attacks],
      'warnings': [warning.message for warning in result.warnings],
      'judged': {key: list(value) if isinstance(value, tuple) else value
                 for key, value in result.judged._asdict().items()}}
  if taken := sorted(found.keys() & (about or {}).keys()):
    raise ValueError(f'about must not have the keys {", ".join(taken)}.')
  return found | dict(about or {})
