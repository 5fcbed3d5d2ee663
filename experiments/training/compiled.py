"""The compiled training steps of a run and their arguments."""

from typing import Any

import awp_jax
from experiments.parallel import placement
from experiments.runs import run as run_lib
from experiments.training import step as step_lib
from experiments.training import streaming, training_data


class CompiledSteps:
  """Training steps, one program per batch size and perturbation factor.

  Steps with and without weight perturbation are separate programs, so warm-up
  steps do not compute the perturbation.
  """

  def __init__(self, run: run_lib.Run) -> None:
    """Puts keys, and images unless they are streamed, on all devices.

    Args:
      run: the run.
    """
    self._run = run
    self._stream = (
        streaming.Stream(run) if training_data.is_streamed(run) else None)
    self._data = None if self._stream else placement.replicate(
        training_data.of_run(run))
    self._devices = placement.device_numbers()
    self._keys = placement.replicate(run_lib.keys(run.config))
    self._order_fn = training_data.make_order_fn(
        run, placement.replicated())
    self._order: tuple[int, Any] | None = None
    self._programs: dict[tuple[int, float], Any] = {}

  def find(self, size: int, factor: float) -> Any:
    """The program for a batch size and factor, or None if not compiled."""
    return self._programs.get((size, factor))

  def compile(
      self, size: int, factor: float, arguments: tuple[Any, ...]) -> Any:
    """Compiles a program.

    Args:
      size: images per batch, over all devices.
      factor: of the config's weight perturbation; 0 for a step without.
      arguments: from `arguments`.

    Returns:
      A function of the arguments that returns the next state and sums.
    """
    program = step_lib.make_train_fn(
        self._run, size, factor).lower(*arguments).compile()
    self._programs[size, factor] = program
    return program

  def arguments(
      self, state: awp_jax.TrainState, sums: step_lib.Sums, step: int
  ) -> tuple[Any, ...]:
    """The arguments of a step.

    Args:
      state: the state before the step.
      sums: the sums before the step.
      step: number of completed steps.

    Returns:
      State, sums, training data, order, keys and device numbers; the rows of
      the step instead of the training data, and no order, if they are streamed.
    """
    if self._stream:
      self._stream.wait(sums)
      return (
          state, sums, self._stream.rows(step), None, self._keys,
          self._devices)
    number = training_data.order_number(self._run, step)
    if self._order is None or self._order[0] != number:
      self._order = number, self._order_fn(self._keys['order'], number)
    return (
        state, sums, self._data, self._order[1], self._keys, self._devices)

  def close(self) -> None:
    """Ends the threads that gather images, if there are any."""
    if self._stream:
      self._stream.close()
