"""Projected gradient ascent on the inputs.

From a start x'_0 in the ball around x, each of K steps of size eta computes

  x'_{k+1} = project( x'_k + eta * linear_maximizer( grad_x' loss(x'_k) ) ),

with both functions from the threat model: sign gradients and clipping for
L_inf, unit gradients and scaling for L_2. Entries of the gradient that are not
finite count as 0. Otherwise one NaN would spread over x' and end the attack.
FGSM is the single step of size epsilon from x; CW_inf is PGD on
`awp_jax.objectives.cw_margin`.

  >>> import jax, jax.numpy as jnp
  >>> from awp_jax.threat import ThreatModel
  >>> loss_fn = lambda x: x @ jnp.array([1.0, -2.0])
  >>> x = jnp.array([[0.5, 0.5]])
  >>> threat = ThreatModel('Linf', epsilon=0.25)
  >>> print(pgd(jax.random.key(0), loss_fn, x, threat, step_size=0.25,
  ...           num_steps=3))
  [[0.75 0.25]]
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.core import checks, loops, numerics
from awp_jax.threat import ThreatModel
from awp_jax.types import Array, InputLossFn, StatefulInputLossFn

Start = Literal['random', 'gaussian', 'zero']
STARTS: tuple[Start, ...] = ('random', 'gaussian', 'zero')

#: Standard deviation of the 'gaussian' start of TRADES and MART.
GAUSSIAN_START_STD = 0.001


class Attack(NamedTuple):
  """How `train_step` and `eval_step` attack inputs; see `pgd`.

  Attributes:
    step_size: eta > 0, in pixels of [0, 1].
    num_steps: K1 >= 1.
    start: 'random', 'gaussian', 'zero', or the starting inputs.
    restarts: random restarts >= 1.
    mode: whether the attacked model uses batch statistics ('train') or running
      statistics ('eval'); None means as in the objective's published code.
    algorithm: a function with the arguments and outputs of `pgd_with_state`,
      which `train_step` calls instead of it; it may ignore what it does not
      need. Its inputs are projected into the threat model. `eval_step` does not
      take it: `awp_jax.evaluate` runs other attacks.
  """

  step_size: float
  num_steps: int
  start: Start | Array = 'random'
  restarts: int = 1
  mode: Literal['train', 'eval'] | None = None
  algorithm: Callable[..., tuple[Array, Any]] | None = None


class PGDOutput(NamedTuple):
  """Result of an attack.

  Attributes:
    x_adv: x', shaped like x, in float32 or wider.
    state: the final state of the loss.
    nonfinite: [B], whether the start or a gradient of the example had an entry
      that is not finite.
  """

  x_adv: Array
  state: Any
  nonfinite: Array


def _start_point(
    key: Array, x: Array, threat: ThreatModel, start: Start | Array) -> Array:
  if not isinstance(start, str):
    return start.astype(x.dtype)
  if start == 'random':
    return threat.random_start(key, x)
  if start == 'gaussian':
    # Not clipped, as in the published code: the first step projects.
    return x + GAUSSIAN_START_STD * jax.random.normal(key, x.shape, x.dtype)
  return x


def check_settings(
    start: Start | Array, step_size: float, num_steps: int,
    restarts: int) -> None:
  """Raises a ValueError for settings that `pgd` does not take."""
  checks.positive('step_size', step_size)
  checks.count('num_steps', num_steps)
  checks.count('restarts', restarts)
  if isinstance(start, str) or not hasattr(start, 'shape'):
    checks.one_of('start', start, STARTS)
  if restarts > 1 and not (
      isinstance(start, str) and start in ('random', 'gaussian')):
    raise ValueError(
        f"restarts={restarts} needs a random start ('random' or 'gaussian'): "
        'other starts repeat the same attack.')


def check_start(start: Start | Array, x: Array) -> None:
  """Raises a ValueError for an array start unless it has the shape of x."""
  if not isinstance(start, str) and start.shape != x.shape:
    raise ValueError(
        f'an array start must have the shape of x, {x.shape}, got '
        f'{start.shape}.')


def _check(
    x: Array, start: Start | Array, step_size: float, num_steps: int,
    restarts: int) -> None:
  checks.floating('x', x)
  check_settings(start, step_size, num_steps, restarts)
  check_start(start, x)


def _any_nonfinite(x: Array) -> Array:
  """Whether any entry of each example is not finite, [B]."""
  return ~jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def run_pgd(
    key: Array, loss_fn: StatefulInputLossFn, state: Any, x: Array,
    threat: ThreatModel, *, step_size: float, num_steps: int,
    start: Start | Array = 'random', restarts: int = 1,
    gradient_floor: float = 0.0,
    broken_fn: Callable[[Array], Array] | None = None) -> PGDOutput:
  """`pgd_with_state` that also returns which gradients were not finite.

  Args:
    key: a PRNG key.
    loss_fn: (x', state) -> (losses [B], next state).
    state: any pytree of arrays.
    x: natural inputs [B, ...].
    threat: the ball and the box.
    step_size: as in `pgd`.
    num_steps: as in `pgd`.
    start: as in `pgd`.
    restarts: as in `pgd`.
    gradient_floor: added to |g|_2 where an L_2 step divides by it.
    broken_fn: x' [B, ...] -> bools [B], whether x' is misclassified. A
      misclassified restart is preferred to one with a higher loss.

  Returns:
    A `PGDOutput` in float32 or wider, since bfloat16 loses steps of 2 / 255.
  """
  _check(x, start, step_size, num_steps, restarts)
  x = numerics.wide(x)

  def summed(x_adv: Array, state: Any) -> tuple[Array, Any]:
    losses, state = loss_fn(x_adv, state)
    return jnp.sum(losses), state

  def ascend(carry: PGDOutput) -> PGDOutput:
    gradient, state = jax.grad(summed, has_aux=True)(carry.x_adv, carry.state)
    nonfinite = carry.nonfinite | _any_nonfinite(gradient)
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
    step = step_size * threat.linear_maximizer(gradient, gradient_floor)
    moved = carry.x_adv + step.astype(carry.x_adv.dtype)
    return PGDOutput(threat.project(moved, x), state, nonfinite)

  def attack(key: Array, state: Any) -> PGDOutput:
    first = _start_point(key, x, threat, start)
    return loops.repeat(
        num_steps, ascend, PGDOutput(first, state, _any_nonfinite(first)))

  if restarts == 1:
    return jax.lax.stop_gradient(attack(key, state))

  best, best_losses = x, jnp.full(x.shape[0], -jnp.inf)
  nonfinite = _any_nonfinite(x)
  for restart_key in jax.random.split(key, restarts):
    out = attack(restart_key, state)
    losses, state = loss_fn(out.x_adv, out.state)
    # A NaN loss counts as the highest: the model failed.
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
    if broken_fn is not None:
      losses = jnp.where(broken_fn(out.x_adv), jnp.inf, losses)
    better = losses > best_losses
    best_losses = jnp.where(better, losses, best_losses)
    best = jnp.where(
        better.reshape((-1,) + (1,) * (x.ndim - 1)), out.x_adv, best)
    nonfinite |= out.nonfinite
  return jax.lax.stop_gradient(PGDOutput(best, state, nonfinite))


def pgd_with_state(
    key: Array, loss_fn: StatefulInputLossFn, state: Any, x: Array,
    threat: ThreatModel, *, step_size: float, num_steps: int,
    start: Start | Array = 'random', restarts: int = 1,
    gradient_floor: float = 0.0) -> tuple[Array, Any]:
  """`pgd` on a loss with a state that every evaluation updates.

  The gradient does not flow through the state. Each step updates it once. With
  several restarts, the final losses of each restart update it once more.

  Args:
    key: a PRNG key.
    loss_fn: (x', state) -> (losses [B], next state).
    state: any pytree of arrays.
    x: natural inputs [B, ...].
    threat: the ball and the box.
    step_size: as in `pgd`.
    num_steps: as in `pgd`.
    start: as in `pgd`.
    restarts: as in `pgd`.
    gradient_floor: added to |g|_2 where an L_2 step divides by it.

  Returns:
    The adversarial inputs and the final state.
  """
  out = run_pgd(
      key, loss_fn, state, x, threat, step_size=step_size,
      num_steps=num_steps, start=start, restarts=restarts,
      gradient_floor=gradient_floor)
  return out.x_adv, out.state


def pgd(
    key: Array, loss_fn: InputLossFn, x: Array, threat: ThreatModel, *,
    step_size: float, num_steps: int, start: Start | Array = 'random',
    restarts: int = 1) -> Array:
  """Projected gradient ascent on per-example losses.

  Args:
    key: a PRNG key; used only by random starts.
    loss_fn: x' [B, ...] -> losses [B]. For a linen model in eval mode,
      `lambda x: cross_entropy(model.apply(variables, x), labels)`.
    x: natural inputs [B, ...], inside the box of `threat`.
    threat: the ball and the box.
    step_size: eta > 0, in the units of `x`.
    num_steps: K >= 1.
    start: 'random' (a random point of the ball), 'gaussian' (x + 0.001 N(0, 1),
      as in TRADES and MART), 'zero' (x itself), or the starting inputs as an
      array shaped like `x`, used unchanged.
    restarts: number of random starts; each example keeps the result with the
      highest final loss.

  Returns:
    x' shaped like `x`, inside ball and box, with no gradient through it; in
    float32 if `x` is narrower, since bfloat16 loses small steps.

  Raises:
    ValueError: for a step size, number of steps, start or number of restarts
      outside the ranges above.

  References:
    Madry et al., Towards Deep Learning Models Resistant to Adversarial
    Attacks, ICLR 2018.
  """
  x_adv, _ = pgd_with_state(
      key, lambda x_adv, state: (loss_fn(x_adv), state), (), x, threat,
      step_size=step_size, num_steps=num_steps, start=start, restarts=restarts)
  return x_adv


def fgsm(
    loss_fn: InputLossFn, x: Array, threat: ThreatModel, *,
    step_size: float | None = None) -> Array:
  """The fast gradient method: one step from `x`, of size epsilon by default.

  Args:
    loss_fn: x' [B, ...] -> losses [B].
    x: natural inputs [B, ...].
    threat: the ball and the box.
    step_size: eta > 0; None means `threat.epsilon`.

  Returns:
    x' shaped like `x`, with no gradient through it.

  References:
    Goodfellow, Shlens, Szegedy, Explaining and Harnessing Adversarial
    Examples, ICLR 2015.
  """
  x_adv, _ = pgd_with_state(
      jax.random.key(0), lambda x_adv, state: (loss_fn(x_adv), state), (), x,
      threat, step_size=threat.epsilon if step_size is None else step_size,
      num_steps=1, start='zero')
  return x_adv
