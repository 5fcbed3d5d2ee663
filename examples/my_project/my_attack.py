"""An attack for evaluations: random corners of the ball."""

from typing import Any

import jax
import jax.numpy as jnp

from awp_jax import AttackSpec, ThreatModel
from awp_jax.evaluation.model import Model, margins, misclassified
from awp_jax.evaluation.protocol import BoundAttack, Examples, Report, step_keys


def corner(num_steps: int = 20) -> AttackSpec:
  """Evaluates x + epsilon s with random signs s; it needs no gradient.

  Args:
    num_steps: number of corners for each image.
  """

  def build(model: Model, threat: ThreatModel) -> BoundAttack:

    def init(examples: Examples) -> Any:
      return jnp.zeros(len(examples.labels), jnp.int32)

    def step(examples: Examples, time: Any) -> tuple[Any, Report]:
      keys = step_keys(examples.keys, time)
      signs = jax.vmap(lambda key: jax.random.rademacher(
          key, examples.images.shape[1:], examples.images.dtype))(keys)
      candidates = threat.project(
          examples.images + threat.epsilon * signs, examples.images)
      logits = model.logits(candidates, keys)
      none = jnp.zeros(len(logits), bool)
      return time + 1, Report(
          candidates, broken=misclassified(logits, examples.labels),
          finished=time + 1 >= num_steps, zero_gradient=none,
          margin=margins(logits, examples.labels))

    return BoundAttack(1, init, step)

  return AttackSpec(
      'corner', build, white_box=False, settings={'num_steps': num_steps})
