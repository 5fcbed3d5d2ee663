"""The compiled functions of a run: the training step and evaluation by PGD."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from experiments.data import batches
from experiments.parallel import mapping, placement
from experiments.runs import precision
from experiments.runs import run as run_lib
from experiments.training import training_data


class Sums(NamedTuple):
  """Sums of the step's metrics over the images of an epoch, on the device."""

  loss: Any
  robust_accuracy: Any
  gradient_norm: Any
  perturbation_ratio: Any
  images: Any


def zero_sums() -> Sums:
  """The sums at the start of an epoch."""
  return Sums(*(np.zeros((), np.float32) for _ in Sums._fields))


def to_tree(state: awp_jax.TrainState, sums: Sums) -> dict[str, Any]:
  """The contents of a checkpoint, as a tree of arrays."""
  tree = {
      'step': jnp.asarray(state.step, jnp.int32), 'params': state.params,
      'batch_stats': state.batch_stats, 'opt_state': state.opt_state,
      'sums': sums}
  if state.average is not None:
    tree['average'] = state.average._asdict()
  if jax.tree.leaves(state.memory):
    tree['memory'] = state.memory
  return tree


def from_tree(
    state: awp_jax.TrainState, tree: dict[str, Any]
) -> tuple[awp_jax.TrainState, Sums]:
  """State and sums of a checkpoint; `state` supplies model and optimizer."""
  average = tree.get('average')
  return state.replace(
      step=tree['step'], params=tree['params'],
      batch_stats=tree['batch_stats'], opt_state=tree['opt_state'],
      average=None if average is None else awp_jax.Average(**average),
      memory=tree.get('memory', state.memory),
  ), Sums(*tree['sums'])


def evaluated(state: awp_jax.TrainState) -> awp_jax.TrainState:
  """The state to evaluate: with the averaged weights, if there are any."""
  if state.average is None:
    return state
  return state.replace(
      params=state.average.params, batch_stats=state.average.batch_stats)


def make_train_fn(
    run: run_lib.Run, size: int, factor: float,
    devices: Sequence[jax.Device] | None = None) -> Any:
  """The mapped step: (state, sums, data, order, keys, device numbers).

  It returns the next state and sums. The keys are arguments, so runs of several
  seeds share a compilation cache. If images are streamed, the step takes its
  rows instead of the data, and None instead of the order.

  Args:
    run: the run.
    size: number of images per batch, over all devices.
    factor: multiplies the size of the config's weight perturbation; 0 during
      warm-up and in steps that the method skips.
    devices: as for `mapping.over_devices`.

  Returns:
    A mapped function that donates the state and sums passed to it.
  """
  config = run.config
  # Two programs, chosen on the host, instead of a branch in one: convolutions
  # inside a branch are slow on CPUs.
  perturbation = awp_jax.methods.scaled(
      dataclasses.replace(run.setup.perturbation, start=0, every=1), factor)

  def step(
      state: awp_jax.TrainState, sums: Sums,
      source: training_data.TrainingData | training_data.Rows, order: Any,
      keys: dict[str, Any], device: Any
  ) -> tuple[awp_jax.TrainState, Sums]:
    number = jnp.asarray(state.step)
    batch = training_data.device_batch(
        run, source, order, keys, number, size, device)
    state, metrics = awp_jax.train_step(
        state, batch, keys['step'],
        objective=run.setup.objective, threat=run.setup.threat,
        attack=run.setup.attack, perturbation=perturbation,
        alternations=run.setup.alternations,
        statistics=config.statistics, axis_name=mapping.AXIS,
        accumulate=config.accumulate)
    if state.average is not None:
      state = state.replace(average=awp_jax.update_average(
          state.average, state.params, state.batch_stats,
          awp_jax.ema_decay(config.ema_decay, number)))
    means = metrics._asdict() | {'images': 1}
    return state, Sums(*(
        (total + size * means[name]).astype(jnp.float32)
        for name, total in sums._asdict().items()))

  is_split = training_data.is_streamed(run) and not (
      training_data.needs_all_rows(run))
  return mapping.over_devices(
      step, rows=(2, 5) if is_split else (5,), donate=(0, 1),
      devices=devices)


