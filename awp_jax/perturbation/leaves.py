"""Which leaves of a pytree of parameters are perturbed, and their norms.

A mask chooses leaves in one of four ways, all turned into a pytree of bools:

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

Between `select` and `restore` the chosen leaves are a dict by path, in float32
or wider; nothing is stored for the others:

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

from awp_jax import checks, numerics
from awp_jax.types import Array, LeafPredicate, Params, Scalar

#: Which leaves are perturbed: a predicate of (path, leaf), a pattern of paths
#: or several, or a pytree of bools like the parameters.
Mask = LeafPredicate | Params | str | tuple[str, ...]

#: How many leading axes of a leaf count layers, as under `nn.scan`: one number
#: for all leaves, or numbers by pattern of paths, the first that matches.
StackAxes: TypeAlias = int | Mapping[str, int] | tuple[tuple[str, int], ...]

#: The chosen leaves by path, in float32 or wider.
Chosen: TypeAlias = dict[str, Array]


def is_weight(path: str, leaf: Array) -> bool:
  """Whether a leaf has two axes or more and is not named bias or scale."""
  return leaf.ndim > 1 and path.split('/')[-1] not in ('bias', 'scale')


def is_any(path: str, leaf: Array) -> bool:
  """True: every leaf."""
  del path, leaf
  return True


def is_no_bias(path: str, leaf: Array) -> bool:
  """Whether a leaf is not named bias; scales count as weights here."""
  del leaf
  return path.split('/')[-1] != 'bias'


#: Classes of flax that hold one array of parameters, by name and module; flax
#: itself is not imported.
_BOXES = (('Variable', 'flax.nnx'), ('AxisMetadata', 'flax.core'))


def _is_box(node: Any) -> bool:
  """Whether a node is an `nnx.Variable` or a boxed parameter of linen."""
  return any(base.__name__ == name and base.__module__.startswith(module)
             for base in type(node).__mro__ for name, module in _BOXES)


def leaf_paths(tree: Params) -> list[str]:
  """The paths of the leaves, like 'conv1/kernel', in the leaves' order.

  The attribute `value`, in which an `nnx.Variable` and linen's `nn.Partitioned`
  hold their array, is no part of a path: linen, nnx and Equinox models have
  paths of the same form.

  Args:
    tree: any pytree.

  Returns:
    A path for each leaf.

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
        f'every leaf needs a path of its own, got twice: {", ".join(twice)}.')
  return paths


def as_stack_axes(value: StackAxes) -> int | tuple[tuple[str, int], ...]:
  """Checks `stack_axes` and makes it hashable.

  Args:
    value: a whole number >= 0, or such numbers by pattern.

  Returns:
    The number, or pairs of pattern and number.

  Raises:
    ValueError: for anything else.
  """
  if isinstance(value, Mapping | tuple | list):
    pairs = tuple(dict(value).items())
    for pattern, number in pairs:
      checks.count(f'stack_axes of {pattern!r}', number, minimum=0)
    return pairs
  checks.count('stack_axes', value, minimum=0)
  return int(value)


def num_stack_axes(stack_axes: StackAxes, path: str, leaf: Array) -> int:
  """How many leading axes of a leaf count layers, at most all of them."""
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
  """The predicate sees one layer of a leaf that stacks several."""
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


def weight_mask(
    params: Params, mask: Mask = is_weight, stack_axes: StackAxes = 0
) -> Params:
  """True at each leaf that is to be perturbed.

  Args:
    params: any pytree of arrays.
    mask: a pytree of bools like `params`, which is returned as it is; a pattern
      such as 'conv1/*' that whole paths must match, or a tuple of patterns of
      which one must; or a predicate of (path, leaf), the path being like
      'conv1/kernel'.
    stack_axes: how many leading axes of a leaf count layers, as in
      `balls.Ball`. A predicate is given the shape of one layer.

  Returns:
    A pytree of Python bools with the structure of `params`.

  Raises:
    ValueError: if a pattern matches no leaf, or `mask` is a pytree of another
      structure.
  """
  if isinstance(mask, str):
    mask = (mask,)
  if isinstance(mask, tuple | list) and mask and all(
      isinstance(pattern, str) for pattern in mask):
    patterns = tuple(mask)
    _check_patterns('mask', patterns, leaf_paths(params))
    mask = lambda path, leaf: any(  # noqa: E731
        fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
  wanted: Any = jax.tree.structure(params)
  got: Any = jax.tree.structure(mask)
  # A pytree of bools may be callable, as Equinox modules are, and a predicate
  # may be a pytree.
  is_tree = got == wanted and all(
      isinstance(flag, bool | np.bool_) for flag in jax.tree.leaves(mask))
  if not is_tree and _is_predicate(mask):
    return _by_predicate(params, mask, stack_axes)
  if not is_tree:
    raise ValueError(
        'mask must be a predicate of (path, leaf), a pattern of paths, or a '
        f'pytree of bools like the parameters, {wanted}, got {got}.')
  return mask


def select(tree: Params, chosen: Params) -> Chosen:
  """The chosen leaves of a tree by path, in float32 or wider."""
  return {
      path: numerics.wide(leaf) for path, flag, leaf in zip(
          leaf_paths(tree), jax.tree.leaves(chosen), jax.tree.leaves(tree),
          strict=True) if flag}


def restore(values: Chosen | None, params: Params) -> Params:
  """A pytree like `params`, in its dtypes: `values`, and zeros elsewhere."""
  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, [
      values[path].astype(w.dtype) if values and path in values
      else jnp.zeros_like(w)
      for path, w in zip(leaf_paths(params), flat, strict=True)])


def perturb(params: Params, perturbation: Chosen | None) -> Params:
  """w + v, added in float32 or wider; `params` itself where v is None.

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
  """sqrt of the sum of squares over all leaves, in float32 or wider."""
  return numerics.global_norm(jax.tree.leaves(tree))


def relative_norm(
    perturbation: Params | None, params: Params, mask: Mask = is_weight
) -> Array:
  """|v| / |w| over the chosen leaves; 0 for no perturbation or w = 0."""
  if perturbation is None:
    return jnp.float32(0)
  norm = global_norm(select(params, weight_mask(params, mask)))
  return global_norm(perturbation) / jnp.where(norm > 0, norm, 1)


def is_off(size: Scalar) -> bool:
  """Whether `size` is the number 0; a traced or device value never counts."""
  return not isinstance(size, jax.Array) and size == 0
