"""Which leaves of a pytree of parameters are perturbed, and their norms.

A mask is a predicate, a path pattern, several patterns, or a pytree of bools.
`weight_mask` converts each form to a pytree of bools:

  >>> import jax.numpy as jnp
  >>> params = {'in': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
  ...           'out': {'kernel': jnp.ones((3, 1))}}
  >>> weight_mask(params, is_weight)['in']
  {'bias': False, 'kernel': True}
  >>> weight_mask(params, 'out/*')['out']
  {'kernel': True}
  >>> weight_mask(params, 'head/*')
  Traceback (most recent call last):
    ...
  ValueError: mask 'head/*' matches no leaf; there are: in/bias, in/kernel, \
out/kernel.

`select` returns the chosen leaves as a dict by path, in float32 or wider, and
`restore` converts them back. Nothing is stored for the other leaves:

  >>> v = select(params, weight_mask(params, 'out/*'))
  >>> {path: leaf.shape for path, leaf in v.items()}
  {'out/kernel': (3, 1)}
  >>> print(perturb(params, v)['out']['kernel'].T)
  [[2. 2. 2.]]
  >>> print(restore(v, params)['in']['bias'])
  [0. 0. 0.]
"""

from collections.abc import Mapping
import fnmatch
import inspect
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks, numerics
from awp_jax.types import Array, LeafPredicate, Params, Scalar

#: Which leaves are perturbed: a predicate of (path, leaf), a pattern of paths
#: or several, or a pytree of bools like the parameters.
Mask = LeafPredicate | Params | str | tuple[str, ...]

#: The number of leading axes of a leaf that index layers, as under `nn.scan`: a
#: number for all leaves, or numbers by path pattern (the first match applies).
StackAxes: TypeAlias = int | Mapping[str, int] | tuple[tuple[str, int], ...]

#: The chosen leaves by path, in float32 or wider.
Chosen: TypeAlias = dict[str, Array]


def is_weight(path: str, leaf: Array) -> bool:
  """Whether a leaf has two or more axes and is not named bias or scale."""
  return leaf.ndim > 1 and path.split('/')[-1] not in ('bias', 'scale')


def is_any(path: str, leaf: Array) -> bool:
  """True for every leaf."""
  del path, leaf
  return True


def is_no_bias(path: str, leaf: Array) -> bool:
  """Whether a leaf is not named bias; includes scales."""
  del leaf
  return path.split('/')[-1] != 'bias'


#: Flax classes that hold one parameter array, by name and module. This avoids
#: importing flax.
_BOXES = (('Variable', 'flax.nnx'), ('AxisMetadata', 'flax.core'))


def _is_box(node: Any) -> bool:
  """Whether a node is an `nnx.Variable` or a boxed parameter of linen."""
  return any(base.__name__ == name and base.__module__.startswith(module)
             for base in type(node).__mro__ for name, module in _BOXES)


def leaf_paths(tree: Params) -> list[str]:
  """The paths of the leaves in order, like 'conv1/kernel'.

  The attribute `value` of an `nnx.Variable` or linen `nn.Partitioned` is not
  part of the path, so linen, nnx and Equinox models have paths of the same
  form.

  Args:
    tree: any pytree.

  Returns:
    One path per leaf.

  Raises:
    ValueError: if two leaves have the same path.
  """
  paths = []
  for path, node in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=_is_box):
    inner: list[Any] = [()]
    if _is_box(node):
      inner = [keys[1:] for keys, _ in jax.tree_util.tree_leaves_with_path(
          node)]
    paths += [jax.tree_util.keystr((*path, *keys), simple=True, separator='/')
              for keys in inner]
  if len(set(paths)) < len(paths):
    twice = sorted({path for path in paths if paths.count(path) > 1})
    raise ValueError(
        f'leaf paths must be unique, got twice: {", ".join(twice)}.')
  return paths


def as_stack_axes(value: StackAxes) -> int | tuple[tuple[str, int], ...]:
  """Checks `stack_axes` and converts it to a hashable value.

  Args:
    value: a whole number >= 0, or such numbers by pattern.

  Returns:
    The number, or (pattern, number) pairs.

  Raises:
    ValueError: if a number is not a whole number >= 0.
  """
  if isinstance(value, Mapping | tuple | list):
    pairs = tuple(dict(value).items())
    for pattern, number in pairs:
      checks.count(f'stack_axes of {pattern!r}', number, minimum=0)
    return pairs
  checks.count('stack_axes', value, minimum=0)
  return int(value)


def num_stack_axes(stack_axes: StackAxes, path: str, leaf: Array) -> int:
  """The number of leading axes of a leaf that index layers, <= its rank."""
  spec = as_stack_axes(stack_axes)
  number = spec if isinstance(spec, int) else next(
      (count for pattern, count in spec if fnmatch.fnmatchcase(path, pattern)),
      0)
  return min(number, jnp.ndim(leaf))


def _check_patterns(
    name: str, patterns: tuple[str, ...], paths: list[str]) -> None:
  for pattern in patterns:
    if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
      raise ValueError(
          f'{name} {pattern!r} matches no leaf; there are: '
          f'{", ".join(paths)}.')


