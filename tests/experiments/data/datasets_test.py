"""Tests of the data sets: reading, downloading, subsets and bad input.

Downloads come from a server on this machine, which can also cut them short.
Real prepared data are read only when AWP_TEST_DATA names a folder with `tfds/`.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
from PIL import Image
import pytest

from experiments.data import archives, arrays, datasets, downloads, prepared

pytest.importorskip('tensorflow_datasets')

PROXIES = ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy')


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
  """No test sees this machine's data, cache or proxies."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('AWP_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  for name in PROXIES:
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.upper(), raising=False)


def random_images(seed, num, num_classes=10):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (num, 32, 32, 3), np.uint8)
  return images, np.arange(num, dtype=np.uint8) % num_classes


# ---- A server on this machine --------------------------------------------


@dataclasses.dataclass
class Server:
  """Files by path; `sent` may be less than what is announced."""

  files: dict
  status: int = 200
  announce: bool = True
  sent: int | None = None
  fail_after: int | None = None
  stall: threading.Event | None = None  # ... after what is sent, until set
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
      # A probe hangs up without reading.
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
  """`archive` with few images, and (its content by path, its arrays)."""
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
  """`archive` as this server has it."""
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


@pytest.fixture
def shop():
  """(server, its tiny CIFAR-10, the arrays in that)."""
  files = {}
  expected = tiny(archives.CIFAR10, files)
  with serving(Server(files)) as server:
    yield server, at(server, archives.CIFAR10), expected


def assert_same(got, expected):
  for name in arrays.Arrays._fields:
    np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


# ---- Downloads -----------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'archive'),
    [('cifar10', archives.CIFAR10), ('cifar100', archives.CIFAR100)])
def test_download_then_reuse(monkeypatch, tmp_path, name, archive):
  files = {}
  expected = tiny(archive, files)
  with serving(Server(files)) as server:
    official(monkeypatch, name, at(server, archive))
    first = datasets.load(name, data_dir=str(tmp_path), progress=False)
    assert len(server.requests) == 2  # the probe and TFDS
  again = datasets.load(name, data_dir=str(tmp_path), progress=False)
  assert len(server.requests) == 2
  for dataset in (first, again):
    assert_same(dataset, expected)
    assert dataset.x_train.dtype == np.uint8
    assert dataset.y_train.dtype == np.int32
    assert dataset.num_classes == (100 if name == 'cifar100' else 10)
    assert 'official files' in dataset.source
    assert f'of {archive.num_train:,} training images' in dataset.source


def test_progress_bar(shop, tmp_path, capfd):
  _, archive, _ = shop
  downloads.load(archive, [tmp_path / 'quiet'], progress=False)
  assert 'Dl Size' not in capfd.readouterr().err
  downloads.load(archive, [tmp_path / 'shown'], progress=True)
  assert 'Dl Size' in capfd.readouterr().err


def test_tfds_finds_what_was_downloaded(shop, tmp_path):
  """The names on disk are TFDS's own, so neither fetches it twice."""
  from tensorflow_datasets.core.download import checksums, download_manager
  from tensorflow_datasets.core.utils import Size
  server, archive, _ = shop
  url = archive.urls[0]
  path = downloads.fetch(archive, url, [tmp_path], False)
  before = len(server.requests)
  size, sha256 = archive.checksum(url)
  manager = download_manager.DownloadManager(
      download_dir=tmp_path / 'downloads', dataset_name='cifar10',
      url_infos={url: checksums.UrlInfo(Size(size), sha256, None)})
  assert os.fspath(manager.download(url)) == os.fspath(path)
  assert len(server.requests) == before


def test_svhn_files(monkeypatch, tmp_path):
  from scipy.io import savemat
  files, expected = {}, []
  for seed, part in enumerate(('train', 'test')):
    images, labels = random_images(seed, 20)
    stream = io.BytesIO()
    savemat(stream, {
        'X': images.transpose(1, 2, 3, 0),
        'y': np.where(labels == 0, 10, labels)[:, None]})
    files[f'/{part}_32x32.mat'] = stream.getvalue()
    expected += [images, labels]
  with serving(Server(files)) as server:
    official(monkeypatch, 'svhn', at(server, archives.SVHN))
    dataset = datasets.load('svhn', data_dir=str(tmp_path), progress=False)
  assert_same(dataset, arrays.Arrays(*expected))
  assert dataset.mean == dataset.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize('announce', [True, False])
