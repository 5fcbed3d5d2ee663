"""Weight perturbation against closed forms and an independent oracle."""

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import awp_jax
from awp_jax import weights
from awp_jax.perturbation import engine, leaves, methods

PARAMS = {
    'dense': {'kernel': np.linspace(-1, 1, 12).reshape(4, 3),
              'bias': np.array([0.1, -0.2, 0.3])},
    'out': {'kernel': np.linspace(1, -2, 6).reshape(3, 2)}}
X = np.linspace(-1, 2, 20).reshape(5, 4)
Y = np.array([0, 1, 1, 0, 1])


def params_as(dtype):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)


def loss_fn(params, x=X, y=Y):
  x = jnp.asarray(x, params['dense']['kernel'].dtype)
  hidden = jnp.tanh(x @ params['dense']['kernel'] + params['dense']['bias'])
  return jnp.mean(awp_jax.cross_entropy(hidden @ params['out']['kernel'], y))


def norms(tree):
  return jax.tree.map(
      lambda leaf: np.linalg.norm(np.asarray(leaf, np.float64)), tree)


def assert_trees_close(a, b, **tolerances):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b)


def numpy_awp(gradient_fn, params, gamma, num_steps):
  """The projected ascent, leaf by leaf, in plain NumPy."""
  v = jax.tree.map(np.zeros_like, params)
  for _ in range(num_steps):
    g = gradient_fn(jax.tree.map(np.add, params, v))
    for path in (('dense', 'kernel'), ('out', 'kernel')):
      w = params[path[0]][path[1]]
      radius = gamma * np.linalg.norm(w)
      leaf = v[path[0]][path[1]]
      direction = g[path[0]][path[1]]
      leaf = leaf + radius / num_steps * direction / np.linalg.norm(direction)
      if np.linalg.norm(leaf) > radius:
        leaf = leaf * radius / np.linalg.norm(leaf)
      v[path[0]][path[1]] = leaf
  return v


@pytest.mark.parametrize('num_steps', [1, 2, 5])
def test_perturbation_equals_numpy(num_steps, x64):
  gradient_fn = jax.grad(loss_fn)
  wanted = numpy_awp(
      lambda p: jax.tree.map(np.asarray, gradient_fn(p)), PARAMS, 0.3,
      num_steps)
  got = weights.awp_perturbation(
      loss_fn, gamma=0.3, num_steps=num_steps)(params_as(np.float64))
  assert_trees_close(got, wanted, rtol=1e-12, atol=1e-14)


def moved(method, perturbation, gradients, params):
  chosen = method.chosen(params)
  v = None if perturbation is None else leaves.select(perturbation, chosen)
  out = engine.move(
      method, engine.Ascent(v), leaves.select(gradients, chosen), params,
      jnp.int32(0))
  return leaves.restore(out.perturbation, params)


def test_projection_acts_and_keeps_the_radius(x64):
  params = params_as(np.float64)
  start = jax.tree.map(lambda w: 0.01 * w, params)  # on the sphere of gamma
  gradients = jax.grad(loss_fn)(params)
  outside = jax.tree.map(
      lambda v, w, g: v + 0.01 * np.linalg.norm(w) * g / np.linalg.norm(g),
      start, params, gradients)
  onto = moved(methods.awp(0.01), start, gradients, params)
  # A hundred moves to a ball of 1: as long a move, which ends well inside.
  inside = moved(methods.awp(1.0, num_steps=100), start, gradients, params)
  for layer in ('dense', 'out'):
    w, v = params[layer]['kernel'], outside[layer]['kernel']
    assert np.linalg.norm(v) > 1.1 * 0.01 * np.linalg.norm(w)
    np.testing.assert_allclose(
        onto[layer]['kernel'],
        v * 0.01 * np.linalg.norm(w) / np.linalg.norm(v), rtol=1e-12)
    np.testing.assert_allclose(inside[layer]['kernel'], v, rtol=1e-12)


