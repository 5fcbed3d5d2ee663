"""Broken versions of files, for hypothesis."""

import io
import os
import pickle
import zipfile

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
import numpy as np

#: Examples of each test; `make fuzz` sets thousands.
EXAMPLES = int(os.environ.get('AWP_FUZZ_EXAMPLES', '10'))


def fuzzed(share=1.0, deadline=5000):
  """The settings of a fuzz test: a slow example is a hang.

  Without the variable the examples are the same in every run.
  """
  return settings(
      max_examples=max(5, round(share * EXAMPLES)), deadline=deadline,
      derandomize='AWP_FUZZ_EXAMPLES' not in os.environ, database=None,
      suppress_health_check=list(HealthCheck))


#: Byte strings that mean something in a pickle, a zip file or an array.
TOKENS = [
    b'cposix\nsystem\n', b'cbuiltins\neval\n',
    b'\x8c\x05posix\x8c\x06system\x93',
    b'R.', b'(lp0\n', b'\x80\x04\x95', b'PK\x03\x04', b'PK\x05\x06',
    b"'descr': '|O'", b"'shape': (1099511627776, 3)", b'\x93NUMPY\x01\x00',
    b'../../escaped', b'\xff' * 8, b'\x00' * 16]


@st.composite
def broken(draw, data):
  """The bytes after a few changes."""
  found = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    place = draw(st.integers(0, len(found)))
    kind = draw(st.sampled_from(('flip', 'cut', 'insert', 'token', 'copy')))
    if kind == 'flip' and place < len(found):
      found[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == 'cut':
      del found[place:place + draw(st.integers(1, len(data)))]
    elif kind == 'insert':
      found[place:place] = draw(st.binary(max_size=20))
    elif kind == 'token':
      token = draw(st.sampled_from(TOKENS))
      found[place:place + len(token)] = token
    elif kind == 'copy':
      start = draw(st.integers(0, len(found)))
      found[place:place] = found[start:start + draw(st.integers(1, 64))]
  return bytes(found)


def npz(compressed=False, **arrays):
  """The bytes of an .npz file."""
  buffer = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
  return buffer.getvalue()


def npz_of_header(name, shape, descr='|u1', zeros=0):
  """An .npz whose array has any shape in its header, and that many zeros."""
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
      header, {'descr': descr, 'fortran_order': False, 'shape': shape})
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open(f'{name}.npy', 'w') as member:
      member.write(header.getvalue())
      for _ in range(zeros // 2**20):
        member.write(bytes(2**20))
  return buffer.getvalue()


class Touch:
  """Makes a file when it is unpickled by `pickle.load`."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, 'w')


def hostile_pickle(path):
  """A pickle that makes a file, among plain arrays."""
  return pickle.dumps({'data': np.zeros((3, 4, 4, 3), np.uint8),
                       'labels': Touch(path)})
