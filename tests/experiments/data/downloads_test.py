"""Tests of downloads from a local server, also with failures."""

import dataclasses
import io
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments.data import archives, arrays, datasets, downloads
from tests.helpers.dataset_files import (
  Server,
  assert_same,
  at,
  checksum_of,
  cifar_bytes,
  left_in,
  official,
  random_images,
  serving,
  tiny,
)

pytest.importorskip('tensorflow_datasets')


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
  """Files have TFDS's names, so neither downloads them twice."""
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
  wanted = 'failed.*IncompleteRead' if announce else r'1000 bytes.*truncated'
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
  """A killed process leaves its folder, or an old partial file."""
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
  # Another process may still use the recent folder.
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
  with pytest.raises(arrays.DataError, match=r'the download of .* failed'):
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
  with pytest.raises(arrays.DataError, match=r'no response in 0\.1 s'):
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
  with pytest.raises(arrays.DataError, match=r'is not writable.*data_dir'):
    downloads.load(archive, [tmp_path / 'file'], progress=False)


@pytest.mark.parametrize(
    'archive', [archives.CIFAR10, archives.CIFAR100, archives.SVHN])
def test_tfds_knows_the_official_files(archive):
  for url in archive.urls:
    size, sha256 = archive.checksum(url)
    assert size > 50e6
    assert len(bytes.fromhex(sha256)) == 32
