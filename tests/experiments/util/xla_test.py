"""Flags of the compiler and the folder of compiled programs."""

from importlib import metadata
import os
import pathlib

import jax
import pytest

from experiments.util import xla
from experiments.util.errors import UserError


@pytest.fixture
def updates(monkeypatch, tmp_path):
  seen = {}
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(jax.config, 'update', seen.__setitem__)
  for name in ('JAX_COMPILATION_CACHE_DIR', 'JAX_COMPILATION_CACHE_MAX_SIZE',
               'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv('AWP_CACHE_DIR', raising=False)
  monkeypatch.setenv('XLA_FLAGS', '')
  return seen


@pytest.mark.parametrize('version,given,expected', [
    ('0.12.3', '', '--xla_cpu_use_onednn=true '
     '--xla_cpu_experimental_onednn_custom_call=true'),
    ('0.12.0', '--xla_cpu_use_onednn=false', '--xla_cpu_use_onednn=false '
     '--xla_cpu_experimental_onednn_custom_call=true'),
    ('0.12.0', '--a --xla_cpu_experimental_onednn_custom_call=false', '--a '
     '--xla_cpu_experimental_onednn_custom_call=false '
     '--xla_cpu_use_onednn=true'),
    ('0.10.2', '--a', '--a'), ('0.13.0', '', ''), ('1.12.0', '', '')])
def test_flags_of_known_releases_only(monkeypatch, version, given, expected):
  monkeypatch.setattr(metadata, 'version', lambda name: version)
  monkeypatch.setenv('XLA_FLAGS', given)
  xla.use_onednn()
  assert os.environ['XLA_FLAGS'] == expected
  if not given:
    monkeypatch.delenv('XLA_FLAGS')
    xla.use_onednn()
    assert os.environ.get('XLA_FLAGS', '') == expected


def test_cache_is_in_the_home_by_default(updates, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  xla.use_cache(None)
  assert updates == {
      'jax_compilation_cache_dir': str(
          tmp_path / '.cache' / 'awp_jax' / 'programs'),
      'jax_compilation_cache_max_size': 4_000_000_000,
      'jax_persistent_cache_min_compile_time_secs': 0.1}
  monkeypatch.setenv('AWP_CACHE_DIR', str(tmp_path / 'other'))
  xla.use_cache(None)
  assert updates['jax_compilation_cache_dir'] == str(
      tmp_path / 'other' / 'programs')
  monkeypatch.setenv('AWP_CACHE_DIR', '')
  xla.use_cache(None)
  assert updates['jax_compilation_cache_dir'] is None


def test_a_named_cache_or_none(updates, monkeypatch):
  xla.use_cache('named')
  assert updates == {'jax_compilation_cache_dir': 'named'}
  xla.use_cache('')
  assert updates == {'jax_compilation_cache_dir': None}
  updates.clear()
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'set')
  xla.use_cache(None)
  assert not updates


def test_no_cache_of_programs_that_call_onednn(updates, monkeypatch):
  monkeypatch.setattr(metadata, 'version', lambda name: '0.12.0')
  xla.use_onednn()
  xla.use_cache(None)
  assert not updates
  xla.use_cache('named')
  assert updates == {'jax_compilation_cache_dir': 'named'}


@pytest.mark.parametrize('flag, backend, kept', [
    ('=true', 'cpu', False), ('', 'cpu', False), ('=false', 'cpu', True),
    ('=0', 'cpu', True), ('=False', 'cpu', True), ('=true', 'gpu', True)])
def test_only_cpus_lack_a_cache_with_onednn(
    updates, monkeypatch, flag, backend, kept):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  name = xla.ONEDNN[1].partition('=')[0]
  # A flag without a value means true.
  monkeypatch.setenv('XLA_FLAGS', f'--a {name}{flag}')
  monkeypatch.setenv('AWP_CACHE_DIR', 'folder')
  xla.use_cache(None)
  assert ('jax_compilation_cache_dir' in updates) == kept


def test_folders_in_the_home_and_in_buckets(updates, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  xla.use_cache('~/kept')
  assert updates['jax_compilation_cache_dir'] == str(tmp_path / 'home/kept')
  assert (tmp_path / 'home/kept').is_dir()
  xla.use_cache('gs://bucket/kept')
  assert updates['jax_compilation_cache_dir'] == 'gs://bucket/kept'
  assert [path.name for path in tmp_path.iterdir()] == ['home']


def test_the_size_that_the_user_sets_stays(updates, monkeypatch):
  monkeypatch.setenv('AWP_CACHE_DIR', 'folder')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_MAX_SIZE', '7')
  xla.use_cache(None)
  assert 'jax_compilation_cache_max_size' not in updates
  assert updates['jax_persistent_cache_min_compile_time_secs'] == 0.1


def test_no_home(updates, monkeypatch):
  def none(path):
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.setattr(pathlib.Path, 'expanduser', none)
  xla.use_cache(None)
  assert updates['jax_compilation_cache_dir'] is None


def test_programs_that_were_written_in_part_are_removed(
    updates, monkeypatch, tmp_path):
  folder = tmp_path / 'programs'
  folder.mkdir()
  for name in ('whole-1-cache', 'whole-1-atime', 'part-2-cache'):
    (folder / name).touch()
  monkeypatch.setenv('AWP_CACHE_DIR', str(tmp_path))
  xla.use_cache(None)
  assert sorted(path.name for path in folder.glob('*-*')) == [
      'whole-1-atime', 'whole-1-cache']


def test_a_folder_that_cannot_be_made(updates, monkeypatch, tmp_path, capsys):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'--compilation_cache=file: .*exists'):
    xla.use_cache('file')
  assert not updates
  monkeypatch.setenv('AWP_CACHE_DIR', str(tmp_path / 'file'))
  xla.use_cache(None)
  assert updates['jax_compilation_cache_dir'] is None
  out = capsys.readouterr().err
  assert out.startswith('compiled programs are not kept (')
  assert f"{tmp_path / 'file' / 'programs'}" in out
