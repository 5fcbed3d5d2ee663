"""PyTorch checkpoint files: formats, hostile pickles, damage."""

import io
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.models.torch_exchange import (
  read_state_dict,
  write_state_dict,
)
from awp_jax.models.torch_exchange.files import (
  _EMPTY_DICT,
  _literal,
  _tensor_opcodes,
)
from tests.helpers.torch_layout import assert_same, prepared


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


# PyTorch 2.13's pickle of {'state_dict': {'module.a': a transposed 2x3}}, with
# gaps for the storage key and view, which differ between its two formats.
PICKLE = (
    b'\x80\x02}q\x00X\n\x00\x00\x00state_dictq\x01ccollections\nOrderedDict\n'
    b'q\x02)Rq\x03X\x08\x00\x00\x00module.aq\x04ctorch._utils\n'
    b'_rebuild_tensor_v2\nq\x05((X\x07\x00\x00\x00storageq\x06ctorch\n'
    b'FloatStorage\nq\x07%sq\x08X\x03\x00\x00\x00cpuq\tK\x06%stq\nQK\x00K\x03K'
    b'\x02\x86q\x0bK\x01K\x03\x86q\x0c\x89h\x02)Rq\rtq\x0eRq\x0fss.')
STREAM_HEAD = (
    b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00('
    b'X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00'
    b'little_endianq\x02\x88X\n\x00\x00\x00type_sizesq\x03}q\x04(X\x05\x00'
    b'\x00\x00shortq\x05K\x02X'
    b'\x03\x00\x00\x00intq\x06K\x04X\x04\x00\x00\x00longq\x07K\x04uu.')
NUMBERS = np.arange(6, dtype='<f4').tobytes()
STREAM_KEY = b'X\x0e\x00\x00\x0094234244347504'
STREAM = b''.join([
    STREAM_HEAD, PICKLE % (STREAM_KEY, b'N'), b'\x80\x02]q\x00', STREAM_KEY,
    b'q\x01a.', (6).to_bytes(8, 'little'), NUMBERS])


def test_files_as_pytorch_wrote_them(tmp_path):
  expected = np.arange(6, dtype=np.float32).reshape(2, 3).T
  path = tmp_path / 'a.pt'
  write_archive(path, PICKLE % (b'X\x01\x00\x00\x000', b''), [NUMBERS])
  assert_same(read_state_dict(path), {'a': expected})
  path.write_bytes(STREAM)
  assert_same(read_state_dict(path), {'a': expected})
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
  """An object whose pickle makes a folder when it is loaded."""

  def __init__(self, folder):
    self.target = str(folder / 'planted')

  def __reduce__(self):
    return os.mkdir, (self.target,)


@pytest.mark.parametrize('where', ['archive', 'entry', 'stream', 'bare'])
def test_files_execute_no_code(tmp_path, where):
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
  assert (tmp_path / 'planted').exists()  # the pickle itself is harmful


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
  expected = np.empty(size, np.float32)
  for index in np.ndindex(size):
    expected[index] = offset + np.dot(index, stride)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize('offset,size,stride', [
    (6, (), ()), (0, (7,), (1,)), (1, (2, 3), (3, 1)), (0, (2,), (6,)),
    (0, (10 ** 12,), (0,)), (-1, (2,), (1,)), (2, (2,), (-1,)),
    (0, (2, 3), (1,)), (0, (2.0,), (1,))])
def test_views_beyond_their_storage_are_refused(tmp_path, offset, size, stride):
  write_archive(
      tmp_path / 'a.pth',
      dictionary(_literal('a') + tensor_of(offset, size, stride)), [bytes(24)])
  with pytest.raises(
      ValueError, match=r'overruns its storage|not a plain tensor'):
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


def test_truncated_files(tmp_path):
  path = tmp_path / 'a.pth'
  write_state_dict(path, prepared('WRN-10-1')[1])
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
  with pytest.raises(
      ValueError, match=r"not tensors: 'last', 'best'. .* `key`"):
    read(*both)
  with pytest.raises(ValueError, match=r"no entry 'ema', only 'last', 'best'"):
    read(*both, key='ema')
  with pytest.raises(ValueError, match=r"by `key`: 'model', 'net'"):
    read(nested('model', one), nested('net', two))
  with pytest.raises(ValueError, match=r"not tensors: 'test_robust_acc'"):
    read(one, accuracy)
  with pytest.raises(ValueError, match='no dictionary of tensors'):
    read(nested('state_dict'))
