"""Robust training steps for flax.linen networks with batch statistics.

`train_step` composes everything below it: the inputs ascend (attacks), the
weights are perturbed (weights), the optimizer descends, batch statistics move
under a named policy. Per mini-batch, with A alternations of K1 input steps and
K2 weight steps,

  v = 0, x' = start
  A times:   x' <- K1 steps of PGD at w + v
             v  <- K2 steps of gamma / (A K2) on the train loss at w + v
  w <- optimizer(w + v, grad at w + v) - v.

It is a pure function: jit or pmap it with the keywords closed over.
`eval_step` measures natural and robust accuracy on a batch.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple

from flax.training import train_state
import jax
import jax.numpy as jnp

from awp_jax import averaging, checks, objectives, weights
from awp_jax.attacks import pgd as pgd_lib
from awp_jax.objectives import Objective, Pass
from awp_jax.perturbation import engine, gradients, leaves, methods
from awp_jax.perturbation.method import Method, MethodState
from awp_jax.threat import ThreatModel
from awp_jax.types import Array, Params, Scalar

Statistics = Literal['perturbed', 'reference']
STATISTICS: tuple[Statistics, ...] = ('perturbed', 'reference')
MODES = ('train', 'eval')


class TrainState(train_state.TrainState):
  """Flax's `TrainState` with running batch statistics.

  Attributes:
    batch_stats: the model's 'batch_stats' collection; {} if it has none.
    average: an `awp_jax.Average` that a caller keeps up to date, or None; a
      step hands it on as it is.
    memory: what the weight perturbation carries, `method.init(params).memory`;
      () for methods that carry nothing. Its step count is the state's own.
  """

  batch_stats: Any
  average: averaging.Average | None = None
  memory: Any = ()


class Attack(NamedTuple):
  """How `train_step` and `eval_step` attack inputs; see `awp_jax.attacks.pgd`.

  Attributes:
    step_size: eta > 0, in pixels of [0, 1].
    num_steps: K1 >= 1.
    start: 'random', 'gaussian', 'zero', or inputs to start from.
    restarts: random restarts >= 1.
    mode: whether the attacked model runs with batch statistics ('train') or
      running ones ('eval'); None means as the objective's published code.
  """

  step_size: float
  num_steps: int
  start: pgd_lib.Start | Array = 'random'
  restarts: int = 1
  mode: Literal['train', 'eval'] | None = None


class WeightPerturbation(NamedTuple):
  """How `train_step` perturbs weights; see `awp_jax.weights`.

  Attributes:
    gamma: |v_l| / |w_l|; the number 0 switches it off at no cost.
    num_steps: K2 >= 1, weight steps in each alternation.
    alternations: A >= 1, how often input and weight steps take turns.
    mask: which leaves: a predicate of (path, leaf), or a pytree of bools.
    decay_at: whether weight decay acts at 'perturbed' or 'natural' weights.
    method: any method of `awp_jax.methods`, which then takes the place of all
      the choices above but `alternations`; None is AWP with them.
  """

  gamma: Scalar = 0.0
  num_steps: int = 1
  alternations: int = 1
  mask: weights.Mask = weights.is_weight
  decay_at: weights.DecayAt = 'perturbed'
  method: Method | None = None

  def as_method(self) -> Method:
    """The choices as a record for the engine."""
    return self.method or methods.awp(
        self.gamma, num_steps=self.num_steps, mask=self.mask,
        decay_at=self.decay_at)


class TrainMetrics(NamedTuple):
  """What `train_step` reports, averaged over the global batch.

  Attributes:
    loss: the train loss at w + v, before the update.
    robust_accuracy: of the adversarial examples at w + v, in [0, 1]; natural
      accuracy where the objective has no attack.
    gradient_norm: |G|_2 over all parameters.
    perturbation_ratio: |v|_2 / |w|_2 over the perturbed leaves; 0 without AWP.
  """

  loss: Array
  robust_accuracy: Array
  gradient_norm: Array
  perturbation_ratio: Array


class EvalMetrics(NamedTuple):
  """Sums over the valid examples of a batch (and, under an axis, over devices).

  Attributes:
    examples: how many examples are valid.
    natural_loss: sum of cross-entropies at x.
    natural_correct: how many are classified right at x.
    robust_loss: sum of cross-entropies at x'.
    robust_correct: how many are classified right at x' and at x.
  """

  examples: Array
  natural_loss: Array
  natural_correct: Array
  robust_loss: Array
  robust_correct: Array


def _forward(
    state: TrainState, params: Params, batch_stats: Any, images: Array, *,
    train: bool, dropout_key: Array | None = None) -> tuple[Array, Any]:
  """Logits and the next running statistics, which move in train mode only."""
  variables = {'params': params, 'batch_stats': batch_stats}
  if not train:
    return state.apply_fn(variables, images, train=False), batch_stats
  rngs = None if dropout_key is None else {'dropout': dropout_key}
  logits, moved = state.apply_fn(
      variables, images, train=True, mutable=['batch_stats'], rngs=rngs)
  return logits, moved.get('batch_stats', batch_stats)


def _device_key(
    key: Array, step: int | Array, axis_name: str | None) -> Array:
  """The key of this step; under an axis, each device's own."""
  key = jax.random.fold_in(key, step)
  if axis_name is None:
    return key
  return jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def _mean(tree: Any, axis_name: str | None) -> Any:
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _weight_loss(
    state: TrainState, objective: Objective, passes: tuple[Pass, ...],
    dropout_key: Array
) -> Callable[..., tuple[Array, tuple[Any, Array]]]:
  """The losses of the weights, and what they leave behind.

  It maps (params, statistics, x', x, labels) to the losses [B] and the pair of
  the next statistics and whether x' is classified right [B]. `passes` is the
  order in which forward passes move the statistics; one that appears twice
  moves them twice.
  """

  def loss_fn(
      params: Params, batch_stats: Any, x_adv: Array, natural: Array,
      labels: Array) -> tuple[Array, tuple[Any, Array]]:
    images = {'adversarial': x_adv, 'natural': natural}
    logits: dict[str, Array] = {}
    for name in passes:
      logits[name], batch_stats = _forward(
          state, params, batch_stats, images[name], train=True,
          dropout_key=dropout_key)
    adversarial = logits['adversarial']
    losses = objective.train_loss(adversarial, logits.get('natural'), labels)
    is_right = jnp.argmax(adversarial, axis=-1) == objectives.hard_labels(
        labels)
    return losses, (batch_stats, is_right)

  return loss_fn


