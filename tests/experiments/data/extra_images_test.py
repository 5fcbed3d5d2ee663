"""Tests of extra images: every format, and refusal of code."""

import io
import os
import pathlib
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from experiments.data import extra_images, safe_pickle
from experiments.data.arrays import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 4, 4, 3), np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0])


def load(path, **more):
  return extra_images.load(
      path, **({'image_shape': (4, 4, 3), 'num_classes': 3} | more))


def assert_same(extra):
  assert extra.images.dtype == np.uint8 and extra.labels.dtype == np.int32
  np.testing.assert_array_equal(extra.images, IMAGES)
  np.testing.assert_array_equal(extra.labels, LABELS)


def as_numpy_1(raw):
  """The same pickle with NumPy 1's names and adjusted lengths."""
  for module in (b'multiarray', b'numeric'):
    old, new = b'numpy._core.' + module, b'numpy.core.' + module
    for length in (bytes([len(old)]), struct.pack('<I', len(old))):
      shorter = struct.pack('<I', len(new))[:len(length)]
      raw = raw.replace(length + old, shorter + new)
    raw = raw.replace(old, new)
  return raw


def without_frames(raw):
  """Protocols 4 and 5 without FRAME, whose length depends on the names."""
  at = raw.index(b'\x95')
  return raw[:at] + raw[at + 9:]


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('numpy', [1, 2])
@pytest.mark.parametrize('labels', [
    LABELS, LABELS.astype('>i8'), LABELS.astype(np.uint8), LABELS.tolist(),
    list(LABELS)], ids=['array', 'big-endian', 'uint8', 'list', 'scalars'])
def test_pickles(tmp_path, protocol, numpy, labels):
  path = tmp_path / 'extra.pickle'
  raw = pickle.dumps(
      {'data': IMAGES, 'extrapolated_targets': labels, 'prediction_model': 'x'},
      protocol)
  if numpy == 1:
    old = as_numpy_1(without_frames(raw) if protocol > 3 else raw)
    assert b'numpy.core.' in old and b'_core' not in old
    assert len(old) < len(raw)
    raw = old
  path.write_bytes(raw)
  extra = load(path)
  assert_same(extra)
  assert extra.source == f'{path}, 6 images'


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('value', [
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.arange(4, dtype='>f8'), np.array(3, np.int16), np.zeros((0, 5)),
    np.array([True, False]), np.arange(12).reshape(3, 4)[:, ::2], 'text',
    b'bytes\x00\xff', 2.5, None, (1, [2])], ids=repr)
def test_values_come_back(protocol, value):
  found = safe_pickle.load(io.BytesIO(pickle.dumps(value, protocol)))
  if isinstance(value, np.ndarray):
    assert found.dtype == value.dtype and found.shape == value.shape
    np.testing.assert_array_equal(found, value)
  else:
    assert found == value and type(found) is type(value)


def test_pickle_of_python_2():
  # {'a': array([1, 2], uint8)} written by Python 2, with str for bytes.
  raw = (b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray"
         b"\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K"
         b"\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
         b"\x89U\x02\x01\x02tbs.")
  (array,) = safe_pickle.load(io.BytesIO(raw)).values()
  assert array.dtype == np.uint8 and array.tolist() == [1, 2]
  assert pickle.loads(raw, encoding='latin1')['a'].tolist() == [1, 2]


@pytest.mark.parametrize('image', extra_images.IMAGE_KEYS)
@pytest.mark.parametrize('label', extra_images.LABEL_KEYS)
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz(tmp_path, image, label, save):
  save(tmp_path / 'x.npz', **{image: IMAGES, label: LABELS, 'more': 1})
  assert_same(load(tmp_path / 'x.npz'))


def test_float_images(tmp_path):
  np.savez(tmp_path / 'x.npz', image=IMAGES / 255, label=LABELS)
  images = load(tmp_path / 'x.npz').images
  assert images.dtype == np.float32
  np.testing.assert_array_equal(images, (IMAGES / 255).astype(np.float32))


