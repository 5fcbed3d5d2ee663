"""The license, the workflow, the citation and the reference match the code."""

import pathlib
import re
import tomllib

import pytest

import awp_jax
from awp_jax import methods, models
from awp_jax.models import torch_exchange

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']

# How a public name is written in the reference.
PUBLIC = {
    f'{module.__name__.replace("perturbation.methods", "methods")}.{name}'
    for module in (awp_jax, methods, models, torch_exchange)
    for name, member in vars(module).items()
    if callable(member) and not name.startswith('_')}


def test_license():
  text = (ROOT / 'LICENSE').read_text()
  assert PROJECT['license'] == 'Apache-2.0'
  assert 'Copyright 2026 The awp_jax authors' in text
  assert len(text.splitlines()) > 200


def test_versions_agree():
  version = awp_jax.__version__
  assert PROJECT['version'] == version
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {version}\n' in citation
  changelog = (ROOT / 'CHANGELOG.md').read_text()
  date = re.search(r"date-released: '(.*)'", citation).group(1)
  assert f'\n## [{version}] - {date}\n' in changelog
  assert '\n## [Unreleased]\n' in changelog


def test_every_dependency_is_accounted_for():
  text = (ROOT / 'docs' / 'dependencies.md').read_text()
  extras = PROJECT['optional-dependencies']
  for group, listed in {'': PROJECT['dependencies'], **extras}.items():
    for requirement in listed:
      name = re.match(r'[\w-]+', requirement)[0]
      if group == 'aot':
        name = 'jax-cuda13' if 'cuda' in name else name
      assert name in text or name == 'jax', requirement


def test_no_path_of_a_machine():
  """Records and pages name no folder of the machine they were made on."""
  for folder in ('docs', 'experiments', 'awp_jax', 'benchmarks', 'examples'):
    for path in (ROOT / folder).rglob('*'):
      if path.suffix in ('.json', '.jsonl', '.md', '.py', '.txt', '.html'):
        found = re.search(
            r'(?<![\w/:.])/(?:home|root|work|Users)/\w+', path.read_text())
        assert not found, (path, found)


def test_workflow_runs_what_ci_runs():
  text = (ROOT / '.github' / 'workflows' / 'ci.yml').read_text()
  assert re.findall(r'- run: (.*)', text) == [
      '.ci/run',
      'pip install -c requirements-lowest.txt -r requirements-dev.txt',
      "python -m pytest -n 2 --dist=worksteal -m 'not slow and not torch'"]
  assert "python: ['3.11', '3.13']" in text


def test_reference_has_every_public_name_once():
  pages = (ROOT / 'docs' / 'api').glob('*.md')
  listed = [name for page in pages
            for name in re.findall(r'^::: (\S+)$', page.read_text(), re.M)]
  assert len(set(listed)) == len(listed)
  assert set(listed) >= PUBLIC
  index = (ROOT / 'docs' / 'api' / 'index.md').read_text()
  assert set(re.findall(r'\]\[([\w.]+)\]', index)) == set(listed)


@pytest.mark.parametrize('path', re.findall(
    r'`((?:awp_jax|experiments|tests)/[\w/.]*)`',
    (ROOT / 'CONTRIBUTING.md').read_text()))
def test_contributing_names_what_exists(path):
  assert (ROOT / path).exists()
