"""Objectives: the losses that inputs ascend and weights descend.

Adversarial training uses two losses of one network f:

  x'  ascends   attack_loss(f(x'), f(x), y)             per example
  w   descends  mean of train_loss(f(x'), f(x), y)

An `Objective` is this pair, together with the details of its published code
that affect results, mostly through batch statistics. `adversarial` (Madry et
al. 2018), `trades` (Zhang et al. 2019) and `mart` (Wang et al. 2020) are those
of the AWP paper; `natural` is training without an adversary.

Labels y are integers [B], or probabilities [B, C] for mixed examples (mixup).

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[2.0, 0.0, -1.0]])
  >>> losses = trades(beta=6.0).train_loss(logits, logits, jnp.array([0]))
  >>> bool(jnp.allclose(losses, cross_entropy(logits, jnp.array([0]))))
  True
"""

from collections.abc import Callable
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.core import checks, numerics
from awp_jax.types import Array

Pass = Literal['adversarial', 'natural']
ObjectiveLoss = Callable[[Array, Array | None, Array], Array]


def _log_probabilities(logits: Array) -> Array:
  # Robust losses need small probabilities, which half precision would round.
  wide = numerics.wide(logits)
  return jax.nn.log_softmax(wide, axis=-1)


def _pick(values: Array, labels: Array) -> Array:
  return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def _without_label(values: Array, labels: Array) -> Array:
  """`values` with -inf at the label."""
  is_label = jax.nn.one_hot(labels, values.shape[-1], dtype=bool)
  return jnp.where(is_label, -jnp.inf, values)


def is_soft(labels: Array) -> bool:
  """Whether labels are probabilities [B, C] rather than integers [B]."""
  return jnp.issubdtype(jnp.asarray(labels).dtype, jnp.floating)


def hard_labels(labels: Array) -> Array:
  """The integers [B] of `labels`: the most probable class of soft ones."""
  return jnp.argmax(labels, axis=-1) if is_soft(labels) else labels


def is_correct(logits: Array, labels: Array) -> Array:
  """Whether the logits are finite and the label has the largest one.

  Non-finite logits count as incorrect: the argmax of NaN may be the label.

  Args:
    logits: [B, C].
    labels: integers [B], or probabilities [B, C]; the most probable class is
      the label.

  Returns:
    Bools [B].
  """
  is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
  predicted = jnp.argmax(logits, axis=-1)
  return is_finite & (predicted == hard_labels(labels).astype(predicted.dtype))


