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


#: Tracing twice for leaks takes seconds; one objective has every part.
PAIRS = [
    (switch, case) for switch in SWITCHES for case in library_tour.CASES
    if switch == 'strict promotion' or not case.startswith('training') or (
        case == 'training MART')]


@pytest.mark.parametrize('switch, case', PAIRS)
def test_results_do_not_depend_on_a_switch(switch, case):
  """No error, and float32 in gives the same float32 out."""
  with SWITCHES[switch]():
    found = jax.tree.map(np.asarray, library_tour.CASES[case]())
  for ours, wanted in zip(
      jax.tree.leaves(found), jax.tree.leaves(usual(case)), strict=True):
    if np.issubdtype(wanted.dtype, np.floating):
      assert ours.dtype == wanted.dtype
    np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=2e-5)
