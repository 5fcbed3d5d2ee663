"""Names of targets, and what is said when one cannot be compiled for."""

import pytest

from experiments.ahead import chips, targets
from experiments.util.errors import UserError


@pytest.mark.parametrize('name, platform, devices, hosts, topology', [
    ('v5e:1x1', 'tpu', 1, 1, 'v5e:1x1'),
    ('v5e:2x4', 'tpu', 8, 2, 'v5e:2x4'),
    ('v6e:16x16', 'tpu', 256, 64, 'v6e:16x16'),
    ('v5p:2x2x1', 'tpu', 4, 1, 'v5p:2x2x1'),
    ('v5p:8x8x8', 'tpu', 512, 128, 'v5p:8x8x8'),
    ('h100:1', 'gpu', 1, 1, '1x1x1'),
    ('a100:8', 'gpu', 8, 1, '1x1x8'),
    ('h200:64', 'gpu', 64, 8, '1x8x8')])
def test_parses(name, platform, devices, hosts, topology):
  target = targets.parse(name)
  assert target.name == name and target.chip.platform == platform
  assert target[2:] == (devices, hosts, topology)


@pytest.mark.parametrize('name, message', [
    ('', 'must be one of v5e, v5p, v6e, a100, h100, h200'),
    ('tpu:2x4', 'must be one of'),
    ('v5e', 'slices of v5e are 1x1, 2x2, 2x4'),
    ('v5e:8', 'slices of v5e'),
    ('v5e:3x3', 'slices of v5e'),
    ('v5e:2x2x2', 'slices of v5e'),
    ('v5p:2x2', 'for instance 2x2x1'),
    ('v5p:0x2x2', 'for instance 2x2x1'),
    ('h100', 'as in h100:8'),
    ('h100:2x4', 'as in h100:8'),
    ('h100:0', 'as in h100:8'),
    ('h100:12', 'multiple')])
def test_rejects(name, message):
  with pytest.raises(UserError, match=message) as caught:
    targets.parse(name)
  assert f'--target={name}:' in str(caught.value)


@pytest.mark.parametrize('name', ['v5e:2x2', 'h100:8'])
def test_missing_compiler_names_the_extra(monkeypatch, name):
  monkeypatch.setattr(targets.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'pip install "awp_jax\[aot\]"'):
    targets.check_installed(targets.parse(name))


@pytest.mark.parametrize('chip', chips.CHIPS.values(), ids=list(chips.CHIPS))
def test_facts_are_ordered(chip):
  peak = chip.peak
  assert peak['bfloat16'] >= peak['float32'] >= peak['float32 high']
  assert peak['float32 high'] > peak['float32 highest']
  assert chip.bandwidth > chip.link >= chip.network
  assert 0.5 < chip.usable <= 1
  assert (chip.gpu is None) == (chip.platform == 'tpu')


def test_gpu_description_holds_the_facts():
  text = chips.target_config(chips.CHIPS['h100'])
  for line in ('major: 9 minor: 0', 'core_count: 132',
               'device_memory_size: 84942979072',
               'memory_bandwidth: 3352000000000',
               'device_description_str: "NVIDIA H100 80GB HBM3"'):
    assert line in text
  assert text.count('{') == text.count('}')
