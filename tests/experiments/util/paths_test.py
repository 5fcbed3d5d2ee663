"""Tests of paths in buckets, and of files written there."""

from concurrent import futures
import pathlib
import sys
from unittest import mock

from etils import epath
import pytest

from experiments.util import atomic, paths
from experiments.util.errors import UserError
from tests.helpers import fake_buckets


@pytest.fixture
def systems():
  with fake_buckets.served() as found:
    yield found


@pytest.fixture(params=['gs', 's3'])
def folder(request, systems):
  return fake_buckets.root(request.param) / 'run'


@pytest.mark.parametrize(('text', 'path'), [
    ('runs/x', pathlib.Path('runs/x')), ('~/x', pathlib.Path.home() / 'x'),
    ('gs', pathlib.Path('gs')), ('a:/b', pathlib.Path('a:/b')),
    (pathlib.Path('/x'), pathlib.Path('/x'))])
def test_local_paths_are_those_of_pathlib(text, path):
  assert type(paths.parse(text)) is type(path)
  assert paths.parse(text) == path
  assert not paths.is_bucket(path)


def test_addresses_survive_all_that_is_done_with_them(folder):
  address = str(folder)
  assert isinstance(folder, epath.Path)
  assert paths.is_bucket(folder)
  assert address in ('gs://bucket/run', 's3://bucket/run')
  assert str(paths.absolute(folder)) == address
  assert str(paths.parse(folder)) == address
  assert str(folder / 'a.json') == f'{address}/a.json'


@pytest.mark.parametrize('text', [
    'http://x/y', 'file:///x', 'gs://', 's3:///x', 'gs:/bucket/x',
    pathlib.Path('s3://bucket/x')])
def test_a_wrong_address_is_an_error_with_the_address(
    text, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r'gs://|s3://') as error:
    paths.parse(text)
  assert repr(str(text)) in str(error.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('scheme', 'package'), paths.PACKAGES.items())
def test_a_missing_package_is_named(scheme, package):
  with mock.patch.dict(sys.modules, {package: None}), pytest.raises(
      UserError, match=f'needs the package {package}: pip install {package}'):
    paths.parse(f'{scheme}://bucket/run')


def test_an_object_is_written_whole_or_not_at_all(folder, systems):
  path = folder / 'a.json'
  atomic.write_text(path, 'old')
  with pytest.raises(KeyError), atomic.replacing(path) as file:
    file.write(b'half')
    raise KeyError
  assert path.read_text() == 'old'
  atomic.write_json(path, [1])
  assert path.read_text() == '[\n  1\n]\n'
  atomic.append_text(path, 'ä\n')
  atomic.append_text(folder / 'b', 'first\n')
  assert path.read_bytes() == '[\n  1\n]\nä\n'.encode()
  scheme = str(folder)[:2]
  # No hidden files.
  assert sorted(systems[scheme].objects) == [
      'bucket/run/a.json', 'bucket/run/b']


def test_one_of_many_creates_an_object(folder):
  path = folder / 'config.json'
  with futures.ThreadPoolExecutor(8) as pool:
    created = list(pool.map(
        lambda n: atomic.create_text(path, str(n)), range(8)))
  assert sum(created) == 1
  assert path.read_text() == str(created.index(True))


def test_folders_are_the_objects_in_them(folder, systems):
  assert paths.children(folder) == []
  atomic.write_text(folder / 'a' / 'b', '')
  atomic.write_text(folder / 'c', '')
  assert sorted(paths.children(folder)) == [folder / 'a', folder / 'c']
  # As the consoles of providers make them.
  systems[str(folder)[:2]].objects['bucket/run/'] = b''
  assert sorted(paths.children(folder)) == [folder / 'a', folder / 'c']
  atomic.write_text(folder / 'run', '')
  assert folder / 'run' in paths.children(folder)
  paths.remove_tree(folder / 'run')
  paths.remove_tree(folder / 'a')
  assert paths.children(folder) == [folder / 'c']


@pytest.mark.parametrize('write', [
    atomic.write_text, atomic.append_text, atomic.create_text])
def test_errors_of_a_client_name_the_path(folder, systems, write):
  class ClientError(Exception):
    """Not an OSError, as those of Google's client."""

  systems[str(folder)[:2]].failing = ClientError('quota exceeded')
  with pytest.raises(OSError, match=rf'{folder}/a: quota exceeded'):
    write(folder / 'a', '')


def test_errors_of_local_files_are_not_changed(tmp_path):
  with pytest.raises(KeyError), paths.errors(tmp_path):
    raise KeyError
