"""Command lines of main.py: one line of error, or a run that is ready."""

import os
import re
import shutil

from hypothesis import given
from hypothesis import strategies as st
import pytest

from experiments.config import schema
from experiments.configs import base
from experiments.main import CONFIGS
from tests.helpers import command_server
from tests.helpers.fuzzing import fuzzed

DEFAULTS = schema.flatten(base.get_config())

NUMBERS = st.one_of(
    st.integers(-2, 20), st.integers(-2**70, 2**70), st.floats(),
    st.floats(-2, 2), st.sampled_from([2**31, 2**32, 2**63, 10**400]))
WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from([
        '', 'None', 'True', 'nan', 'awp', 'rwp(gamma=0.01)', 'awp(mask="k")',
        'sam(rho=-1)', 'sam(rho="x")', 'awp(gamma=[1])', 'math:hypot',
        'os.path:join', 'no_such:thing', 'awp(' + '(' * 300, 'gs://', 's3:///x',
        '/proc/self/mem', '/dev/null', '/', '..', '\x00', '../../escaped',
        'tests.helpers.named_parts:objective', 'relu', 'L2', 'natural', 'MART',
        'wide_resnet', 'cosine', 'pgd-0', 'pgd-99999999999999999999', 'fgsm',
        'aa-standard', 'npz', 'float64', 'bfloat16']))
ITEMS = st.one_of(NUMBERS, WORDS, st.none(), st.booleans())
VALUES = st.one_of(
    ITEMS.map(str), st.lists(ITEMS, max_size=4).map(lambda v: str(tuple(v))),
    st.dictionaries(WORDS, NUMBERS, max_size=2).map(str))


@st.composite
def likely(draw, name):
  """A value of the field's kind, as text."""
  default = DEFAULTS[name]
  if isinstance(default, bool):
    return draw(st.sampled_from(['True', 'False', '1', '']))
  if isinstance(default, int | float):
    return str(draw(NUMBERS))
  if isinstance(default, str):
    return draw(WORDS)
  return str(tuple(draw(st.lists(
      WORDS if default and isinstance(default[0], str) else NUMBERS,
      max_size=3))))


@st.composite
def arguments(draw):
  """One argument of a command line."""
  name = draw(st.sampled_from(sorted(DEFAULTS)))
  kind = draw(st.integers(0, 9))
  if kind < 5:
    return f'--config.{name}={draw(likely(name))}'
  if kind == 5:
    return f'--config.{name}={draw(VALUES)}'
  if kind == 6:
    place = draw(st.integers(0, len(name)))
    letter = draw(st.sampled_from(['', '.', 'x', '=', 'é', ' ']))
    return f'--config.{name[:place]}{letter}{name[place + 1:]}={draw(VALUES)}'
  if kind == 7:
    flag = draw(st.sampled_from([
        'mode', 'target', 'json', 'compare_to', 'debug', 'compilation_cache',
        'process_id', 'num_processes', 'trust_run', 'verbosity', 'v', 'config',
        'alsologtostderr', 'workdir', 'config.user.x', 'config.model', 'mod']))
    value = draw(st.one_of(VALUES, st.sampled_from([
        'evaluate', 'landscape', 'compile', 'v5e:2x2', 'h100:8', 'run'])))
    return draw(st.sampled_from(
        [f'--{flag}={value}', f'--{flag}', f'-{flag}={value}', f'--no{flag}']))
  if kind == 8:
    path = draw(st.sampled_from(sorted(CONFIGS.glob('digits_*.py'))))
    return f'--config={path}' + draw(st.sampled_from(['', ':L2', ':', ':x']))
  return draw(st.text(max_size=20))


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  found = command_server.Server(
      tmp_path_factory.mktemp('commands'),
      os.environ | {'XLA_FLAGS': ''})  # one device
  yield found
  found.close()


def check(code, out, err, logs=False):
  """One line of error, after a traceback or logs if asked for, or an end."""
  if code == 0:
    assert logs or not err
    assert out == 'ready\n' or '--config.awp.gamma=' in out  # --help
  else:
    assert code == 2
    line = r'error: [^\n]{8,}\n'
    assert (re.search(f'{line}$', err) if logs else re.fullmatch(line, err))


def test_the_server_is_the_command(server):
  _, out, _ = server.finish('--config.awp.gamma=0.5', trains=False)
  assert out == 'ready\n'
  code, out, err = server.finish('--config.awp.gamma=-1', trains=False)
  assert code == 2 and 'gamma must be' in err
  check(code, out, err)


def test_command_lines(server):

  @fuzzed(deadline=None)
  @given(st.lists(arguments(), min_size=1, max_size=3))
  def run(argv):
    argv = [argument for argument in argv
            if not re.match('--?[a-z]*flagfile', argument)]  # absl reads it
    shutil.rmtree(server.folder / 'runs', ignore_errors=True)
    check(*server.finish(*argv, trains=False), logs=any(
        re.match('--?(debug|v|verbosity|alsologtostderr)', argument)
        for argument in argv))

  run()


