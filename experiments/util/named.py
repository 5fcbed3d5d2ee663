"""Parts of a config by name: ours, and those of other packages.

A part is named by text, with options in parentheses: 'sam(rho=0.05)', or, for a
part of another package, 'my_package.losses:margin_loss(weight=2.0)'.

  >>> parse_call('my.losses:make(weight=2.0)')
  ('my.losses:make', {'weight': 2.0})
  >>> load('objective', 'math:hypot')(3.0, 4.0)
  5.0
"""

import ast
from collections.abc import Callable, Mapping
import difflib
import functools
import hashlib
import importlib
import inspect
import pathlib
import re
import sys
from typing import Any

from experiments.util.errors import UserError

_CALL = re.compile(
    r'\s*(?P<name>[A-Za-z_]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*)\s*(?P<options>\(.*\))?\s*',
    re.DOTALL)

#: Where modules are looked for besides the installed ones.
_FOLDERS: list[str] = []


def is_external(text: str) -> bool:
  """Whether a name is that of a part in another package."""
  return ':' in text.partition('(')[0]


def parse_call(
    text: str, field: str = 'weight_perturbation'
) -> tuple[str, dict[str, Any]]:
  """Parses 'sam(rho=0.1)' to ('sam', {'rho': 0.1}), and 'sam' to ('sam', {}).

  Args:
    text: a name, optionally with keywords of plain values in parentheses.
    field: the config's field, for errors.

  Returns:
    The name and the options.

  Raises:
    UserError: for any other text.
  """
  match = _CALL.fullmatch(text)
  if match is not None:
    try:
      node = ast.parse(f'_{match["options"] or "()"}', mode='eval').body
      if isinstance(node, ast.Call) and not node.args and isinstance(
          node.func, ast.Name) and all(
              keyword.arg for keyword in node.keywords):  # without **{...}
        return match['name'], {
            str(keyword.arg): ast.literal_eval(keyword.value)
            for keyword in node.keywords}
    except (SyntaxError, ValueError, TypeError):
      pass
  raise UserError(
      f'{field} must be a name, with options of plain values in parentheses '
      f"like 'sam(rho=0.05)' or 'my_package.parts:make(rho=0.05)', got "
      f'{text!r}.')


def load(field: str, name: str) -> Callable[..., Any]:
  """Imports a part of another package.

  Args:
    field: the config's field, for errors.
    name: 'package.module:attribute'.

  Returns:
    The attribute, which is callable.

  Raises:
    UserError: if the module cannot be imported, or has no such callable.
  """
  place, colon, attribute = name.partition(':')
  if not colon:
    raise UserError(
        f"{field}={name!r} must have the form 'package.module:name'.")
  for folder in _FOLDERS:
    # Not before: other packages look for optional modules everywhere.
    if folder not in sys.path:
      sys.path.append(folder)
  try:
    module = importlib.import_module(place)
  except Exception as error:
    if isinstance(error, ModuleNotFoundError) and (
        f'{place}.'.startswith(f'{error.name}.')):
      raise UserError(
          f'{field}={name!r}: there is no module {error.name!r}. Modules are '
          'imported from installed packages, the folder of the config file and '
          f'the current folder, {pathlib.Path.cwd()}.') from error
    raise UserError(
        f'{field}={name!r}: importing {place!r} failed with '
        f'{type(error).__name__}: {error}. --debug shows the traceback.'
    ) from error
  found = getattr(module, attribute, None)
  if callable(found):
    return found
  names = [key for key, value in vars(module).items()
           if callable(value) and not key.startswith('_')]
  near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.5)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  what = 'no such name' if found is None else (
      f'{attribute!r} is not callable but {type(found).__name__}')
  raise UserError(
      f'{field}={name!r}: {what} in {module.__file__ or place}.{hint}')


