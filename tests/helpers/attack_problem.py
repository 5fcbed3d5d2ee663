"""A small classifier, and attacks that follow a script."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.evaluation.evaluate import EvalOptions
from awp_jax.evaluation.protocol import AttackSpec, BoundAttack, Report

KEY = jax.random.key(0)
#: One batch in one thread, so that little is compiled.
QUIET = EvalOptions(batch_size=8, check_model=False)
KEYED = dataclasses.replace(QUIET, takes_key=True)
#: Radii at which part of the examples of `network` break.
RADII = {'Linf': 0.04, 'L2': 0.1, 'L1': 0.25}


def network(count=24, size=8, classes=4, seed=0):
  """A two-layer network whose first input has no effect, and its inputs."""
  rng = np.random.default_rng(seed)
  first = rng.normal(size=(size, 16))
  first[0] = 0
  first = jnp.asarray(first / np.sqrt(size), jnp.float32)
  second = jnp.asarray(rng.normal(size=(16, classes)), jnp.float32)

  def logits_fn(x):
    return jnp.tanh(3 * (x - 0.5) @ first) @ second

  images = rng.uniform(0.2, 0.8, size=(count, size)).astype(np.float32)
  return logits_fn, images, np.asarray(logits_fn(images).argmax(-1))


def threshold(x):
  """Logits of two classes: class 1 where the first input exceeds 0.5."""
  margin = x[:, 0] - 0.5
  return jnp.stack([-margin, margin], axis=-1)


def noisy(x, key):
  """`threshold` with Gaussian noise on the inputs."""
  noise = 0.1 * jax.random.normal(key, x.shape)
  return threshold(x + noise)


def kinds(result):
  """{(kind, attack): number of examples} of the warnings of a result."""
  return {(w.kind, w.attack): w.num_examples for w in result.warnings}


def scripted(points, claims, *, runs=1, nonfinite=None, name='scripted',
             settings=None):
  """An attack that visits given points and claims success at some of them.

  Args:
    points: (examples, time [B]) -> candidates [B, ...].
    claims: [runs, steps] of bools: when each run claims to have succeeded.
    runs: number of runs.
    nonfinite: [runs, steps]: when a run reports a non-finite gradient.
    name: of the attack.
    settings: of the spec.

  Returns:
    The spec.
  """
  claims = jnp.asarray(claims, bool).reshape(runs, -1)
  odd = None if nonfinite is None else jnp.asarray(nonfinite).reshape(runs, -1)
  last = claims.shape[1] - 1

  def step(examples, time):
    # Steps after the end, as in a chunk of iterations, must not count.
    at = jnp.minimum(time, last)
    report = Report(
        points(examples, time), claims[examples.runs, at], time >= last,
        jnp.zeros_like(time, bool),
        None if odd is None else odd[examples.runs, at])
    return time + 1, report

  return AttackSpec(
      name, lambda model, threat: BoundAttack(
          runs, lambda examples: jnp.zeros_like(examples.labels), step),
      settings=settings)
