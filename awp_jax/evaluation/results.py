"""Results of an evaluation: verdicts, attack reports, warnings, intervals.

>>> interval = confidence_interval(52, 256)
>>> [round(bound, 3) for bound in interval]
[0.158, 0.257]
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import statistics
from typing import Any, Literal, NamedTuple

import numpy as np

from awp_jax.core import checks

WarningKind = Literal[
    'randomized', 'probabilities', 'zero-gradients', 'square-stronger',
    'few-classes', 'non-finite', 'batch-dependent', 'non-finite-gradient',
    'outside', 'half-precision', 'layout', 'attack-model']


class RobustnessWarning(UserWarning):
  """A sign that a robust accuracy may not mean what it seems to."""


class AttackWarning(NamedTuple):
  """One warning of an evaluation.

  Attributes:
    kind: one of `WarningKind`.
    message: the observation and a remedy.
    attack: the attack that raised it; '' for the checks before all attacks.
    num_examples: number of examples affected; 0 if it is not about examples.
  """

  kind: WarningKind
  message: str
  attack: str
  num_examples: int


class Anomalies(NamedTuple):
  """Number of examples on which an attack met each anomaly.

  Attributes:
    zero_gradient: an all-zero gradient at a start.
    nonfinite_gradient: a gradient with entries that are not finite, which the
      attack replaced by 0.
    nonfinite_logits: logits that are not finite at an adversarial example,
      which count as misclassified.
    outside: a candidate with NaN, or outside ball or box, which was rejected.
    refused: a candidate that the attack's model misclassifies and the forward
      pass of the verdicts does not, which was rejected. Causes: rounding,
      another draw of a randomized model, or `EvalOptions.attack_fn`.
  """

  zero_gradient: int = 0
  nonfinite_gradient: int = 0
  nonfinite_logits: int = 0
  outside: int = 0
  refused: int = 0

  def plus(self, other: 'Anomalies') -> 'Anomalies':
    """The sums, field by field."""
    return Anomalies(*(a + b for a, b in zip(self, other, strict=True)))


class BatchResult(NamedTuple):
  """Results of one attack on one group of examples; the unit of resuming.

  Attributes:
    attack: the attack's name.
    indices: the examples attacked, [n], rising.
    broken: which of them it broke, [n].
    adversarial: adversarial examples of the broken ones, [k, ...].
    distances: between those and the natural images, [k].
    anomalies: counts over the n examples.
    seconds: wall-clock time, including compilation.
    identity: a hash of everything that the record depends on.
  """

  attack: str
  indices: np.ndarray
  broken: np.ndarray
  adversarial: np.ndarray
  distances: np.ndarray
  anomalies: Anomalies
  seconds: float
  identity: str

  def to_arrays(self) -> dict[str, Any]:
    """The fields as arrays, as `np.savez` takes them."""
    return {name: np.asarray(v) for name, v in self._asdict().items()}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, Any]) -> 'BatchResult':
    """The inverse of `to_arrays`."""
    fields = {name: arrays[name] for name in cls._fields}
    return cls(**fields)._replace(
        attack=str(fields['attack']), seconds=float(fields['seconds']),
        anomalies=Anomalies(*map(int, fields['anomalies'])),
        identity=str(fields['identity']))


@dataclasses.dataclass(frozen=True)
class Share:
  """One of several processes that divide the examples of an evaluation.

  All call `evaluate` with the same arguments and the same `EvalOptions.done`,
  and get the same result. Each attacks every `count`-th example that has no
  record, on its own devices.

  Attributes:
    index: number of this process, in [0, count).
    count: number of processes.
    exchange: called once after each attack, with the new records of this
      process. Waits for all processes and returns the new records of all.
  """

  index: int
  count: int
  exchange: Callable[[Sequence[BatchResult]], Sequence[BatchResult]]

  def __post_init__(self) -> None:
    if not 0 <= self.index < self.count:
      raise ValueError(
          f'index must be in [0, count), got {self.index} of {self.count}.')


class Merged(NamedTuple):
  """The records of one attack together.

  Attributes:
    broken: the examples it broke, as rising indices [k].
    adversarial: their adversarial examples, [k, ...].
    largest_distance: of those from the natural images; 0 if there are none.
    anomalies: counts over all records.
  """

  broken: np.ndarray
  adversarial: np.ndarray
  largest_distance: float
  anomalies: Anomalies


def of_attack(
    name: str, records: Iterable[BatchResult]) -> list[BatchResult]:
  """The records of one attack."""
  return [record for record in records if record.attack == name]


def without_record(
    examples: np.ndarray, records: Iterable[BatchResult]) -> np.ndarray:
  """The examples that no record of an attack holds, in the same order."""
  known = [record.indices for record in records]
  return examples[~np.isin(examples, np.concatenate(known))] if (
      known) else examples


def merge(records: Sequence[BatchResult], robust: np.ndarray) -> Merged:
  """Merges the records of an attack.

  Args:
    records: none if no example has survived the earlier attacks.
    robust: which examples survived the earlier attacks, [N]. Records may hold
      others, after a resumed evaluation that lost records of earlier attacks.

  Returns:
    The examples in `robust` that the attack broke; of an example with several
    records, the first counts.
  """
  if not records:
    nothing = np.zeros(0, np.int64)
    return Merged(nothing, nothing, 0.0, Anomalies())
  broken = np.concatenate([r.indices[r.broken] for r in records])
  adversarial = np.concatenate([r.adversarial for r in records])
  distances = np.concatenate([r.distances for r in records])
  broken, first = np.unique(broken, return_index=True)
  kept = first[robust[broken]]
  anomalies = Anomalies()
  for record in records:
    anomalies = anomalies.plus(record.anomalies)
  return Merged(
      broken[robust[broken]], adversarial[kept],
      float(max(distances[kept], default=0.0)), anomalies)


class OtherEvaluation(ValueError):
  """Records that are not of the evaluation that is to use them."""


def check_records(
    records: Iterable[BatchResult], attacks: Sequence[str], identity: str,
    name: str = 'EvalOptions.done') -> None:
  """Raises OtherEvaluation unless all records are of one evaluation.

  Args:
    records: of groups of examples.
    attacks: the names of its attacks.
    identity: of the evaluation; '' if it has none.
    name: where the records come from, for the message.
  """
  for record in records:
    if not identity:
      raise OtherEvaluation(
          f'{name} cannot be used: an attack of this evaluation has no '
          '`settings`, which its AttackSpec sets, or the model calls Python '
          'code, which cannot be compared.')
    if record.attack not in attacks:
      raise OtherEvaluation(
          f'{name} belongs to another evaluation: it has a record of '
          f'{record.attack}, this one runs {", ".join(attacks)}.')
    if record.identity != identity:
      raise OtherEvaluation(
          f'{name} belongs to another evaluation: key, model, '
          'weights, images, labels, threat model, attacks, settings or '
          f'versions differ (expected identity {identity[:12]!r}, got '
          f'{record.identity[:12]!r}).')


class AttackReport(NamedTuple):
  """Results of one attack of a list.

  Attributes:
    name: its name.
    seconds: wall-clock time, including compilation; with `EvalOptions.share`
      summed over the processes.
    robust_accuracy: the fraction of all examples that survive up to here.
    broken: the examples it broke, as rising indices.
    largest_distance: of those from the natural images; 0 if there are none.
    anomalies: counts over the examples it attacked.
  """

  name: str
  seconds: float
  robust_accuracy: float
  broken: np.ndarray
  largest_distance: float
  anomalies: Anomalies


class Judgement(NamedTuple):
  """Types, precision, devices and versions used for the verdicts.

  Attributes:
    dtype: of the images passed to the model.
    logits_dtype: of the logits that it returned.
    product_dtype: the narrowest type of an operand of its matrix products and
      convolutions, or a lower precision that one of them requests.
    matmul_precision: of matrix products and convolutions, as in
      `jax.default_matmul_precision`.
    devices: the kind of each device.
    versions: of jax, jaxlib and awp_jax.
    attack_product_dtype: `product_dtype` of the model that the attacks used,
      `EvalOptions.attack_fn` or the same.
    attack_matmul_precision: of the attacks; None is the caller's setting.
  """

  dtype: str
  logits_dtype: str
  product_dtype: str
  matmul_precision: str
  devices: tuple[str, ...]
  versions: dict[str, str]
  attack_product_dtype: str
  attack_matmul_precision: str | None


class AttackResult(NamedTuple):
  """Results of an evaluation, on the host.

  Attributes:
    adversarial: [N, ...]; the natural image if the example is robust or its
      natural image is misclassified. None without `EvalOptions.keep_images`.
    robust: which examples survived all attacks, [N].
    natural: which natural images are classified correctly, [N].
    natural_accuracy: the fraction in `natural`.
    robust_accuracy: the fraction in `robust`.
    attacks: a report per attack, in the order in which they ran.
    warnings: reasons to doubt the robust accuracy.
    judged: types, precision, devices and versions used for the verdicts.
  """

  adversarial: np.ndarray | None
  robust: np.ndarray
  natural: np.ndarray
  natural_accuracy: float
  robust_accuracy: float
  attacks: tuple[AttackReport, ...]
  warnings: tuple[AttackWarning, ...]
  judged: Judgement


def confidence_interval(
    successes: int, count: int, level: float = 0.95) -> tuple[float, float]:
  """Wilson score interval of a fraction.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),  p = k / n

  Args:
    successes: k, in [0, n].
    count: n >= 1.
    level: the coverage, in (0, 1).

  Returns:
    The lower and the upper bound.

  Raises:
    ValueError: for arguments outside their ranges.

  References:
    Wilson, Probable Inference, the Law of Succession, and Statistical
    Inference, JASA 1927.
  """
  checks.count('count', count)
  checks.count('successes', successes, 0)
  if successes > count:
    raise ValueError(
        f'successes must be at most count, got {successes} of {count}.')
  if not 0 < level < 1:
    raise ValueError(f'level must be between 0 and 1, got {level!r}.')
  z = statistics.NormalDist().inv_cdf((1 + level) / 2)
  share, spread = successes / count, z * z / count
  center = share + spread / 2
  half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
  lower, upper = (center - half) / (1 + spread), (center + half) / (1 + spread)
  # Exact at 0 and 1, where rounding would leave an error of 1e-17.
  return (lower if successes else 0.0), (upper if successes < count else 1.0)
