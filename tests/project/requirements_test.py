"""The lists of versions agree, and docs/dependencies.md names every package."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']


def bounds(requirements):
  """Name -> lowest version of each requirement."""
  return {match[1]: match[3] for match in (
      re.match(r'([\w.-]+)(\[.*\])?>=([\w.]+)', requirement)
      for requirement in requirements)}


def test_the_lowest_versions_are_those_of_the_project():
  lines = (ROOT / 'requirements-lowest.txt').read_text().splitlines()
  pinned = dict(line.split('==') for line in lines if not line.startswith('#'))
  assert pinned == bounds(
      PROJECT['dependencies'] + EXTRAS['experiments'] + EXTRAS['dev'])
  assert list(pinned) == sorted(pinned, key=str.lower)


def test_every_package_is_explained():
  text = (ROOT / 'docs/dependencies.md').read_text()
  packages = bounds(PROJECT['dependencies'] + [
      requirement for extra in EXTRAS.values() for requirement in extra])
  assert len(packages) > 40
  for name in packages:
    shown = 'jax-cuda13' if name.startswith('jax-cuda13') else name
    assert shown in text, name
