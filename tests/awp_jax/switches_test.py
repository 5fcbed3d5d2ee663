"""The library under the switches of jax that users debug with."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import library_tour

SWITCHES = {
    'strict promotion': lambda: jax.numpy_dtype_promotion('strict'),
    'nans are errors': lambda: jax.debug_nans(True),
    'leaks are errors': jax.checking_leaks,
    '64 bits': lambda: jax.enable_x64(True)}


@functools.cache
def usual(case):
  return jax.tree.map(np.asarray, library_tour.CASES[case]())


@pytest.mark.parametrize('case', library_tour.CASES)
@pytest.mark.parametrize('switch', SWITCHES)
def test_results_do_not_depend_on_a_switch(switch, case):
  """No error, and float32 in gives the same float32 out."""
  with SWITCHES[switch]():
    found = jax.tree.map(np.asarray, library_tour.CASES[case]())
  for ours, wanted in zip(
      jax.tree.leaves(found), jax.tree.leaves(usual(case)), strict=True):
    if np.issubdtype(wanted.dtype, np.floating):
      assert ours.dtype == wanted.dtype
    np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-5)
