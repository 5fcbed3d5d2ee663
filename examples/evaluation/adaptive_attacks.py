"""Adaptive attacks on two defenses that only hide gradients.

  python examples/evaluation/adaptive_attacks.py

A perceptron is trained on handwritten digits (scikit-learn's, no download) by
AT, then defended in two ways that do not make it robust:

  * its inputs are rounded to a few levels, so gradients are zero. BPDA
    (Athalye, Carlini, Wagner, ICML 2018) attacks the network without the
    rounding: `EvalOptions(attack_fn=...)`. Verdicts still use the defense.
  * Gaussian noise is added to its inputs, so every gradient is a random draw.
    EOT (Athalye et al., ICML 2018) averages gradients over draws:
    `EvalOptions(takes_key=True, eot_samples=...)`.

The table shows robust accuracy under the plain and the adaptive attack. An
evaluation that is not adaptive reports the higher number, and warns.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any, NamedTuple
import warnings

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import awp_jax
from examples import report

THREAT = awp_jax.ThreatModel('Linf', 0.15)
LEVELS = 8
NOISE = 0.25
NUM_TEST = 200


class Judged(NamedTuple):
  """One evaluation.

  Attributes:
    defense: its name.
    attack: 'plain' or the adaptive one.
    robust_accuracy: in [0, 1].
    warnings: kinds of the evaluation's warnings.
  """

  defense: str
  attack: str
  robust_accuracy: float
  warnings: tuple[str, ...]


def network(params: Any, x: jax.Array) -> jax.Array:
  """Logits [B, 10] of images [B, 64]."""
  hidden = jax.nn.relu((x - 0.5) @ params['w1'] + params['b1'])
  return hidden @ params['w2'] + params['b2']


def forward_fn(
    params: Any, batch_stats: Any, x: jax.Array, train: bool,
    key: jax.Array | None) -> tuple[jax.Array, Any]:
  """`network` as `train_step` calls it."""
  del train, key
  return network(params, x), batch_stats


def trained(x: jax.Array, y: jax.Array, seed: int, steps: int) -> Any:
  """Parameters after AT."""
  keys = jax.random.split(jax.random.key(seed))
  params = {
      'w1': jax.random.normal(keys[0], (64, 128)) / 8, 'b1': jnp.zeros(128),
      'w2': jax.random.normal(keys[1], (128, 10)) / 11, 'b2': jnp.zeros(10)}
  state = awp_jax.TrainState.create(
      forward_fn=forward_fn, params=params, tx=optax.adam(2e-3))

  @jax.jit
  def step(state: awp_jax.TrainState, key: jax.Array) -> Any:
    rows = jax.random.randint(
        jax.random.fold_in(key, state.step), (128,), 0, len(y))
    return awp_jax.train_step(
        state, (x[rows], y[rows]), key, objective=awp_jax.adversarial(),
        threat=THREAT, attack=awp_jax.Attack(0.05, 5))[0]

  for _ in range(steps):
    state = step(state, keys[0])
  return state.params


def judge(
    defense: str, attack: str, logits_fn: Any, x: np.ndarray, y: np.ndarray,
    **options: Any) -> Judged:
  """Robust accuracy of a classifier under APGD."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', awp_jax.RobustnessWarning)
    result = awp_jax.auto_attack(
        jax.random.key(0), logits_fn, x, y, THREAT, attacks=('apgd-ce',),
        options=awp_jax.EvalOptions(**options))
  return Judged(defense, attack, result.robust_accuracy, tuple(
      dict.fromkeys(warning.kind for warning in result.warnings)))


def evaluations(seed: int, steps: int) -> list[Judged]:
  """All rows of the table for one network."""
  images, labels = load_digits(return_X_y=True)
  order = np.random.default_rng(seed).permutation(len(labels))
  x, y = (images[order] / 16).astype(np.float32), labels[order]
  params = trained(
      jnp.asarray(x[NUM_TEST:]), jnp.asarray(y[NUM_TEST:]), seed, steps)
  x, y = x[:NUM_TEST], y[:NUM_TEST]

  def plain(x: jax.Array) -> jax.Array:
    return network(params, x)

  def rounded(x: jax.Array) -> jax.Array:
    return plain(jnp.round(x * LEVELS) / LEVELS)

  def noisy(x: jax.Array, key: jax.Array) -> jax.Array:
    return plain(x + NOISE * jax.random.normal(key, x.shape))

  return [
      judge('none', 'plain', plain, x, y),
      judge('rounding', 'plain', rounded, x, y),
      judge('rounding', 'BPDA', rounded, x, y, attack_fn=plain),
      judge('noise', 'plain', noisy, x, y, takes_key=True, eot_samples=1),
      judge('noise', 'EOT, 20', noisy, x, y, takes_key=True, eot_samples=20)]


def main(argv: Sequence[str] | None = None) -> list[list[Judged]]:
  """Prints the table; returns its rows for each seed."""
  parser = report.Parser(__doc__, seeds=1, steps=600)
  options = parser.parse_args(argv)
  rows = [evaluations(seed, options.steps) for seed in range(options.seeds)]
  print(f'{"defense":10s}  {"attack":8s}  {"robust accuracy":>15s}  warnings')
  for judged in zip(*rows, strict=True):
    mean = 100 * np.mean([row.robust_accuracy for row in judged])
    print(f'{judged[0].defense:10s}  {judged[0].attack:8s}  {mean:15.2f}  '
          f'{", ".join(judged[0].warnings)}'.rstrip())
  return rows


if __name__ == '__main__':
  main()