@pytest.mark.parametrize('dtype,tolerance', [
    ('float64', 1e-14), ('float32', 1e-6), ('bfloat16', 1e-2)])
@pytest.mark.filterwarnings('ignore:2 perturbed parameters are in half')
@pytest.mark.parametrize('gamma', [0.005, 0.01, 1.0])
def test_relative_norms_are_gamma_on_weights_and_zero_elsewhere(
    dtype, tolerance, gamma, x64):
  params = params_as(dtype)
  v = weights.awp_perturbation(loss_fn, gamma=gamma)(params)
  for got, wanted in zip(
      jax.tree.leaves(v), jax.tree.leaves(params), strict=True):
    assert got.dtype == wanted.dtype
  for layer in ('dense', 'out'):
    np.testing.assert_allclose(
        norms(v)[layer]['kernel'], gamma * norms(params)[layer]['kernel'],
        rtol=tolerance)
  assert not np.any(v['dense']['bias'])


def test_oracle_rejects_another_gamma(x64):
  params = params_as(np.float64)
  v = weights.awp_perturbation(loss_fn, gamma=0.011)(params)
  wanted = 0.01 * norms(params)['out']['kernel']
  assert abs(norms(v)['out']['kernel'] / wanted - 1) > 0.05


def test_equals_optax_sam_with_a_trust_ratio_adversary(x64):
  # An independent implementation: weight decay at the clean weights, and SAM in
  # opaque mode with |w| / |g| scaling as its adversary.
  params, gamma = params_as(np.float64), 0.01
  adversary = optax.chain(
      optax.scale_by_trust_ratio(trust_coefficient=gamma), optax.scale(-1))
  labels = jax.tree.map(
      lambda m: 'weight' if m else 'other', leaves.weight_mask(params))
  sam = optax.contrib.sam(
      optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9)),
      optax.multi_transform(
          {'weight': adversary, 'other': optax.set_to_zero()}, labels),
      opaque_mode=True, reset_state=False)
  tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9))
  theirs, their_state = params, sam.init(params)
  ours, our_state = params, tx.init(params)
  for _ in range(4):
    updates, their_state = sam.update(
        jax.grad(loss_fn)(theirs), their_state, theirs,
        grad_fn=lambda p, _: jax.grad(loss_fn)(p))
    theirs = optax.apply_updates(theirs, updates)
    out = awp_jax.awp_step(
        loss_fn, tx, ours, our_state, gamma=gamma, update_at='natural')
    ours, our_state = out.params, out.opt_state
  assert_trees_close(ours, theirs, rtol=0, atol=1e-12)
  assert np.abs(ours['out']['kernel'] - params['out']['kernel']).max() > 1e-2


def test_decay_acts_at_the_perturbed_weights_by_default(x64):
  params, decay = params_as(np.float64), 0.1
  tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(1.0))
  out = awp_jax.awp_step(loss_fn, tx, params, tx.init(params), gamma=0.3)
  shown = jax.tree.map(np.add, params, out.perturbation)
  wanted = jax.tree.map(
      lambda w, s, g: w - (g + decay * s), params, shown,
      jax.grad(loss_fn)(shown))
  assert_trees_close(out.params, wanted, rtol=1e-12)
  clean = awp_jax.awp_step(
      loss_fn, tx, params, tx.init(params), gamma=0.3, update_at='natural')
  assert_trees_close(
      jax.tree.map(np.subtract, clean.params, out.params),
      jax.tree.map(lambda v: decay * v, out.perturbation),
      rtol=1e-9, atol=1e-15)


def test_gamma_zero_is_the_plain_step_bit_for_bit():
  params, tx = params_as(np.float32), optax.adamw(1e-2)
  out = awp_jax.awp_step(loss_fn, tx, params, tx.init(params), gamma=0)
  loss, gradients = jax.value_and_grad(loss_fn)(params)
  updates, _ = tx.update(gradients, tx.init(params), params)
  plain = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, out.params, plain)
  assert out.loss == loss
  assert not any(np.any(v) for v in jax.tree.leaves(out.perturbation))


