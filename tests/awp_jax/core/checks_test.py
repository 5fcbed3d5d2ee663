"""Argument checks: the limits of what devices can hold."""

import jax
import pytest

from awp_jax.core import checks


def test_counts():
  checks.count('n', 2**31 - 1)
  for value in (2**31, 10**30):
    with pytest.raises(ValueError, match=f'at most 2,147,483,647, got {value}'):
      checks.count('n', value)


@pytest.mark.parametrize('check', [checks.positive, checks.not_negative])
@pytest.mark.parametrize('value', [1e39, 10**400, 1e-46, 1e-39])
def test_numbers_that_devices_do_not_have(check, value):
  with pytest.raises(ValueError, match=r'range of float32, from 1\.2e-38'):
    check('n', value)
  for valid in (3e38, 2e-38, 1):
    check('n', valid)
  checks.not_negative('n', 0)


def test_64_bits_have_more_numbers():
  with jax.enable_x64(True):
    checks.positive('n', 1e-100)
    checks.positive('n', 1e100)