def test_images_alone(tmp_path):
  np.savez(tmp_path / 'x.npz', data=IMAGES, label=np.full(6, -1))
  images = extra_images.load_images(
      tmp_path / 'x.npz', image_shape=(4, 4, 3))
  np.testing.assert_array_equal(images, IMAGES)


def test_large_files_are_in_memory_once(tmp_path):
  images = np.zeros((5000, 32, 32, 3), np.uint8)  # 15 MB
  labels = np.zeros(5000, np.int64)
  np.savez(tmp_path / 'x.npz', image=images, label=labels)
  for protocol in (3, 4, 5):
    (tmp_path / f'{protocol}.pickle').write_bytes(pickle.dumps(
        {'data': images, 'extrapolated_targets': labels}, protocol))
  for name in ('x.npz', '3.pickle', '4.pickle', '5.pickle'):
    tracemalloc.start()
    load(tmp_path / name, image_shape=(32, 32, 3), num_classes=10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.nbytes < peak < 1.1 * images.nbytes, name


class Runs:
  """Pickles as a call."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def attacks(flag):
  """Malicious pickles by name; each would create the file `flag` if run."""
  touch = f'touch {flag}'
  code = f'open({str(flag)!r}, "w").close()'
  nested = {'data': IMAGES, 'extrapolated_targets': [[Runs(os.system, touch)]]}
  yield 'system', pickle.dumps(Runs(os.system, touch), 2)
  yield 'system', pickle.dumps({'data': Runs(os.system, touch)}, 5)
  yield 'system', pickle.dumps(nested, 4)
  yield 'builtins.eval', (
      b'\x80\x04\x8c\x08builtins\x8c\x04eval\x93' + _text(code) + b'\x85R.')
  yield 'builtins.exec', b'cbuiltins\nexec\n(V' + code.encode() + b'\ntR.'
  yield '__builtin__.eval', b'(V' + code.encode() + b'\ni__builtin__\neval\n.'
  yield 'posix.system', b'(cposix\nsystem\nV' + touch.encode() + b'\no.'
  # A dotted name is an attribute of an attribute.
  yield 'numpy.f2py.os.system', (
      b'\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93' + _text(touch)
      + b'\x85R.')
  yield 'numpy.fromfile', pickle.dumps(Runs(np.fromfile, str(flag)), 4)
  yield 'numpy.memmap', pickle.dumps(
      Runs(np.memmap, str(flag), 'u1', 'w+', 0, (1,)), 4)
  yield 'numpy.core.multiarray.fromstring', (
      b'\x80\x02cnumpy.core.multiarray\nfromstring\n.')
  yield 'builtins.getattr', b'\x80\x02cbuiltins\ngetattr\n.'
  yield "'O8'", pickle.dumps(np.array([Runs(os.system, touch)], object), 0)
  yield "'O8'", pickle.dumps(np.array([1, None], object), 4)
  yield "'V", pickle.dumps(np.zeros(2, [('a', 'u1')]), 4)
  yield "'S3'", pickle.dumps(np.array([b'abc']), 3)
  yield "'M8'", pickle.dumps(np.zeros(2, 'M8[s]'), 4)
  yield 'other than as bytes', (
      b'c_codecs\nencode\n(V' + touch.encode() + b'\nVrot13\ntR.')
  yield 'a way that NumPy does not write', b'cnumpy\nndarray\n(K\x02tR.'
  yield 'a function or a type', b'cnumpy\nndarray\n.'
  yield 'a function or a type', pickle.dumps(np.dtype('u1'), 3)


def _text(text):
  return b'X' + struct.pack('<I', len(text)) + text.encode()


@pytest.mark.parametrize('number', range(21))
def test_malicious_pickles(tmp_path, number):
  flag = tmp_path / 'it_ran'
  shown, raw = list(attacks(flag))[number]
  path = tmp_path / 'extra.pickle'
  path.write_bytes(raw)
  with pytest.raises(DataError, match='is an unsupported pickle') as caught:
    load(path)
  message = str(caught.value)
  assert shown in message and str(path) in message
  assert '\n' not in message and 'numpy.savez' in message
  assert not flag.exists()


def test_number_of_attacks_is_whole():
  assert len(list(attacks(pathlib.Path('x')))) == 21


def test_attacks_would_have_run(tmp_path):
  flag = tmp_path / 'it_ran'
  for number in (0, 3, 4, 6, 7, 9):
    _, raw = list(attacks(flag))[number]
    pickle.loads(raw)
    assert flag.exists(), number
    flag.unlink()


@pytest.mark.parametrize('raw', [
    # BUILD on a global or on a stand-in for an array sets no attribute.
    b'\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.',
    b'\x80\x02cnumpy\nndarray\nN}X\x05\x00\x00\x00_makeK\x01s\x86b.',
    b'\x80\x02cnumpy.core.multiarray\n_reconstruct\nK\x00K\x00K\x00\x87R}b.',
    b'\x80\x02cnumpy.core.multiarray\n_reconstruct\nK\x00K\x00K\x00\x87R.',
    b'\x80\x02cnumpy\ndtype\n)\x81.',  # NEWOBJ
    b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.',
    b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.',  # 2^63 bytes to come
    b'Pnowhere\n.', b'\x82\x01.', b'\x80\x05\x97.', b'\x80\x63.', b'', b'.',
    b'\x89PNG\r\n\x1a\n', b'PK\x03\x04', b'image,label\n1,2\n',
    pickle.dumps({'data': IMAGES, 'extrapolated_targets': LABELS})[:-200],
    pickle.dumps({'data': IMAGES, 'extrapolated_targets': LABELS})[:40]])
def test_damaged_files(tmp_path, raw):
  path = tmp_path / 'extra.pickle'
  path.write_bytes(raw)
  with pytest.raises(DataError, match='is neither a readable') as caught:
    load(path)
  assert '\n' not in str(caught.value)


def test_bytes_must_fill_the_array(tmp_path):
  raw = pickle.dumps({'data': IMAGES, 'extrapolated_targets': LABELS}, 2)
  at = raw.index(b'(K\x01(K\x06K\x04')
  more = raw[:at] + raw[at:].replace(b'K\x06', b'K\x07', 1)
  (tmp_path / 'x').write_bytes(more)
  with pytest.raises(DataError, match=r'shape \(7, 4, 4, 3\) and type uint8'):
    load(tmp_path / 'x')


def test_truncated_npz(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, image=IMAGES, label=LABELS)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(DataError, match='is neither a readable'):
    load(path)


@pytest.mark.parametrize('content, shown', [
    ({'image': IMAGES}, 'for labels it has none among image'),
    ({'pictures': IMAGES, 'label': LABELS}, 'for images it has none among'),
    ({'x': IMAGES, 'image': IMAGES, 'y': LABELS}, 'it has image and x among'),
    ({'image': IMAGES[:5], 'label': LABELS}, r'shape \(5,\), got shape \(6,\)'),
    ({'image': IMAGES[..., :1], 'label': LABELS},
     r'shape \(4, 4, 3\), got \(4, 4, 1\)'),
    ({'image': IMAGES[0], 'label': LABELS}, r'got shape \(4, 4, 3\)'),
    ({'image': IMAGES.astype(np.int32), 'label': LABELS}, 'got int32'),
    ({'image': IMAGES.astype(np.float32), 'label': LABELS}, 'divide by 255'),
    ({'image': IMAGES, 'label': LABELS / 2}, 'got float64'),
    ({'image': IMAGES, 'label': LABELS + 1}, r'0\.\.2 \(3 classes\), got .* 3'),
    ({'image': IMAGES, 'label': LABELS - 2}, 'from -2 to 0'),
    ({'image': IMAGES, 'label': LABELS - 1},
     '-1 for 2 of 6 images, .* experiments/pseudo_labels.py --images='),
    ({'image': IMAGES[:0], 'label': LABELS[:0]}, 'is empty'),
    ({'image': IMAGES, 'label': np.array([0, None] * 3)}, 'Object arrays'),
])
def test_wrong_npz(tmp_path, content, shown):
  np.savez(tmp_path / 'x.npz', **content)
  with pytest.raises(DataError, match=shown):
    load(tmp_path / 'x.npz')


@pytest.mark.parametrize('content, shown', [
    ([IMAGES, LABELS], 'is a pickle of list; it must be a dictionary'),
    (IMAGES, 'is a pickle of ndarray'),
    ({'data': [1, 2], 'y': LABELS}, 'images must be one NumPy array .* list'),
    ({'data': IMAGES, 'y': [0.5] * 6}, 'labels must be whole numbers'),
    ({'data': IMAGES, 'y': [True] * 6}, 'labels must be whole numbers'),
    ({'data': IMAGES, 'y': 'cat'}, 'an array or a list .* got str'),
])
def test_wrong_content_of_pickles(tmp_path, content, shown):
  (tmp_path / 'x').write_bytes(pickle.dumps(content))
  with pytest.raises(DataError, match=shown):
    load(tmp_path / 'x')


def test_no_file(tmp_path):
  with pytest.raises(DataError, match='No such file'):
    load(tmp_path / 'nowhere.npz')


def write_folder(path, images, labels, names=('images', 'labels')):
  path.mkdir()
  for name, array in zip(names, (images, labels), strict=True):
    np.save(path / f'{name}.npy', array)
  return path


@pytest.mark.parametrize('names', [('images', 'labels'), ('data', 'y')])
def test_folders_are_mapped(tmp_path, names):
  extra = load(write_folder(tmp_path / 'x', IMAGES, LABELS, names))
  assert_same(extra)
  assert isinstance(extra.images.base, np.memmap)
  assert not extra.images.flags.writeable
  assert extra.source == f'{tmp_path / "x"}, 6 images'


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_images_of_a_folder_are_not_in_memory(tmp_path, dtype):
  images = np.zeros((5000, 32, 32, 3), dtype)
  path = write_folder(tmp_path / 'x', images, np.zeros(5000, int))
  tracemalloc.start()
  load(path, image_shape=(32, 32, 3), num_classes=10)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < images.nbytes / 50


@pytest.mark.parametrize('images, labels, shown', [
    (IMAGES / 255, LABELS, 'uint8 or float32 in the byte order.* got <f8'),
    ((IMAGES / 255).astype('>f4'), LABELS, 'got >f4'),
    (np.asfortranarray(IMAGES), LABELS, 'saved in C order'),
    (IMAGES, LABELS + 1, r'0\.\.2 \(3 classes\)'),
    (IMAGES.astype(np.float32), LABELS, 'divide by 255'),
    (IMAGES.astype(object), LABELS, 'neither a readable .npz'),
])
def test_wrong_folders(tmp_path, images, labels, shown):
  path = write_folder(tmp_path / 'x', images, labels)
  with pytest.raises(DataError, match=shown):
    load(path)


def test_a_folder_without_the_names(tmp_path):
  path = write_folder(tmp_path / 'x', IMAGES, LABELS, ('pictures', 'label'))
  with pytest.raises(DataError, match='for images it has none among label, p'):
    load(path)


def test_the_range_of_floats_is_that_of_all_of_them(tmp_path):
  images = np.zeros((2500, 4, 4, 3), np.float32)
  for number, value, shown in (
      (0, -0.1, 'from -0.1 to 0'), (1500, 2.0, 'from 0 to 2'),
      (2499, np.nan, 'first in image 2499'), (1023, np.inf, 'image 1023')):
    broken = images.copy()
    broken[number, 1, 2, 0] = value
    path = tmp_path / f'{number}'
    with pytest.raises(DataError, match=shown):
      load(write_folder(path, broken, np.zeros(2500, int)))
