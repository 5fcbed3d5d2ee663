"""Attacks of evaluations: names, step rules, and non-finite logits."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.evaluation import evaluate as evaluate_lib
from experiments.evaluation import attacks
from tests.experiments.modes import train_test


@dataclasses.dataclass(frozen=True)
class FromTheImage(awp_jax.ThreatModel):
  """A ball whose random start is the image itself."""

  def random_start(self, key, x):
    del key
    return x


#: Logits x @ LINEAR + SHIFT, of class 0 at the start. A larger coordinate 0
#: favors class 1, a smaller one class 2, which is nearly as likely.
LINEAR = np.array([[0.0, 1.0, -3.0], [0.0, 0.7, 1.2], [0.0, 0.6, 0.9]])


SHIFT = np.array([0.30, 0.0, -0.05]) - 0.5 * LINEAR.sum(axis=0)


def ascent(name, step_size, epsilon):
  """PGD and CW from the image on the linear network, in NumPy."""
  kind, steps = name.split('-')
  natural = x = np.full(3, 0.5)
  for _ in range(int(steps)):
    logits = x @ LINEAR + SHIFT
    if kind == 'cw':  # z_1 - z_0 or z_2 - z_0, whichever is larger
      gradient = LINEAR[:, 1 + np.argmax(logits[1:])] - LINEAR[:, 0]
    else:
      weights = np.exp(logits) / np.exp(logits).sum() - [1, 0, 0]
      gradient = LINEAR @ weights
    x = np.clip(
        x + step_size * np.sign(gradient), natural - epsilon,
        natural + epsilon)
  return x


@pytest.mark.parametrize('name', ['pgd-6', 'pgd-7', 'cw-6', 'cw-7'])
def test_pgd_and_cw_take_n_steps_on_their_losses(name):
  config = train_test.small(eval__step_size=0.05, eval__num_steps=1)
  result = evaluate_lib.evaluate(
      jax.random.key(0), lambda x: x @ LINEAR + SHIFT,
      np.full((2, 3), 0.5, np.float32), np.zeros(2, int),
      FromTheImage('Linf', 0.45), attacks.make_specs(name, config),
      options=evaluate_lib.EvalOptions(batch_size=2, check_model=False))
  assert not result.robust.any()
  wanted = {
      other: ascent(other, 0.05, 0.45)
      for other in ('pgd-6', 'pgd-7', 'cw-6', 'cw-7')}
  for other, x in wanted.items():
    far = np.abs(result.adversarial - x).max()
    assert far < 1e-6 if other == name else far > 0.04, other


def test_logits_that_are_not_finite_count_as_wrong():
  subject = types.SimpleNamespace(logits_fn=lambda x: jnp.where(
      x[:, :1] > 0.5, jnp.array([1.0, 0.0]), jnp.array([jnp.nan, 0.0])))
  images = np.array([[0.2], [0.8], [0.1]], np.float32)
  # NumPy's and JAX's argmax of [nan, 0] is 0, the label.
  assert attacks._count_correct(subject, images, np.zeros(3, int)) == 1


@pytest.mark.parametrize('names,message', [
    ((), 'evaluation.attacks is empty'),
    (('pdg-20',), "evaluation.attacks must be one of .* got 'pdg-20'"),
    (('pgd-N',), "'pgd-N' needs a number"),
    (('pgd-0',), 'must be one of'),
    (('aa-standart',), "Did you mean 'aa-standard'"),
    (('fgsm', 'fgsm'), 'contains a duplicate'),
])
def test_bad_names(names, message):
  with pytest.raises(ValueError, match=message):
    attacks.check_names(names)


def test_randomized_evaluation_of_a_deterministic_network():
  with pytest.raises(
      ValueError, match=r"'aa-rand' is for randomized models.*'aa-standard'"):
    attacks.check_names(('fgsm', 'aa-rand'))
  assert 'aa-rand' not in attacks.allowed_names()


@pytest.mark.parametrize('name,expected', [
    ('aa-standard', ['apgd-ce', 'apgd-t', 'fab-t', 'square']),
    ('aa-plus', ['apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t']),
    ('aa-fast', ['apgd-ce', 'apgd-t']), ('square', ['square']),
    ('spsa', ['spsa']), ('fgsm', ['fgsm']), ('cw-7', ['cw-7'])])
def test_every_name_makes_its_attacks(name, expected):
  specs = attacks.make_specs(name, train_test.small())
  assert [spec.name for spec in specs] == expected
