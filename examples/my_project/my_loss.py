"""An objective: a mean of the losses at adversarial and natural images."""

import jax
import ml_collections

import awp_jax


def half_natural(
    config: ml_collections.FrozenConfigDict) -> awp_jax.Objective:
  """(1 - a) CE(f(x'), y) + a CE(f(x), y); the attack ascends CE(f(x'), y).

  Goodfellow et al., Explaining and Harnessing Adversarial Examples, ICLR 2015.

  Args:
    config: its field `user.natural_weight` is a.

  Returns:
    The objective, whose attributes `awp_jax.Objective` describes.
  """
  weight = config.user.natural_weight
  if not 0 <= weight <= 1:
    raise ValueError(f'user.natural_weight must be in [0, 1], got {weight!r}.')

  def attack_loss(
      logits: jax.Array, natural: jax.Array | None, labels: jax.Array
  ) -> jax.Array:
    del natural
    return awp_jax.cross_entropy(logits, labels)

  def train_loss(
      logits: jax.Array, natural: jax.Array | None, labels: jax.Array
  ) -> jax.Array:
    assert natural is not None
    return (1 - weight) * awp_jax.cross_entropy(logits, labels) + (
        weight * awp_jax.cross_entropy(natural, labels))

  return awp_jax.Objective(
      'half natural', attack_loss, train_loss,
      passes=('natural', 'adversarial'), attack_uses_natural=False,
      attack_mode='train', reference_passes=('natural', 'adversarial'),
      reference_pass_after_update=False)
