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
import jaxlib
import numpy as np

from awp_jax.evaluation import arguments
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.threat import ThreatModel
from awp_jax.types import Array
from awp_jax.version import __version__


def versions() -> dict[str, str]:
  """The versions of the packages that verdicts depend on."""
  return {'jax': jax.__version__, 'jaxlib': jaxlib.__version__,
          'awp_jax': __version__}


def _constants(closed: jax.extend.core.ClosedJaxpr) -> Iterator[Any]:
  """The constants of a program and of the programs that it calls."""
  yield from closed.consts
  for equation in closed.jaxpr.eqns:
    for value in equation.params.values():
      inner = value if isinstance(value, (list, tuple)) else [value]
      for part in inner:
        if isinstance(part, jax.extend.core.ClosedJaxpr):
          yield from _constants(part)


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
  """A value of `AttackSpec.settings` as a plain value; functions are hashed."""
  if not callable(value):
    return value
  if name == 'loss':
    whole = jax.ShapeDtypeStruct((2,), np.int32)
    specs: tuple[Any, ...] = (
        jax.ShapeDtypeStruct((2, traced.num_classes), np.float32), whole, whole)
  else:
    specs = tuple(traced.program.in_avals[:1])
  return hash_program(jax.make_jaxpr(value)(*specs))


def identify(
    key: Array, traced: arguments.Traced, images: np.ndarray,
    labels: np.ndarray, threat: ThreatModel, specs: Sequence[AttackSpec],
    settings: dict[str, Any]) -> str:
  """The identity of an evaluation.

  Args:
    key: a PRNG key.
    traced: the model.
    images: [N, ...].
    labels: [N].
    threat: the threat model.
    specs: the attacks.
    settings: other plain values that verdicts depend on.

  Returns:
    A hash, as hexadecimal digits; '' if an attack has no settings.
  """
  if any(spec.settings is None for spec in specs):
    return ''
  attacks = [
      [spec.name, spec.num_targets, spec.eot_samples, {
          name: _setting(name, value, traced)
          for name, value in (spec.settings or {}).items()}]
      for spec in specs]
  values = {
      'key': np.asarray(jax.random.key_data(key)).tolist(),
      'model': hash_program(traced.program), 'images': hash_array(images),
      'labels': hash_array(labels), 'threat': dataclasses.asdict(threat),
      'attacks': attacks, 'versions': versions(),
      **settings}
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
