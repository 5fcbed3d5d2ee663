"""Norms and unit vectors at the limits of the float range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import threat
from awp_jax.core import numerics
from awp_jax.perturbation import methods, perturbed_step


@pytest.mark.parametrize('dtype,wanted', [
    ('bfloat16', 'float32'), ('float16', 'float32'), ('int32', 'float32'),
    ('uint8', 'float32'), ('float32', 'float32'), ('float64', 'float64')])
def test_wide(dtype, wanted, x64):
  assert numerics.wide(jnp.ones(2, dtype)).dtype == wanted
  assert numerics.wide_dtype(jnp.dtype(dtype)) == wanted


@pytest.mark.parametrize('scale', [1e-37, 1e-30, 1.0, 1e30, 1e36])
def test_tiny_and_huge_entries(scale):
  x = jnp.array([[0.75, -1.0], [0.0, 0.0]]) * scale
  unit, norm = numerics.unit_and_norm(x, (1,))
  np.testing.assert_allclose(unit, [[0.6, -0.8], [0, 0]], rtol=1e-6)
  np.testing.assert_allclose(norm, [[1.25 * scale], [0]], rtol=1e-6)
  whole, length = numerics.unit_and_norm(x)
  np.testing.assert_allclose(whole, unit, rtol=1e-6)
  np.testing.assert_allclose(length, [[1.25 * scale]], rtol=1e-6)
  np.testing.assert_allclose(
      numerics.global_norm([x, x]), np.sqrt(2) * 1.25 * scale, rtol=1e-6)


def test_floor_is_added_to_the_norm_itself():
  x = jnp.array([3e-6, -4e-6])
  unit, norm = numerics.unit_and_norm(x, floor=5e-6)
  np.testing.assert_allclose(unit, [0.3, -0.4], rtol=1e-6)
  np.testing.assert_allclose(norm, [5e-6], rtol=1e-6)
  np.testing.assert_array_equal(
      numerics.unit_and_norm(jnp.zeros(2), floor=1.0)[0], [0, 0])


def test_joint_groups_have_one_norm():
  leaves = [jnp.array([[1e30, 0.0]]), jnp.array([0.0, 0.0, 1e30])]
  units, norms = numerics.units_and_norms(leaves, [(0, 1), (0,)], joint=True)
  for unit, norm, shape in zip(units, norms, [(1, 1), (1,)], strict=True):
    np.testing.assert_allclose(unit.max(), 0.5 ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(norm, np.full(shape, 2 ** 0.5 * 1e30), rtol=1e-6)


def test_empty_inputs_have_norm_zero():
  assert numerics.units_and_norms([], [], joint=True) == ([], [])
  assert numerics.global_norm([]) == 0
  empty = jnp.zeros((0, 2))
  (unit,), (norm,) = numerics.units_and_norms([empty], [(0, 1)], joint=True)
  assert unit.shape == (0, 2) and norm.shape == (1, 1) and norm[0, 0] == 0


@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_non_finite_entries_propagate(bad):
  unit, _ = numerics.unit_and_norm(jnp.array([bad, 1.0]))
  assert not np.all(np.isfinite(unit))


@pytest.mark.filterwarnings('ignore:1 perturbed parameters')
def test_half_precision_under_strict_promotion():
  # All casts are explicit, so no implicit promotion happens.
  params = {'kernel': jnp.ones((2, 2), 'bfloat16')}
  method = methods.awp(0.5, num_steps=2)
  with jax.numpy_dtype_promotion('strict'):
    find_fn = perturbed_step.find_perturbation(
        method, lambda p: jnp.sum(p['kernel'] ** 2))
    v = find_fn(params, method.init(params))
    assert v['kernel'].dtype == jnp.bfloat16
    np.testing.assert_allclose(v['kernel'].astype('float32'), 0.5)
    x = jnp.ones((2, 4), 'bfloat16')
    np.testing.assert_allclose(threat.l2_norms(x)[:, 0], 2)
    np.testing.assert_allclose(threat.l1_norms(x)[:, 0], 4)
    assert threat.unit_l2(x).dtype == jnp.bfloat16
