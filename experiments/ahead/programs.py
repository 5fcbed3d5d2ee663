"""Lowers and compiles the training step and the evaluation of a config.

Nothing is loaded, written or run: arguments are shapes, and loops take the form
of the platform that is compiled for.
"""

import math
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from awp_jax.core import loops
from experiments.ahead import analysis, flops, hlo, sizes
from experiments.config import build, networks
from experiments.runs import run as run_lib
from experiments.training import step as step_lib
from experiments.training import training_data
from experiments.util.errors import UserError

#: Without a GPU there is nothing to tune kernels on.
_OPTIONS = {'gpu': {'xla_gpu_autotune_level': 0}}


class Program(NamedTuple):
  """A compiled program and what is known of it.

  Attributes:
    name: 'training step' or 'evaluation'.
    images: that it processes on each device.
    arguments: bytes of its arguments by name.
    donated: number of arguments (arrays) whose memory it may reuse.
    flops: operations of each device by kind, as the jaxpr has them.
    memory: of each device.
    module: after optimization; None if the compiler ran out of memory.
    seconds: of compiling.
    processor_seconds: the same, of all threads and processes.
  """

  name: str
  images: int
  arguments: dict[str, int]
  donated: int
  flops: dict[str, float]
  memory: analysis.Memory
  module: hlo.Module | None
  seconds: float
  processor_seconds: float


def prepare(
    config: ml_collections.ConfigDict, num_devices: int) -> run_lib.Run:
  """A run of the right sizes without data, folder and weights.

  Args:
    config: with the fields of `experiments/configs/base.py`.
    num_devices: to shard its batches over.

  Returns:
    The run, from which programs can be lowered.

  Raises:
    UserError: for an invalid value, and for data whose size is unknown.
  """
  setup = build.build(config)
  build.check_devices(
      config.batch_size, num_devices, 'batch_size', config.accumulate)
  build.check_devices(config.eval.batch_size, num_devices, 'eval.batch_size')
  if 'float64' in (config.model.dtype, config.model.param_dtype):
    raise UserError("model.dtype='float64' is not for accelerators.")
  dataset = sizes.dataset(config)
  if len(dataset.x_train) < config.batch_size:
    raise UserError(
        f'batch_size={config.batch_size} is larger than the '
        f'{len(dataset.x_train)} training images.')
  return run_lib.Run(
      config, pathlib.Path(), setup, dataset,
      sizes.validation(config, dataset), networks.build(config, dataset),
      num_devices, sizes.extra(config, dataset))


def _shapes(tree: Any) -> Any:
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def _bytes(tree: Any) -> int:
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


def state_shapes(run: run_lib.Run) -> tuple[Any, Any]:
  """Shapes of the first state and of the keys."""
  return jax.eval_shape(
      lambda: (run_lib.initial_state(run), run_lib.keys(run.config)))


def _rows(run: run_lib.Run, size: int) -> training_data.Rows:
  """Shapes of the streamed images of a step."""
  images = run.dataset.x_train
  dtypes = {images.dtype} | (
      {run.extra.images.dtype} if run.extra is not None else set())
  return training_data.Rows(
      jax.ShapeDtypeStruct(
          (size, math.prod(images.shape[1:])),
          images.dtype if len(dtypes) == 1 else jnp.float32),
      jax.ShapeDtypeStruct((size,), jnp.int32))


def training_step(run: run_lib.Run, devices: Any) -> Program:
  """Compiles the step of a full batch, with the weight perturbation if any.

  Args:
    run: from `prepare`.
    devices: from `targets.devices`.

  Returns:
    The program.
  """
  factor = 0.0 if run.setup.perturbation.is_off else 1.0
  size, is_streamed = run.config.batch_size, training_data.is_streamed(run)
  order = jax.ShapeDtypeStruct((len(run.dataset.y_train),), jnp.int32)
  with loops.platform(devices[0].platform):
    state, keys = state_shapes(run)
    arguments = {
        'state': state, 'sums': _shapes(step_lib.zero_sums()),
        'data': (_rows(run, size) if is_streamed
                 else _shapes(training_data.of_run(run))),
        'order': None if is_streamed else order, 'keys': keys,
        'numbers': jax.ShapeDtypeStruct((run.num_devices,), jnp.int32)}
    return _compile(
        'training step', size // run.num_devices, arguments,
        step_lib.make_train_fn(run, size, factor, devices),
        len(jax.tree.leaves((state, arguments['sums']))), devices,
        split=('numbers', *['data'] * (
            is_streamed and not training_data.needs_all_rows(run))))


def evaluation(run: run_lib.Run, devices: Any) -> Program:
  """Compiles the evaluation of a batch by PGD; see `training_step`."""
  size = run.config.eval.batch_size
  images = run.dataset.x_test
  with loops.platform(devices[0].platform):
    state, keys = state_shapes(run)

    def batch(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((size, *shape), dtype)

    arguments = {
        'state': step_lib.evaluated(state),
        'images': batch(images.shape[1:], images.dtype),
        'labels': batch((), jnp.int32), 'valid': batch((), jnp.bool_),
        'key': keys['eval']}
    return _compile(
        'evaluation', size // run.num_devices, arguments,
        step_lib.make_eval_fn(run, devices), 0, devices,
        split=('images', 'labels', 'valid'))


def _processor_seconds() -> float:
  # The GPU's assembler runs in processes of its own.
  return sum(os.times()[:4])


def _compile(
    name: str, images: int, arguments: dict[str, Any], fn: Any, donated: int,
    devices: Any, split: tuple[str, ...]) -> Program:
  traced = fn.trace(*arguments.values())
  lowered = traced.lower()
  sized = {
      part: _bytes(tree) // (len(devices) if part in split else 1)
      for part, tree in arguments.items()}
  started, used_before = time.perf_counter(), _processor_seconds()
  try:
    compiled = lowered.compile(
        compiler_options=_OPTIONS.get(devices[0].platform))
  except jax.errors.JaxRuntimeError as error:
    # Of a TPU. It includes the arguments.
    used = re.search(r'\(([\d.]+)([KMGT])\) exceeds available HBM', str(error))
    if used is None:
      raise
    total = int(float(used.group(1)) * 1024 ** ('KMGT'.index(
        used.group(2)) + 1))
    inputs = sum(sized.values())
    memory = analysis.Memory(inputs, 0, total - inputs, 0)
    compiled = module = None
  seconds = time.perf_counter() - started
  processor_seconds = _processor_seconds() - used_before
  if compiled is not None:
    memory = analysis.memory(compiled)
    module = hlo.parse(compiled.as_text())
  return Program(
      name, images, sized, donated, flops.count(traced.jaxpr.jaxpr), memory,
      module, seconds, processor_seconds)
