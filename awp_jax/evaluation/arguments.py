"""Options of an evaluation, and checks of its arguments before compiling."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks, convolution, equations
from awp_jax.evaluation.engine import compilation
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import BatchResult, Share
from awp_jax.threat import ThreatModel
from awp_jax.types import Array


def check_images(images: np.ndarray, threat: ThreatModel) -> None:
  """Raises ValueError unless images are [N, ...] floats inside the box."""
  if images.ndim < 2 or not images.shape[0] or not images[0].size:
    raise ValueError(
        'images need at least one example and rank >= 2, [N, ...], got shape '
        f'{images.shape}.')
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
        f'images must be floating point in [{threat.lower}, {threat.upper}], '
        f'got {images.dtype}. Bytes need a division by 255.')
  # In blocks, so that a memory-mapped file is not loaded as a whole.
  for begin in range(0, len(images), 1024):
    block = images[begin:begin + 1024]
    low, high = float(np.min(block)), float(np.max(block))
    # The negation makes NaN fail too.
    if not (low >= threat.lower and high <= threat.upper):
      raise ValueError(
          f'images must be in [{threat.lower}, {threat.upper}] without NaN, '
          f'got values from {low} to {high}.')


def check_labels(
    labels: np.ndarray, count: int, num_classes: int, name: str = 'labels'
) -> None:
  """Raises ValueError unless labels are `count` integers in [0, C)."""
  if labels.shape != (count,):
    raise ValueError(
        f'{name} must have shape ({count},), one per image, got '
        f'{labels.shape}.')
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'{name} must be integers, got {labels.dtype}.')
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
        f'{name} must be in [0, {num_classes}), got {labels.min()} to '
        f'{labels.max()}.')


def check_model_inputs(
    logits_fn: Callable[..., Array], images: np.ndarray, labels: np.ndarray,
    threat: ThreatModel, takes_key: bool = False, name: str = 'labels') -> int:
  """Checks images, the model and labels before anything is compiled.

  Args:
    logits_fn: images [B, ...] -> logits [B, C].
    images: [N, ...].
    labels: integers [N] in [0, C).
    threat: its box holds the images.
    takes_key: whether the model takes a key, too.
    name: of the labels, for errors.

  Returns:
    The number of classes C.

  Raises:
    ValueError: for arguments that are not as above.
  """
  check_images(images, threat)
  with jax.default_matmul_precision('float32'):
    found = trace_model(logits_fn, images.astype(
        np.result_type(images.dtype, np.float32), copy=False), takes_key)
  check_labels(labels, len(images), found.num_classes, name)
  return found.num_classes


@dataclasses.dataclass(frozen=True)
class EvalOptions:
  """How an evaluation batches, resumes and reports.

  Attributes:
    batch_size: examples on the device at a time, over all devices; None means
      64 on the CPU, where larger batches exceed the caches, and 512 elsewhere.
      On the CPU it is divided into up to four batches that run in parallel.
    group_size: examples per record of `progress`, the unit of resuming; None
      means eight batches on the CPU and two elsewhere.
    devices: shard each batch over these; None means the default device.
    progress: called with a `BatchResult` after each group.
    done: records of an interrupted evaluation with the same arguments, in any
      order and of any group size; their examples are not attacked again.
    store: a folder that keeps every finished group of examples. The same call
      with the same folder, after an interruption, resumes with the same result;
      any other evaluation may use the folder, too. A record depends on key,
      model, weights, images, labels, threat model, attacks and their settings,
      batch size, `eot_samples`, `attack_fn`, `attack_precision` and versions;
      the code of your own attack is not among them. Attacks need
      `settings`. See `awp_jax.evaluation.store`.
    verbose: whether to print the number of survivors after each group.
    share: the share of this process, if several divide the examples.
    keep_images: whether the result holds the adversarial examples.
    takes_key: whether the model is randomized: `logits_fn(images, key)`.
    eot_samples: draws of a randomized model that each gradient is averaged
      over; None means 20 for the attacks of version 'rand' and 1 otherwise.
    check_model: whether to check first for signs of an unreliable evaluation.
    attack_fn: a classifier of the same images and classes that the attacks use
      instead of `logits_fn`, typically the same network in bfloat16. Its logits
      are cast to float32. Verdicts always use `logits_fn`: the candidates that
      it classifies correctly are rejected, and their runs go on. Examples that
      stay robust with a rejected candidate, or with one that `logits_fn` nearly
      misclassifies, are attacked again on `logits_fn`.
    attack_precision: of matrix products and convolutions inside the attacks, as
      in `jax.default_matmul_precision`; None keeps the caller's setting.
      Verdicts always use 'float32'. On accelerators a lower precision makes
      attacks faster and somewhat weaker.
  """

  batch_size: int | None = None
  group_size: int | None = None
  devices: Sequence[jax.Device] | None = None
  progress: Callable[[BatchResult], None] | None = None
  done: Sequence[BatchResult] = ()
  store: str | os.PathLike[str] | None = None
  verbose: bool = False
  share: Share | None = None
  keep_images: bool = True
  takes_key: bool = False
  eot_samples: int | None = None
  check_model: bool = True
  attack_fn: Callable[..., Array] | None = None
  attack_precision: str | None = 'float32'


class Traced(NamedTuple):
  """A model's trace and what is read from it.

  Attributes:
    program: the trace, on two images.
    num_classes: C.
    dtype: of the logits.
    product: the narrowest floating type of an operand of its matrix products
      and convolutions, or a lower precision that one of them requests;
      'float32' or wider if there is neither.
    suits_loops: whether the model is deterministic and all its convolutions
      are fast inside loops on CPUs, with their gradients.
    operations: floating-point operations of its matrix products and
      convolutions per image; bodies of loops count once, all branches of a
      `cond` count.
  """

  program: jax.extend.core.ClosedJaxpr
  num_classes: int
  dtype: np.dtype
  product: str
  suits_loops: bool
  operations: float


def _products(program: Any) -> Iterator[Any]:
  """The matrix products and convolutions of a program, nested ones included."""
  for equation in equations.walk(program):
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      yield equation


def _operations(equation: Any) -> int:
  """Two for each multiplication of a product or convolution."""
  lhs, rhs = (var.aval.shape for var in equation.invars)
  numbers = equation.params['dimension_numbers']
  if equation.primitive.name == 'dot_general':
    (axes, _), _ = numbers
    summed = math.prod(lhs[axis] for axis in axes)
  else:
    summed = math.prod(rhs) // max(1, rhs[numbers.rhs_spec[0]])
  return 2 * summed * math.prod(equation.outvars[0].aval.shape)


def _narrowest_product(program: jax.extend.core.ClosedJaxpr) -> str:
  """`Traced.product` of a program traced at precision 'float32'."""
  narrowest = np.dtype(np.float64)
  for equation in _products(program):
    for operand in equation.invars:
      dtype = operand.aval.dtype
      if jnp.issubdtype(dtype, jnp.floating):
        narrowest = min(narrowest, np.dtype(dtype), key=lambda d: d.itemsize)
    requested = equation.params['precision']
    for precision in (
        requested if isinstance(requested, tuple) else (requested,)):
      if precision not in (None, jax.lax.Precision.HIGHEST):
        return str(precision)
  return str(narrowest)


def trace_model(
    logits_fn: Callable[..., Array], images: np.ndarray, takes_key: bool,
    name: str = 'logits_fn') -> Traced:
  """Traces the model once, without compiling.

  Call it under `jax.default_matmul_precision('float32')`, like the verdicts.

  Args:
    logits_fn: the model.
    images: [N, ...].
    takes_key: whether the model also takes a key.
    name: of the model, for messages.

  Returns:
    The trace.

  Raises:
    ValueError: unless the model returns logits [B, C], C >= 2.
  """
  spec = jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype)
  keys = (jax.random.key(0),) if takes_key else ()
  program, logits = jax.make_jaxpr(
      compilation.unwrap(logits_fn), return_shape=True)(spec, *keys)
  shape: tuple[int, ...] = getattr(logits, 'shape', ())
  if len(shape) != 2 or shape[0] != 2:
    raise ValueError(
        f'{name} must map images [B, ...] to one array of logits [B, C], got '
        f'{logits} for images of shape {spec.shape}.')
  if shape[1] < 2:
    raise ValueError(
        f'{name} must return logits of at least 2 classes, got {shape[1]}.')
  return Traced(
      program, int(shape[1]), np.dtype(logits.dtype),
      _narrowest_product(program),
      # The draws of a randomized model may be batched over its kernels.
      not takes_key and all(
          convolution.suits_loops(equation) for equation in _products(program)
          if equation.primitive.name == 'conv_general_dilated'),
      sum(map(_operations, _products(program))) / 2)


def trace_attack_model(
    options: EvalOptions, images: np.ndarray, traced: Traced) -> Traced:
  """Traces `EvalOptions.attack_fn`, like `trace_model`.

  Args:
    options: of the evaluation.
    images: [N, ...].
    traced: `logits_fn`.

  Returns:
    The trace; `traced` if the attacks use `logits_fn`. Its `suits_loops` is
    that of both models, because the second attack uses `logits_fn`.

  Raises:
    ValueError: unless it returns logits of the same classes.
  """
  if options.attack_fn is None:
    return traced
  found = trace_model(options.attack_fn, images, options.takes_key, 'attack_fn')
  if found.num_classes != traced.num_classes:
    raise ValueError(
        'attack_fn and logits_fn must return logits of the same classes, got '
        f'{found.num_classes} and {traced.num_classes}.')
  return found._replace(suits_loops=found.suits_loops and traced.suits_loops)


def check_specs(
    specs: Sequence[AttackSpec], rank: int, takes_key: bool,
    eot_samples: int | None) -> None:
  """Raises ValueError unless names are distinct and attacks fit the model."""
  names = [spec.name for spec in specs]
  if not names or len(set(names)) < len(names):
    raise ValueError(
        f'attacks must be at least one, with distinct names, got {names}.')
  if eot_samples is not None:
    checks.count('eot_samples', eot_samples)
  for spec in specs:
    if spec.needs_images and rank != 4:
      raise ValueError(
          f'{spec.name} needs images [N, height, width, channels], got inputs '
          f'of rank {rank}. Remove it from the attacks.')
    draws = eot_samples or spec.eot_samples or 1
    if draws > 1 and not takes_key:
      raise ValueError(
          f'{spec.name} averages gradients over {draws} draws of a randomized '
          'model, but this model takes no key: all draws would be equal. '
          'Use a version for deterministic models, or pass logits_fn(images, '
          'key) and EvalOptions(takes_key=True).')
