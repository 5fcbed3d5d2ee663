"""Buckets in memory, behind `gs://` and `s3://`, for fsspec and tensorstore.

`epath` reaches them through fsspec, as it reaches real ones through gcsfs and
s3fs. Orbax writes arrays to `gs://` through tensorstore, whose own client talks
to a small HTTP server over the same objects.
"""

import contextlib
import errno
import functools
from http import server
import io
import json
import os
import re
import threading
from unittest import mock
from urllib import parse
import zlib

from etils.epath import backend
import fsspec
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils

from experiments.util import paths

#: Content by bucket and name, 'bucket/folder/name'.
Objects = dict[str, bytes]


class _Upload(io.BytesIO):
  """Becomes an object when it is closed, not before."""

  def __init__(self, save):
    super().__init__()
    self._save = save

  def close(self):
    data = None if self.closed else self.getvalue()
    super().close()
    if data is not None:
      self._save(data)


class FakeBucket(fsspec.AbstractFileSystem):
  """Whole objects and no folders: no append, no rename, no locks.

  Attributes:
    objects: all objects; of the subclass, so that of all instances.
    failing: raised by every write through fsspec, if not None.
  """

  cachable = False
  objects: Objects
  failing: Exception | None = None

  def _put(self, name, data, mode='overwrite'):
    if self.failing:  # a new one, because it keeps the frames it went through
      raise type(self.failing)(*self.failing.args)
    if not name.startswith('bucket/'):
      raise FileNotFoundError(errno.ENOENT, 'the bucket does not exist')
    if mode == 'create' and name in self.objects:
      raise FileExistsError(name)
    self.objects[name] = bytes(data)

  def ls(self, path, detail=True, **kwargs):
    folder = self._strip_protocol(path)
    if folder in self.objects:
      names = {folder}
    else:
      rests = [name.removeprefix(f'{folder}/') for name in self.objects
               if name.startswith(f'{folder}/')]
      # An object 'folder/' is listed as the folder itself.
      names = {
          f'{folder}/{rest.partition("/")[0]}'.rstrip('/') for rest in rests}
    if not names:
      raise FileNotFoundError(errno.ENOENT, 'no such object', folder)
    found = [self.info(name) for name in sorted(names)]
    return found if detail else [one['name'] for one in found]

  def info(self, path, **kwargs):
    name = self._strip_protocol(path)
    if name in self.objects:
      return {'name': name, 'type': 'file', 'size': len(self.objects[name])}
    if any(other.startswith(f'{name}/') for other in self.objects):
      return {'name': name, 'type': 'directory', 'size': 0}
    raise FileNotFoundError(errno.ENOENT, 'no such object', name)

  def _open(self, path, mode='rb', **kwargs):
    name = self._strip_protocol(path)
    if mode == 'rb':
      if name not in self.objects:
        raise FileNotFoundError(errno.ENOENT, 'no such object', name)
      return io.BytesIO(self.objects[name])
    assert mode == 'wb', f'a bucket has no mode {mode!r}'
    return _Upload(lambda data: self._put(name, data))

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    self._put(self._strip_protocol(path), value, mode)

  def rm(self, path, recursive=False, maxdepth=None):
    name = self._strip_protocol(path)
    found = [other for other in self.objects if other == name or (
        recursive and other.startswith(f'{name}/'))]
    if not found:
      raise FileNotFoundError(errno.ENOENT, 'no such object', name)
    for other in found:
      del self.objects[other]

  def mkdir(self, path, create_parents=True, **kwargs):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def mv(self, path1, path2, **kwargs):
    raise AssertionError(f'{path1}: a bucket cannot rename')

  cp_file = mv


def _generation(data):
  """Identifies a version of an object; '0' is that of an absent one."""
  return '0' if data is None else str(zlib.crc32(data) + 1)


class _Handler(server.BaseHTTPRequestHandler):
  """The requests of tensorstore's client for Google Cloud Storage."""

  objects: Objects

  def _answer(self, code, body=b'', **headers):
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _parsed(self):
    url = parse.urlsplit(self.path)
    bucket, name = re.fullmatch(
        r'(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?', url.path).groups()
    return bucket, name and parse.unquote(name), dict(
        parse.parse_qsl(url.query))

  def do_GET(self):
    bucket, name, query = self._parsed()
    if name is None:
      self._list(bucket, query)
      return
    data = self.objects.get(f'{bucket}/{name}')
    if data is None:
      self._answer(404)
      return
    generation = _generation(data)
    if query.get('ifGenerationNotMatch') == generation:
      self._answer(304)
      return
    code, asked = 200, re.fullmatch(
        r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
    headers = {'x_goog_generation': generation}
    if asked:
      start, end = int(asked[1]), int(asked[2] or len(data) - 1)
      headers['Content_Range'] = f'bytes {start}-{end}/{len(data)}'
      code, data = 206, data[start:end + 1]
    self._answer(code, data, **headers)

  def _list(self, bucket, query):
    names = [
        key.removeprefix(f'{bucket}/') for key in sorted(self.objects)
        if key.startswith(f'{bucket}/{query.get("prefix", "")}')]
    self._answer(200, json.dumps({'items': [
        {'name': name, 'size': str(len(self.objects[f'{bucket}/{name}']))}
        for name in names]}).encode())

  def do_POST(self):
    bucket, _, query = self._parsed()
    key = f'{bucket}/{query["name"]}'
    data = self.rfile.read(int(self.headers['Content-Length']))
    if query.get('ifGenerationMatch', _generation(
        self.objects.get(key))) != _generation(self.objects.get(key)):
      self._answer(412)
      return
    self.objects[key] = data
    self._answer(200, json.dumps({
        'name': query['name'], 'bucket': bucket,
        'generation': _generation(data), 'size': str(len(data))}).encode())

  def log_message(self, *arguments):
    pass


def _bucket_class(scheme, names):
  return type(f'Fake_{scheme}', (FakeBucket,), {
      'protocol': names, 'objects': {}})


SYSTEMS = {
    'gs': _bucket_class('gs', ('gs', 'gcs')),
    's3': _bucket_class('s3', ('s3',))}


@functools.cache
def _start():
  """Starts the server and names it to tensorstore, once per process."""
  web = server.ThreadingHTTPServer(
      ('127.0.0.1', 0), type('Handler', (_Handler,), {
          'objects': SYSTEMS['gs'].objects}))
  threading.Thread(target=web.serve_forever, daemon=True).start()
  os.environ['TENSORSTORE_GCS_HTTP_URL'] = f'http://127.0.0.1:{web.server_port}'
  os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'token'


@contextlib.contextmanager
def served():
  """Yields the file systems of the empty `gs://bucket` and `s3://bucket`."""
  _start()
  forget = backend._FileSystemSpecBackend._get_filesystem.cache_clear
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.dict(_registry, {
        name: system for system in SYSTEMS.values()
        for name in system.protocol}))
    # Asks Google's own client whether a bucket has real folders.
    stack.enter_context(mock.patch.object(
        gcs_utils, 'is_hierarchical_namespace_enabled', lambda path: False))
    for system in SYSTEMS.values():
      system.objects.clear()
      system.failing = None
    forget()
    stack.callback(forget)
    yield SYSTEMS


def root(scheme):
  """The path of the bucket of a scheme."""
  return paths.parse(f'{scheme}://bucket')
