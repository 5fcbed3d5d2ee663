"""Examples in the README and in docstrings run."""

import doctest
import importlib
import pathlib
import pkgutil

import pytest

import awp_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = [
    info.name for info in pkgutil.walk_packages(
        awp_jax.__path__, prefix='awp_jax.')]


def test_readme():
  results = doctest.testfile(str(ROOT / 'README.md'), module_relative=False)
  assert results.attempted > 10
  assert results.failed == 0


def test_readme_example_is_short():
  text = (ROOT / 'README.md').read_text()
  block = text.split('```python\n')[1].split('```')[0].strip()
  assert len(block.splitlines()) <= 25


@pytest.mark.parametrize('name', MODULES)
def test_module_examples(name):
  assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_functions_are_typed_and_documented():
  for name in vars(awp_jax):
    member = getattr(awp_jax, name)
    if name.startswith('_') or not callable(member):
      continue
    assert member.__doc__, name
    if not isinstance(member, type):
      code = member.__code__
      arguments = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
      assert set(arguments) <= set(member.__annotations__), name
      assert 'return' in member.__annotations__, name
