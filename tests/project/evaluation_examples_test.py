"""The examples of evaluations: adaptive attacks, and the stored networks."""

import numpy as np
import pytest

from examples.evaluation import adaptive_attacks, small_networks


@pytest.mark.slow
def test_adaptive_attacks_find_what_plain_ones_miss(capsys):
  (rows,) = adaptive_attacks.main(['--steps=200'])
  found = {(row.defense, row.attack): row for row in rows}
  base = found['none', 'plain'].robust_accuracy
  rounding = found['rounding', 'plain'], found['rounding', 'BPDA']
  assert rounding[0].robust_accuracy > base + 0.1
  assert 'zero-gradients' in rounding[0].warnings
  assert abs(rounding[1].robust_accuracy - base) < 0.05
  assert found['noise', 'EOT, 20'].robust_accuracy <= (
      found['noise', 'plain'].robust_accuracy)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 6 and 'zero-gradients' in lines[2]


@pytest.mark.parametrize('name', ['at', 'awp'])
def test_stored_networks(name):
  logits = small_networks.load(name)(np.full((2, 16, 16, 3), 0.5, np.float32))
  assert logits.shape == (2, 10) and np.isfinite(logits).all()
