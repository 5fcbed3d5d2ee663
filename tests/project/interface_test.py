"""The public interface is the one in tests/data/interface.txt.

After a change that is meant, write the file anew and list the change in
CHANGELOG.md:

  python -m tests.project.interface_test
"""

import dataclasses
import inspect
import pathlib

import awp_jax
from awp_jax import methods, models
from awp_jax.frameworks import equinox, nnx
from awp_jax.models import torch_exchange

FILE = pathlib.Path(__file__).parents[1] / 'data' / 'interface.txt'
MODULES = (awp_jax, methods, models, torch_exchange, nnx, equinox)


def default(value):
  """A default as text that is the same on every version."""
  if callable(value) or dataclasses.is_dataclass(value):
    return getattr(value, '__name__', type(value).__name__)
  return repr(value)


#: Fields that flax gives to every module.
OF_FLAX = ('parent', 'name')


def parameters(member):
  """'name', 'name=default', '*' before those by keyword alone."""
  found, only_keywords = [], False
  listed = inspect.signature(member).parameters
  if set(OF_FLAX) <= listed.keys():
    listed = {name: value for name, value in listed.items()
              if name not in OF_FLAX}
  for parameter in listed.values():
    if parameter.kind == parameter.KEYWORD_ONLY and not only_keywords:
      only_keywords = True
      found.append('*')
    text = {parameter.VAR_POSITIONAL: '*', parameter.VAR_KEYWORD: '**'}.get(
        parameter.kind, '') + parameter.name
    only_keywords |= parameter.kind == parameter.VAR_POSITIONAL
    if parameter.default is not parameter.empty:
      text += f'={default(parameter.default)}'
    found.append(text)
  return ', '.join(found)


def describe(name, member):
  """Lines of a function, or of a class with its fields and methods."""
  if not isinstance(member, type):
    return [f'{name}({parameters(member)})']
  if issubclass(member, BaseException):
    return [f'{name}: an exception']
  fields = getattr(member, '__dataclass_fields__', {})
  own = [method for method, value in sorted(vars(member).items())
         if not method.startswith('_') and method not in fields
         and inspect.isfunction(value)
         and value.__module__.startswith('awp_jax')]
  return [f'{name}({parameters(member)})'] + [
      f'{name}.{method}({parameters(getattr(member, method))})'
      for method in own]


def interface():
  lines = []
  for module in MODULES:
    prefix = module.__name__.replace('perturbation.methods', 'methods')
    for name, member in sorted(vars(module).items()):
      if callable(member) and not name.startswith('_') and (
          getattr(member, '__module__', '').startswith('awp_jax')):
        lines += describe(f'{prefix}.{name}', member)
  return lines


def test_the_public_interface_changes_on_purpose():
  assert FILE.read_text().splitlines() == interface()


def test_an_interface_has_what_callers_depend_on():
  def function(a, *rest, b, c=2, **others):
    del a, rest, b, c, others

  assert parameters(function) == 'a, *rest, b, c=2, **others'
  assert parameters(lambda x, *, y=print: 0) == 'x, *, y=print'
  found = interface()
  assert len(found) > 80 and len(set(found)) == len(found)
  assert any(line.startswith('awp_jax.awp_step(') for line in found)
  assert any(line.startswith('awp_jax.ThreatModel(') for line in found)


if __name__ == '__main__':
  FILE.write_text('\n'.join(interface()) + '\n')
