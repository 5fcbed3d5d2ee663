r"""Compares verdicts with those of the reference AutoAttack on a fixture.

  python benchmarks/autoattack_fixture.py path/to/autoattack.npz [--count 64] \
      [--attack_dtype bfloat16]

The file holds a small convolutional network, 256 CIFAR-10 test images, and
which of them survive each attack of the reference. Prints Markdown.
"""

import argparse
from collections.abc import Callable, Sequence
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.attacks import autoattack
from awp_jax.evaluation.evaluate import EvalOptions
from awp_jax.objectives import cw_margin
from awp_jax.threat import ThreatModel

THREATS = (ThreatModel('Linf', 8 / 255), ThreatModel('L2', 0.5))
ATTACKS = ('apgd-ce', 'apgd-t', 'fab-t', 'square')


def layers_of(data: Any) -> tuple[list[int], int]:
  """Indices of the convolutions, in order, and of the linear layer."""
  numbers = sorted(
      int(key.removeprefix('param/').removesuffix('.weight'))
      for key in data if key.startswith('param/') and key.endswith('.weight'))
  return numbers[:-1], numbers[-1]


def network(
    data: Any, dtype: str = 'float32') -> Callable[[jax.Array], jax.Array]:
  """The fixture's network, images [B, H, W, 3] -> logits [B, classes].

  3x3 convolutions with ReLU, the first of stride 1 and the others of stride 2,
  a mean over the pixels, and a linear layer. The file sets their number and
  widths. The linear layer is in float32, whatever the `dtype` of the others.
  """
  convolutions, linear = layers_of(data)
  kernels = [
      jnp.asarray(data[f'param/{i}.weight'].transpose(2, 3, 1, 0), dtype)
      for i in convolutions]
  biases = [jnp.asarray(data[f'param/{i}.bias']) for i in convolutions]
  head = jnp.asarray(data[f'param/{linear}.weight'].T)
  shift = jnp.asarray(data[f'param/{linear}.bias'])

  def logits_fn(x: jax.Array) -> jax.Array:
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
      stride = 2 if i else 1
      x = jax.lax.conv_general_dilated(
          x.astype(dtype), kernel, (stride, stride), [(1, 1), (1, 1)],
          dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
      # In float32: XLA does not vectorize a choice between bfloat16 numbers on
      # the CPU, and the gradient of a ReLU is one.
      x = jax.nn.relu(x + bias)
    return x.mean((1, 2)) @ head + shift

  return logits_fn


def compare(
    data: Any, count: int, batch_size: int | None, norms: Sequence[str],
    attack_dtype: str) -> None:
  """Runs each attack alone and `standard`; prints verdicts that differ."""
  logits_fn = network(data)
  options = EvalOptions(
      batch_size=batch_size, check_model=False,
      attack_fn=None if attack_dtype == 'float32' else network(
          data, attack_dtype))
  images = data['x'][:count].astype(np.float32).transpose(0, 2, 3, 1) / 255
  labels = data['y'][:count]
  margins = jax.jit(lambda x: cw_margin(logits_fn(x), labels))
  print('| threat | attack | robust, reference | robust, ours | verdicts that '
        'differ | refused | seconds |')
  print('|---|---|---|---|---|---|---|')
  notes = []
  for threat in (threat for threat in THREATS if threat.norm in norms):
    for name in (*ATTACKS, 'robust'):
      begin = time.perf_counter()
      result = autoattack.auto_attack(
          jax.random.key(0), logits_fn, images, labels, threat,
          attacks=ATTACKS if name == 'robust' else (name,),
          options=options)
      seconds = time.perf_counter() - begin
      reference = data[f'{threat.norm}/{name}'][:count]
      differ = np.flatnonzero(reference != result.robust)
      shown = 'standard' if name == 'robust' else name
      print(f'| {threat.norm} | {shown} | {reference.sum()} | '
            f'{result.robust.sum()} | {differ.size} | '
            f'{sum(a.anomalies.refused for a in result.attacks)} | '
            f'{seconds:.0f} |', flush=True)
      natural, found = margins(images), margins(result.adversarial)
      for i in differ:
        outcome = 'robust' if result.robust[i] else (
            f'broken, margin {-float(found[i]):.2g}')
        notes.append(
            f'| {threat.norm} | {shown} | {i} | '
            f'{"robust" if reference[i] else "broken"} | {outcome} | '
            f'{-float(natural[i]):.2g} |')
  print('\n| threat | attack | example | reference | ours | natural margin |')
  print('|---|---|---|---|---|---|')
  print('\n'.join(notes))


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('fixture')
  parser.add_argument('--count', type=int, default=256)
  parser.add_argument('--batch_size', type=int)
  parser.add_argument('--norms', nargs='*', default=('Linf', 'L2'))
  parser.add_argument('--attack_dtype', default='float32',
                      choices=('float32', 'bfloat16'))
  arguments = parser.parse_args()
  compare(
      np.load(arguments.fixture), arguments.count, arguments.batch_size,
      arguments.norms, arguments.attack_dtype)


if __name__ == '__main__':
  main()
