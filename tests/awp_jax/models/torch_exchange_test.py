"""Weights of PyTorch's networks: names, files, and equal logits."""

import collections
import functools
import io
import os
import pickle
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.models import PreActResNet, WideResNet
from awp_jax.models.torch_exchange import (
    from_torch,
    model_from_torch,
    normalization,
    read_state_dict,
    to_torch,
    write_state_dict,
)
from awp_jax.models.torch_exchange.files import (
    _EMPTY_DICT,
    _literal,
    _tensor_opcodes,
)

MODELS = {
    'PreActResNet-18': PreActResNet(5, width=4),
    'PreActResNet-50': PreActResNet(3, depth=50, width=4),
    'WRN-10-1': WideResNet(10, depth=10, width=1),
    'WRN-16-2': WideResNet(7, depth=16, width=2),
}
CIFAR = {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2471, 0.2435, 0.2616)}


def random_variables(model, channels=3, seed=0):
  """Random weights and running statistics that keep activations moderate."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(
      lambda key: model.init(key, jnp.zeros((1, 8, 8, channels))),
      jax.random.key(0))

  def draw(path, leaf):
    name = path[-1].key
    if name == 'kernel':
      value = rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
    elif name in ('scale', 'var'):
      value = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      value = rng.normal(size=leaf.shape) * 0.3
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def prepared(name):
  """Variables of one of the models, and their state dict."""
  variables = random_variables(MODELS[name])
  return variables, to_torch(variables, MODELS[name])


@pytest.fixture(scope='module')
def small():
  """A model, its variables and its state dict."""
  model = WideResNet(4, depth=10, width=2)
  variables = random_variables(model)
  return model, variables, to_torch(variables, model)


# Names and shapes.


@pytest.mark.parametrize('name', MODELS)
def test_round_trip_through_a_file_is_exact(name, tmp_path):
  model = MODELS[name]
  variables, state_dict = prepared(name)
  write_state_dict(tmp_path / 'a.pth', state_dict)
  again = read_state_dict(tmp_path / 'a.pth')
  assert list(again) == list(state_dict)
  assert_same(again, state_dict)
  found = model_from_torch(again)
  assert found == model
  assert_same(from_torch(again, found), variables)
  assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_names_and_layouts_are_those_of_pytorch():
  _, state_dict = prepared('PreActResNet-18')
  shapes = {name: value.shape for name, value in state_dict.items()}
  assert len(shapes) == 107  # as in the AWP authors' PreActResNet18
  assert shapes['conv1.weight'] == (4, 3, 3, 3)
  assert shapes['layer2.0.shortcut.0.weight'] == (8, 4, 1, 1)
  assert shapes['layer2.0.bn1.running_var'] == (4,)
  assert shapes['bn.num_batches_tracked'] == ()
  assert shapes['linear.weight'] == (5, 32)
  assert state_dict['bn.num_batches_tracked'].dtype == np.int64
  variables, _ = prepared('WRN-16-2')
  model = MODELS['WRN-16-2']
  state_dict = to_torch(variables, model, prefix='module.')
  shapes = {name: value.shape for name, value in state_dict.items()}
  assert len(shapes) == 83
  assert shapes['module.block1.layer.0.convShortcut.weight'] == (32, 16, 1, 1)
  assert shapes['module.block3.layer.1.conv2.weight'] == (128, 128, 3, 3)
  assert shapes['module.fc.bias'] == (7,)
  # A kernel keeps its orientation: entry [out, in, row, column].
  kernel = np.arange(16 * 3 * 9, dtype=np.float32).reshape(16, 3, 3, 3)
  state_dict['module.conv1.weight'] = kernel
  ours = from_torch(state_dict, model)['params']['conv1']['kernel']
  assert ours[2, 1, 0, 5] == kernel[5, 0, 2, 1]


@pytest.mark.parametrize('prefix', [
    'module.', 'model.', 'module.model.', '_orig_mod.', '1.'])
def test_prefixes_of_wrappers(small, prefix):
  model, variables, state_dict = small
  wrapped = {prefix + name: value for name, value in state_dict.items()}
  assert model_from_torch(wrapped) == model
  assert_same(from_torch(wrapped, model), variables)
  with pytest.raises(ValueError, match=r"two entries for 'conv1.weight'"):
    from_torch(wrapped | {'conv1.weight': 0}, model)


def test_idle_tensors_are_left_out_and_nothing_else(small):
  model, variables, state_dict = small
  first = {name.replace('block1', 'sub_block1'): value + 1
           for name, value in state_dict.items() if name.startswith('block1')}
  assert len(first) == 13
  idle = first | {'n_averaged': np.asarray(3)}
  without_counters = {name: value for name, value in state_dict.items()
                      if not name.endswith('num_batches_tracked')}
  assert model_from_torch(state_dict | idle) == model
  for extended in (state_dict | idle, without_counters):
    assert_same(from_torch(extended, model), variables)
  with pytest.raises(ValueError, match=r'1 unexpected \(conv9.num_batches'):
    from_torch(state_dict | {'conv9.num_batches_tracked': 0}, model)
  other, (_, fitting) = MODELS['PreActResNet-18'], prepared('PreActResNet-18')
  with pytest.raises(ValueError, match='11 unexpected'):
    from_torch(fitting | first, other)


def test_what_does_not_fit_is_named(small):
  model, variables, state_dict = small
  broken = dict(state_dict)
  del broken['bn1.weight'], broken['block2.layer.0.bn1.running_var']
  broken['fc.scale'] = broken['fc.bias']
  broken['conv1.weight'] = broken['conv1.weight'][:8]
  with pytest.raises(ValueError, match=(
      r'WideResNet-10 of width 2 with 4 classes: '
      r'2 missing \(block2.layer.0.bn1.running_var, bn1.weight\); '
      r'1 unexpected \(fc.scale\); 1 misshapen '
      r'\(conv1.weight \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)\)')):
    from_torch(broken, model)
  with pytest.raises(ValueError, match=(
      r'PreActResNet-18 .*: 89 missing \(bn.running_mean, .*, \.\.\.\); '
      r'39 unexpected \(.*\); 1 misshapen')):
    from_torch(state_dict, PreActResNet(4, width=4))
  with pytest.raises(ValueError, match=r'fc.weight \(4, 128\) instead of'):
    from_torch(state_dict, WideResNet(9, depth=10, width=2))
  with pytest.raises(ValueError, match='14 missing'):
    to_torch({'params': variables['params']}, model)
  for call in (from_torch, to_torch):
    with pytest.raises(TypeError, match='got Dense'):
      call(state_dict, nn.Dense(3))


def test_other_numbers_of_channels_and_types():
  model = WideResNet(2, depth=10, width=1, param_dtype=jnp.bfloat16)
  variables = random_variables(model, channels=1)
  state_dict = to_torch(variables, model)
  assert state_dict['conv1.weight'].shape == (16, 1, 3, 3)
  assert state_dict['conv1.weight'].dtype == jnp.bfloat16
  assert_same(from_torch(state_dict, model), variables)
  wide = {name: value.astype(np.float64) for name, value in state_dict.items()}
  assert_same(from_torch(wide, model), variables)
  with pytest.raises(ValueError, match=r'\(16, 1, 3, 3\) instead of'):
    from_torch(state_dict, WideResNet(2, depth=10, width=1, **CIFAR))


# Which network, which normalisation.


@pytest.mark.parametrize('names', [
    ('mu', 'sigma'), ('module.mu', 'module.sigma'), ('mean', 'std'),
    ('normalize.mean', 'normalize.std'), ('0.mean', '0.std')])
def test_normalisation_in_the_state_dict(small, names):
  model, variables, state_dict = small
  assert normalization(state_dict) is None
  for name, values in zip(names, CIFAR.values(), strict=True):
    state_dict = state_dict | {
        name: np.asarray(values, np.float32)[None, :, None, None]}
  for got, wanted in zip(
      normalization(state_dict), CIFAR.values(), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-7)
  found = model_from_torch(state_dict)
  assert found.mean == normalization(state_dict)[0]
  assert_same(from_torch(state_dict, found), variables)
  assert_same(from_torch(state_dict, model.clone(**CIFAR)), variables)
  with pytest.raises(ValueError, match=r'normalises with .* \(\(0.49'):
    from_torch(state_dict, model)
  del state_dict[names[0]]
  with pytest.raises(ValueError, match=f'no one pair .*{names[1][-3:]}'):
    normalization(state_dict)


def test_normalisation_is_written_on_demand(small):
  _, variables, _ = small
  model = WideResNet(4, depth=10, width=2, mean=(0.5,), std=(0.25,))
  assert normalization(to_torch(variables, model)) is None
  state_dict = to_torch(variables, model, with_normalisation=True)
  assert state_dict['mu'].shape == (1, 3, 1, 1)
  assert normalization(state_dict) == ((0.5,) * 3, (0.25,) * 3)


def test_model_from_torch_takes_the_normalisation(small):
  _, _, state_dict = small
  assert model_from_torch(state_dict, **CIFAR) == WideResNet(
      4, depth=10, width=2, **CIFAR)
  with pytest.raises(ValueError, match='give both mean and std'):
    model_from_torch(state_dict, mean=(0.5,))


def test_networks_that_are_not_ours(small):
  _, _, state_dict = small
  with pytest.raises(ValueError, match=r'no WideResNet has \(1, 1, 2\) blocks'):
    model_from_torch(state_dict | {
        'block3.layer.1.conv1.weight': np.zeros((128, 128, 3, 3))})
  with pytest.raises(ValueError, match='of 24 channels'):
    model_from_torch(
        state_dict | {'block1.layer.0.conv1.weight': np.zeros((24, 16, 3, 3))})
  _, state_dict = prepared('PreActResNet-18')
  with pytest.raises(ValueError, match=r'has \(2, 2, 2, 3\) blocks of .*Block'):
    model_from_torch(
        state_dict | {'layer4.2.conv1.weight': np.zeros((32, 32, 3, 3))})
  # Wong2020Fast and Andriushchenko2020Understanding have no `bn`.
  with pytest.raises(ValueError, match='neither of a PreActResNet'):
    model_from_torch({name: value for name, value in state_dict.items()
                      if not name.startswith('bn.')})


# Files.


def write_archive(path, data, storages=(), compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', data)
    for i, raw in enumerate(storages):
      archive.writestr(f'archive/data/{i}', raw)


def dictionary(*items):
  """A pickle of a dictionary, of opcodes that push its names and values."""
  return b''.join([pickle.PROTO, b'\x02', _EMPTY_DICT, pickle.MARK, *items,
                   pickle.SETITEMS, pickle.STOP])


def test_types_of_numbers(tmp_path):
  names = ['float16', 'bfloat16', 'float32', 'float64', 'int64', 'int32',
           'int16', 'int8', 'uint8', 'bool']
  arrays = {name: np.asarray([[0, 1, 2], [3, 0, 5]]).astype(jnp.dtype(name))
            for name in names}
  arrays |= {'scalar': np.asarray(7), 'empty': np.zeros((0, 3), np.float32),
             'strided': np.arange(24.0).reshape(2, 3, 4).T[::2]}
  write_state_dict(tmp_path / 'a.pt', arrays)
  again = read_state_dict(tmp_path / 'a.pt')
  assert_same(again, arrays)
  assert all(value.flags.writeable for value in again.values())
  first = (tmp_path / 'a.pt').read_bytes()
  big = {name: value.astype(value.dtype.newbyteorder('>'))
         for name, value in arrays.items() if name != 'bfloat16'}
  write_state_dict(tmp_path / 'big.pt', big)
  assert_same(read_state_dict(tmp_path / 'big.pt'), {
      name: value for name, value in arrays.items() if name != 'bfloat16'})
  write_state_dict(tmp_path / 'a.pt', arrays)
  assert (tmp_path / 'a.pt').read_bytes() == first
  with pytest.raises(ValueError, match='type complex64'):
    write_state_dict(tmp_path / 'a.pt', {'a': np.zeros(1, np.complex64)})
  assert (tmp_path / 'a.pt').read_bytes() == first


# What PyTorch 2.13 writes for {'state_dict': {'module.a': a transposed 2x3}},
# between the keys and views of storages in which its two formats differ.
PICKLE = (
    b'\x80\x02}q\x00X\n\x00\x00\x00state_dictq\x01ccollections\nOrderedDict\n'
    b'q\x02)Rq\x03X\x08\x00\x00\x00module.aq\x04ctorch._utils\n'
    b'_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\n'
    b'FloatStorage\nq\x07%sq\x08X\x03\x00\x00\x00cpuq\tK\x06%stq\nQK\x00K\x03K'
    b'\x02\x86q\x0bK\x01K\x03\x86q\x0c\x89h\x02)Rq\rtq\x0eRq\x0fss.')
STREAM_HEAD = (
    b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00('
    b'X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00'
    b'little_endianq\x02\x88X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00\x00\x00shortq\x05K\x02X'
    b'\x03\x00\x00\x00intq\x06K\x04X\x04\x00\x00\x00longq\x07K\x04uu.')
NUMBERS = np.arange(6, dtype='<f4').tobytes()
STREAM_KEY = b'X\x0e\x00\x00\x0094234244347504'
STREAM = b''.join([
    STREAM_HEAD, PICKLE % (STREAM_KEY, b'N'), b'\x80\x02]q\x00', STREAM_KEY,
    b'q\x01a.', (6).to_bytes(8, 'little'), NUMBERS])


def test_files_as_pytorch_wrote_them(tmp_path):
  wanted = np.arange(6, dtype=np.float32).reshape(2, 3).T
  path = tmp_path / 'a.pt'
  write_archive(path, PICKLE % (b'X\x01\x00\x00\x000', b''), [NUMBERS])
  assert_same(read_state_dict(path), {'a': wanted})
  path.write_bytes(STREAM)
  assert_same(read_state_dict(path), {'a': wanted})
  for length in range(len(STREAM)):
    path.write_bytes(STREAM[:length])
    with pytest.raises(ValueError, match=r'cannot read .*: it is '):
      read_state_dict(path)
  path.write_bytes(STREAM.replace(
      (6).to_bytes(8, 'little'), (2 ** 60).to_bytes(8, 'little')))
  with pytest.raises(ValueError, match='truncated in storage 94234244347504'):
    read_state_dict(path)
  path.write_bytes(STREAM.replace(b'little_endianq\x02\x88',
                                  b'little_endianq\x02\x89'))
  with pytest.raises(ValueError, match=r"machine .*'little_endian': False"):
    read_state_dict(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', b'')
    archive.writestr('a/byteorder', b'big')
  with pytest.raises(ValueError, match="b'big'-endian"):
    read_state_dict(path)


class Planted:
  """What a hostile checkpoint holds."""

  def __init__(self, folder):
    self.target = str(folder / 'planted')

  def __reduce__(self):
    return os.mkdir, (self.target,)


@pytest.mark.parametrize('where', ['archive', 'entry', 'stream', 'bare'])
def test_nothing_of_a_file_is_run(tmp_path, where):
  path = tmp_path / 'evil.pth'
  hostile = pickle.dumps(Planted(tmp_path), protocol=2)
  if where == 'archive':
    write_archive(path, hostile)
  elif where == 'entry':
    tensor = _tensor_opcodes('0', np.ones(2, np.float32))
    write_archive(path, dictionary(
        _literal('a') + tensor, _literal('b') + hostile[2:-1]), [bytes(8)])
  elif where == 'stream':
    head = (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})
    path.write_bytes(b''.join(
        [pickle.dumps(item, protocol=2) for item in head] + [hostile]))
  else:
    path.write_bytes(hostile)
  with pytest.raises(
      ValueError, match=r'names (posix|nt|os)\.mkdir, .* state_dict\(\) alone'):
    read_state_dict(path)
  assert not (tmp_path / 'planted').exists()
  pickle.loads(hostile)
  assert (tmp_path / 'planted').exists()  # the pickle does what it should


@pytest.mark.parametrize('name', [
    'builtins\neval', 'torch\nload', 'torch._utils\n_rebuild_tensor',
    'torch\nComplexFloatStorage', 'collections\ndefaultdict',
    'numpy\ndtype', 'awp_jax.models.torch_exchange.pickle_reader\n_tensor'])
def test_other_globals_are_refused(tmp_path, name):
  data = dictionary(_literal('a') + f'c{name}\n'.encode())
  write_archive(tmp_path / 'a.pth', data)
  with pytest.raises(ValueError, match=f'names {name.replace(chr(10), ".")},'):
    read_state_dict(tmp_path / 'a.pth')


@pytest.mark.parametrize('name', [
    'torch._utils\n_rebuild_tensor_v2', 'collections\nOrderedDict',
    'torch\nFloatStorage'])
def test_a_pickle_cannot_change_what_it_names(tmp_path, name):
  target = f'c{name}\n'.encode()
  for state in ({'name': 'a'}, (None, {'_make': 1, 'name': 'a'})):
    write_archive(tmp_path / 'a.pth', dictionary(
        _literal('a') + target + pickle.dumps(state, 2)[2:-1] + pickle.BUILD))
    with pytest.raises(ValueError, match=r'sets attributes|is damaged'):
      read_state_dict(tmp_path / 'a.pth')
  write_archive(tmp_path / 'a.pth', dictionary(
      _literal('a') + target + pickle.EMPTY_TUPLE + pickle.NEWOBJ))
  with pytest.raises(ValueError, match='is damaged'):
    read_state_dict(tmp_path / 'a.pth')


def tensor_of(offset, size, stride, numel=6):
  """Opcodes of a float32 tensor on storage '0'."""
  value = _tensor_opcodes('0', np.zeros(numel, np.float32))
  old = _literal(0) + _literal((numel,)) + _literal((1,))
  new = _literal(offset) + _literal(size) + _literal(stride)
  assert value.count(old) == 1
  return value.replace(old, new)


@pytest.mark.parametrize('offset,size,stride', [
    (0, (2, 3), (1, 2)), (2, (2, 2), (2, 1)), (1, (2,), (4,)), (5, (), ()),
    (6, (0, 2), (2, 1))])
def test_views_of_storages(tmp_path, offset, size, stride):
  write_archive(
      tmp_path / 'a.pth',
      dictionary(_literal('a') + tensor_of(offset, size, stride)),
      [np.arange(6, dtype='<f4').tobytes()])
  got = read_state_dict(tmp_path / 'a.pth')['a']
  wanted = np.empty(size, np.float32)
  for index in np.ndindex(size):
    wanted[index] = offset + np.dot(index, stride)
  np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('offset,size,stride', [
    (6, (), ()), (0, (7,), (1,)), (1, (2, 3), (3, 1)), (0, (2,), (6,)),
    (0, (10 ** 12,), (0,)), (-1, (2,), (1,)), (2, (2,), (-1,)),
    (0, (2, 3), (1,)), (0, (2.0,), (1,))])
def test_views_beyond_their_storage_are_refused(tmp_path, offset, size, stride):
  write_archive(
      tmp_path / 'a.pth',
      dictionary(_literal('a') + tensor_of(offset, size, stride)), [bytes(24)])
  with pytest.raises(ValueError, match=r'overruns its storage|no plain tensor'):
    read_state_dict(tmp_path / 'a.pth')


def test_storages_shared_and_of_a_wrong_size(tmp_path):
  data = dictionary(_literal('a') + tensor_of(0, (3,), (1,)),
                    _literal('b') + tensor_of(3, (3,), (1,)))
  write_archive(tmp_path / 'a.pth', data, [np.arange(6, dtype='<f4').tobytes()])
  got = read_state_dict(tmp_path / 'a.pth')
  got['a'][:] = 9
  np.testing.assert_array_equal(got['b'], [3, 4, 5])
  write_archive(tmp_path / 'a.pth', data, [bytes(20)])
  with pytest.raises(ValueError, match='has 20 bytes, not 6 numbers'):
    read_state_dict(tmp_path / 'a.pth')
  write_archive(tmp_path / 'a.pth', data, [bytes(24)], zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match=r'data.pkl is compressed'):
    read_state_dict(tmp_path / 'a.pth')
  write_archive(tmp_path / 'a.pth', data)
  with pytest.raises(ValueError, match='is damaged'):
    read_state_dict(tmp_path / 'a.pth')


def test_truncated_files(small, tmp_path):
  path = tmp_path / 'a.pth'
  write_state_dict(path, small[2])
  whole = path.read_bytes()
  for length in (0, 3, 40, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r'cannot read .*a\.pth: it is '):
      read_state_dict(path)
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  path.write_bytes(flipped)
  with pytest.raises(ValueError, match=r'damaged .*CRC'):
    read_state_dict(path)


def test_other_files(tmp_path):
  path = tmp_path / 'a.pth'
  with pytest.raises(FileNotFoundError):
    read_state_dict(path)
  path.write_bytes(b'<html>not found</html>')
  with pytest.raises(ValueError, match='neither a zip file nor a pickle'):
    read_state_dict(path)
  path.write_bytes(pickle.dumps({'a': 1.0}))
  with pytest.raises(ValueError, match=r'not one of torch.save'):
    read_state_dict(path)
  archive = io.BytesIO()
  np.savez(archive, a=np.ones(3))
  path.write_bytes(archive.getvalue())
  with pytest.raises(ValueError, match=r'without the data.pkl'):
    read_state_dict(path)


def test_what_training_scripts_save_around_it(tmp_path):
  path = tmp_path / 'a.pth'
  one = _literal('module.a') + _tensor_opcodes('0', np.zeros(1, np.float32))
  two = _literal('b') + _tensor_opcodes('1', np.zeros(2, np.float32))

  def read(*items, key=None):
    write_archive(path, dictionary(*items), [bytes(4), bytes(8)])
    return {name: value.shape
            for name, value in read_state_dict(path, key=key).items()}

  def nested(name, *items):
    return _literal(name) + dictionary(*items)[2:-1]

  accuracy = _literal('test_robust_acc') + _literal(0.5)
  optimizer = nested('optimizer', nested('state'))
  for name in ('state_dict', 'model', 'net', 'model_state_dict'):
    assert read(nested(name, one), accuracy, optimizer) == {'a': (1,)}
  assert read(nested('model', nested('state_dict', two))) == {'b': (2,)}
  both = nested('last', one), nested('best', two)
  assert read(*both, key='best') == {'b': (2,)}
  with pytest.raises(ValueError, match=r"no tensors: 'last', 'best'. .* `key`"):
    read(*both)
  with pytest.raises(ValueError, match=r"no entry 'ema', only 'last', 'best'"):
    read(*both, key='ema')
  with pytest.raises(ValueError, match=r"by `key`: 'model', 'net'"):
    read(nested('model', one), nested('net', two))
  with pytest.raises(ValueError, match=r"no tensors: 'test_robust_acc'"):
    read(one, accuracy)
  with pytest.raises(ValueError, match='no dictionary of tensors'):
    read(nested('state_dict'))


# Beside PyTorch itself, where it is installed.


def torch_logits(torch, tensors, x):
  """The networks' logits in evaluation mode, straight from a state dict."""
  functional = torch.nn.functional

  def activated(name, x):
    return functional.relu(functional.batch_norm(
        x, *(tensors[f'{name}.{part}'] for part in (
            'running_mean', 'running_var', 'weight', 'bias')), eps=1e-5))

  def conv(name, x, stride=1):
    kernel = tensors[f'{name}.weight']
    return functional.conv2d(
        x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

  wide = 'fc.weight' in tensors
  stages, shortcut, norm, classifier = (
      (('block1.layer', 'block2.layer', 'block3.layer'), 'convShortcut', 'bn1',
       'fc') if wide else
      (('layer1', 'layer2', 'layer3', 'layer4'), 'shortcut.0', 'bn', 'linear'))
  x = conv('conv1', x)
  for number, stage in enumerate(stages):
    i = 0
    while f'{stage}.{i}.conv1.weight' in tensors:
      block = f'{stage}.{i}'
      stride = 2 if number and not i else 1
      deep = f'{block}.conv3.weight' in tensors  # a bottleneck
      out = activated(f'{block}.bn1', x)
      if f'{block}.{shortcut}.weight' in tensors:
        x = conv(f'{block}.{shortcut}', out, stride)
      out = conv(f'{block}.conv1', out, 1 if deep else stride)
      out = conv(f'{block}.conv2', activated(f'{block}.bn2', out),
                 stride if deep else 1)
      if deep:
        out = conv(f'{block}.conv3', activated(f'{block}.bn3', out))
      x = x + out
      i += 1
  features = activated(norm, x).mean((2, 3))
  return functional.linear(
      features, tensors[f'{classifier}.weight'], tensors[f'{classifier}.bias'])


@pytest.mark.torch
@pytest.mark.parametrize('name,legacy', [
    ('PreActResNet-18', True), ('PreActResNet-50', False), ('WRN-10-1', False),
    ('WRN-16-2', True)])
def test_logits_equal_those_of_pytorch(name, legacy, tmp_path):
  torch = pytest.importorskip('torch')
  model = MODELS[name].clone(**CIFAR)
  x = np.random.default_rng(1).uniform(size=(2, 16, 16, 3)).astype(np.float32)
  mean, std = (np.asarray(value, np.float32) for value in CIFAR.values())
  theirs = torch.from_numpy(((x - mean) / std).transpose(0, 3, 1, 2).copy())
  apply = jax.jit(model.apply)

  # From us to PyTorch,
  variables, state_dict = prepared(name)
  write_state_dict(tmp_path / 'ours.pth', state_dict)
  tensors = torch.load(tmp_path / 'ours.pth', weights_only=True)
  np.testing.assert_allclose(
      torch_logits(torch, tensors, theirs).numpy(), apply(variables, x),
      atol=1e-4)

  # and from PyTorch to us, with weights of its own.
  generator = torch.Generator().manual_seed(3)
  for key, value in tensors.items():
    if value.ndim > 1:
      drawn = torch.randn(value.shape, generator=generator)
      tensors[key] = drawn * value[0].numel() ** -0.5
    elif value.ndim:
      tensors[key] = torch.rand(value.shape, generator=generator) + 0.5
  logits = torch_logits(torch, tensors, theirs).numpy()
  assert np.abs(logits).max() > 0.5
  torch.save(
      {'state_dict': collections.OrderedDict(
          (f'module.{key}', torch.nn.Parameter(value, requires_grad=False))
          for key, value in tensors.items()), 'test_robust_acc': 0.5},
      tmp_path / 'theirs.pth', _use_new_zipfile_serialization=not legacy)
  state_dict = read_state_dict(tmp_path / 'theirs.pth')
  found = model_from_torch(state_dict, **CIFAR)
  assert found == model
  np.testing.assert_allclose(
      apply(from_torch(state_dict, found), x), logits, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize('legacy', [False, True])
def test_tensors_of_every_kind_from_pytorch(legacy, tmp_path):
  torch = pytest.importorskip('torch')
  base = torch.arange(24.0).reshape(4, 6)
  tensors = {
      'half': base.half(), 'bfloat': base.bfloat16(), 'double': base.double(),
      'long': torch.tensor(3), 'bool': base > 4, 'byte': base.byte(),
      'view': base[1:, ::2], 'transposed': base.t(), 'tied': base,
      'empty': torch.zeros(0, 2)}
  torch.save(tensors, tmp_path / 'a.pt',
             _use_new_zipfile_serialization=not legacy)
  got = read_state_dict(tmp_path / 'a.pt')
  assert list(got) == list(tensors)
  for name, value in tensors.items():
    assert str(value.dtype) == f'torch.{got[name].dtype}'
    np.testing.assert_array_equal(
        got[name].astype(np.float64), value.double().numpy())
  write_state_dict(tmp_path / 'b.pt', got)
  back = torch.load(tmp_path / 'b.pt', weights_only=True)
  assert isinstance(back, collections.OrderedDict)
  for name, value in tensors.items():
    assert back[name].dtype == value.dtype and torch.equal(back[name], value)
  if legacy:
    whole = (tmp_path / 'a.pt').read_bytes()
    (tmp_path / 'a.pt').write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r'truncated in storage|damaged'):
      read_state_dict(tmp_path / 'a.pt')


@pytest.mark.torch
def test_pickled_module_is_refused(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save(torch.nn.Linear(2, 3), tmp_path / 'a.pt')
  with pytest.raises(ValueError, match=r'names torch\.nn\..*Linear'):
    read_state_dict(tmp_path / 'a.pt')
