"""Small official archives and the local server that tests download them from.

The server can also truncate a response or stop in the middle of it.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np

from experiments.data import archives, arrays, datasets


def random_images(seed, num, num_classes=10):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (num, 32, 32, 3), np.uint8)
  return images, np.arange(num, dtype=np.uint8) % num_classes


@dataclasses.dataclass
class Server:
  """Files by path; sends at most `sent` bytes of each."""

  files: dict
  status: int = 200
  announce: bool = True
  sent: int | None = None
  fail_after: int | None = None
  stall: threading.Event | None = None  # waits for it after sending
  requests: list = dataclasses.field(default_factory=list)
  url: str = ''


@contextlib.contextmanager
def serving(server):
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      server.requests.append(self.path)
      body = server.files.get(self.path)
      status = server.status if body is not None else 404
      if server.fail_after is not None and (
          len(server.requests) > server.fail_after):
        status = 503
      self.send_response(status)
      if server.announce:
        self.send_header('Content-Length', str(len(body or b'')))
      self.end_headers()
      # A probe closes the connection without reading.
      with contextlib.suppress(ConnectionError):
        self.wfile.write((body or b'')[:server.sent])
        if server.stall is not None:
          self.wfile.flush()
          server.stall.wait(30)

    def log_message(self, *args):
      del args

  httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  httpd.daemon_threads = True
  thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
  thread.start()
  server.url = f'http://127.0.0.1:{httpd.server_port}'
  try:
    yield server
  finally:
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def cifar_bytes(label_bytes, files):
  """A tar.gz in the official layout; `files`: name -> (images, labels)."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w:gz') as tar:
    for name, (images, labels) in files.items():
      label = np.zeros((len(labels), label_bytes), np.uint8)
      label[:, -1] = labels
      pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
      content = np.concatenate([label, pixels], axis=1).tobytes()
      member = tarfile.TarInfo(f'batches/{name}')
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return stream.getvalue()


def checksum_of(content):
  return archives.Checksum(len(content), hashlib.sha256(content).hexdigest())


def tiny(archive, files):
  """Adds a small version of `archive` to `files`; returns its arrays."""
  num_classes = 100 if archive.label_bytes == 2 else 10
  parts = {
      name: random_images(seed, 20, num_classes)
      for seed, name in enumerate((*archive.train_files, *archive.test_files))}
  train = [parts[name] for name in archive.train_files]
  expected = arrays.Arrays(
      *map(np.concatenate, zip(*train, strict=True)),
      *parts[archive.test_files[0]])
  files['/a.tar.gz'] = cifar_bytes(archive.label_bytes, parts)
  return expected


def at(server, archive, **changes):
  """`archive` with the URLs and checksums of a server."""
  urls = tuple(server.url + path for path in server.files)
  sums = dict(zip(urls, map(checksum_of, server.files.values()), strict=True))
  return dataclasses.replace(
      archive, urls=urls, checksums={**sums, **changes.pop('checksums', {})},
      **changes)


def official(monkeypatch, name, archive):
  entry = datasets._OFFICIAL[name]._replace(archive=archive)
  monkeypatch.setitem(datasets._OFFICIAL, name, entry)


def left_in(folder):
  return sorted(path.name for path in folder.rglob('*') if path.is_file())


def assert_same(got, expected):
  for name in arrays.Arrays._fields:
    np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