@pytest.mark.parametrize('gamma,passes', [(0, 1), (0.0, 1), (0.01, 2)])
def test_number_of_passes(gamma, passes):
  calls = []

  def counted(params):
    calls.append(1)
    return loss_fn(params)

  awp_jax.awp_value_and_grad(counted, gamma=gamma)(params_as(np.float32))
  assert len(calls) == passes


def test_drop_in_for_value_and_grad():
  def with_aux(params, x, *, y):
    loss = loss_fn(params, x, y)
    return loss, {'twice': 2 * loss}

  params = params_as(np.float32)
  (loss, aux), gradients = awp_jax.awp_value_and_grad(
      with_aux, gamma=0.01, has_aux=True)(params, X, y=Y)
  v = weights.awp_perturbation(
      with_aux, gamma=0.01, has_aux=True)(params, X, y=Y)
  (wanted, wanted_aux), wanted_gradients = jax.value_and_grad(
      with_aux, has_aux=True)(jax.tree.map(jnp.add, params, v), X, y=Y)
  assert loss == wanted and aux == wanted_aux
  assert_trees_close(gradients, wanted_gradients, rtol=1e-6)
  assert loss > loss_fn(params)


def test_loss_at_the_perturbed_weights_is_higher_than_in_random_directions():
  params = params_as(np.float32)
  v = weights.awp_perturbation(loss_fn, gamma=0.05)(params)
  worst = loss_fn(jax.tree.map(jnp.add, params, v))
  for key in jax.random.split(jax.random.key(0), 20):
    noise = moved(
        methods.awp(0.05), None, jax.tree.map(
            lambda w, key=key: jax.random.normal(key, w.shape), params), params)
    assert loss_fn(jax.tree.map(jnp.add, params, noise)) < worst


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.filterwarnings('ignore:4 perturbed parameters are in half')
@pytest.mark.parametrize('num_steps', [1, 3])
def test_zero_gradients_and_zero_weights_give_zero(dtype, num_steps):
  params = {'used': jnp.ones((2, 2), dtype), 'unused': jnp.ones((2, 2), dtype),
            'zero': jnp.zeros((2, 2), dtype), 'empty': jnp.zeros((0, 2), dtype)}

  def loss(p):
    return jnp.sum(p['used'] * jnp.array([[1, 2], [3, 4]], dtype)) + jnp.sum(
        p['zero']) + 0 * jnp.sum(p['unused']) + jnp.sum(p['empty'])

  v = weights.awp_perturbation(loss, gamma=0.1, num_steps=num_steps)(params)
  assert not np.any(v['unused']) and not np.any(v['zero'])
  np.testing.assert_allclose(
      norms(v)['used'], 0.2, rtol=1e-6 if dtype == 'float32' else 1e-2)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_tiny_and_huge_gradients_do_not_vanish(scale):
  v = weights.awp_perturbation(
      lambda p: scale * jnp.sum(p['w'] * jnp.array([[3.0, 4.0]])),
      gamma=0.1)({'w': jnp.array([[0.6, 0.8]])})
  np.testing.assert_allclose(v['w'], [[0.06, 0.08]], rtol=1e-6)


def test_gradients_that_are_not_finite_are_not_hidden():
  v = weights.awp_perturbation(
      lambda p: jnp.sum(p['w']) * jnp.inf, gamma=0.1)({'w': jnp.ones((2, 2))})
  assert np.isnan(v['w']).all()