def _attack_inputs(
    state: TrainState, params: Params, batch_stats: Any, images: Array,
    labels: Array, key: Array, *, objective: Objective, threat: ThreatModel,
    attack: Attack, start: pgd_lib.Start | Array,
    axis_name: str | None) -> tuple[Array, Any]:
  """x' at `params`, and the running statistics after the attack's passes."""
  if objective.attack_loss is None:
    return images, batch_stats
  attack_loss = objective.attack_loss
  train = (attack.mode or objective.attack_mode) == 'train'
  attack_key, dropout_key = jax.random.split(key)
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  batch_size = images.shape[0] * devices

  def forward(x: Array, batch_stats: Any) -> tuple[Array, Any]:
    return _forward(
        state, params, batch_stats, x, train=train, dropout_key=dropout_key)

  natural = None
  if objective.attack_uses_natural:
    natural, _ = jax.lax.stop_gradient(forward(images, batch_stats))

  def loss_fn(x_adv: Array, batch_stats: Any) -> tuple[Array, Any]:
    logits, batch_stats = forward(x_adv, batch_stats)
    return attack_loss(logits, natural, labels), batch_stats

  x_adv, moved = pgd_lib.pgd_with_state(
      attack_key, loss_fn, batch_stats, images, threat,
      step_size=attack.step_size, num_steps=attack.num_steps, start=start,
      restarts=attack.restarts,
      gradient_floor=objective.gradient_floor * batch_size)
  if train and attack.restarts == 1:
    # The published attack ends with one more forward pass, which compares the
    # losses of its restarts, even of a single one.
    _, moved = forward(x_adv, moved)
  return x_adv, jax.lax.stop_gradient(moved)


