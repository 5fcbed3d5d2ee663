"""Loops of attacks as one program on CPUs: which networks, equal results."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import autoattack
from awp_jax.core import loops
from awp_jax.evaluation import arguments, driver, protocol, threads
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.models import PreActResNet
from awp_jax.threat import ThreatModel
from tests.helpers.attack_oracles import SMALL, short_spec

KEY = jax.random.key(0)
DRAW = np.random.default_rng(0)
KERNEL = jnp.asarray(DRAW.normal(size=(3, 3, 3, 6)) / 2, jnp.float32)
HEAD = jnp.asarray(DRAW.normal(size=(6, 5)), jnp.float32)
IMAGES = DRAW.uniform(size=(20, 8, 8, 3)).astype(np.float32)
NHWC = ('NHWC', 'HWIO', 'NHWC')


def features(x, kernel=KERNEL, numbers=NHWC, stride=2, **settings):
  y = lax.conv_general_dilated(
      x - 0.5, kernel, (stride, stride), ((1, 1), (1, 1)),
      dimension_numbers=numbers, **settings)
  axes = tuple(numbers[2].index(letter) for letter in 'HW')
  return jax.nn.relu(y).mean(axes)


MEAN = features(IMAGES).mean(0)


def network(*args, **settings):
  # Without their mean one class would be the largest for all images.
  return (features(*args, **settings) - MEAN) @ HEAD


def channels_first(x):
  return network(
      jnp.moveaxis(x, -1, 1), numbers=('NCHW', 'HWIO', 'NCHW'))


def other_kernel(x):
  return network(
      x, jnp.moveaxis(KERNEL, 3, 0), numbers=('NHWC', 'OHWI', 'NHWC'))


LABELS = np.asarray(network(IMAGES).argmax(-1), np.int32)


@pytest.mark.parametrize('logits_fn, suits', [
    (network, True),
    (lambda x: network(x.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)),
     True),
    (lambda x: x.reshape(len(x), -1)[:, :6] @ HEAD, True),
    (lambda x: lax.cond(x[0, 0, 0, 0] > 0, network, network, x), True),
    (channels_first, False), (other_kernel, False),
    (lambda x: network(x, rhs_dilation=(2, 2), stride=1), False),
    (lambda x: network(x, lhs_dilation=(2, 2), stride=1), False),
    (lambda x: network(x, KERNEL[:, :, :1], feature_group_count=3), False),
    (lambda x: network(x.astype(jnp.float16), KERNEL.astype(jnp.float16)),
     False),
    (lambda x: jax.jit(channels_first)(x), False)])
def test_networks_that_suit_loops(logits_fn, suits):
  traced = arguments.trace_model(logits_fn, IMAGES, False)
  assert traced.suits_loops == suits


def test_a_randomized_model_does_not():
  def noisy(x, key):
    return network(x + 0.01 * jax.random.normal(key, x.shape))

  assert not arguments.trace_model(noisy, IMAGES, True).suits_loops


@pytest.mark.parametrize('attack_fn, compiled', [
    (None, True), (network, True), (channels_first, False)])
def test_loops_are_compiled_if_both_models_suit(
    attack_fn, compiled, monkeypatch):
  seen, make = [], driver.make_advance
  monkeypatch.setattr(driver, 'make_advance', lambda *args, **kwargs: (
      seen.append(kwargs['compiled']) or make(*args, **kwargs)))
  evaluate(
      KEY, network, IMAGES, LABELS, ThreatModel('Linf', 0.01),
      (short_spec('pgd', 1),),
      options=dataclasses.replace(SMALL, attack_fn=attack_fn))
  assert set(seen) == {compiled}


@pytest.mark.parametrize('name', [
    'apgd-ce', 'apgd-t', 'fab', 'fab-t', 'square', 'pgd', 'spsa'])
def test_verdicts_do_not_depend_on_it(name, monkeypatch):
  def run(suits):
    make = arguments.trace_model
    with monkeypatch.context() as patch:
      patch.setattr(arguments, 'trace_model', lambda *args: make(
          *args)._replace(suits_loops=suits))
      return evaluate(
          KEY, network, IMAGES, LABELS, ThreatModel('Linf', 0.01),
          (short_spec(name),), options=SMALL)

  whole, single = run(True), run(False)
  assert 0 < single.robust.sum() < len(LABELS)
  np.testing.assert_array_equal(whole.robust, single.robust)
  np.testing.assert_allclose(
      whole.adversarial, single.adversarial, atol=1e-4)


def test_loops_inside_stay_loops():
  """FAB looks at every class: its step holds one gradient, not C."""
  def nested(x):
    with loops.rolled():
      return loops.repeat_pieces(7, jnp.sin, loops.repeat(5, jnp.cos, x))

  text = jax.jit(nested).lower(jnp.ones(2)).as_text()
  assert text.count('stablehlo.while') == 2
  assert text.count('stablehlo.sine') == text.count('stablehlo.cosine') == 1


def test_standard_autoattack_agrees():
  result = autoattack.auto_attack(
      KEY, network, IMAGES, LABELS, ThreatModel('Linf', 0.01), options=SMALL)
  other = autoattack.auto_attack(
      KEY, channels_first, IMAGES, LABELS, ThreatModel('Linf', 0.01),
      options=SMALL)
  np.testing.assert_array_equal(result.robust, other.robust)


def test_operations_of_a_network():
  traced = arguments.trace_model(network, IMAGES, False)
  # 4 x 4 outputs of 6 features, 27 products each; 6 x 5 in the head.
  assert traced.operations == 2 * (16 * 6 * 27 + 30)
  model = PreActResNet(10)
  variables = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3))))
  traced = arguments.trace_model(
      lambda x: model.apply(variables, x, train=False),
      np.zeros((2, 32, 32, 3), np.float32), False)
  # 0.56 G multiplications, as published for this network.
  assert traced.operations == pytest.approx(1.11e9, rel=0.01)


@pytest.mark.parametrize('operations, sizes', [(0.0, {16}), (1e12, {16, 8})])
def test_a_smaller_batch_is_compiled_once_idle_places_cost_as_much(
    operations, sizes, monkeypatch):
  """Two of sixteen examples survive the first iterations."""
  seen = set()

  def build(model, threat):
    def step(examples, time):
      seen.add(time.size)
      won = (examples.runs == 0) & (examples.images[:, 0, 0, 0] > 0.1)
      moved = jnp.where(won[:, None, None, None], 1 - examples.images,
                        examples.images)
      return time + 1, protocol.Report(
          moved, won, time >= 9, jnp.zeros_like(won))
    return protocol.BoundAttack(1, lambda e: jnp.zeros_like(e.labels), step)

  monkeypatch.setattr(threads, 'num_streams', lambda size: 1)
  make = arguments.trace_model
  monkeypatch.setattr(arguments, 'trace_model', lambda *args: make(
      *args)._replace(operations=operations))
  images = np.full((16, 1, 1, 1), 0.3, np.float32)
  images[:2] = 0.05
  result = evaluate(
      KEY, lambda x: jnp.concatenate(
          [0.5 - x[:, 0, 0], x[:, 0, 0] - 0.5], -1), images, np.zeros(16, int),
      ThreatModel('Linf', 0.5), (protocol.AttackSpec('two-survive', build),),
      options=dataclasses.replace(SMALL, batch_size=16))
  assert result.robust.sum() == 2 and seen == sizes
