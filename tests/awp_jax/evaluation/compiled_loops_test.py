"""Loops of attacks as one program on CPUs: which networks, equal results."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import autoattack
from awp_jax.core import loops
from awp_jax.evaluation import arguments, protocol, verdicts
from awp_jax.evaluation.engine import driver, slots, threads
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
    (lambda x: network(
        x.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32), False),
    (lambda x: jax.jit(channels_first)(x), False)])
def test_networks_that_suit_loops(logits_fn, suits):
  traced = arguments.trace_model(logits_fn, IMAGES, False)
  assert traced.suits_loops == suits


def test_a_randomized_model_does_not():
  def noisy(x, key):
    return network(x + 0.01 * jax.random.normal(key, x.shape))

  assert not arguments.trace_model(noisy, IMAGES, True).suits_loops


@pytest.mark.parametrize('logits_fn, attack_fn, compiled', [
    (network, None, True), (network, network, True),
    (network, channels_first, False), (channels_first, network, False)])
def test_loops_are_compiled_if_both_models_suit(
    logits_fn, attack_fn, compiled, monkeypatch):
  seen, make = [], slots.make_advance
  monkeypatch.setattr(slots, 'make_advance', lambda *args, **kwargs: (
      seen.append(kwargs['compiled']) or make(*args, **kwargs)))
  evaluate(
      KEY, logits_fn, IMAGES, LABELS, ThreatModel('Linf', 0.01),
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
      ThreatModel('Linf', 0.5),
      (protocol.AttackSpec('two-survive', build, settings={}),),
      options=dataclasses.replace(SMALL, batch_size=16))
  assert result.robust.sum() == 2 and seen == sizes


def test_custom_attacks_without_settings_stay_on_the_host(monkeypatch):
  """Their steps may do what a compiled loop would do once only."""
  made = []

  def build(model, threat):
    def step(examples, time):
      made.append(1)
      none = jnp.zeros_like(time, bool)
      return time + 1, protocol.Report(examples.images, none, time >= 4, none)
    return protocol.BoundAttack(1, lambda e: jnp.zeros_like(e.labels), step)

  monkeypatch.setattr(threads, 'num_streams', lambda size: 1)
  counts = []
  for settings in (None, {}):
    made.clear()
    evaluate(
        KEY, network, IMAGES, LABELS, ThreatModel('Linf', 0.01),
        (protocol.AttackSpec('own', build, settings=settings),),
        options=dataclasses.replace(SMALL, batch_size=32))
    counts.append(len(made))
  assert counts == [5, 1]


def test_float64_networks_widen_iterates(x64):
  """A float64 network makes the iterates of float32 images float64."""
  weights = jnp.asarray(
      np.random.default_rng(1).normal(size=(192, 5)), jnp.float64)

  def logits_fn(x):
    return (x.reshape(len(x), -1) - 0.5) @ weights

  labels = np.asarray(logits_fn(jnp.asarray(IMAGES)).argmax(-1), np.int32)
  for name in ('fab', 'fab-t', 'apgd-ce', 'square'):
    result = evaluate(
        KEY, logits_fn, IMAGES, labels, ThreatModel('Linf', 0.02),
        (short_spec(name),), options=SMALL)
    assert result.natural_accuracy == 1 and result.robust_accuracy < 1


def timed_attack():
  """Example i ends at iteration 1000 x_i."""
  def step(examples, time):
    none = jnp.zeros_like(time, bool)
    over = time + 1 >= jnp.round(1000 * examples.images[:, 0])
    return time + 1, protocol.Report(examples.images, none, over, none)

  return protocol.BoundAttack(1, lambda e: jnp.zeros_like(e.labels), step)


def calls_of(ends, sizes=(16, 8), operations=0.0, own_model=False):
  """(batch size, patience, limit, iterations) of each call of the loop."""
  calls, attack = [], timed_attack()
  advance = slots.make_advance(attack, False, own_model, compiled=True)

  def recorded(carry, busy, patience, limit):
    *out, made = advance(carry, busy, patience, limit)
    calls.append((busy.size, patience, limit, made))
    return *out, made

  count = len(ends)
  images = (np.asarray(ends)[:, None] / 1000).astype(np.float32)
  outcome = driver.attack_group(
      driver.Job(
          attack, recorded, KEY, sizes, jax.device_put, None, own_model,
          operations),
      verdicts.Group(
          np.arange(count), images, np.zeros(count, np.int32),
          np.zeros((count, 1), np.int32)))
  assert not outcome.broken.any()
  return calls


def test_calls_get_longer_up_to_the_limit():
  limits = [limit for _, _, limit, _ in calls_of([900], sizes=(1,))]
  assert limits[0] == 1 and limits[-1] == 100 and limits == sorted(limits)


def test_on_cpus_every_end_returns_to_the_host(monkeypatch):
  assert {call[1] for call in calls_of([5] * 16)} == {1}
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  assert {call[1] for call in calls_of([5] * 16)} == {2}
  assert {call[1] for call in calls_of([5] * 16, own_model=True)} == {1}


def test_batches_shrink_after_the_same_waste_each_time():
  ends = [10] * 4 + [30] * 4 + [100] * 8
  # Four spare places waste as much as compiling costs in five iterations.
  calls = calls_of(ends, (16, 12, 8), driver._COMPILING / 20)
  made = {size: sum(call[3] for call in calls if call[0] == size)
          for size in (16, 12, 8)}
  assert made == {16: 10 + 5, 12: 30 - 15 + 5, 8: 100 - 35}
  assert {call[0] for call in calls_of(ends, (16, 12, 8))} == {16}


@pytest.mark.parametrize('busy, spare', [(16, 0), (12, 4), (9, 4), (8, 8)])
def test_spare_places(busy, spare):
  assert slots.spare(np.arange(16) < busy, (16, 12, 8)) == spare
  assert slots.spare(np.ones(4, bool), (16, 12, 8)) == 0


def test_operations_of_an_iteration(monkeypatch):
  seen, attack_group = {}, threads.attack_group
  monkeypatch.setattr(threads, 'attack_group', lambda job, group, streams: (
      seen.update({len(seen): job.operations}) or attack_group(
          job, group, streams=streams)))
  evaluate(
      KEY, network, IMAGES, LABELS, ThreatModel('Linf', 0.001),
      (short_spec('pgd', 1), short_spec('square', 1)), options=SMALL)
  forward = arguments.trace_model(network, IMAGES, False).operations
  assert list(seen.values()) == [3 * forward, forward]


def test_a_compiled_loop_makes_many_iterations_and_holds_a_step_once():
  traces = []

  def step(examples, time):
    def body(x):
      traces.append(1)
      return jnp.sin(x)

    moved = loops.repeat_pieces(7, body, examples.images)
    none = jnp.zeros_like(time, bool)
    return time + 1, protocol.Report(moved, none, none, none)

  attack = protocol.BoundAttack(1, lambda e: jnp.zeros_like(e.labels), step)
  images, labels = jnp.zeros((4, 1)), jnp.zeros(4, int)
  no, low = jnp.zeros(4, bool), jnp.full(4, -jnp.inf)
  begin = slots.Carry(
      protocol.Examples(images, labels, labels[:, None], labels, labels),
      labels, slots.Found(images, no, no, no, no, no, low, low))
  busy = np.ones(4, bool)
  advance = slots.make_advance(attack, False, compiled=True)
  assert advance(begin, busy, 5, 7)[2] == 7 and len(traces) < 7
  assert slots.make_advance(attack, False)(begin, busy, 5, 7)[2] == 1


def test_rolled_ends_with_its_block():
  def is_loop():
    text = jax.jit(lambda x: loops.repeat(3, jnp.sin, x)).lower(
        jnp.ones(2)).as_text()
    return 'stablehlo.while' in text

  with pytest.raises(KeyError), loops.rolled():
    assert is_loop()
    raise KeyError
  assert not is_loop()
