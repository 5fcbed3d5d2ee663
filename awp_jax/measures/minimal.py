"""The smallest perturbation that misclassifies each example.

Two searches in turn, both in float32 at matrix precision 'float32':

  * FAB to its last step, in a ball that holds the whole box. Of all
    misclassified points that it visits, the nearest one counts.
  * A bisection on the line from the image to that point,
    x + t (x' - x), t in (0, 1].

The distances are upper bounds of the smallest perturbation: both searches find
misclassified points, and neither proves that there is none nearer.

  >>> import jax, jax.numpy as jnp
  >>> logits_fn = lambda x: x @ jnp.eye(2)
  >>> images = jnp.array([[0.75, 0.25], [0.55, 0.45], [0.2, 0.8]])
  >>> found = minimal_perturbations(
  ...     jax.random.key(0), logits_fn, images, jnp.zeros(3, int), 'Linf')
  >>> print(found.distances.round(4))
  [0.25 0.05 0.  ]
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.attacks.fab import fab_spec
from awp_jax.core import checks, loops
from awp_jax.evaluation import arguments
from awp_jax.evaluation.model import Model, make_model, misclassified
from awp_jax.evaluation.protocol import BoundAttack, Examples
from awp_jax.evaluation.setting import VERDICT_PRECISION
from awp_jax.threat import NORMS, Norm, ThreatModel
from awp_jax.types import Array

#: Halvings of the line; 2^-20 of its length is left.
_HALVINGS = 20

#: Examples per batch on CPUs, and elsewhere.
_BATCH, _LARGE_BATCH = 64, 512


class MinimalPerturbations(NamedTuple):
  """The nearest misclassified points that were found.

  Attributes:
    distances: |x' - x| in the norm, [N]; 0 if the natural image is
      misclassified, infinity if nothing was found.
    adversarial: x', [N, ...]; the natural image where the distance is 0 or
      infinite.
    natural: which natural images are classified correctly, [N].
  """

  distances: np.ndarray
  adversarial: np.ndarray
  natural: np.ndarray


class _Best(NamedTuple):
  """The nearest misclassified points so far.

  Attributes:
    distances: [B]; infinity if there is none.
    x: [B, ...].
  """

  distances: Array
  x: Array


def _diameter(norm: Norm, size: int, width: float) -> float:
  """The largest distance of two points of a box of `size` entries."""
  return width * {'Linf': 1.0, 'L2': math.sqrt(size), 'L1': float(size)}[norm]


@jax.jit
def _keep(best: _Best, x: Array, wrong: Array, distances: Array) -> _Best:
  """The nearer of two points."""
  nearer = wrong & (distances < best.distances)
  rows = nearer.reshape((-1,) + (1,) * (x.ndim - 1))
  return _Best(
      jnp.where(nearer, distances, best.distances), jnp.where(rows, x, best.x))


def _search(
    attack: BoundAttack, threat: ThreatModel, num_steps: int,
    examples: Examples) -> _Best:
  """All runs of FAB on a batch."""
  best = _Best(
      jnp.full(len(examples.labels), jnp.inf, jnp.float32), examples.images)
  for number in range(attack.num_runs):
    run = examples._replace(runs=jnp.full_like(examples.runs, number))

    def step(
        carry: tuple[Any, _Best], run: Examples = run) -> tuple[Any, _Best]:
      state, best = carry
      state, report = attack.step(run, state)
      return state, _keep(
          best, report.candidates, report.broken,
          threat.distance(report.candidates, run.images))

    _, best = loops.repeat_pieces(num_steps, step, (attack.init(run), best))
  return best


def _bisect(
    model: Model, threat: ThreatModel, examples: Examples, best: _Best
) -> _Best:
  """The nearest misclassified point on the lines to the points found."""
  shape = (-1,) + (1,) * (examples.images.ndim - 1)

  def halve(carry: tuple[Array, Array, _Best]) -> tuple[Array, Array, _Best]:
    low, high, nearest = carry
    middle = (low + high) / 2
    x = examples.images + middle.reshape(shape) * (best.x - examples.images)
    wrong = misclassified(
        model.logits(x, examples.keys), examples.labels)
    return (jnp.where(wrong, low, middle), jnp.where(wrong, middle, high),
            _keep(nearest, x, wrong & jnp.isfinite(best.distances),
                  threat.distance(x, examples.images)))

  none = jnp.zeros_like(best.distances)
  return loops.repeat_pieces(_HALVINGS, halve, (none, none + 1, best))[2]


def _searcher(
    model: Model, attack: BoundAttack, threat: ThreatModel, num_targets: int,
    num_steps: int) -> Callable[..., tuple[Array, _Best]]:
  """(key, images, labels) -> whether they are misclassified, nearest points."""

  def search(key: Array, x: Array, y: Array) -> tuple[Array, _Best]:
    keys = jax.random.split(key, len(y))
    logits = model.logits(x, keys)
    others = jnp.where(
        jax.nn.one_hot(y, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    targets = jnp.argsort(-others, axis=-1)[:, :num_targets]
    examples = Examples(x, y, targets, keys, jnp.zeros_like(y))
    best = _search(attack, threat, num_steps, examples)
    return misclassified(logits, y), _bisect(model, threat, examples, best)

  # On CPUs the pieces are compiled separately.
  return search if loops.unrolls() else jax.jit(search)


def minimal_perturbations(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    labels: Array | np.ndarray, norm: Norm, *, num_steps: int = 100,
    num_targets: int = 9, targeted: bool = True, lower: float = 0.0,
    upper: float = 1.0, batch_size: int | None = None) -> MinimalPerturbations:
  """Searches the nearest misclassified point of each example.

  Args:
    key: a PRNG key.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2, traceable by JAX.
    images: [N, ...], N >= 1, rank >= 2, in the box.
    labels: integers [N] in [0, C).
    norm: 'Linf', 'L2' or 'L1'.
    num_steps: iterations of FAB per run, >= 1.
    num_targets: classes that FAB goes towards in turn, at most C - 1.
    targeted: whether it goes towards classes, with a gradient per iteration, or
      towards the nearest of all boundaries, with C gradients.
    lower: of the box.
    upper: of the box.
    batch_size: examples per batch; None means 64 on CPUs and 512 elsewhere.

  Returns:
    Distances and points.

  Raises:
    ValueError: for arguments that are not as above.

  References:
    Croce and Hein, Minimally Distorted Adversarial Examples with a Fast
    Adaptive Boundary Attack, ICML 2020.
  """
  images, labels = np.asanyarray(images), np.asarray(labels)
  checks.one_of('norm', norm, NORMS)
  if not lower < upper:
    raise ValueError(
        f'lower must be below upper, got {lower!r} and {upper!r}.')
  size = int(np.prod(images.shape[1:]))
  # Twice the diameter: nothing in the box is outside the ball by rounding.
  threat = ThreatModel(
      norm, 2 * _diameter(norm, size, upper - lower), lower, upper)
  num_classes = arguments.check_model_inputs(
      logits_fn, images, labels, threat)
  images = images.astype(np.result_type(images.dtype, np.float32), copy=False)
  if batch_size is None:
    batch_size = _BATCH if loops.unrolls() else _LARGE_BATCH
  checks.count('batch_size', batch_size)
  spec = fab_spec(
      'fab', targeted=targeted, num_steps=num_steps, num_targets=num_targets)
  model = make_model(
      logits_fn, num_classes, takes_key=False,
      precision=VERDICT_PRECISION, devices=None)
  attack = spec.build(model, threat)
  batch_size = min(batch_size, len(images))

  search = _searcher(
      model, attack, threat, max(spec.num_targets, 1), num_steps)
  distances, adversarial = np.empty(len(images)), images.copy()
  natural = np.empty(len(images), bool)
  for begin in range(0, len(images), batch_size):
    rows = np.minimum(
        np.arange(begin, begin + batch_size), len(images) - 1)
    kept = slice(begin, min(begin + batch_size, len(images)))
    count = kept.stop - begin
    wrong, best = jax.device_get(search(
        jax.random.fold_in(key, begin), jnp.asarray(images[rows]),
        jnp.asarray(labels[rows].astype(np.int32))))
    natural[kept] = ~wrong[:count]
    distances[kept] = np.where(wrong, 0, best.distances)[:count]
    moved = natural[kept] & np.isfinite(distances[kept])
    adversarial[kept][moved] = best.x[:count][moved]
  return MinimalPerturbations(distances, adversarial, natural)
