"""Written and compiled HLO modules with known contents."""

import doctest
import pathlib

import jax
import jax.numpy as jnp
import pytest

from awp_jax.core import loops
from experiments.ahead import analysis, flops, hlo, targets

#: The forms in which TPU, GPU and CPU write loops and collectives.
MODULE = (pathlib.Path(__file__).resolve().parents[2] / 'data' /
          'loops.hlo').read_text()


@pytest.fixture(scope='module')
def module():
  return hlo.parse(MODULE)


def test_loops_multiply(module):
  outer, inner = hlo.Loop('outer_body', 3), hlo.Loop('inner_body', 5)
  assert [(place.computation, place.times, place.loops, place.is_fused)
          for place in hlo.places(module)] == [
              ('main', 1, (), False), ('fused', 1, (), True),
              ('outer_body', 3, (outer,), False),
              ('inner_body', 15, (outer, inner), False)]


def test_unknown_trip_count():
  module = hlo.parse(MODULE.replace('known_trip_count', 'unknown'))
  loop = module.computations['main']['w']
  assert hlo.trip_count(module, loop) is None


def test_collectives(module):
  assert [(found.opcode, found.bytes, found.times, len(found.loops))
          for found in analysis.collectives(module)] == [
              ('all-reduce', 36, 1, 0), ('all-reduce', 32, 15, 2)]


def test_reused_arguments(module):
  assert analysis.reused_arguments(module) == {1, 3}
  without = MODULE.replace('input_output_alias', 'nothing')
  assert analysis.reused_arguments(hlo.parse(without)) == set()


def test_convolutions(module):
  found = analysis.convolutions(module)
  assert analysis.kinds(found) == {'bf16*f32 highest': 1}
  assert analysis.loops_of_convolutions(module) == []


def test_bytes_of_kernels(module):
  moved = {  # in order: read + written
      'all-reduce-start': 36 + 36,
      'multiply': 32 + 32,  # its result stays on the chip
      'fusion': 32 + 4 + 32,  # two rows of q, and s
      'custom-call': 32 + 32 + 32}
  assert [kernel.bytes for kernel in analysis.kernels(module)][:4] == list(
      moved.values())
  assert analysis.kernels(module)[4:] == [analysis.Kernel(64, 15)]


@pytest.mark.parametrize('documented', [flops, hlo, targets])
def test_docstrings(documented):
  found = doctest.testmod(documented)
  assert found.attempted > 1 and found.failed == 0


def test_text_without_entry():
  with pytest.raises(ValueError, match='not an HLO module'):
    hlo.parse('HloModule m\n')


@pytest.fixture(scope='module')
def step():
  """A step on four devices: two convolutions in a loop of six, two sums."""
  devices = jax.devices()[:4]

  def fn(w, sums, x):
    def loss(w, x):
      return jnp.sum(jnp.square(jax.lax.conv_general_dilated(
          x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))))

    def attack(x):
      return x + jnp.sign(jax.grad(loss, 1)(w, x))

    x = loops.repeat(6, attack, x)
    gradient = jax.lax.pmean(jax.grad(loss)(w, x), 'batch')
    total = jax.lax.psum(jnp.sum(x), 'batch')
    return w - gradient, sums + total

  mapped = jax.pmap(
      fn, axis_name='batch', in_axes=(None, None, 0), out_axes=None,
      donate_argnums=(0, 1), devices=devices)
  with loops.platform('gpu'):
    return mapped.lower(
        jnp.ones((3, 3, 2, 2)), jnp.zeros(()),
        jnp.ones((4, 1, 5, 5, 2))).compile()


def test_compiled_step(step):
  module = hlo.parse(step.as_text())
  found = analysis.collectives(module)
  assert {part.opcode for part in found} == {'all-reduce'}
  assert sum(part.bytes * part.times for part in found) == 4 * (36 + 1)
  assert not any(part.loops for part in found)
  ((loop,),) = analysis.loops_of_convolutions(module)
  assert loop.trips == 6
  assert analysis.reused_arguments(module) == {0, 1}
  assert set(analysis.kinds(analysis.convolutions(module))) == {'f32 default'}


def test_memory_of_compiled_step(step):
  found = analysis.memory(step)
  assert found.arguments == 4 * (36 + 1 + 50)
  assert found.outputs < 100  # the state replaces its arguments
  assert found.total == sum(found)


def test_collective_inside_the_attack_is_found():
  """Batch statistics over all devices communicate in every attack step."""

  def fn(x):
    return loops.repeat(
        4, lambda x: x - jax.lax.pmean(x, 'batch') / (1 + jnp.abs(x)), x)

  with loops.platform('gpu'):
    compiled = jax.pmap(fn, axis_name='batch').lower(
        jnp.ones((jax.device_count(), 6))).compile()
  (found,) = analysis.collectives(hlo.parse(compiled.as_text()))
  assert (found.bytes, found.times, found.loops[0].trips) == (24, 4, 4)
