"""Which warnings and skips fail a test: in CI, and for users."""

import pathlib
import tomllib
import warnings

import pytest

from tests.helpers import strict

ROOT = pathlib.Path(__file__).resolve().parents[2]

MODULE = 'tests.awp_jax.training.train_step_test'
TESTS = '''
import warnings
import pytest

def warn(name, category):
  warnings.warn_explicit('a word', category, 'a.py', 1, module=name)

@pytest.mark.parametrize('name', [
    'awp_jax.awp', 'experiments.modes.train', 'MODULE', 'scipy.sparse', 'jax'])
@pytest.mark.parametrize('category', [
    UserWarning, RuntimeWarning, DeprecationWarning, FutureWarning,
    PendingDeprecationWarning, ResourceWarning])
def test_warning(name, category):
  warn(name, category)

def test_listed():
  pytest.skip('no browser on this machine')

def test_unlisted():
  pytest.skip('no idea')

def test_expected():
  pytest.xfail('to be fixed')
'''.replace('MODULE', MODULE)


class Outcomes:
  """A plugin that collects the report of each test."""

  def __init__(self):
    self.outcomes = {}

  def pytest_runtest_logreport(self, report):
    if report.when == 'call':
      self.outcomes[report.nodeid.split('::')[1]] = report

  def pytest_collectreport(self, report):
    if report.outcome != 'passed':
      self.outcomes[report.nodeid] = report


def run(folder, name, *plugins):
  """Runs the tests above with this repository's warning filters.

  Args:
    folder: where the tests are written.
    name: prefix of their modules, unique within one process.
    *plugins: pytest plugins.

  Returns:
    Reports by test, and by module that could not be collected.
  """
  filters = tomllib.loads((ROOT / 'pyproject.toml').read_text())[
      'tool']['pytest']['ini_options']['filterwarnings']
  (folder / 'pytest.ini').write_text(
      '[pytest]\nfilterwarnings =\n' + ''.join(f'  {f}\n' for f in filters))
  files = [folder / f'{name}_test.py', folder / f'{name}_module_test.py']
  files[0].write_text(TESTS)
  files[1].write_text("import pytest\npytest.importorskip('no_such_package')\n")
  seen = Outcomes()
  with warnings.catch_warnings():
    warnings.resetwarnings()  # Only the inner run's filters apply.
    pytest.main(
        ['-p', 'no:cacheprovider', '-p', 'no:terminal', f'--rootdir={folder}',
         '--continue-on-collection-errors', *map(str, files)],
        plugins=[seen, *plugins])
  return seen.outcomes


def failed(outcomes):
  return {name for name, report in outcomes.items() if report.failed}


def test_only_warnings_of_our_modules_fail_for_users(tmp_path):
  assert failed(run(tmp_path, 'users')) == {
      f'test_warning[{category}-{name}]'
      for name in ('awp_jax.awp', 'experiments.modes.train', MODULE)
      for category in ('UserWarning', 'RuntimeWarning')}


def test_warnings_and_unlisted_skips_fail_in_ci(tmp_path):
  outcomes = run(tmp_path, 'ci', strict.Strict(strict.read(
      '# a comment\n\n*ci_test.py::* | no browser | not installed\n')))
  assert failed(outcomes) == {'test_unlisted', 'ci_module_test.py'} | {
      f'test_warning[{category}-{name}]'
      for name in ('awp_jax.awp', 'experiments.modes.train', MODULE,
                   'scipy.sparse', 'jax')
      for category in ('UserWarning', 'RuntimeWarning', 'DeprecationWarning',
                       'FutureWarning', 'PendingDeprecationWarning')}
  assert outcomes['test_listed'].skipped
  assert outcomes['test_expected'].skipped
  assert 'Skipped: no idea. In CI' in outcomes['test_unlisted'].longrepr
  assert 'no_such_package' in outcomes['ci_module_test.py'].longrepr


def test_allowed_skips_match_existing_tests():
  entries = strict.read(strict.ALLOWED.read_text())
  assert 0 < len(entries) <= 5
  for entry in entries:
    folder, name = entry.tests.split('::')[0].rsplit('/', 1)
    assert list((ROOT / folder).rglob(name)), entry


@pytest.mark.parametrize('line', ['a | b', 'a | b |', 'a', 'a | b | c | d'])
def test_an_allowed_skip_has_a_reason(line):
  with pytest.raises(ValueError, match=r'must be `tests . message . reason`'):
    strict.read(line)
