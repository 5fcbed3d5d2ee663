"""Robust training steps for any model, with or without batch statistics.

`train_step` attacks the inputs, perturbs the weights, applies the optimizer and
updates the batch statistics under a named policy. Per mini-batch, with A
alternations of K1 input steps and K2 weight steps,

  v = 0, x' = start
  A times:   x' <- K1 steps of PGD at w + v
             v  <- K2 steps of gamma / (A K2) on the train loss at w + v
  w <- optimizer(w + v, grad at w + v) - v.

It is a pure function: jit or pmap it with the keywords closed over.
`eval_step` measures natural and robust accuracy on a batch.

  >>> import jax, jax.numpy as jnp, optax
  >>> from awp_jax import methods, objectives, threat
  >>> def forward_fn(params, batch_stats, x, train, key):
  ...   return x @ params['kernel'], batch_stats
  >>> state = TrainState.create(
  ...     forward_fn=forward_fn, params={'kernel': jnp.eye(2)},
  ...     tx=optax.sgd(0.1))
  >>> batch = jnp.array([[0.75, 0.25], [0.25, 0.5]]), jnp.array([0, 1])
  >>> state, metrics = train_step(
  ...     state, batch, jax.random.key(0), objective=objectives.adversarial(),
  ...     threat=threat.ThreatModel('Linf', 0.125), attack=Attack(0.125, 1),
  ...     perturbation=methods.awp(0.25))
  >>> print(int(state.step), f'{metrics.perturbation_ratio:.2f}')
  1 0.25
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax import objectives
from awp_jax.attacks import pgd as pgd_lib
from awp_jax.attacks.pgd import Attack as Attack
from awp_jax.core import checks, numerics
from awp_jax.objectives import Objective, Pass
from awp_jax.perturbation import leaves, methods, perturbed_step, value_and_grad
from awp_jax.perturbation.base import Method, MethodState
from awp_jax.threat import ThreatModel
from awp_jax.training import alternation, parts
from awp_jax.training.eval_step import EvalMetrics as EvalMetrics
from awp_jax.training.eval_step import eval_step as eval_step
from awp_jax.training.state import TrainState as TrainState
from awp_jax.training.state import check_memory, forward
from awp_jax.types import Array, Params

Statistics = Literal['perturbed', 'reference']
STATISTICS: tuple[Statistics, ...] = ('perturbed', 'reference')
MODES = ('train', 'eval')

#: The method used for `perturbation=None`.
_OFF = methods.awp(0)


class TrainMetrics(NamedTuple):
  """Metrics of `train_step`, averaged over the global batch.

  Attributes:
    loss: the train loss at w + v, before the update.
    robust_accuracy: the accuracy on adversarial examples at w + v, in [0, 1];
      natural accuracy if the objective has no attack. Non-finite logits count
      as incorrect.
    gradient_norm: |G|_2 over all parameters.
    perturbation_ratio: |v|_2 / |w|_2 over the perturbed leaves; 0 in steps
      without weight perturbation.
    unperturbed_loss: the train loss at w, with the x' of the first round, if
      the step evaluated it on the whole batch; else infinity.
  """

  loss: Array
  robust_accuracy: Array
  gradient_norm: Array
  perturbation_ratio: Array
  unperturbed_loss: Array


def _per_example(
    objective: Objective, name: str, losses: Array, labels: Array) -> Array:
  """The losses of an objective; raises ValueError unless they are [B]."""
  if jnp.shape(losses) != (len(labels),):
    raise ValueError(
        f'{name} of objective {objective.name!r} must return losses of shape '
        f'({len(labels)},), one per example, got {jnp.shape(losses)}.')
  return losses


def _weight_loss(
    state: TrainState, objective: Objective, passes: tuple[Pass, ...]
) -> Callable[..., tuple[Array, tuple[Any, Array]]]:
  """Returns the loss function of the weights.

  It maps (params, statistics, x', x, labels, dropout key) to the losses [B] and
  the pair of the next statistics and whether x' is classified correctly [B].
  `passes` is the order in which forward passes update the statistics; a
  repeated pass updates them again.
  """

  def loss_fn(
      params: Params, batch_stats: Any, x_adv: Array, natural: Array,
      labels: Array, dropout_key: Array) -> tuple[Array, tuple[Any, Array]]:
    images = {'adversarial': x_adv, 'natural': natural}
    logits: dict[str, Array] = {}
    for name in passes:
      logits[name], batch_stats = forward(
          state, params, batch_stats, images[name], train=True,
          key=dropout_key)
    adversarial = logits['adversarial']
    losses = _per_example(objective, 'train_loss', objective.train_loss(
        adversarial, logits.get('natural'), labels), labels)
    return losses, (batch_stats, objectives.is_correct(adversarial, labels))

  return loss_fn


def _attack_inputs(
    state: TrainState, params: Params, images: Array, labels: Array,
    batch_stats: Any, key: Array, start: pgd_lib.Start | Array, *,
    objective: Objective, threat: ThreatModel, attack: Attack, num_shares: int
) -> tuple[Array, Any]:
  """x' at `params`, and the running statistics after the attack's passes.

  The images are one of `num_shares` equal shares of the global batch.
  """
  attack_loss = objective.attack_loss
  assert attack_loss is not None
  train = (attack.mode or objective.attack_mode) == 'train'
  attack_key, dropout_key = jax.random.split(key)
  batch_size = images.shape[0] * num_shares

  def run(x: Array, batch_stats: Any) -> tuple[Array, Any]:
    return forward(
        state, params, batch_stats, x, train=train, key=dropout_key)

  natural = None
  if objective.attack_uses_natural:
    natural, _ = run(images, batch_stats)

  def loss_fn(x_adv: Array, batch_stats: Any) -> tuple[Array, Any]:
    logits, batch_stats = run(x_adv, batch_stats)
    losses = attack_loss(logits, natural, labels)
    return _per_example(
        objective, 'attack_loss', losses, labels), batch_stats

  found = (attack.algorithm or pgd_lib.pgd_with_state)(
      attack_key, loss_fn, batch_stats, images, threat,
      step_size=attack.step_size, num_steps=attack.num_steps, start=start,
      restarts=attack.restarts,
      gradient_floor=objective.gradient_floor * batch_size)
  if attack.algorithm is not None:
    found = _checked(found, images, threat)
  x_adv, moved = found
  if train and attack.restarts == 1:
    # The published attack ends with a forward pass that compares the losses of
    # its restarts, even if there is only one.
    _, moved = run(x_adv, moved)
  return x_adv, moved


def _checked(
    found: Any, images: Array, threat: ThreatModel) -> tuple[Array, Any]:
  """The result of an attack of the caller, projected into the threat model."""
  is_pair = isinstance(found, tuple) and len(found) == 2
  if not is_pair or jnp.shape(found[0]) != images.shape:
    got = (f'inputs of shape {jnp.shape(found[0])}' if is_pair
           else type(found).__name__)
    raise ValueError(
        'attack.algorithm must return (inputs, state) with inputs of shape '
        f'{images.shape}, got {got}.')
  x_adv, state = found
  # No gradient: the weights are perturbed and trained at fixed inputs.
  return jax.lax.stop_gradient(
      threat.project(x_adv.astype(images.dtype), images)), state


def _attack_fn(
    state: TrainState, images: Array, labels: Array, num_parts: int,
    axis_name: str | None, **settings: Any) -> alternation.AttackFn:
  """Returns the attack on the parts, as `alternation` calls it."""
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)

  def attack_fn(
      params: Params, batch_stats: Any, key: Array,
      start: pgd_lib.Start | Array) -> tuple[Array, Any]:
    if settings['objective'].attack_loss is None:
      return images, batch_stats
    named, arrays = ((start,), ()) if isinstance(start, str) else (
        (), (start,))

    def part_fn(*args: Any) -> tuple[Array, Any]:
      return _attack_inputs(
          state, params, *args, *named, num_shares=num_parts * devices,
          **settings)

    return parts.each(
        num_parts, part_fn, images, labels, batch_stats, key, *arrays)

  return attack_fn


def _check(
    batch: tuple[Array, Array], objective: Objective, attack: Attack,
    perturbation: Method | None, alternations: int, statistics: Statistics,
    accumulate: int) -> None:
  images, labels = batch
  checks.floating('images', images)
  checks.one_of('statistics', statistics, STATISTICS)
  checks.count('alternations', alternations)
  checks.count('accumulate', accumulate)
  checks.one_of('mode', attack.mode or objective.attack_mode, MODES)
  if attack.algorithm is not None and not callable(attack.algorithm):
    raise TypeError(
        'attack.algorithm must be a function like pgd_with_state, or None, got '
        f'{attack.algorithm!r}.')
  if perturbation is not None and not isinstance(perturbation, Method):
    raise TypeError(
        'perturbation must be a Method, such as awp_jax.methods.awp(0.01), or '
        f'None, got {perturbation!r}.')
  if alternations > 1 and attack.restarts > 1:
    raise ValueError(
        f'alternations={alternations} continue one attack; '
        f'restarts={attack.restarts} run several. One of them must be 1.')
  size, rest = divmod(len(labels), accumulate)
  if rest:
    raise ValueError(
        f'accumulate={accumulate} must divide the batch of {len(labels)} '
        'images on every device.')
  if objective.attack_loss is not None and (
      accumulate > 1 or attack.algorithm is not None):
    pgd_lib.check_settings(
        attack.start, attack.step_size, attack.num_steps, attack.restarts)
    pgd_lib.check_start(attack.start, images)
  if perturbation and perturbation.natural_batch == 'other' and size < 2:
    raise ValueError(
        f'method {perturbation.name!r} halves the batch: it needs at least two '
        f'images in every part on every device, got {size}.')


def train_step(
    state: TrainState, batch: tuple[Array, Array], key: Array, *,
    objective: Objective, threat: ThreatModel, attack: Attack,
    perturbation: Method | None = None, alternations: int = 1,
    statistics: Statistics = 'perturbed', axis_name: str | None = None,
    accumulate: int = 1) -> tuple[TrainState, TrainMetrics]:
  """One step of adversarial training, with or without weight perturbation.

  Args:
    state: model, parameters, running statistics, optimizer state, step count.
    batch: (images, labels); under an axis, this device's part. Images [B, ...]
      are floating, in the threat model's box, and cast to float32 if narrower,
      since small attack steps vanish in bfloat16. Labels are integers [B], or
      probabilities [B, C] for mixed examples.
    key: the run's PRNG key, the same in every step and on every device. The
      step count is folded in, and under an axis the device's index.
    objective: the losses that inputs ascend and weights descend.
    threat: the ball and the box.
    attack: the attack on the inputs.
    perturbation: the weight perturbation, a method of `awp_jax.methods`, or
      None. Methods with a memory need a state from
      `TrainState.create(method=...)`.
    alternations: A >= 1, the number of rounds of input and weight steps. Each
      attack continues from the x' of the previous round. Steps skipped by the
      method's `start` and `every` make one round.
    statistics: which forward passes update the running statistics. 'perturbed':
      only those of `train_loss` at w + v. 'reference': those of the published
      code; for AT every pass of the attack, another at x', the pass at w + v,
      and a natural pass at the new weights.
    axis_name: under `pmap` or `shard_map`, the axis that shards the batch.
      Gradients, statistics and metrics are averaged over it, and there is one v
      for the global batch. The attack does not communicate, unless the model
      averages its batch statistics over the axis.
    accumulate: the number M >= 1 of equal parts that the (device's) batch is
      split into. They are processed in turn, so activations need the memory of
      one part, except on the CPU, where the parts are unrolled. A step has one
      v and one update, from gradients averaged over the parts. The result is
      that of M devices: noise and batch statistics are those of each part, the
      latter averaged over the m-th parts of all devices if the model averages
      them over the axis. The parts are contiguous rows; for a batch sharded
      over devices, use `axis_name`.

  Returns:
    The next state and the step's metrics.

  Raises:
    TypeError: if `perturbation` is not a method, or the model cannot be called.
    ValueError: if an argument is out of range, images are not floating, or the
      state's memory does not match the method. Raised before compilation.
  """
  _check(
      batch, objective, attack, perturbation, alternations, statistics,
      accumulate)
  if perturbation is not None:
    check_memory(state, perturbation)
  method = perturbation or _OFF
  images, labels = parts.split(
      accumulate, (numerics.wide(batch[0]), batch[1]))
  attack_key, dropout_key = parts.step_keys(
      accumulate, key, state.step, axis_name)
  as_published = statistics == 'reference'
  ascent_fn, descent_fn = value_and_grad.gradient_fns(
      method, _weight_loss(
          state, objective,
          objective.reference_passes if as_published else objective.passes),
      has_aux=True, axis_name=axis_name, num_parts=accumulate)
  inputs = alternation.AlternationInputs(
      state.params, images, labels, dropout_key, method,
      MethodState(jnp.asarray(state.step), state.memory),
      _attack_fn(
          state, images, labels, accumulate, axis_name, objective=objective,
          threat=threat, attack=attack),
      ascent_fn, descent_fn, as_published, accumulate)
  # All devices share one noise draw, so the device index is not folded in.
  noise_key = jax.random.fold_in(key, 2**32 - 1)
  out = alternation.descend(inputs, alternation.alternate(
      inputs, parts.split(accumulate, attack.start),
      parts.copies(accumulate, state.batch_stats), attack_key, noise_key,
      alternations))
  batch_stats, is_right = out.aux
  params, opt_state = perturbed_step.apply_at_perturbed(
      state.tx, state.params, state.opt_state, out.perturbation, out.gradients,
      update_at=method.update_at, value=out.loss)
  if as_published and objective.reference_pass_after_update:
    batch_stats = parts.each(accumulate, lambda *args: forward(
        state, params, args[0], args[1], train=True, key=args[2])[1],
        batch_stats, images, dropout_key)
  metrics = TrainMetrics(
      loss=out.loss,
      robust_accuracy=parts.device_mean(
          jnp.mean(is_right, dtype=jnp.float32), axis_name),
      gradient_norm=leaves.global_norm(out.gradients),
      perturbation_ratio=leaves.relative_norm(
          out.perturbation, state.params, method.chosen(state.params)),
      unperturbed_loss=out.unperturbed_loss)
  return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state,
      memory=out.state.memory,
      batch_stats=parts.device_mean(
          parts.mean(accumulate, batch_stats), axis_name)), metrics
