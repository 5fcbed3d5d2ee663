"""--mode=compile: errors before anything compiles, and the printed report."""

import json

import pytest

from experiments.ahead import programs, targets
from experiments.modes import compile as compile_mode
from experiments.util.errors import UserError
from tests.experiments.modes import train_test


@pytest.fixture
def config(tmp_path):
  return train_test.small(
      dataset='npz', awp__gamma=0.01,
      npz_path=train_test.write_images(tmp_path / 'images.npz'))


def never(*arguments):
  raise AssertionError('nothing may be compiled')


@pytest.mark.parametrize('target, fields, message', [
    ('h100', {}, 'as in h100:8'),
    ('h100:3', {}, 'batch_size=16 does not divide among 3 devices'),
    ('h100:16', {}, 'eval.batch_size=24 does not divide among 16'),
    ('h100:2', {'batch_size': 64}, 'larger than the 48 training images'),
    ('h100:2', {'threat.epsilon': -1}, 'threat.epsilon'),
    ('h100:2', {'model.dtype': 'float64'}, 'float64')])
def test_errors(monkeypatch, config, target, fields, message):
  monkeypatch.setattr(targets, 'devices', never)
  monkeypatch.setattr(targets, 'missing', lambda target: [])
  config.update_from_flattened_dict(fields)
  with pytest.raises(UserError, match=message):
    compile_mode.compile_for(config, target)


def test_missing_extra(monkeypatch, config):
  monkeypatch.setattr(targets, 'devices', never)
  monkeypatch.setattr(targets, '_has_module', lambda name: False)
  with pytest.raises(UserError, match=r'awp_jax\[aot\]'):
    compile_mode.compile_for(config, 'v5e:2x2')


@pytest.mark.parametrize('as_json, gib, data', [
    (False, 1.0, 48 * (64 + 4)), (True, 0.0, 8 * (64 + 4))])
def test_prints(monkeypatch, capsys, config, tmp_path, as_json, gib, data):
  """Compiled for this machine's devices in place of the target's."""
  import jax

  config.data_on_device_gib = gib  # 0: the rows of each step are streamed
  train_test.use_tiny_net(monkeypatch)
  monkeypatch.setattr(targets, 'devices', lambda target: jax.devices()[:2])
  monkeypatch.setattr(targets, 'missing', lambda target: [])
  monkeypatch.setattr(
      compile_mode.report, '_versions', lambda target: {'jax': '1'})
  monkeypatch.chdir(tmp_path)
  before = sorted(tmp_path.iterdir())
  record = compile_mode.compile_for(config, 'h100:2', as_json)
  printed = capsys.readouterr().out
  assert sorted(tmp_path.iterdir()) == before  # nothing is written
  step = record['programs']['training step']
  assert step['argument_bytes']['data'] == data
  assert step['fits'] and step['images_per_device'] == 8
  assert step['reused'] == step['donated'] > 10
  if as_json:
    assert json.loads(printed) == json.loads(json.dumps(record))
    return
  assert 'h100:2: 2 x NVIDIA H100 SXM' in printed
  assert f'{step["donated"]} of {step["donated"]}' in printed


def test_out_of_memory(monkeypatch):
  """A TPU's compiler fails; its message has the size."""
  import jax

  class Traced:
    jaxpr = jax.make_jaxpr(lambda x: x)(1.0)

    def trace(self, *arguments):
      return self

    def lower(self):
      return self

    def compile(self, compiler_options):
      raise jax.errors.JaxRuntimeError(
          'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on '
          'HBM, the total memory required for HLO temporaries (20.50G) exceeds '
          'available HBM (15.75G). HLO module: jit__fun.')

  found = programs._compile(
      'training step', 16, {'state': jax.ShapeDtypeStruct((250,), 'float32')},
      Traced(), 0, jax.devices()[:1], split=())
  assert found.module is None
  assert found.memory.total == int(20.5 * 2**30)
  assert found.memory.arguments == 1000
