"""Records of an interrupted evaluation, and the hash that they carry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.evaluation import arguments as arguments_lib
from awp_jax.evaluation import fingerprint
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import (
  KEY,
  QUIET,
  scripted,
  threshold,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def shifted(by, wrap=lambda f: f):
  offset = jnp.full((1,), by, jnp.float32)
  return wrap(lambda x: threshold(x + offset))


@pytest.mark.parametrize('wrap', (lambda f: f, jax.jit))
def test_records_of_another_evaluation_are_refused(wrap, tmp_path):
  images, labels = np.full((8, 1), 0.45, np.float32), np.zeros(8, int)
  spec = scripted(lambda e, t: e.images + 0.06, [[1]], settings={'by': 0.06})
  same = dict(
      key=KEY, logits_fn=shifted(0.01, wrap), images=images, labels=labels,
      threat=ThreatModel('Linf', 0.1), specs=(spec,))
  records = []
  whole = evaluate(
      **same, options=dataclasses.replace(
          QUIET, group_size=4, progress=records.append))
  # Through a file, as a resumed process reads them.
  kept = []
  for number, record in enumerate(records):
    np.savez(tmp_path / f'{number}.npz', **record.to_arrays())
    with np.load(tmp_path / f'{number}.npz') as archive:
      kept.append(awp_jax.BatchResult.from_arrays(archive))
  done = dataclasses.replace(QUIET, group_size=4, done=kept)
  again = evaluate(
      **{**same, 'logits_fn': shifted(0.01, wrap)}, options=done)
  np.testing.assert_array_equal(again.adversarial, whole.adversarial)
  assert again.attacks[0].anomalies == whole.attacks[0].anomalies
  assert again.attacks[0].seconds == whole.attacks[0].seconds
  moved = images.copy()
  moved[3] += 1e-3
  for changed in (
      {'key': jax.random.key(1)}, {'logits_fn': shifted(0.02, wrap)},
      {'threat': ThreatModel('Linf', 0.2)}, {'images': moved},
      {'threat': ThreatModel('L2', 0.1)},
      {'specs': (spec._replace(settings={'by': 0.07}),)},
      {'specs': (spec._replace(num_targets=1),)}):
    with pytest.raises(ValueError, match='another evaluation'):
      evaluate(**{**same, **changed}, options=done)
  with pytest.raises(ValueError, match='another evaluation'):
    evaluate(**same, options=dataclasses.replace(
        done, attack_precision='bfloat16'))
  with pytest.raises(ValueError, match=r'has no `settings`, which its'):
    evaluate(**{**same, 'specs': (spec._replace(settings=None),)}, options=done)


def margin_loss(scale):
  return lambda z, y, t: scale * (jnp.max(z, -1) - z[jnp.arange(len(y)), y])


def other_model(by):
  return lambda x: threshold(x + by)


@pytest.mark.parametrize('one,other', [
    (awp_jax.apgd_spec('a', loss='ce', num_steps=2),
     awp_jax.apgd_spec('a', loss='ce', num_steps=3)),
    (awp_jax.apgd_spec('a', loss='ce', num_steps=2),
     awp_jax.apgd_spec('a', loss='ce', num_steps=2, restarts=5)),
    (awp_jax.apgd_spec('a', loss=margin_loss(1.0)),
     awp_jax.apgd_spec('a', loss=margin_loss(2.0))),
    (awp_jax.fab_spec('a', targeted=False, num_steps=2),
     awp_jax.fab_spec('a', targeted=False, num_steps=3)),
    (awp_jax.square_spec('a', num_queries=2),
     awp_jax.square_spec('a', num_queries=2, p_init=0.5)),
    (awp_jax.spsa_spec('a', num_samples=4), awp_jax.spsa_spec('a')),
    (awp_jax.pgd_spec('a', step_size=0.1, num_steps=1),
     awp_jax.pgd_spec('a', step_size=0.2, num_steps=1)),
    tuple(awp_jax.pgd_spec(
        'a', step_size=0.1, num_steps=1, source_fn=other_model(by))
          for by in (0.0, 0.1))])
def test_identity_depends_on_every_setting_of_an_attack(one, other):
  images = np.full((2, 1), 0.3, np.float32)
  traced = arguments_lib.trace_model(threshold, images, False)

  def identity_of(spec):
    return fingerprint.identify(
        KEY, [traced], images, np.zeros(2, int), ThreatModel('Linf', 0.1),
        (spec,), {})

  assert identity_of(one) == identity_of(one) != ''
  assert identity_of(one) != identity_of(other)
  assert identity_of(one) != identity_of(one._replace(eot_samples=20))