def test_truncated_then_repeated(shop, tmp_path, announce):
  server, archive, expected = shop
  server.sent, server.announce = 1000, announce
  wanted = 'broke off.*IncompleteRead' if announce else r'1000 bytes.*cut off'
  with pytest.raises(arrays.DataError, match=wanted):
    downloads.load(archive, [tmp_path], progress=False)
  assert left_in(tmp_path) == []
  server.sent, server.announce = None, True
  assert_same(downloads.load(archive, [tmp_path], progress=False)[0], expected)
  assert len(left_in(tmp_path)) == 2  # the archive and its .INFO
  assert not list(tmp_path.rglob('incomplete-*'))


def test_wrong_checksum_names_both(shop, tmp_path):
  server, archive, expected = shop
  url = archive.urls[0]
  good = archive.checksum(url)
  bad = at(server, archives.CIFAR10, checksums={
      url: archives.Checksum(good.size, 'a1' * 32)})
  with pytest.raises(
      arrays.DataError, match=f'expected.*{"a1" * 32}.*got.*{good.sha256}'):
    downloads.load(bad, [tmp_path], progress=False)
  assert left_in(tmp_path) == []
  assert_same(downloads.load(archive, [tmp_path], progress=False)[0], expected)


def test_killed_download_is_not_taken_for_whole(shop, tmp_path):
  """What a killed process leaves: its folder, or half a file of old."""
  from tensorflow_datasets.core.download import resource
  server, archive, expected = shop
  folder = tmp_path / 'downloads' / 'cifar10'
  for age, name in ((0, 'incomplete-new'), (2 * 86400, 'incomplete-old')):
    (folder / name).mkdir(parents=True)
    (folder / name / 'a.tar.gz').write_bytes(b'half')
    os.utime(folder / name, (time.time() - age,) * 2)
  sha256 = archive.checksum(archive.urls[0]).sha256
  fname = resource.get_dl_fname(archive.urls[0], sha256)
  (folder / fname).write_bytes(server.files['/a.tar.gz'][:500])
  assert_same(downloads.load(archive, [tmp_path], progress=False)[0], expected)
  # Another process may still be at work in the young folder.
  assert [p.name for p in folder.glob('incomplete-*')] == ['incomplete-new']


KILLED = """
import dataclasses, pathlib, sys
from experiments.data import archives, downloads
url, size, sha256, place = sys.argv[1:]
archive = dataclasses.replace(archives.CIFAR10, urls=(url,), checksums={
    url: archives.Checksum(int(size), sha256)})
downloads.load(archive, [pathlib.Path(place)], progress=False)
"""


def test_process_killed_in_the_middle_then_repeated(shop, tmp_path):
  server, archive, expected = shop
  server.sent, server.stall = 100_000, threading.Event()
  url = archive.urls[0]
  process = subprocess.Popen(
      [sys.executable, '-c', KILLED, url, *map(str, archive.checksum(url)),
       str(tmp_path)], cwd=pathlib.Path(datasets.__file__).parents[2])
  try:
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.rglob('a.tar.gz')):
      assert process.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.05)
  finally:
    process.kill()
    process.wait()
    server.stall.set()
  assert [path.name for path in tmp_path.rglob('a.tar.gz')] == ['a.tar.gz']
  server.sent, server.stall = None, None
  assert_same(downloads.load(archive, [tmp_path], progress=False)[0], expected)


def test_second_file_fails_first_is_kept(tmp_path):
  server = Server({'/one.mat': b'one', '/two.mat': b'two'})
  with serving(server):
    archive = at(server, archives.SVHN)
    server.fail_after = 2  # probe and download of the first
    with pytest.raises(arrays.DataError, match='HTTP status 503'):
      downloads.load(archive, [tmp_path], progress=False)
    downloads.fetch(archive, archive.urls[0], [tmp_path], False)
  assert server.requests.count('/one.mat') == 2