def test_masks():
  params = params_as(np.float32)
  by_path = leaves.weight_mask(params, lambda path, _: path == 'out/kernel')
  assert by_path == {
      'dense': {'kernel': False, 'bias': False}, 'out': {'kernel': True}}
  assert leaves.weight_mask(params, by_path) is by_path
  v = weights.awp_perturbation(loss_fn, gamma=0.1, mask=by_path)(params)
  assert np.any(v['out']['kernel']) and not np.any(v['dense']['kernel'])
  everything = weights.awp_perturbation(
      loss_fn, gamma=0.1, mask=lambda path, leaf: True)(params)
  assert np.any(everything['dense']['bias'])
  nothing = awp_jax.awp_value_and_grad(
      loss_fn, gamma=0.1, mask=lambda path, leaf: False)(params)
  assert nothing[0] == loss_fn(params)
  with pytest.raises(ValueError, match='mask must be a predicate'):
    leaves.weight_mask(params, {'dense': True})


def test_dropout_key_gives_the_same_mask_in_every_pass():
  masks = []

  def loss(params, key):
    keep = jax.random.bernoulli(key, 0.5, (4, 3))
    masks.append(np.asarray(keep))
    return jnp.sum(params['w'] * keep)

  awp_jax.awp_value_and_grad(loss, gamma=0.1, num_steps=2)(
      {'w': jnp.ones((4, 3))}, jax.random.key(3))
  assert len(masks) == 3
  np.testing.assert_array_equal(masks[0], masks[1])
  np.testing.assert_array_equal(masks[0], masks[2])


def test_arguments_of_the_loss_go_by_position():
  params, tx = params_as(np.float32), optax.sgd(0.1)

  def masked(params, mask, num_steps):
    return loss_fn(params) * jnp.sum(mask) * num_steps

  with pytest.raises(TypeError, match=r"keyword, 'padding'.* by position"):
    awp_jax.awp_step(
        masked, tx, params, tx.init(params), gamma=0.1, padding=jnp.ones(3))
  out = awp_jax.awp_step(
      masked, tx, params, tx.init(params), jnp.ones(3), 2.0, gamma=0)
  np.testing.assert_allclose(out.loss, 6 * loss_fn(params), rtol=1e-6)


def test_drop_in_takes_keywords_of_any_name():
  # `value_and_grad` hands keywords on; none of ours may swallow them.
  def loss(params, noise_key, *, natural_args, method_state):
    return loss_fn(params) * noise_key * natural_args * method_state

  params = params_as(np.float32)
  keywords = {'natural_args': 3.0, 'method_state': 5.0}
  value, _ = awp_jax.awp_value_and_grad(loss, gamma=0)(
      params, noise_key=2.0, **keywords)
  np.testing.assert_allclose(value, 30 * loss_fn(params), rtol=1e-6)
  v = awp_jax.awp_perturbation(loss, gamma=0.1)(
      params, noise_key=2.0, **keywords)
  assert_trees_close(
      v, awp_jax.awp_perturbation(loss_fn, gamma=0.1)(params), rtol=1e-5)


@pytest.mark.parametrize('call', ['step', 'value_and_grad', 'perturbation'])
def test_a_schedule_is_an_error_that_names_what_takes_it(call):
  params, tx = params_as(np.float32), optax.sgd(0.1)
  gamma = optax.linear_schedule(0, 0.1, 10)
  with pytest.raises(ValueError, match=r'gamma must be a number.*perturbed_st'):
    if call == 'step':
      awp_jax.awp_step(loss_fn, tx, params, tx.init(params), gamma=gamma)
    elif call == 'value_and_grad':
      awp_jax.awp_value_and_grad(loss_fn, gamma=gamma)
    else:
      awp_jax.awp_perturbation(loss_fn, gamma=gamma)


def test_perturbation_on_request():
  params, tx = params_as(np.float32), optax.sgd(0.1)
  full, less = (awp_jax.awp_step(
      loss_fn, tx, params, tx.init(params), gamma=0.1,
      return_perturbation=flag) for flag in (True, False))
  assert less.perturbation is None and less._fields == (
      'params', 'opt_state', 'loss', 'aux', 'perturbation')
  jax.tree.map(np.testing.assert_array_equal, less.params, full.params)


def test_perturbation_of_size_zero_is_a_tree_of_zeros():
  params = params_as(np.float32)
  v = awp_jax.awp_perturbation(loss_fn, gamma=0)(params)
  assert jax.tree.structure(v) == jax.tree.structure(params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(v))


