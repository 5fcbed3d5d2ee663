"""Imports, their order, sizes of files, and the library without extras."""

import ast
import graphlib
from importlib import metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ('awp_jax', 'experiments')


def module_of(path):
  """awp_jax/attacks/__init__.py -> awp_jax.attacks."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_of(path): path for package in PACKAGES
           for path in sorted((ROOT / package).rglob('*.py'))}
LIBRARY = [name for name in MODULES if name.startswith('awp_jax')]


def imports(path, everywhere=True):
  """Modules that a file imports; `everywhere` includes function bodies."""
  tree = ast.parse(path.read_text())
  found = set()
  for node in ast.walk(tree) if everywhere else tree.body:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        found.add(name if name in MODULES else node.module)
  return found


def floors(package):
  """The paths in each row of a package's table, lowest floor first."""
  text = (ROOT / 'docs' / 'architecture.md').read_text()
  rows = [re.findall(r'`([\w/]+(?:/|\.py))`', line.split('|')[1])
          for line in text.splitlines() if line.startswith(f'| `{package}/')]
  assert len(rows) > 6
  return rows


def floor_of(module):
  """The row with a module's file or its nearest parent folder."""
  path = str(MODULES[module].relative_to(ROOT))
  matching = [(len(name), row)
              for row, names in enumerate(floors(module.split('.')[0]))
              for name in names if path == name or (
                  name.endswith('/') and path.startswith(name))]
  assert matching, f'docs/architecture.md lacks {path}'
  return max(matching)[1]


@pytest.mark.parametrize('package', PACKAGES)
def test_tables_name_what_exists(package):
  for row in floors(package):
    for name in row:
      assert (ROOT / name).exists(), name


@pytest.mark.parametrize('package', PACKAGES)
def test_imports_go_downwards(package):
  for module in MODULES:
    if not module.startswith(f'{package}.'):
      continue
    floor = floor_of(module)
    for name in imports(MODULES[module]):
      if name.split('.')[0] == package:
        assert name != package, f'{module} imports the whole package'
        assert floor_of(name) <= floor, f'{module} imports {name} from above'


def test_the_library_imports_nothing_of_the_experiments():
  for module in LIBRARY:
    assert not any(name.split('.')[0] in ('experiments', 'tests', 'benchmarks')
                   for name in imports(MODULES[module])), module


def test_imports_have_no_cycles():
  graph = {name: imports(path, everywhere=False) & set(MODULES)
           for name, path in MODULES.items()}
  assert sum(map(len, graph.values())) > 100
  graphlib.TopologicalSorter(graph).prepare()


def test_folders_and_files_stay_small():
  """At most 14 files per folder, configs aside, and 350 lines per file."""
  for package in PACKAGES:
    for folder in [ROOT / package, *(ROOT / package).rglob('*/')]:
      if folder.name != 'configs':
        assert len(list(folder.glob('*.py'))) <= 14, folder
  for path in MODULES.values():
    assert len(path.read_text().splitlines()) <= 350, path


def test_function_bodies_stay_short():
  """At most 50 lines without the docstring, tests included."""
  count = 0
  for folder in (*PACKAGES, 'tests', 'benchmarks', 'examples'):
    for path in (ROOT / folder).rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
          first = node.body[bool(ast.get_docstring(node)) and
                            len(node.body) > 1]
          lines = node.body[-1].end_lineno - first.lineno + 1
          assert lines <= 50, f'{path}: {node.name}'
          count += 1
  assert count > 2000


def requirements(text):
  """Distribution names in a list of requirements."""
  return {re.match(r'[\w.-]+', line).group().lower().replace('_', '-')
          for line in text.splitlines() if re.match(r'\w', line)}