def call(
    field: str, found: Callable[..., Any], name: str, *,
    options: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
  """Calls a part with its options and with what it takes of what is offered.

  Args:
    field: the config's field, for errors.
    found: from `load`.
    name: its name, for errors.
    options: given by the user, by keyword. They replace offered values.
    offered: values that are passed if the part has parameters of these names.

  Returns:
    What the part returns.

  Raises:
    UserError: for an option that the part does not take, a required parameter
      without a value, or any exception of the part.
  """
  parameters = parameters_of(found)
  takes_any = any(
      each.kind is each.VAR_KEYWORD for each in parameters.values())
  named = {key: each for key, each in parameters.items() if each.kind in (
      each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
  for key in options:
    if key not in named and not takes_any:
      near = difflib.get_close_matches(key, named, n=1, cutoff=0.5)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise UserError(
          f'{field}: {name!r} takes no option {key!r}, only '
          f'{", ".join(named) or "none"}.{hint}')
  given = {key: value for key, value in offered.items() if key in named}
  given |= options
  missing = [key for key, each in named.items()
             if each.default is each.empty and key not in given]
  missing += [key for key, each in parameters.items()
              if each.kind is each.POSITIONAL_ONLY]
  if missing:
    raise UserError(
        f'{field}: {name!r} requires {", ".join(missing)}. Give it as an '
        f'option, as in {name}({missing[0]}=...); it may also take '
        f'{", ".join(offered)}.')
  try:
    return found(**given)
  except UserError:
    raise
  except Exception as error:
    raise UserError(
        f'{field}: {name!r} failed with {type(error).__name__}: {error} '
        '(--debug shows the traceback).') from error


def bound(
    field: str, name: str, options: Mapping[str, Any],
    like: Callable[..., Any]) -> Callable[..., Any]:
  """A function of another package with its options bound.

  Args:
    field: the config's field, for errors.
    name: as in `load`.
    options: given by the user, by keyword.
    like: a function whose parameters the function must take, too.

  Returns:
    The function; equal calls return equal functions only if `options` is empty.

  Raises:
    UserError: if it cannot be imported, lacks a parameter, or takes no such
      option.
  """
  found = load(field, name)
  parameters, wanted = parameters_of(found), list(parameters_of(like))
  takes_any = any(
      each.kind is each.VAR_KEYWORD for each in parameters.values())
  lacking = [] if takes_any else [
      key for key in wanted if key not in parameters]
  extra = [key for key, each in parameters.items()
           if key not in wanted and key not in options
           and each.default is each.empty and each.kind not in (
               each.VAR_POSITIONAL, each.VAR_KEYWORD)]
  unknown = [] if takes_any else [
      key for key in options if key not in parameters]
  if lacking or extra or unknown:
    raise UserError(
        f'{field}: {name!r} must be a function of {", ".join(wanted)}, and of '
        f'its options; it has the parameters {", ".join(parameters)}, and '
        f'{", ".join(options) or "no options"} given.')
  return functools.partial(found, **options) if options else found


def parameters_of(found: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
  """The parameters of a function or class by name."""
  try:
    if inspect.isclass(found) and found.__init__ is not object.__init__:
      # The metaclasses of nnx and Equinox hide the signature of the class.
      return dict(list(
          inspect.signature(found.__init__).parameters.items())[1:])
    return inspect.signature(found).parameters
  except (TypeError, ValueError):  # some built-in functions have none
    return {}


def takes(found: Callable[..., Any], name: str) -> bool:
  """Whether a function or class has a parameter of that name."""
  return name in parameters_of(found)


def digest(found: Callable[..., Any]) -> str:
  """SHA-256 of the file that defines a part; '' if there is none."""
  try:
    path = pathlib.Path(inspect.getfile(inspect.unwrap(found)))
    return hashlib.sha256(path.read_bytes()).hexdigest()
  except (TypeError, OSError):
    return ''


def search_here(config_file: str) -> None:
  """Lets modules next to a config file and in the current folder be imported.

  Both come last, so that no file there replaces an installed module, and only
  once a part is loaded.

  Args:
    config_file: the path of the config file.
  """
  for folder in (pathlib.Path(config_file).parent, pathlib.Path()):
    path = str(folder.resolve())
    if path not in _FOLDERS:
      _FOLDERS.append(path)