def test_module_exports_three_functions():
  public = {name for name, value in vars(weights).items()
            if getattr(value, '__module__', None) == weights.__name__
            and not name.startswith('_')}
  assert public == {'awp_perturbation', 'awp_step', 'awp_value_and_grad'}
  for name in ('ascend', 'perturb', 'global_norm', 'apply_at_perturbed'):
    assert not hasattr(weights, name)


def after_steps(tx, update_at, num_steps=3):
  params = params_as(np.float64)
  opt_state = tx.init(params)
  for _ in range(num_steps):
    params, opt_state = awp_jax.awp_step(
        loss_fn, tx, params, opt_state, gamma=0.3, update_at=update_at)[:2]
  return params


def gap(a, b):
  return max(jax.tree.leaves(jax.tree.map(
      lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_optimizers_that_keep_the_parameters_need_update_at_natural(x64):
  # The inner optimizer makes no step, so nothing may move. Shown w + v, the
  # outer one takes v into the average that it keeps.
  tx = optax.contrib.schedule_free(
      optax.sgd(0.0), learning_rate=1.0, b1=0.9)
  params = params_as(np.float64)
  assert gap(after_steps(tx, 'natural'), params) < 1e-15
  assert gap(after_steps(tx, 'perturbed'), params) > 1e-3


def test_optimizers_that_bound_the_parameters_need_update_at_natural(x64):
  tx = optax.chain(optax.sgd(1.0), optax.keep_params_nonnegative())

  def smallest(update_at):
    params = jax.tree.map(np.abs, params_as(np.float64))
    out = awp_jax.awp_step(
        loss_fn, tx, params, tx.init(params), gamma=0.3, update_at=update_at)
    return min(float(leaf.min()) for leaf in jax.tree.leaves(out.params))

  assert smallest('natural') >= 0
  assert smallest('perturbed') < -1e-3


def test_second_call_does_not_recompile():
  params, tx = params_as(np.float32), optax.sgd(0.1)
  traces = []

  @jax.jit
  def step(params, opt_state, gamma):
    traces.append(1)
    out = awp_jax.awp_step(loss_fn, tx, params, opt_state, gamma=gamma)
    return out.params, out.opt_state

  opt_state = tx.init(params)
  for gamma in (0.01, 0.02, 0.0):
    params, opt_state = step(params, opt_state, gamma)
  assert len(traces) == 1


@pytest.mark.parametrize('tx', [
    optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adamw(1e-2),
    optax.lion(1e-2), optax.chain(optax.clip_by_global_norm(1.0),
                                  optax.rmsprop(1e-2))])
def test_any_optimizer_lowers_the_loss(tx):
  params = params_as(np.float32)
  opt_state, first = tx.init(params), loss_fn(params)
  step = jax.jit(lambda p, s: awp_jax.awp_step(
      loss_fn, tx, p, s, gamma=0.01)[:2])
  for _ in range(30):
    params, opt_state = step(params, opt_state)
  assert loss_fn(params) < first - 0.1


@pytest.mark.parametrize('keywords,message', [
    ({'gamma': -0.01}, 'gamma must be a finite number >= 0, got -0.01'),
    ({'gamma': float('nan')}, 'gamma must be a finite number >= 0, got nan'),
    ({'gamma': 0.1, 'num_steps': 0}, 'num_steps must be a whole number >= 1'),
    ({'gamma': 0.1, 'update_at': 'clean'}, "one of 'perturbed', 'natural'"),
])
def test_bad_arguments(keywords, message):
  params, tx = params_as(np.float32), optax.sgd(0.1)
  with pytest.raises(ValueError, match=message):
    awp_jax.awp_step(loss_fn, tx, params, tx.init(params), **keywords)


# The same step on other people's parameters: each is compared with the plain
# dict of the same numbers.


def plain_step():
  params = {'kernel': jnp.asarray(PARAMS['dense']['kernel'], jnp.float32),
            'bias': jnp.asarray(PARAMS['dense']['bias'], jnp.float32)}

  def loss(p):
    return jnp.mean((X.astype(np.float32) @ p['kernel'] + p['bias']) ** 2)

  tx = optax.adam(1e-2)
  return awp_jax.awp_step(loss, tx, params, tx.init(params), gamma=0.02)


def test_plain_dict_with_a_numpy_like_loss():
  out = plain_step()
  assert set(out.params) == {'kernel', 'bias'}
  np.testing.assert_allclose(
      norms(out.perturbation)['kernel'],
      0.02 * np.linalg.norm(PARAMS['dense']['kernel']), rtol=1e-6)


def test_linen_dict():
  model, wanted = nn.Dense(3), plain_step()
  params = model.init(jax.random.key(0), X)
  params = {'params': {'kernel': jnp.asarray(PARAMS['dense']['kernel'],
                                             jnp.float32),
                       'bias': jnp.asarray(PARAMS['dense']['bias'],
                                           jnp.float32)}}
  tx = optax.adam(1e-2)
  out = awp_jax.awp_step(
      lambda p: jnp.mean(model.apply(p, X.astype(np.float32)) ** 2), tx, params,
      tx.init(params), gamma=0.02)
  assert_trees_close(out.params['params'], wanted.params, rtol=1e-5)


def test_nnx_state():
  model, wanted = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), plain_step()
  model.kernel[...] = jnp.asarray(PARAMS['dense']['kernel'], jnp.float32)
  model.bias[...] = jnp.asarray(PARAMS['dense']['bias'], jnp.float32)
  graph, params = nnx.split(model)
  tx = optax.adam(1e-2)
  out = awp_jax.awp_step(
      lambda p: jnp.mean(nnx.merge(graph, p)(X.astype(np.float32)) ** 2), tx,
      params, tx.init(params), gamma=0.02)
  assert jax.tree.structure(out.params) == jax.tree.structure(params)
  trained = nnx.merge(graph, out.params)
  np.testing.assert_allclose(
      trained.kernel[...], wanted.params['kernel'], rtol=1e-5)
  np.testing.assert_allclose(
      trained.bias[...], wanted.params['bias'], rtol=1e-5)


def test_equinox_module():
  model, wanted = eqx.nn.Linear(4, 3, key=jax.random.key(0)), plain_step()
  model = eqx.tree_at(
      lambda m: (m.weight, m.bias), model,
      (jnp.asarray(PARAMS['dense']['kernel'], jnp.float32).T,
       jnp.asarray(PARAMS['dense']['bias'], jnp.float32)))
  tx = optax.adam(1e-2)
  out = awp_jax.awp_step(
      lambda m: jnp.mean(jax.vmap(m)(X.astype(np.float32)) ** 2), tx, model,
      tx.init(model), gamma=0.02)
  assert isinstance(out.params, eqx.nn.Linear)
  np.testing.assert_allclose(
      out.params.weight.T, wanted.params['kernel'], rtol=1e-5)
  np.testing.assert_allclose(out.params.bias, wanted.params['bias'], rtol=1e-5)


@pytest.mark.parametrize('call', ['awp_step', 'perturbed_step'])
def test_optimizers_get_the_loss_as_value(call):
  params, tx = params_as('float32'), optax.chain(
      optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
  if call == 'awp_step':
    out = awp_jax.awp_step(loss_fn, tx, params, tx.init(params), gamma=0.3)
  else:
    method = methods.awp(0.3)
    out = awp_jax.perturbed_step(
        method, loss_fn, tx, params, tx.init(params), method.init(params))
  # The loss at w + v, not at w.
  shifted = jax.tree.map(jnp.add, params, out.perturbation)
  assert loss_fn(shifted) > loss_fn(params) + 0.01
  np.testing.assert_allclose(
      out.opt_state[1].best_value, loss_fn(shifted), rtol=1e-5)