def _pass(
    gradient_fn: Callable[..., Any], args: tuple[Any, ...], params: Params
) -> Any:
  return gradient_fn(params, *args)


def _check(
    objective: Objective, attack: Attack, perturbation: WeightPerturbation,
    statistics: Statistics) -> None:
  checks.one_of('statistics', statistics, STATISTICS)
  checks.not_negative('gamma', perturbation.gamma)
  checks.count('num_steps of the weight perturbation', perturbation.num_steps)
  checks.count('alternations', perturbation.alternations)
  checks.one_of('decay_at', perturbation.decay_at, weights.DECAY_AT)
  checks.one_of('mode', attack.mode or objective.attack_mode, MODES)
  if perturbation.alternations > 1 and attack.restarts > 1:
    raise ValueError(
        f'alternations={perturbation.alternations} continue one attack; '
        f'restarts={attack.restarts} make several. One of them must be 1.')


def train_step(
    state: TrainState, batch: tuple[Array, Array], key: Array, *,
    objective: Objective, threat: ThreatModel, attack: Attack,
    perturbation: WeightPerturbation = WeightPerturbation(),
    statistics: Statistics = 'perturbed', axis_name: str | None = None,
) -> tuple[TrainState, TrainMetrics]:
  """One step of adversarial training, with or without weight perturbation.

  Args:
    state: parameters, running statistics, optimizer state and step count.
    batch: (images [B, ...] in the threat model's box, labels: integers [B], or
      probabilities [B, C] for mixed examples); under an axis, this device's
      part.
    key: the run's PRNG key. The step count is folded in here, and under an axis
      the device's index, so the same key serves every step and device.
    objective: what inputs ascend and weights descend.
    threat: the ball and the box.
    attack: the attack on the inputs.
    perturbation: the perturbation of the weights; none by default.
    statistics: which forward passes move the running statistics. 'perturbed':
      those of the pass at w + v only. 'reference': those of the published code;
      for AT every pass of the attack, one more at x', the one at w + v, and a
      natural one at the new weights.
    axis_name: under `pmap` or `shard_map`, the axis that the batch is spread
      over. Gradients, statistics and metrics are averaged over it; there is
      one v for the global batch. The attack communicates nothing.

  Returns:
    The next state and the step's metrics.

  Raises:
    ValueError: for arguments out of range, before anything is compiled.
  """
  _check(objective, attack, perturbation, statistics)
  images, labels = batch
  if perturbation.as_method().natural_batch == 'other' and len(labels) < 2:
    raise ValueError(
        f'method {perturbation.as_method().name!r} halves the batch: it needs '
        f'two images on every device at least, got {len(labels)}.')
  attack_key, dropout_key = jax.random.split(
      _device_key(key, state.step, axis_name))
  as_published = statistics == 'reference'
  batch_stats = state.batch_stats
  loss_fn = _weight_loss(
      state, objective,
      objective.reference_passes if as_published else objective.passes,
      dropout_key)
  method = perturbation.as_method()
  ascent_fn, descent_fn = gradients.gradient_fns(
      method, loss_fn, has_aux=True, axis_name=axis_name)
  method_state = MethodState(jnp.asarray(state.step), state.memory)
  # Methods of two batches halve this one.
  is_halved = method.natural_batch == 'other' and not method.is_off
  rows = slice(0, None, 2) if is_halved else slice(None)

  # With nothing to alternate with, one round of the attack is all there is.
  rounds = 1 if method.is_off else perturbation.alternations
  # The noise is one draw for all devices: this key knows no device.
  noise_key = jax.random.fold_in(key, 2**32 - 1)
  ascent = engine.begin(method, method_state, noise_key)
  x_adv = attack.start
  for i, round_key in enumerate(jax.random.split(attack_key, rounds)):
    x_adv, moved = _attack_inputs(
        state, leaves.perturb(state.params, ascent.perturbation), batch_stats,
        images, labels, round_key, objective=objective, threat=threat,
        attack=attack, start=attack.start if i == 0 else x_adv,
        axis_name=axis_name)
    if as_published:
      batch_stats = moved
    passed = (batch_stats, x_adv[rows], images[rows], labels[rows])
    ascent = engine.ascend(
        method, method_state, ascent, state.params,
        functools.partial(_pass, ascent_fn, passed), rounds=rounds)

  natural_fn = None
  if is_halved:
    others = slice(1, None, 2)
    natural_fn = functools.partial(_pass, descent_fn, (
        batch_stats, x_adv[others], images[others], labels[others]))
  out = engine.descend(
      method, method_state, ascent, state.params,
      functools.partial(_pass, descent_fn, passed), natural_fn)
  batch_stats, is_right = out.aux
  params, opt_state = weights.apply_at_perturbed(
      state.tx, state.params, state.opt_state, out.perturbation, out.gradients,
      decay_at=method.decay_at)
  if as_published and objective.reference_pass_after_update:
    _, batch_stats = _forward(
        state, params, batch_stats, images, train=True, dropout_key=dropout_key)

  metrics = TrainMetrics(
      loss=out.loss,
      robust_accuracy=_mean(jnp.mean(is_right, dtype=jnp.float32), axis_name),
      gradient_norm=weights.global_norm(out.gradients),
      perturbation_ratio=weights.relative_norm(
          out.perturbation, state.params, method.mask))
  return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state,
      memory=out.state.memory,
      batch_stats=_mean(batch_stats, axis_name)), metrics