def cross_entropy(
    logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
  """Per-example cross-entropy, -sum_k q_k log softmax(z)_k.

  Args:
    logits: z [B, C], C >= 1.
    labels: integers [B] in [0, C), with q one-hot, or probabilities q [B, C].
    smoothing: s in [0, 1): the target becomes (1 - s) q + s / C (Szegedy et
      al. 2016).

  Returns:
    Losses [B], float32 or wider.
  """
  log_p = _log_probabilities(logits)
  if is_soft(labels):
    losses = -jnp.sum(labels * log_p, axis=-1)
  else:
    losses = -_pick(log_p, labels)
  if smoothing:
    losses = (1 - smoothing) * losses - smoothing * jnp.mean(log_p, axis=-1)
  return losses


def kl_divergence(logits: Array, other_logits: Array) -> Array:
  """KL(p || q) = sum_k p_k (log p_k - log q_k) of two softmax distributions.

  Finite for all finite logits: classes with p_k = 0 contribute zero.

  Args:
    logits: [B, C], of p.
    other_logits: [B, C], of q.

  Returns:
    Divergences [B], float32 or wider.
  """
  log_p = _log_probabilities(logits)
  log_q = _log_probabilities(other_logits)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def cw_margin(logits: Array, labels: Array) -> Array:
  """max_{k != y} z_k - z_y, the margin loss of Carlini and Wagner (2017).

  Positive exactly where the example is misclassified.

  Args:
    logits: [B, C], C >= 2.
    labels: integers [B].

  Returns:
    Margins [B], float32 or wider.
  """
  wide = numerics.wide(logits)
  return jnp.max(_without_label(wide, labels), axis=-1) - _pick(wide, labels)


class Objective(NamedTuple):
  """A pair of losses, with the conventions of its published code.

  `natural`, `adversarial`, `trades` and `mart` return the same object for equal
  arguments, so an objective can be a static argument of a jitted function.

  Attributes:
    name: 'AT', 'TRADES', 'MART' or 'natural'.
    attack_loss: (logits at x', logits at x or None, labels) -> losses [B],
      which the inputs ascend. Natural logits are passed, without a gradient, if
      `attack_uses_natural`. None: there is no attack, x' = x.
    train_loss: the same arguments -> losses [B]. The weights descend their
      mean, and the weight perturbation ascends it. The gradient flows through
      both logits.
    passes: the forward passes that `train_loss` needs, in the order in which
      they update the running statistics.
    attack_uses_natural: whether `attack_loss` reads the natural logits.
    attack_mode: whether the published attack runs the model with batch
      statistics ('train') or with running statistics ('eval').
    reference_passes: the forward passes at w + v that update the running
      statistics in the published code.
    reference_pass_after_update: whether the published code updates them in a
      further natural pass, at the new weights.
    gradient_floor: added by the published L_2 attack to the norm of the
      gradient of the *mean* loss, in the division.
  """

  name: str
  attack_loss: ObjectiveLoss | None
  train_loss: ObjectiveLoss
  passes: tuple[Pass, ...]
  attack_uses_natural: bool
  attack_mode: Literal['train', 'eval']
  reference_passes: tuple[Pass, ...]
  reference_pass_after_update: bool
  gradient_floor: float = 0.0


def check_smoothing(smoothing: float) -> None:
  """Raises ValueError unless the label smoothing is in [0, 1)."""
  checks.not_negative('label_smoothing', smoothing)
  if smoothing >= 1:
    raise ValueError(f'label_smoothing must be below 1, got {smoothing!r}.')


def _cached(make: Callable[..., Objective]) -> Callable[..., Objective]:
  """Caches objectives, so that equal arguments give one static object."""
  # 3.0 and np.float64(3.0) are equal but promote differently.
  cached = functools.lru_cache(maxsize=None, typed=True)(make)

  def find(*arguments: float) -> Objective:
    try:
      hash(arguments)
    except TypeError:  # a device array
      return make(*arguments)
    return cached(*arguments)

  return find


def natural(label_smoothing: float = 0.0) -> Objective:
  """Training without an adversary: CE(f(x), y).

  Args:
    label_smoothing: smoothing of the targets, in [0, 1).
  """
  check_smoothing(label_smoothing)
  return _natural(label_smoothing)


@_cached
def _natural(label_smoothing: float) -> Objective:

  def train_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    del natural
    return cross_entropy(logits, labels, label_smoothing)

  return Objective(
      'natural', attack_loss=None, train_loss=train_loss,
      passes=('adversarial',), attack_uses_natural=False, attack_mode='train',
      reference_passes=('adversarial',), reference_pass_after_update=False)


def adversarial(label_smoothing: float = 0.0) -> Objective:
  """Adversarial training: inputs ascend and weights descend CE(f(x'), y).

  Args:
    label_smoothing: smoothing of the targets in the train loss, in [0, 1). The
      inputs ascend the plain cross-entropy.

  References:
    Madry et al., Towards Deep Learning Models Resistant to Adversarial
    Attacks, ICLR 2018.
  """
  check_smoothing(label_smoothing)
  return _adversarial(label_smoothing)


@_cached
def _adversarial(label_smoothing: float) -> Objective:

  def attack_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    del natural
    return cross_entropy(logits, labels)

  def train_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    del natural
    return cross_entropy(logits, labels, label_smoothing)

  return Objective(
      'AT', attack_loss=attack_loss, train_loss=train_loss,
      passes=('adversarial',),
      attack_uses_natural=False, attack_mode='train',
      reference_passes=('adversarial',), reference_pass_after_update=True,
      gradient_floor=1e-10)


def trades(beta: float = 6.0, label_smoothing: float = 0.0) -> Objective:
  """TRADES: CE(f(x), y) + beta KL(f(x) || f(x')); the attack ascends the KL.

  Args:
    beta: the weight of the robust term, >= 0 (1 / lambda in the paper).
    label_smoothing: smoothing of the cross-entropy's targets, in [0, 1).

  References:
    Zhang et al., Theoretically Principled Trade-off between Robustness and
    Accuracy, ICML 2019.
  """
  checks.not_negative('beta', beta)
  check_smoothing(label_smoothing)
  return _trades(beta, label_smoothing)


@_cached
def _trades(beta: float, label_smoothing: float) -> Objective:

  def attack_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    del labels
    assert natural is not None
    return kl_divergence(natural, logits)

  def train_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    assert natural is not None
    robust = kl_divergence(natural, logits)
    return cross_entropy(natural, labels, label_smoothing) + beta * robust

  return Objective(
      'TRADES', attack_loss=attack_loss, train_loss=train_loss,
      passes=('adversarial', 'natural'), attack_uses_natural=True,
      attack_mode='eval',
      reference_passes=('adversarial', 'natural', 'natural'),
      reference_pass_after_update=False)


def mart(beta: float = 5.0, label_smoothing: float = 0.0) -> Objective:
  """MART: BCE(f(x'), y) + beta KL(p || p') (1.0000001 - p_y).

  Here p = softmax f(x), p' = softmax f(x'), k is the most probable wrong class
  at x', and

    BCE = CE(f(x'), y) - log(1.0001 - p'_k + 1e-12).

  The attack ascends CE(f(x'), y). The published code also adds 1e-12 to p' in
  the logarithm of the KL term; here that logarithm is exact. For soft labels, y
  is the most probable class except in the cross-entropy.

  Args:
    beta: the weight of the second term, >= 0.
    label_smoothing: smoothing of the cross-entropy's targets, in [0, 1).

  References:
    Wang et al., Improving Adversarial Robustness Requires Revisiting
    Misclassified Examples, ICLR 2020.
  """
  checks.not_negative('beta', beta)
  check_smoothing(label_smoothing)
  return _mart(beta, label_smoothing)


@_cached
def _mart(beta: float, label_smoothing: float) -> Objective:

  def attack_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    del natural
    return cross_entropy(logits, labels)

  def train_loss(logits: Array, natural: Array | None, labels: Array) -> Array:
    assert natural is not None
    hard = hard_labels(labels)
    adversarial = jnp.exp(_log_probabilities(logits))
    rival = jnp.max(_without_label(adversarial, hard), axis=-1)
    boosted = cross_entropy(
        logits, labels, label_smoothing) - jnp.log(1.0001 - rival + 1e-12)
    true_probability = jnp.exp(-cross_entropy(natural, hard))
    weighted = kl_divergence(natural, logits) * (1.0000001 - true_probability)
    return boosted + beta * weighted

  return Objective(
      'MART', attack_loss=attack_loss, train_loss=train_loss,
      passes=('natural', 'adversarial'), attack_uses_natural=False,
      attack_mode='eval', reference_passes=('natural', 'adversarial'),
      reference_pass_after_update=False)
