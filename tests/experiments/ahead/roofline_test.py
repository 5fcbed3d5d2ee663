"""Estimates of time, and advice on memory, against closed forms."""

import math
import textwrap

import ml_collections
import pytest

from experiments.ahead import advice, analysis, hlo, programs, roofline, targets

MODULE = textwrap.dedent('''
    HloModule m

    ENTRY %main (x: f32[1000000], y: f32[2]) -> f32[1000000] {
      %x = f32[1000000]{0} parameter(0)
      %y = f32[2]{0} parameter(1)
      %small = f32[2]{0} negate(%y), backend_config={"estimated_cycles":"3000"}
      ROOT %sum = f32[1000000]{0} all-reduce(%x), channel_id=1
    }
    ''')


def program(flops=None, temporaries=0, images=16, arguments=10**9, **fields):
  return programs.Program(**{
      'name': 'training step', 'images': images,
      'arguments': {'state': arguments}, 'donated': 0,
      'flops': flops or {}, 'seconds': 1.0, 'processor_seconds': 1.0,
      'memory': analysis.Memory(arguments, 0, temporaries, 0),
      'module': hlo.parse(MODULE)} | fields)


def settings(accumulate=1, remat=False):
  return ml_collections.ConfigDict(
      {'accumulate': accumulate, 'model': {'remat': remat}})


def test_parts_of_the_time():
  target = targets.parse('v5e:2x2')
  found = roofline.estimate(
      target, program({'bfloat16': 197e12, 'float32 highest': 197e12 / 3}))
  assert found.computing == pytest.approx(1 + 2)
  moved = 8e6 / 819e9
  assert found.memory == pytest.approx(moved + 16 / 819e9)
  assert found.kernels == pytest.approx(moved + 3e-7)
  ring = 2 * 3 / 4 * 4e6 / 200e9
  assert found.communication == pytest.approx(ring + 2 * roofline.LATENCY)
  assert found.compiler == pytest.approx(3000 / 1.5e9)
  assert found.least == pytest.approx(3 + found.communication)
  assert found.most == pytest.approx(
      3 + found.kernels + found.communication)


def test_memory_bound():
  found = roofline.estimate(targets.parse('h100:1'), program())
  assert found.least == found.most == found.kernels > 0
  assert found.communication == 0 and found.compiler is None


def test_several_hosts_use_the_network():
  part = analysis.Collective('all-reduce', 10**9, 3, ())
  one, eight = (
      roofline.of_collective(targets.parse(name), part)
      for name in ('h100:8', 'h100:64'))
  assert one == pytest.approx(3 * (2 * 7 / 8 / 450 + 3 * roofline.LATENCY))
  assert eight == pytest.approx(
      3 * (2 * 63 / 64 / 400 + math.log2(64) * roofline.LATENCY))


def test_what_fits_needs_no_advice():
  config = settings()
  assert advice.remedies(config, targets.parse('h100:1'), program()) == []


def test_advice_suffices():
  """Of 15.75 GiB, 1 GB of state and 1 GB of gradients are fixed."""
  target = targets.parse('v5e:2x2')
  found = program(temporaries=20 * 10**9)
  room = advice.fit(target, found)
  assert not room.is_enough and room.used == 21 * 10**9
  images = advice.most_images(room, found)
  each = 19 * 10**9 / 16
  assert 2 * 10**9 + images * each <= room.usable
  assert room.usable < 2 * 10**9 + (images + 1) * each
  assert images == 12
  text = '; '.join(advice.remedies(settings(), target, found))
  assert '--config.batch_size=48 or less' in text
  assert '2 times as many chips' in text
  assert '--config.accumulate=2: that many parts of 8 images' in text
  assert 'model.remat=True' in text
  # Of four parts of 4 images in 20 GB, eight parts fit.
  more = advice.remedies(
      settings(accumulate=4, remat=True), target, found)
  assert '--config.accumulate=8: that many parts of 2 images' in more[2]
  assert len(more) == 3


def test_a_program_that_the_compiler_refused_does_not_fit():
  target = targets.parse('v6e:1x1')
  refused = program(temporaries=10**9, module=None)
  assert advice.fit(target, program(temporaries=10**9)).is_enough
  assert not advice.fit(target, refused).is_enough
  assert advice.remedies(settings(), target, refused)


def test_arguments_alone_do_not_fit():
  (line,) = advice.remedies(
      settings(), targets.parse('v5e:1x1'),
      program(temporaries=10**9, arguments=17 * 10**9))
  assert 'beside the arguments of the training step, 17.00 GB' in line


def test_gpu_allocates_a_share():
  lines = advice.remedies(
      settings(), targets.parse('h100:1'),
      program(temporaries=70 * 10**9))
  assert 'XLA_PYTHON_CLIENT_MEM_FRACTION=0.95' in lines[0]
