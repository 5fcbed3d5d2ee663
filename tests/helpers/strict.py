"""Rules of CI, a pytest plugin: every warning and every skip is a failure.

On a user's machine a package that is newer than ours may warn, and a test that
lacks its data is skipped. Where `AWP_TEST_STRICT` is set, both fail, but for
the warnings that pyproject.toml ignores and the skips in `allowed_skips.txt`.
"""

import fnmatch
import pathlib
from typing import NamedTuple

import pytest

ALLOWED = pathlib.Path(__file__).with_name('allowed_skips.txt')


class Allowed(NamedTuple):
  """A skip that CI accepts: tests by pattern, the start of its message, why."""

  tests: str
  message: str
  reason: str


def read(text: str) -> list[Allowed]:
  """Entries of the list, one a line: `tests | message | reason`."""
  entries = []
  for line in text.splitlines():
    if line.strip() and not line.startswith('#'):
      parts = [part.strip() for part in line.split('|')]
      if len(parts) != 3 or not all(parts):
        raise ValueError(
            f'An allowed skip must be `tests | message | reason`, got {line!r}')
      entries.append(Allowed(*parts))
  return entries


class Strict:
  """Turns warnings and skips into failures.

  Attributes:
    allowed: Skips that stay skips.
  """

  def __init__(self, allowed: list[Allowed]):
    self.allowed = allowed

  def pytest_configure(self, config: pytest.Config) -> None:
    filters = config.getini('filterwarnings')
    filters[:] = ['error'] + [
        line for line in filters if line.startswith('ignore')]

  def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, 'wasxfail'):
      return
    message = str(report.longrepr[2]).removeprefix('Skipped: ')
    if any(fnmatch.fnmatch(report.nodeid, entry.tests)
           and message.startswith(entry.message) for entry in self.allowed):
      return
    report.outcome = 'failed'
    report.longrepr = (
        f'Skipped: {message}. In CI a skip must be listed in {ALLOWED.name}.')

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_makereport(self):
    report = yield
    self._judge(report)
    return report

  @pytest.hookimpl(wrapper=True)
  def pytest_make_collect_report(self):
    report = yield
    self._judge(report)
    return report

