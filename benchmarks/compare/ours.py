"""Compiled steps of this library on random images and labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import awp_jax
from awp_jax.models import PreActResNet
from benchmarks.compare import cases
from benchmarks.compare.cases import Case

THREAT = awp_jax.ThreatModel('Linf', cases.EPSILON)


def make_state(case: Case) -> awp_jax.TrainState:
  """Random weights and the optimizer of the paper."""
  model = PreActResNet(
      10, width=case.width,
      dtype='bfloat16' if case.precision == 'bfloat16' else None)
  x = jnp.zeros((1, case.image_size, case.image_size, 3))
  variables = jax.jit(model.init)(jax.random.key(2), x)
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=variables['params'],
      batch_stats=variables['batch_stats'], tx=optax.chain(
          optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9)))
  return state.replace(step=jnp.int32(0))


def training_step(
    case: Case, statistics: str, start: Any = None) -> Callable[..., Any]:
  """The step of a case.

  Args:
    case: a task of training.
    statistics: the policy of batch statistics.
    start: the first x' [B, H, W, 3], instead of random ones.

  Returns:
    A function (state, x, y) -> (next state, metrics).
  """
  setting = case.setting
  if start is None:
    start = 'random' if setting.beta is None else 'gaussian'
  attack = awp_jax.Attack(setting.step_size, setting.num_steps, start)
  objective = awp_jax.adversarial() if setting.beta is None else (
      awp_jax.trades(setting.beta))
  method = awp_jax.methods.awp(setting.gamma) if setting.gamma else None

  def step(state: Any, x: Any, y: Any) -> Any:
    return awp_jax.train_step(
        state, (x, y), jax.random.key(3), objective=objective, threat=THREAT,
        attack=attack, perturbation=method, statistics=statistics)

  return step


def evaluation(case: Case, start: Any = 'random') -> Callable[..., Any]:
  """A function (state, x, y) -> metrics of PGD on running statistics."""
  setting = case.setting
  attack = awp_jax.Attack(setting.step_size, setting.num_steps, start)

  def step(state: Any, x: Any, y: Any) -> Any:
    return awp_jax.eval_step(
        state, (x, y, jnp.ones(len(y), bool)), jax.random.key(3),
        threat=THREAT, attack=attack)

  return step


def _call(case: Case, statistics: str) -> Callable[[], None]:
  """Compiles a case; the call blocks until its outputs are there."""
  x = jax.random.uniform(
      jax.random.key(0),
      (case.batch_size, case.image_size, case.image_size, 3))
  y = jax.random.randint(jax.random.key(1), (case.batch_size,), 0, 10)
  state = make_state(case)
  if case.task not in cases.TRAINING:
    compiled = jax.jit(
        awp_jax.cpu_convolutions(evaluation(case))).lower(state, x, y).compile()
    return lambda: jax.block_until_ready(compiled(state, x, y))
  compiled = jax.jit(
      awp_jax.cpu_convolutions(training_step(case, statistics)),
      donate_argnums=0).lower(state, x, y).compile()
  holder = [state]

  def call() -> None:
    holder[0], _ = jax.block_until_ready(compiled(holder[0], x, y))

  return call


def prepare(case: Case, implementation: str) -> dict[str, Callable[[], None]]:
  """The calls to time, by task; they run in turns."""
  tasks = ('at', 'at-awp') if case.task == cases.OVERHEAD else (case.task,)
  statistics = (
      'reference' if implementation == cases.OURS_REFERENCE else 'perturbed')
  return {task: _call(case._replace(task=task), statistics) for task in tasks}
