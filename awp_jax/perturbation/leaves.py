"""Which leaves of a pytree of parameters are meant, and their norms.

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
"""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp

from awp_jax.types import Array, LeafPredicate, Params, Scalar

#: Which leaves are perturbed: a predicate of (path, leaf), a pattern of paths
#: or several, or a pytree of bools like the parameters.
Mask = LeafPredicate | Params | str | tuple[str, ...]


def is_weight(path: str, leaf: Array) -> bool:
  """Whether a leaf has two axes or more, as kernels do and biases do not."""
  del path
  return jnp.ndim(leaf) > 1


def is_any(path: str, leaf: Array) -> bool:
  """True: every leaf."""
  del path, leaf
  return True


def is_no_bias(path: str, leaf: Array) -> bool:
  """Whether the last part of the path is no 'bias'; scales count as weights."""
  del leaf
  return path.split('/')[-1] != 'bias'


def leaf_paths(tree: Params) -> list[str]:
  """The paths of the leaves, like 'conv1/kernel', in the leaves' order."""
  return [
      jax.tree_util.keystr(path, simple=True, separator='/')
      for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _matches(params: Params, patterns: tuple[str, ...]) -> Params:
  paths = leaf_paths(params)
  for pattern in patterns:
    if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
      raise ValueError(
          f'mask {pattern!r} matches no leaf; there are: {", ".join(paths)}.')
  return jax.tree.unflatten(jax.tree.structure(params), [
      any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
      for path in paths])


def weight_mask(params: Params, mask: Mask = is_weight) -> Params:
  """True at each leaf that is to be perturbed.

  Args:
    params: any pytree of arrays.
    mask: a predicate of (path, leaf), the path being like 'conv1/kernel'; a
      pattern such as 'conv1/*' that whole paths must match, or a tuple of
      patterns of which one must; or the finished pytree of bools, which is
      checked and returned.

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
    return _matches(params, tuple(mask))
  if callable(mask):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: bool(mask(
            jax.tree_util.keystr(path, simple=True, separator='/'), leaf)),
        params)
  wanted: Any = jax.tree.structure(params)
  got: Any = jax.tree.structure(mask)
  if got != wanted:
    raise ValueError(
        'mask must be a predicate of (path, leaf), a pattern of paths, or a '
        f'pytree of bools like the parameters, {wanted}, got {got}.')
  return mask


def wide(leaf: Array) -> Array:
  """Half precision is widened: its range is too short for squares."""
  leaf = jnp.asarray(leaf)
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def pick(tree: Params, chosen: Params) -> list[Array]:
  """The chosen leaves of a tree, in float32 or wider."""
  return [wide(leaf) for flag, leaf in zip(
      jax.tree.leaves(chosen), jax.tree.leaves(tree), strict=True) if flag]


def put(values: list[Array], params: Params, chosen: Params) -> Params:
  """The inverse of `pick`: dtypes of `params`, zeros on the other leaves."""
  rest = iter(values)
  return jax.tree.map(
      lambda flag, w: next(rest).astype(w.dtype) if flag
      else jnp.zeros_like(w), chosen, params)


def perturb(params: Params, perturbation: Params | None) -> Params:
  """w + v; `params` itself where v is None."""
  if perturbation is None:
    return params
  return jax.tree.map(jnp.add, params, perturbation)


def global_norm(tree: Params) -> Array:
  """sqrt of the sum of squares over all leaves, in float32 or wider."""
  squares = [jnp.sum(jnp.square(wide(leaf))) for leaf in jax.tree.leaves(tree)]
  return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.float32(0)


def relative_norm(
    perturbation: Params | None, params: Params, mask: Mask = is_weight
) -> Array:
  """|v| / |w| over the chosen leaves; 0 for no perturbation or w = 0."""
  if perturbation is None:
    return jnp.float32(0)
  chosen = jax.tree.map(
      lambda m, w: w if m else jnp.zeros_like(w), weight_mask(params, mask),
      params)
  norm = global_norm(chosen)
  return global_norm(perturbation) / jnp.where(norm > 0, norm, 1)


def is_off(size: Scalar) -> bool:
  """Whether `size` is the number 0; a traced or device value never counts."""
  return not isinstance(size, jax.Array) and size == 0