@pytest.mark.parametrize('status', [403, 404, 500, 503])
def test_bad_status_costs_one_request(shop, tmp_path, status):
  server, archive, _ = shop
  server.status = status
  with pytest.raises(arrays.DataError, match=f'HTTP status {status}'):
    downloads.load(archive, [tmp_path], progress=False)
  assert len(server.requests) == 1


def test_server_that_fails_after_the_probe(shop, tmp_path):
  server, archive, _ = shop
  server.fail_after = 1
  with pytest.raises(arrays.DataError, match='broke off'):
    downloads.load(archive, [tmp_path], progress=False)
  assert len(server.requests) == 1 + 1 + downloads.RETRIES


def test_limits_stay_below_15_seconds():
  from tensorflow_datasets.core.download import downloader
  assert downloads.PROBE_DEADLINE <= 10
  assert sum(downloads.PROBE_TIMEOUTS) <= downloads.PROBE_DEADLINE
  with downloads._limited(False):
    assert downloader.MAX_RETRIES == downloads.RETRIES <= 2
  assert downloader.MAX_RETRIES > 2


def free_port():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    return taken.getsockname()[1]


def test_no_network_names_places_and_remedies(monkeypatch, tmp_path):
  url = f'http://127.0.0.1:{free_port()}/a.tar.gz'
  official(monkeypatch, 'cifar10', dataclasses.replace(
      archives.CIFAR10, urls=(url,),
      checksums={url: archives.Checksum(1, '00')}))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'by_environment'))
  with pytest.raises(datasets.DataError) as caught:
    datasets.load('cifar10', data_dir=str(tmp_path / 'given'), progress=False)
  message = str(caught.value)
  for part in ('given', 'by_environment', 'home/tensorflow_datasets', url,
               'Connection refused', 'manual', 'data_dir', 'TFDS_DATA_DIR',
               'digits'):
    assert part in message
  assert '\n' not in message


def test_silent_server(monkeypatch):
  monkeypatch.setattr(downloads, 'PROBE_TIMEOUTS', (0.1, 0.1))
  with socket.create_server(('127.0.0.1', 0)) as silent:
    port = silent.getsockname()[1]
    with pytest.raises(arrays.DataError, match='timed out'):
      downloads.probe(f'http://127.0.0.1:{port}/a')


def test_stuck_name_lookup(monkeypatch):
  release = threading.Event()

  def stuck(*args, **kwargs):
    release.wait(10)
    return []

  monkeypatch.setattr(socket, 'getaddrinfo', stuck)
  monkeypatch.setattr(downloads, 'PROBE_DEADLINE', 0.1)
  with pytest.raises(arrays.DataError, match=r'no answer in 0\.1 s'):
    downloads.probe('http://data.invalid/a')
  release.set()


def test_proxy_is_used_by_probe_and_download(shop, monkeypatch, tmp_path):
  server, archive, expected = shop
  url = 'http://data.invalid/a.tar.gz'
  server.files[url] = server.files['/a.tar.gz']
  far = dataclasses.replace(
      archive, urls=(url,), checksums={url: checksum_of(server.files[url])})
  monkeypatch.setenv('http_proxy', server.url)
  assert_same(downloads.load(far, [tmp_path], progress=False)[0], expected)
  assert server.requests == [url, url]


def test_file_put_there_by_hand(shop, tmp_path):
  server, archive, expected = shop
  manual = tmp_path / 'b' / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  (manual / 'a.tar.gz').write_bytes(server.files['/a.tar.gz'])
  places = [tmp_path / 'a', tmp_path / 'b']
  got, path = downloads.load(archive, places, progress=False)
  assert_same(got, expected)
  assert path == str(manual / 'a.tar.gz')
  assert server.requests == []
  (manual / 'a.tar.gz').write_bytes(b'something else')
  with pytest.raises(arrays.DataError, match=r'manual.*wrong checksum'):
    downloads.load(archive, places, progress=False)


@pytest.mark.parametrize('content', [
    b'not an archive',
    cifar_bytes(1, {'test_batch.bin': random_images(0, 2)}),
    cifar_bytes(2, {
        name: random_images(0, 2)
        for name in (*archives.CIFAR10.train_files, 'test_batch.bin')}),
])
def test_unreadable_archive(tmp_path, content):
  path = tmp_path / 'a.tar.gz'
  path.write_bytes(content)
  with pytest.raises(arrays.DataError, match=r'a\.tar\.gz cannot be read.*del'):
    archives.read(archives.CIFAR10, [path])


