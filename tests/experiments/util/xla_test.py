"""Flags of the compiler and the folder of compiled programs."""

from importlib import metadata
import os

import jax
import pytest

from experiments.util import xla
from experiments.util.errors import UserError


@pytest.fixture
def updates(monkeypatch, tmp_path):
  seen = {}
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(jax.config, 'update', seen.__setitem__)
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
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


def test_cache_is_in_the_home_by_default(updates, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  xla.use_cache(None)
  assert updates == {
      'jax_compilation_cache_dir': str(
          tmp_path / '.cache' / 'awp_jax' / 'programs'),
      'jax_compilation_cache_max_size': 4_000_000_000}
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


def test_a_folder_that_cannot_be_made(updates, monkeypatch, tmp_path, capsys):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r'--compilation_cache=file: .*exists'):
    xla.use_cache('file')
  assert not updates
  monkeypatch.setenv('AWP_CACHE_DIR', str(tmp_path / 'file'))
  xla.use_cache(None)
  assert updates['jax_compilation_cache_dir'] is None
  out = capsys.readouterr().out
  assert out.startswith('compiled programs are not kept (')
  assert f"{tmp_path / 'file' / 'programs'}" in out
