"""The list of the lowest versions is that of pyproject.toml."""

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