def eval_step(
    state: TrainState, batch: tuple[Array, Array, Array], key: Array, *,
    threat: ThreatModel, attack: Attack, axis_name: str | None = None,
) -> EvalMetrics:
  """Natural and robust accuracy on a batch, with the running statistics.

  The attack ascends the cross-entropy, whatever the objective of training was.

  Args:
    state: the model, its parameters and running statistics.
    batch: (images [B, ...], labels [B], valid [B] bools); examples that are not
      valid fill up a batch and count for nothing.
    key: a PRNG key, the batch's own; under an axis the device's index is folded
      in.
    threat: the ball and the box.
    attack: the attack; its mode is 'eval' whatever it says.
    axis_name: the axis of the devices, or None; sums run over it.

  Returns:
    Sums over the valid examples.
  """
  images, labels, valid = batch
  if axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

  def logits_fn(x: Array) -> Array:
    return _forward(state, state.params, state.batch_stats, x, train=False)[0]

  x_adv = pgd_lib.pgd(
      key, lambda x: objectives.cross_entropy(logits_fn(x), labels), images,
      threat, step_size=attack.step_size, num_steps=attack.num_steps,
      start=attack.start, restarts=attack.restarts)
  natural, robust = logits_fn(images), logits_fn(x_adv)
  is_natural = valid & (jnp.argmax(natural, axis=-1) == labels)
  is_robust = is_natural & (jnp.argmax(robust, axis=-1) == labels)

  def total(values: Array) -> Array:
    return jnp.sum(jnp.where(valid, values, 0), dtype=jnp.float32)

  metrics = EvalMetrics(
      examples=total(valid),
      natural_loss=total(objectives.cross_entropy(natural, labels)),
      natural_correct=total(is_natural),
      robust_loss=total(objectives.cross_entropy(robust, labels)),
      robust_correct=total(is_robust))
  return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)
