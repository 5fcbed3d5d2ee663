"""The step and the evaluation of a tiny network, compiled for real targets.

These are the compilers of the accelerators, without the accelerators.
"""

import functools
import re
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from awp_jax.perturbation import leaves
from experiments.ahead import advice, analysis, programs, report, targets
from experiments.config import networks
from tests.experiments.modes import train_test

TARGETS = ('v5e:2x2', 'h100:8')
ATTACK, EVALUATION = 3, 4  # steps of PGD


class Net(nn.Module):
  """Two convolutions with batch normalization."""

  dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train=False):
    for width in (8, 16):
      x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(x)
      x = nn.relu(nn.BatchNorm(
          use_running_average=not train, axis_name=self.axis_name)(x))
    return nn.Dense(4, dtype=self.dtype)(x.mean(axis=(1, 2)))


def available(name):
  """The target and its devices, or a skip."""
  target = targets.parse(name)
  if targets.missing(target):
    pytest.skip('the extra awp_jax[aot] is not installed')
  return target, targets.devices(target)


@pytest.fixture(scope='module', params=TARGETS)
def compiled(request, tmp_path_factory):
  """Compiles for a target: `make(dtype)` -> (run, target, programs).

  The programs are functions that compile on their first call.
  """
  target, devices = available(request.param)
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(
          tmp_path_factory.mktemp('ahead') / 'images.npz'),
      awp__gamma=0.01, attack__num_steps=ATTACK, eval__num_steps=EVALUATION)
  done = {}

  def make(dtype, **fields):
    key = dtype, *fields.items()
    if key not in done:
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            networks, 'build',
            lambda config, dataset: Net(jnp.dtype(dtype), **fields))
        run = programs.prepare(config, target.num_devices)
      done[key] = run, target, *(
          functools.cache(functools.partial(fn, run, devices))
          for fn in (programs.training_step, programs.evaluation))
    return done[key]

  return make


def sizes(run):
  """Numbers of parameters, of perturbed ones and of statistics."""
  state, _ = programs.state_shapes(run)
  chosen = run.setup.perturbation.chosen(state.params)

  def total(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  perturbed = sum(
      leaf.size for leaf, is_chosen in zip(
          jax.tree.leaves(state.params), jax.tree.leaves(chosen), strict=True)
      if is_chosen)
  assert leaves.leaf_paths(chosen) == leaves.leaf_paths(state.params)
  return total(state.params), perturbed, total(state.batch_stats)


def test_step_communicates_gradients_statistics_and_metrics(compiled):
  run, _, step, evaluation = compiled('float32')
  found = analysis.collectives(step().module)
  assert {part.opcode for part in found} == {'all-reduce'}
  assert all(part.times == 1 and not part.loops for part in found)
  params, perturbed, statistics = sizes(run)
  assert params == 9 * 8 + 16 + 9 * 8 * 16 + 32 + 16 * 4 + 4
  assert perturbed == params - 16 - 32 - 4
  scalars = sum(part.bytes for part in found) / 4 - (
      params + perturbed + statistics)
  # Loss and accuracy, and the weight of the loss in its mean over devices.
  assert scalars in (2, 3)
  (sums,) = analysis.collectives(evaluation().module)
  assert sums.bytes == 4 * 6 and not sums.loops


def test_attack_is_one_loop(compiled):
  _, _, step, evaluation = compiled('float32')
  for program, steps in ((step(), ATTACK), (evaluation(), EVALUATION)):
    ((loop,),) = analysis.loops_of_convolutions(program.module)
    assert loop.trips == steps
    inside = [part for part in analysis.convolutions(program.module)
              if part.loops]
    # Two convolutions, and their gradients for the input.
    assert len(inside) >= 4 and {part.times for part in inside} == {steps}


def test_donated_arrays_are_reused(compiled):
  step, evaluation = (make() for make in compiled('float32')[2:])
  assert step.donated > 20
  assert analysis.reused_arguments(step.module) == set(range(step.donated))
  assert not analysis.reused_arguments(evaluation.module)
  assert step.memory.outputs < 0.1 * step.arguments['state'] + 4096


@pytest.mark.parametrize('dtype, name', [
    ('float32', 'f32'), ('bfloat16', 'bf16')])
def test_precision(compiled, dtype, name):
  """The step computes in the config's dtype, the evaluation in float32."""
  _, target, *made = compiled(dtype)
  step, evaluation = (make() for make in made)
  found = analysis.convolutions(step.module)
  # A TPU multiplies float32 as bfloat16 by default, and may round before.
  allowed = {name, 'bf16'} if target.chip.platform == 'tpu' else {name}
  assert {kind for part in found for kind in part.dtypes} <= allowed
  assert any(name in part.dtypes for part in found)
  assert {(part.dtypes, part.precision)
          for part in analysis.convolutions(evaluation.module)} == {
              (('f32', 'f32'), 'highest')}
  assert set(step.flops) == {dtype}
  assert set(evaluation.flops) == {'float32 highest'}


def test_statistics_over_devices_communicate_in_the_attack(compiled):
  """What the other tests rule out is found where it is asked for."""
  _, _, step, _ = compiled('float32', axis_name='batch')
  inside = [part for part in analysis.collectives(step().module) if part.loops]
  assert inside and {part.times for part in inside} == {ATTACK}


def test_report(compiled):
  run, target, *found = compiled('float32')
  record = report.values(run, target, [make() for make in found])
  assert all(part['fits'] and not part['remedies']
             for part in record['programs'].values())
  low, high = record['run_seconds']
  assert 0 < low < high
  text = report.text(run, target, record)
  assert f'{target.num_devices} x {target.chip.description}' in text
  assert 'does not fit' not in text and 'Estimate: ' in text


def test_too_many_images(compiled):
  """A TPU's compiler fails, a GPU's does not notice."""
  run, target, *_ = compiled('float32')
  run.config.eval.batch_size = 2**26
  try:
    found = programs.evaluation(run, targets.devices(target))
  finally:
    run.config.eval.batch_size = 24
  assert (found.module is None) == (target.chip.platform == 'tpu')
  (line, *_) = advice.remedies(run.config, target, found)
  number = int(re.match(r'--config.eval.batch_size=(\d+) ', line).group(1))
  assert 2**18 < number < 2**26


def test_accumulation_communicates_once(compiled):
  run, target, step, _ = compiled('float32')
  once = sum(part.bytes for part in analysis.collectives(step().module))
  run.config.accumulate = 2
  try:
    found = programs.training_step(run, targets.devices(target))
  finally:
    run.config.accumulate = 1
  sums = analysis.collectives(found.module)
  assert not any(part.loops for part in sums)
  assert abs(sum(part.bytes for part in sums) - once) <= 4 * 4
  assert [2, ATTACK] in [[loop.trips for loop in nest] for nest in
                         analysis.loops_of_convolutions(found.module)]