def declared(*extras):
  """Requirements in pyproject.toml: of the library, or of some extras."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lists = [project['optional-dependencies'][extra] for extra in extras]
  lists = lists or [project['dependencies']]
  return requirements('\n'.join(line for lines in lists for line in lines))


@pytest.mark.parametrize('name, extras', [
    ('requirements.txt', 'experiments'),
    ('requirements-dev.txt', 'experiments,dev')])
def test_requirements_files_refer_to_pyproject(name, extras):
  lines = [line for line in (ROOT / name).read_text().splitlines()
           if not line.startswith('#')]
  assert lines == [f'-e .[{extras}]']
  assert all(declared(extra) for extra in extras.split(','))


#: Files of the library that need an optional package, which nothing imports.
OPTIONAL = {'equinox.py': {'equinox'}}


def test_optional_modules_are_imported_by_none():
  for module in LIBRARY:
    if MODULES[module].name in OPTIONAL:
      assert all(module not in imports(MODULES[other]) for other in LIBRARY)


def test_only_declared_packages_are_imported():
  # JAX requires NumPy and returns its arrays.
  allowed = declared() | {'numpy', 'awp_jax'} | sys.stdlib_module_names
  for path in map(MODULES.get, LIBRARY):
    found = {name.split('.')[0] for name in imports(path)}
    assert found - OPTIONAL.get(path.name, set()) <= allowed, (
        f'{path}: {found - allowed}')


def closure(names):
  """Some distributions and, of those installed, all that they require."""
  found, todo = set(), set(names)
  while todo:
    name = todo.pop().lower().replace('_', '-')
    found.add(name)
    try:
      needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
      continue
    todo |= requirements(
        '\n'.join(need for need in needs if 'extra ==' not in need)) - found
  return found


ALONE = '''
import importlib, pkgutil, sys

class Refused:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {refused!r}:
      raise ModuleNotFoundError(f'{{name}} is not installed')

sys.meta_path.insert(0, Refused())
import awp_jax
for info in pkgutil.walk_packages(awp_jax.__path__, 'awp_jax.'):
  if info.name == 'awp_jax.frameworks.equinox':
    continue
  importlib.import_module(info.name)

import functools
from flax import linen as nn
import jax, jax.numpy as jnp, numpy as np, optax

class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3))(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(3)(x.mean((1, 2)))

def batch(i):
  x = jax.random.uniform(jax.random.key(i), (8, 6, 6, 3))
  return x, jnp.arange(8) % 3

def compiled():
  return jax.jit(functools.partial(
      awp_jax.train_step, objective=awp_jax.adversarial(),
      threat=awp_jax.ThreatModel('Linf', 8 / 255),
      attack=awp_jax.Attack(2 / 255, 2),
      perturbation=awp_jax.methods.awp(0.01)))

def run(state, step, first, last):
  for i in range(first, last):
    state, _ = step(state, batch(i), jax.random.key(9))
  return state

def bits(state):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]

variables = Net().init(jax.random.key(0), batch(0)[0])
start = awp_jax.TrainState.create(
    apply_fn=Net().apply, tx=optax.sgd(0.1, 0.9), **variables)
whole = run(start, compiled(), 0, 4)
half = jax.tree.map(np.asarray, run(start, compiled(), 0, 2))
jax.clear_caches()
resumed = run(half, compiled(), 2, 4)
assert bits(resumed) == bits(whole) != bits(run(start, compiled(), 0, 3))
print(jax.device_count(), 'same bits')
'''


@pytest.mark.slow
def test_library_alone_with_default_compiler_flags(tmp_path):
  """The library runs without the packages of the experiments.

  The other tests compile for eight devices without optimization. Here XLA
  optimizes, and an interrupted, recompiled run still ends with the same bits.
  """
  others = declared('experiments', 'dev') - closure(declared())
  assert {'tensorflow-datasets', 'ml-collections', 'matplotlib'} <= others
  refused = {'experiments', 'examples', 'tests', 'benchmarks', 'torch'} | {
      package for package, names in metadata.packages_distributions().items()
      if {name.lower().replace('_', '-') for name in names} & others}
  environment = {
      name: value for name, value in os.environ.items()
      if name not in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')} | {
          'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
      [sys.executable, '-c', ALONE.format(refused=refused)], cwd=tmp_path,
      env=environment, capture_output=True, text=True, check=False)
  assert done.stdout.strip() == '1 same bits', done.stderr[-2000:]