def make_eval_fn(
    run: run_lib.Run, devices: Sequence[jax.Device] | None = None) -> Any:
  """The mapped evaluation: (state, images, labels, valid, key) -> sums.

  Networks are evaluated in float32, whatever their training precision.

  Args:
    run: the run.
    devices: as for `mapping.over_devices`.

  Returns:
    The mapped function.
  """
  network = precision.network(run.model)

  def apply(variables: Any, images: Any, train: bool) -> Any:
    del train
    return precision.logits(network, precision.variables(variables), images)

  def step(
      state: awp_jax.TrainState, images: Any, labels: Any, valid: Any, key: Any
  ) -> awp_jax.EvalMetrics:
    pixels = batches.to_pixels(images, jnp.dtype(jnp.float32))
    return awp_jax.eval_step(
        state.replace(apply_fn=apply), (pixels, labels, valid), key,
        threat=run.setup.threat, attack=run.setup.eval_attack,
        axis_name=mapping.AXIS)

  return mapping.over_devices(step, rows=(1, 2, 3), devices=devices)


class Interrupted(Exception):
  """An evaluation ended early, because the run is to stop."""


def _never() -> bool:
  return False


def evaluate_split(
    run: run_lib.Run, eval_fn: Callable[..., Any], state: awp_jax.TrainState,
    images: np.ndarray, labels: np.ndarray, key: Any,
    is_stopping: Callable[[], bool] = _never) -> dict[str, float]:
  """Natural and robust accuracy and loss on one split.

  Args:
    run: the run.
    eval_fn: from `make_eval_fn`.
    state: the model.
    images: [N, H, W, C].
    labels: [N].
    key: a PRNG key; each batch folds in its number.
    is_stopping: whether to end early, asked before each batch.

  Returns:
    Means by name; accuracies in [0, 1]. 'nonfinite' is the share of examples
    with non-finite logits or gradients, on which the attack was weaker.

  Raises:
    Interrupted: if it ended early.
  """
  size = run.config.eval.batch_size
  pending: list[awp_jax.EvalMetrics] = []
  for number in range(math.ceil(len(images) / size)):
    # Two batches are under way, so a stop does not wait for all of them.
    jax.block_until_ready(pending[-2:-1])
    if is_stopping():
      raise Interrupted
    part = slice(number * size, (number + 1) * size)
    x, y = images[part], labels[part]
    valid = np.arange(size) < len(x)
    x = np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
    y = np.pad(y, (0, size - len(y)))
    pending.append(eval_fn(
        state, *placement.split((x, y, valid)),
        placement.replicate(jax.random.fold_in(key, number))))
  sums = jax.tree.map(lambda *values: float(np.sum(values)),
                      *jax.device_get(pending))
  return {
      'natural_accuracy': sums.natural_correct / sums.examples,
      'robust_accuracy': sums.robust_correct / sums.examples,
      'natural_loss': sums.natural_loss / sums.examples,
      'robust_loss': sums.robust_loss / sums.examples,
      'nonfinite': sums.nonfinite / sums.examples}


def evaluate(
    run: run_lib.Run, eval_fn: Callable[..., Any], state: awp_jax.TrainState,
    is_stopping: Callable[[], bool] = _never) -> dict[str, float]:
  """`evaluate_split` on each split; names are prefixed with the split's."""
  num_train = min(run.config.eval.num_train, len(run.dataset.x_train))
  chosen = np.linspace(
      0, len(run.dataset.x_train) - 1, num_train).astype(int)
  splits = {
      'train': (run.dataset.x_train[chosen], run.dataset.y_train[chosen]),
      'test': (run.dataset.x_test, run.dataset.y_test)}
  if len(run.validation[0]):
    splits['validation'] = run.validation
  key = jax.random.fold_in(run_lib.keys(run.config)['eval'], int(state.step))
  state = evaluated(state)
  metrics: dict[str, float] = {}
  for number, (split, (images, labels)) in enumerate(splits.items()):
    values = evaluate_split(
        run, eval_fn, state, images, labels, jax.random.fold_in(key, number),
        is_stopping)
    metrics |= {f'{split}_{name}': value for name, value in values.items()}
  return metrics
