"""A hash of everything that an evaluation depends on.

Records of an interrupted evaluation are invalid for another key, threat model
or model. The hash covers the program of the model and the values of its
weights, so two checkpoints of one network differ.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import re
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import jaxlib
import numpy as np

from awp_jax.core import equations
from awp_jax.evaluation import arguments
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.threat import ThreatModel
from awp_jax.types import Array
from awp_jax.version import __version__


def versions() -> dict[str, str]:
  """The versions of the packages that verdicts depend on."""
  return {'jax': jax.__version__, 'jaxlib': jaxlib.__version__,
          'awp_jax': __version__}


#: Functions of `jax.nn` whose gradients have rules. They are in most models,
#: and tracing the gradient takes seconds.
_OF_JAX = ('relu', 'relu6', 'silu', '_softmax')

#: Primitives that call Python, whose code is not in the program.
_CALLBACKS = ('pure_callback', 'io_callback')


def _constants(program: Any) -> Iterator[Any]:
  """The constants of a program and of all programs inside it."""
  yield from getattr(program, 'consts', ())
  for equation in program.eqns:
    for inner in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda value: hasattr(value, 'eqns')):
      if hasattr(inner, 'eqns'):
        yield from _constants(inner)


def calls_python(closed: jax.extend.core.ClosedJaxpr) -> bool:
  """Whether a program has a callback, so that its text does not identify it."""
  return any(equation.primitive.name in _CALLBACKS
             for equation in equations.walk(closed))


def _has_rule(equation: Any) -> bool:
  """Whether an equation has a gradient of its own that is not one of JAX's."""
  name = equation.primitive.name
  return name.startswith('custom_vjp') or (
      name.startswith('custom_jvp')
      and equation.params.get('name') not in _OF_JAX)


def _with_gradient(
    closed: jax.extend.core.ClosedJaxpr
) -> list[jax.extend.core.ClosedJaxpr]:
  """The program, and its gradient if that has rules of its own."""
  if not any(map(_has_rule, equations.walk(closed))):
    return [closed]

  def total(x: Array, *rest: Any) -> Array:
    logits, = jax.extend.core.jaxpr_as_fun(closed)(x, *rest)
    return jnp.sum(logits)

  try:
    return [closed, jax.make_jaxpr(jax.grad(total))(*(
        jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        for aval in closed.in_avals))]
  except Exception:  # no attack can use a gradient that cannot be traced
    return [closed]


def hash_program(closed: jax.extend.core.ClosedJaxpr) -> str:
  """A hash of a program's text and of its constants, weights among them."""
  # Addresses of objects differ between processes.
  text = re.sub(r'0x[0-9a-f]+', '', str(closed.jaxpr))
  digest = hashlib.sha256(text.encode())
  for constant in _constants(closed):
    if jax.dtypes.issubdtype(
        getattr(constant, 'dtype', None), jax.dtypes.prng_key):
      constant = jax.random.key_data(constant)
    values = np.ascontiguousarray(constant)
    digest.update(f'{values.dtype}{values.shape}'.encode())
    digest.update(values.view(np.uint8).data)
  return digest.hexdigest()


def hash_array(values: np.ndarray) -> str:
  """A hash of an array's values; reads it in blocks."""
  digest = hashlib.sha256(f'{values.dtype}{values.shape}'.encode())
  for begin in range(0, len(values), 1024):
    block = np.ascontiguousarray(values[begin:begin + 1024])
    digest.update(block.view(np.uint8).data)
  return digest.hexdigest()


def _setting(name: str, value: Any, traced: arguments.Traced) -> Any:
  """A value of `AttackSpec.settings` as a plain value.

  Functions and arrays are hashed.
  """
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return hash_array(np.atleast_1d(np.asarray(value)))
  if not callable(value):
    return value
  if name == 'loss':
    whole = jax.ShapeDtypeStruct((2,), np.int32)
    specs: tuple[Any, ...] = (
        jax.ShapeDtypeStruct((2, traced.num_classes), np.float32), whole, whole)
  else:
    specs = tuple(traced.program.in_avals[:1])
  return hash_program(jax.make_jaxpr(value)(*specs))


def _checked_setting(
    attack: str, name: str, value: Any, traced: arguments.Traced) -> Any:
  """`_setting`, with one error for values that cannot be identified."""
  try:
    found = _setting(name, value, traced)
    json.dumps(found)
  except (TypeError, ValueError) as error:
    raise ValueError(
        f'settings[{name!r}] of attack {attack!r} must be a plain value, an '
        f'array or a function of inputs, got {value!r}: {error}') from error
  return found


def identify(
    key: Array, models: Sequence[arguments.Traced], images: np.ndarray,
    labels: np.ndarray, threat: ThreatModel, specs: Sequence[AttackSpec],
    settings: dict[str, Any]) -> str:
  """The identity of an evaluation.

  Args:
    key: a PRNG key.
    models: the model, and that of the attacks if it is another one.
    images: [N, ...].
    labels: [N].
    threat: the threat model.
    specs: the attacks.
    settings: other plain values that verdicts depend on.

  Returns:
    A hash, as hexadecimal digits; '' if an attack has no settings, or the model
    calls Python code, which cannot be compared.
  """
  if any(spec.settings is None for spec in specs) or any(
      calls_python(traced.program) for traced in models):
    return ''
  attacks = [
      [spec.name, spec.num_targets, spec.eot_samples, {
          name: _checked_setting(spec.name, name, value, models[0])
          for name, value in (spec.settings or {}).items()}]
      for spec in specs]
  values = {
      'key': np.asarray(jax.random.key_data(key)).tolist(),
      'models': [
          [hash_program(part) for part in _with_gradient(traced.program)]
          for traced in models],
      'images': hash_array(images),
      'labels': hash_array(labels), 'threat': dataclasses.asdict(threat),
      'attacks': attacks, 'versions': versions(),
      **settings}
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