def _by_predicate(
    params: Params, mask: LeafPredicate, stack_axes: StackAxes) -> Params:
  """Applies a predicate to each leaf, with the shape of a single layer."""
  paths, spec = leaf_paths(params), as_stack_axes(stack_axes)
  if not isinstance(spec, int):
    _check_patterns('stack_axes', tuple(p for p, _ in spec), paths)
  flat, structure = jax.tree.flatten(params)
  counts = [num_stack_axes(spec, path, leaf)
            for path, leaf in zip(paths, flat, strict=True)]
  layers: list[Any] = [leaf if not count else jax.ShapeDtypeStruct(
      jnp.shape(leaf)[count:], leaf.dtype)
            for count, leaf in zip(counts, flat, strict=True)]
  return jax.tree.unflatten(structure, [
      bool(mask(path, leaf)) for path, leaf in zip(paths, layers, strict=True)])


def _is_predicate(mask: Any) -> TypeGuard[LeafPredicate]:
  """Whether `mask` can be called with (path, leaf)."""
  if not callable(mask):
    return False
  try:
    inspect.signature(mask).bind('path', None)
  except TypeError:
    return False
  except ValueError:  # some builtins have no signature
    return True
  return True


def _check_arrays(params: Params) -> None:
  for path, leaf in zip(
      leaf_paths(params), jax.tree.leaves(params), strict=True):
    if not hasattr(leaf, 'ndim') and not isinstance(leaf, int | float):
      raise ValueError(
          f'parameters must be arrays, got {leaf!r} at {path!r}. Pass the '
          'arrays alone, such as eqx.filter(model, eqx.is_inexact_array).')


def weight_mask(
    params: Params, mask: Mask = is_weight, stack_axes: StackAxes = 0
) -> Params:
  """Converts a mask to a pytree of bools, True at leaves to perturb.

  Args:
    params: any pytree of arrays.
    mask: a pytree of bools like `params`, returned unchanged; a pattern such as
      'conv1/*' that must match the whole path; a tuple of patterns, one of
      which must match; or a predicate of (path, leaf), with paths like
      'conv1/kernel'.
    stack_axes: the number of leading axes of a leaf that index layers, as in
      `balls.Ball`. Predicates get the shape of a single layer.

  Returns:
    A pytree of Python bools with the structure of `params`.

  Raises:
    ValueError: if a pattern matches no leaf, the structure of `mask` differs
      from that of `params`, or a leaf of `params` is not an array.
  """
  _check_arrays(params)
  if isinstance(mask, str):
    mask = (mask,)
  if isinstance(mask, tuple | list) and mask and all(
      isinstance(pattern, str) for pattern in mask):
    patterns = tuple(mask)
    _check_patterns('mask', patterns, leaf_paths(params))
    mask = lambda path, leaf: any(  # noqa: E731
        fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
  expected: Any = jax.tree.structure(params)
  got: Any = jax.tree.structure(mask)
  # A pytree of bools may be callable, like an Equinox module, and a predicate
  # may be a pytree.
  is_tree = got == expected and all(
      isinstance(flag, bool | np.bool_) for flag in jax.tree.leaves(mask))
  if not is_tree and _is_predicate(mask):
    return _by_predicate(params, mask, stack_axes)
  if not is_tree:
    raise ValueError(
        'mask must be a predicate of (path, leaf), a pattern of paths, or a '
        f'pytree of bools like the parameters, {expected}, got {got}.')
  return mask


def select(tree: Params, chosen: Params) -> Chosen:
  """Returns the chosen leaves by path, in float32 or wider."""
  return {
      path: numerics.wide(leaf) for path, flag, leaf in zip(
          leaf_paths(tree), jax.tree.leaves(chosen), jax.tree.leaves(tree),
          strict=True) if flag}


def restore(values: Chosen | None, params: Params) -> Params:
  """Returns a pytree like `params` with `values`, and zeros elsewhere."""
  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, [
      values[path].astype(w.dtype) if values and path in values
      else jnp.zeros_like(w)
      for path, w in zip(leaf_paths(params), flat, strict=True)])


def perturb(params: Params, perturbation: Chosen | None) -> Params:
  """Returns w + v, added in float32 or wider; `params` if v is None.

  Args:
    params: w.
    perturbation: v by path, from `select`.

  Returns:
    A pytree like `params`, in its dtypes.
  """
  if perturbation is None:
    return params
  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, [
      (numerics.wide(w) + perturbation[path]).astype(w.dtype)
      if path in perturbation else w
      for path, w in zip(leaf_paths(params), flat, strict=True)])


def global_norm(tree: Params) -> Array:
  """Euclidean norm over all leaves, in float32 or wider."""
  return numerics.global_norm(jax.tree.leaves(tree))


def relative_norm(
    perturbation: Params | None, params: Params, mask: Mask = is_weight
) -> Array:
  """|v| / |w| over the chosen leaves; 0 if v is None or w = 0."""
  if perturbation is None:
    return jnp.float32(0)
  norm = global_norm(select(params, weight_mask(params, mask)))
  return global_norm(perturbation) / jnp.where(norm > 0, norm, 1)


def is_off(size: Scalar) -> bool:
  """Whether `size` is the Python number 0; never true for jax arrays."""
  return not isinstance(size, jax.Array) and size == 0