def test_unwritable_place(shop, tmp_path):
  _, archive, _ = shop
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(arrays.DataError, match=r'cannot be written.*data_dir'):
    downloads.load(archive, [tmp_path / 'file'], progress=False)


@pytest.mark.parametrize(
    'archive', [archives.CIFAR10, archives.CIFAR100, archives.SVHN])
def test_tfds_knows_the_official_files(archive):
  for url in archive.urls:
    size, sha256 = archive.checksum(url)
    assert size > 50e6
    assert len(bytes.fromhex(sha256)) == 32


# ---- Prepared by TFDS ----------------------------------------------------


def png(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, 'PNG')
  return stream.getvalue()


def write_records(path, images, labels, has_coarse=False):
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature['id'].bytes_list.value.append(f'{i}'.encode())
    feature['image'].bytes_list.value.append(png(image))
    feature['label'].int64_list.value.append(int(label))
    if has_coarse:
      feature['coarse_label'].int64_list.value.append(int(label) // 5)
    writer.write(example.SerializeToString())
  writer.close()


def label_feature(num_classes):
  return {
      'pythonClassName':
          'tensorflow_datasets.core.features.class_label_feature.ClassLabel',
      'classLabel': {'numClasses': str(num_classes)}}


def prepare(
    place, version='3.0.2', file_format='array_record', name='cifar10',
    module='cifar', num_classes=10):
  """Writes what TFDS writes when it prepares a set; returns its arrays."""
  folder = place / name / version
  folder.mkdir(parents=True)
  expected = arrays.Arrays(
      *random_images(0, 30, num_classes), *random_images(1, 20, num_classes))
  splits = []
  for split, num in (('train', 30), ('test', 20)):
    write_records(
        folder / f'{name}-{split}.{file_format}-00000-of-00001',
        getattr(expected, f'x_{split}'), getattr(expected, f'y_{split}'),
        has_coarse=num_classes == 100)
    splits.append({
        'name': split, 'numBytes': '1', 'shardLengths': [str(num)],
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'})
  (folder / 'dataset_info.json').write_text(json.dumps({
      'name': name, 'version': version, 'fileFormat': file_format,
      'moduleName': f'tensorflow_datasets.image_classification.{module}',
      'splits': splits}))
  features = 'tensorflow_datasets.core.features.'
  (folder / 'features.json').write_text(json.dumps({
      'pythonClassName': features + 'features_dict.FeaturesDict',
      'featuresDict': {'features': {
          'id': {
              'pythonClassName': features + 'text_feature.Text', 'text': {}},
          'image': {
              'pythonClassName': features + 'image_feature.Image',
              'image': {'dtype': 'uint8',
                        'shape': {'dimensions': ['32', '32', '3']}}},
          'label': label_feature(num_classes)} | (
              {'coarse_label': label_feature(20)} if num_classes == 100
              else {})}}))
  for label, count in (('label', num_classes), ('coarse_label', 20)):
    (folder / f'{label}.labels.txt').write_text(
        '\n'.join(map(str, range(count))))
  return expected


def no_download(monkeypatch):
  def refuse(url):
    raise arrays.DataError(f'{url} is not for tests')
  monkeypatch.setattr(downloads, 'probe', refuse)


@pytest.mark.parametrize('where', ['argument', 'environment', 'home'])
@pytest.mark.parametrize('version', ['3.0.2', '3.0.1'])
def test_prepared(monkeypatch, tmp_path, where, version):
  no_download(monkeypatch)
  place = tmp_path / 'home' / 'tensorflow_datasets'
  place = place if where == 'home' else tmp_path / 'elsewhere'
  expected = prepare(place, version)
  if where == 'environment':
    monkeypatch.setenv('TFDS_DATA_DIR', str(place))
  dataset = datasets.load(
      'cifar10', data_dir=str(place) if where == 'argument' else None,
      progress=False)
  assert_same(dataset, expected)
  assert dataset.y_train.dtype == np.int32
  assert dataset.mean == (0.4914, 0.4822, 0.4465)
  assert f'cifar10/{version}' in dataset.source
  assert '30 of 50,000 training' in dataset.source


@pytest.mark.parametrize('name, tfds_name, module, num_classes', [
    ('cifar100', 'cifar100', 'cifar', 100),
    ('svhn', 'svhn_cropped', 'svhn', 10)])
def test_prepared_cifar100_and_svhn(
    name, tfds_name, module, num_classes, monkeypatch, tmp_path):
  no_download(monkeypatch)
  expected = prepare(
      tmp_path, '3.1.0', name=tfds_name, module=module,
      num_classes=num_classes)
  dataset = datasets.load(name, data_dir=str(tmp_path), progress=False)
  assert_same(dataset, expected)  # with the fine labels
  assert (dataset.name, dataset.num_classes) == (name, num_classes)
  assert f'{tfds_name}/3.1.0' in dataset.source


def test_decoded_once_then_cached(monkeypatch, tmp_path):
  expected = prepare(tmp_path)
  folder = prepared.find('cifar10', tmp_path)
  prepared.read(folder, progress=False)
  cached, = (tmp_path / 'cache').iterdir()

  with monkeypatch.context() as patch:
    patch.setattr(prepared, '_decode', None)
    assert_same(prepared.read(folder), expected)

  cached.write_bytes(cached.read_bytes()[:100])  # damaged: decoded again
  assert_same(prepared.read(folder, progress=False), expected)
  with np.load(cached) as whole:
    assert len(whole['y_train']) == 30

  os.utime(folder / 'dataset_info.json', (1, 1))  # prepared anew
  prepared.read(folder, progress=False)
  assert len(left_in(tmp_path / 'cache')) == 2


@pytest.mark.parametrize('cache', ['', '{tmp}/file/below'])
def test_works_without_a_cache(monkeypatch, tmp_path, cache):
  (tmp_path / 'file').write_text('in the way')
  monkeypatch.setenv('AWP_CACHE_DIR', cache.format(tmp=tmp_path))
  expected = prepare(tmp_path)
  folder = prepared.find('cifar10', tmp_path)
  assert_same(prepared.read(folder, progress=False), expected)
  assert not (tmp_path / 'cache').exists()


def test_newest_version_is_found(tmp_path):
  for version in ('3.0.9', '3.0.10', 'incomplete.abc_3.0.11'):
    (tmp_path / 'cifar10' / version).mkdir(parents=True)
    (tmp_path / 'cifar10' / version / 'dataset_info.json').write_text('{}')
  (tmp_path / 'cifar10' / '4.0.0').mkdir()
  assert prepared.find('cifar10', tmp_path).name == '3.0.10'
  assert prepared.find('cifar100', tmp_path) is None


@pytest.mark.parametrize('damage', ['tfrecord', 'shard', 'info'])
def test_unreadable_prepared_set_is_named(monkeypatch, tmp_path, damage):
  no_download(monkeypatch)
  prepare(tmp_path, file_format=(
      'tfrecord' if damage == 'tfrecord' else 'array_record'))
  folder = prepared.find('cifar10', tmp_path)
  if damage == 'shard':
    (folder / 'cifar10-test.array_record-00000-of-00001').unlink()
  if damage == 'info':
    (folder / 'dataset_info.json').write_text('{')
  with pytest.raises(datasets.DataError, match=f'{folder} cannot be read'):
    datasets.load('cifar10', data_dir=str(tmp_path), progress=False)


def test_unreadable_prepared_set_is_downloaded(shop, monkeypatch, tmp_path):
  _, archive, expected = shop
  prepare(tmp_path, file_format='tfrecord')
  official(monkeypatch, 'cifar10', archive)
  dataset = datasets.load('cifar10', data_dir=str(tmp_path), progress=False)
  assert_same(dataset, expected)


def test_real_prepared_cifar10():
  root = os.environ.get('AWP_TEST_DATA')
  if not root:
    pytest.skip('AWP_TEST_DATA does not name a folder with real data')
  dataset = datasets.load(
      'cifar10', data_dir=str(pathlib.Path(root) / 'tfds'), progress=False)
  assert dataset.x_train.shape[1:] == (32, 32, 3)
  assert len(dataset.x_train) > 49_000
  assert len(dataset.x_test) > 9_900
  assert min(np.bincount(dataset.y_test, minlength=10)) > 900
  mean, std = arrays.channel_statistics(dataset.x_train)
  np.testing.assert_allclose(mean, dataset.mean, atol=1e-3)
  np.testing.assert_allclose(std, dataset.std, atol=1e-3)


def test_real_prepared_cifar100():
  root = os.environ.get('AWP_TEST_DATA')
  if not root:
    pytest.skip('AWP_TEST_DATA does not name a folder with real data')
  dataset = datasets.load(
      'cifar100', data_dir=str(pathlib.Path(root) / 'tfds'), progress=False)
  assert dataset.num_classes == 100
  assert set(dataset.y_train) == set(dataset.y_test) == set(range(100))
  mean, std = arrays.channel_statistics(dataset.x_train)
  np.testing.assert_allclose(mean, dataset.mean, atol=5e-3)
  np.testing.assert_allclose(std, dataset.std, atol=5e-3)


# ---- npz -----------------------------------------------------------------


def good_npz():
  rng = np.random.default_rng(0)
  return {
      'x_train': rng.integers(0, 256, (40, 5, 4, 3), np.uint8),
      'y_train': np.arange(40) % 4,
      'x_test': rng.integers(0, 256, (20, 5, 4, 3), np.uint8),
      'y_test': np.arange(20) % 4,
  }


def load_npz(tmp_path, content, **options):
  path = tmp_path / 'images.npz'
  np.savez(path, **content)
  return datasets.load('npz', npz_path=str(path), **options)


def test_npz_uint8(tmp_path):
  content = good_npz()
  dataset = load_npz(tmp_path, content)
  assert_same(dataset, arrays.Arrays(**content))
  assert dataset.num_classes == 4
  assert dataset.y_train.dtype == dataset.y_test.dtype == np.int32
  pixels = content['x_train'] / 255
  np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)))
  np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)))
  assert str(tmp_path) in dataset.source


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_npz_float(tmp_path, dtype):
  content = good_npz()
  for part in ('x_train', 'x_test'):
    content[part] = (content[part] / 255).astype(dtype)
  dataset = load_npz(tmp_path, content)
  assert dataset.x_train.dtype == dataset.x_test.dtype == np.float32
  np.testing.assert_allclose(dataset.x_train, content['x_train'], rtol=1e-6)
  wide = content['x_train'].astype(np.float64)
  np.testing.assert_allclose(dataset.mean, wide.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(dataset.std, wide.std((0, 1, 2)), rtol=1e-6)


def test_npz_statistics_do_not_depend_on_the_part(tmp_path):
  whole = load_npz(tmp_path, good_npz())
  part = load_npz(tmp_path, good_npz(), num_train=8)
  assert (whole.mean, whole.std) == (part.mean, part.std)


@pytest.mark.parametrize('value', [77, 0.3])
def test_constant_channel_has_unit_std(tmp_path, value):
  content = good_npz()
  for part in ('x_train', 'x_test'):
    content[part] = np.full_like(
        content[part], value, dtype=np.uint8 if value == 77 else np.float32)
  assert load_npz(tmp_path, content).std == (1.0, 1.0, 1.0)


def with_value(x, value):
  x = x / 255
  x[7, 0, 0, 0] = value
  return x


BAD = {
    'rank': ({'x_train': lambda x: x[..., 0]}, r'x_train.*N, H, W, C.*40, 5'),
    'channels first': (
        {'x_train': lambda x: np.zeros((40, 3, 32, 32), np.uint8)},
        r'x_train.*looks like.*transpose'),
    'empty': ({'x_test': lambda x: x[:0], 'y_test': lambda y: y[:0]},
              r'x_test is empty.*\(0, 5'),
    'image type': ({'x_train': lambda x: x.astype(np.int64)},
                   'x_train must be uint8.*int64'),
    'text': ({'x_train': lambda x: x.astype(str)}, 'x_train must be uint8'),
    'NaN': ({'x_train': lambda x: with_value(x, np.nan)},
            'x_train holds NaN or infinity.*image 7'),
    'infinity': ({'x_test': lambda x: with_value(x, -np.inf)},
                 'x_test holds NaN or infinity.*image 7'),
    'too large': ({'x_train': lambda x: x.astype(np.float32)},
                  r'x_train.*in \[0, 1\], got values from 0 to 255.*divide'),
    'too small': ({'x_test': lambda x: with_value(x, -0.25)},
                  r'x_test.*in \[0, 1\], got values from -0\.25'),
    'shapes': ({'x_test': lambda x: x[:, 1:]},
               r'agree.*\(5, 4, 3\).*\(4, 4, 3\)'),
    'types': ({'x_test': lambda x: x / 255}, 'agree.*uint8.*float64'),
    'label length': ({'y_train': lambda y: y[1:]}, r'y_train.*\(40,\).*\(39,'),
    'label column': ({'y_train': lambda y: y[:, None]}, r'y_train.*\(40, 1\)'),
    'label type': ({'y_test': lambda y: y + 0.5}, 'y_test.*whole.*float64'),
    'negative': ({'y_train': lambda y: y - 1}, 'y_train.*from -1 to 2'),
    'stray label': ({'y_train': lambda y: np.where(y == 3, 255, y)},
                    'y_train.*0 to 255.*no image of class 3'),
    'test label': ({'y_test': lambda y: y + 1},
                   r'y_test must lie in 0\.\.3.*from 1 to 4'),
    'one class': ({'y_train': lambda y: y * 0}, 'y_train.*2 or more classes'),
}


@pytest.mark.parametrize('case', BAD)
def test_npz_bad_content(tmp_path, case):
  changes, message = BAD[case]
  content = good_npz()
  for key, change in changes.items():
    content[key] = change(content[key])
  with pytest.raises(datasets.DataError, match=message) as caught:
    load_npz(tmp_path, content)
  assert 'images.npz' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_npz_missing_key(tmp_path):
  content = good_npz()
  content['labels'] = content.pop('y_test')
  with pytest.raises(datasets.DataError, match=r'y_test missing among.*labels'):
    load_npz(tmp_path, content)


def test_npz_of_objects(tmp_path):
  content = good_npz()
  content['x_train'] = content['x_train'].astype(object)
  with pytest.raises(datasets.DataError, match='plain arrays'):
    load_npz(tmp_path, content)


def test_npz_not_an_archive(tmp_path):
  path = tmp_path / 'a.npz'
  with pytest.raises(datasets.DataError, match=r'there is none at .*a\.npz'):
    datasets.load('npz', npz_path=str(path))
  np.savez(path, **good_npz())
  for content in (b'', b'text', path.read_bytes()[:3000]):
    path.write_bytes(content)
    with pytest.raises(datasets.DataError, match=r'not a readable \.npz'):
      datasets.load('npz', npz_path=str(path))
  with path.open('wb') as file:
    np.save(file, np.zeros(3))
  with pytest.raises(datasets.DataError, match=r'not a readable \.npz'):
    datasets.load('npz', npz_path=str(path))


# ---- digits, names, numbers ----------------------------------------------


def test_digits():
  first, again = datasets.load('digits'), datasets.load('digits', seed=5)
  assert first.x_train.shape == (1000, 8, 8, 1)
  assert first.x_test.shape == (797, 8, 8, 1)
  assert first.x_train.dtype == np.uint8
  assert (first.x_train.min(), first.x_train.max()) == (0, 255)
  assert_same(first, again)
  for labels, total in ((first.y_train, 1000), (first.y_test, 797)):
    share = np.bincount(labels) / total
    np.testing.assert_allclose(share, 0.1, atol=0.005)


def test_digits_are_those_of_scikit_learn():
  from sklearn.datasets import load_digits
  dataset = datasets.load('digits')
  got = np.concatenate([dataset.x_train, dataset.x_test]).reshape(1797, 64)
  wanted = np.round(load_digits().data * 255 / 16).astype(np.uint8)
  assert sorted(map(bytes, got)) == sorted(map(bytes, wanted))


def test_describe_is_json():
  facts = json.loads(json.dumps(datasets.describe(datasets.load('digits'))))
  assert facts['name'] == 'digits'
  assert (facts['num_train'], facts['num_test']) == (1000, 797)
  assert facts['image_shape'] == [8, 8, 1]
  assert facts['num_classes'] == 10


@pytest.mark.parametrize(('name', 'near'), [
    ('cifar-10', 'cifar10'), ('cifar_100', 'cifar100'), ('digit', 'digits')])
def test_unknown_name(name, near):
  with pytest.raises(ValueError, match=f'{name}.*Did you mean {near!r}'):
    datasets.load(name)


@pytest.mark.parametrize(('options', 'message'), [
    ({'num_train': 0}, 'num_train.*>= 1, got 0'),
    ({'num_train': 1001}, 'num_train must be at most 1000.*1001'),
    ({'num_test': 798}, 'num_test must be at most 797.*798'),
    ({'num_test': 2.5}, r'num_test.*2\.5'),
    ({'seed': -1}, 'seed.*-1'),
    ({'npz_path': 'a.npz'}, r"goes with data set 'npz', got 'a\.npz'"),
])
def test_bad_numbers(options, message):
  with pytest.raises(ValueError, match=message):
    datasets.load('digits', **options)


def test_npz_needs_a_path():
  with pytest.raises(datasets.DataError, match='needs npz_path'):
    datasets.load('npz')


# ---- Subsets -------------------------------------------------------------


def rows(x):
  return {bytes(image) for image in np.ascontiguousarray(x)}


def test_subset_is_deterministic_and_fair():
  whole = datasets.load('digits')
  part = datasets.load('digits', num_train=100, num_test=50)
  assert_same(part, datasets.load('digits', num_train=100, num_test=50))
  assert rows(part.x_train) <= rows(whole.x_train)
  assert rows(part.x_test) <= rows(whole.x_test)
  assert set(np.bincount(part.y_train)) <= {9, 10, 11}
  assert set(np.bincount(part.y_test)) <= {4, 5, 6}
  other = datasets.load('digits', num_train=100, seed=1)
  assert rows(other.x_train) != rows(part.x_train)
  assert len(other.x_test) == 797


@pytest.mark.parametrize('num', [0, 1, 7, 25, 39, 40])
def test_stratified_on_balanced_labels(num):
  labels = np.tile(np.arange(4), 10)
  picked = arrays.stratified(labels, num, np.random.default_rng(0))
  assert len(set(picked)) == len(picked) == num
  assert (np.diff(picked) > 0).all()
  counts = np.bincount(labels[picked], minlength=4)
  assert counts.max() - counts.min() <= 1


def test_stratified_keeps_the_shares():
  labels = np.repeat([0, 1, 2], [600, 300, 100])
  picked = arrays.stratified(labels, 50, np.random.default_rng(0))
  assert np.bincount(labels[picked]).tolist() == [30, 15, 5]


def test_validation_split():
  rng = np.random.default_rng(0)
  dataset = datasets.load('digits')._replace(  # all images different
      x_train=rng.integers(0, 256, (1000, 8, 8, 1), np.uint8))
  rest, x_val, y_val = datasets.split_validation(dataset, 200, seed=3)
  again = datasets.split_validation(dataset, 200, seed=3)
  np.testing.assert_array_equal(x_val, again[1])
  assert_same(rest, again[0])
  assert (len(rest.x_train), len(x_val), len(y_val)) == (800, 200, 200)
  assert not rows(rest.x_train) & rows(x_val)
  assert rows(rest.x_train) | rows(x_val) == rows(dataset.x_train)
  assert set(np.bincount(y_val)) <= {19, 20, 21}
  label_of = dict(zip(map(bytes, dataset.x_train), dataset.y_train,
                      strict=True))
  assert [label_of[bytes(x)] for x in x_val] == y_val.tolist()
  np.testing.assert_array_equal(rest.x_test, dataset.x_test)
  other = datasets.split_validation(dataset, 200, seed=4)
  assert rows(other[1]) != rows(x_val)


def test_validation_split_limits():
  dataset = datasets.load('digits', num_train=20)
  rest, x_val, _ = datasets.split_validation(dataset, 0, seed=0)
  assert (len(rest.x_train), x_val.shape) == (20, (0, 8, 8, 1))
  with pytest.raises(ValueError, match=r'at most 19 of the 20.*got 20'):
    datasets.split_validation(dataset, 20, seed=0)
  with pytest.raises(ValueError, match=r'num_validation.*-1'):
    datasets.split_validation(dataset, -1, seed=0)
