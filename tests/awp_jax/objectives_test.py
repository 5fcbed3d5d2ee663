"""The losses against NumPy in float64, including extreme logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import objectives

SCALES = [1.0, 30.0, 1e4]


def logits_and_labels(scale, seed=0):
  rng = np.random.default_rng(seed)
  logits = scale * rng.standard_normal((6, 5))
  other = scale * rng.standard_normal((6, 5))
  return logits, other, rng.integers(0, 5, 6)


def numpy_log_softmax(z):
  z = z - z.max(axis=1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def numpy_ce(z, y):
  return -numpy_log_softmax(z)[np.arange(len(y)), y]


def numpy_kl(z, other):
  log_p, log_q = numpy_log_softmax(z), numpy_log_softmax(other)
  p = np.exp(log_p)
  return np.where(p > 0, p * (log_p - log_q), 0).sum(axis=1)


def numpy_mart(adversarial, natural, y, beta):
  p_adv = np.exp(numpy_log_softmax(adversarial))
  p_nat = np.exp(numpy_log_softmax(natural))
  rows = np.arange(len(y))
  others = p_adv.copy()
  others[rows, y] = -1
  rival = others.argmax(axis=1)
  boosted = numpy_ce(adversarial, y) - np.log(
      1.0001 - p_adv[rows, rival] + 1e-12)
  return boosted + beta * numpy_kl(natural, adversarial) * (
      1.0000001 - p_nat[rows, y])


def numeric_gradient(f, z, step):
  gradient = np.zeros_like(z)
  for i in np.ndindex(z.shape):
    up, down = z.copy(), z.copy()
    up[i] += step
    down[i] -= step
    gradient[i] = (f(up) - f(down)) / (2 * step)
  return gradient


@pytest.mark.parametrize('scale', SCALES)
def test_losses_equal_their_formulas(scale, x64):
  z, other, y = logits_and_labels(scale)
  rows = np.arange(len(y))
  masked = z.copy()
  masked[rows, y] = -np.inf
  pairs = [
      (objectives.cross_entropy(z, y), numpy_ce(z, y)),
      (objectives.kl_divergence(z, other), numpy_kl(z, other)),
      (objectives.cw_margin(z, y), masked.max(axis=1) - z[rows, y]),
      (objectives.adversarial().train_loss(z, None, y), numpy_ce(z, y)),
      (objectives.trades(6.0).train_loss(z, other, y),
       numpy_ce(other, y) + 6 * numpy_kl(other, z)),
      (objectives.trades(6.0).attack_loss(z, other, y), numpy_kl(other, z)),
      (objectives.mart(5.0).train_loss(z, other, y),
       numpy_mart(z, other, y, 5)),
      (objectives.mart(5.0).attack_loss(z, None, y), numpy_ce(z, y))]
  for got, wanted in pairs:
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('make,reference', [
    (objectives.trades,
     lambda z, n, y: numpy_ce(n, y) + 6 * numpy_kl(n, z)),
    (objectives.mart, lambda z, n, y: numpy_mart(z, n, y, 6))])
def test_gradients_go_through_both_logits(make, reference, x64):
  z, natural, y = logits_and_labels(1.0)
  loss = make(6.0).train_loss
  for argument in (0, 1):
    def numpy_total(v, argument=argument):
      pair = [z, natural]
      pair[argument] = v
      return reference(*pair, y).sum()

    got = jax.grad(
        lambda a, b: loss(a, b, y).sum(), argnums=argument)(
            jnp.asarray(z), jnp.asarray(natural))
    wanted = numeric_gradient(numpy_total, [z, natural][argument], 1e-6)
    np.testing.assert_allclose(got, wanted, atol=1e-7)
    assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize('make', [
    objectives.adversarial, objectives.trades, objectives.mart])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_extreme_logits_give_finite_losses_and_gradients(make, dtype, x64):
  one_hot = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]])
  z, y = one_hot.astype(dtype), jnp.array([0, 0, 0])
  objective = make()
  for loss in (objective.train_loss, objective.attack_loss):
    value_and_grad = jax.jit(jax.value_and_grad(
        lambda a, b, loss=loss: loss(a, b, y).sum(), argnums=(0, 1)))
    for first, second in ((z, z), (z, -z), (z, jnp.zeros_like(z))):
      value, gradients = value_and_grad(first, second)
      assert np.isfinite(value)
      assert all(np.isfinite(g.astype(jnp.float32)).all() for g in gradients)


def test_kl_of_a_distribution_with_itself_is_zero_with_zero_gradient():
  z = jnp.array([[0.3, -1.0, 2.0]])
  value, gradient = jax.value_and_grad(
      lambda a: objectives.kl_divergence(a, z).sum())(z)
  assert value == 0
  np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_margin_is_positive_exactly_where_misclassified():
  z, _, y = logits_and_labels(1.0)
  wrong = z.argmax(axis=1) != y
  assert wrong.any() and not wrong.all()
  np.testing.assert_array_equal(
      np.asarray(objectives.cw_margin(z, y)) > 0, wrong)


@pytest.mark.parametrize('make', [objectives.trades, objectives.mart])
@pytest.mark.parametrize('beta', [-1.0, float('nan'), float('inf')])
def test_bad_beta(make, beta):
  with pytest.raises(ValueError, match=r'^beta must be a finite number >='):
    make(beta)


def soft(labels, classes=5, seed=3):
  other = np.random.default_rng(seed).permutation(labels)
  return 0.7 * np.eye(classes)[labels] + 0.3 * np.eye(classes)[other]


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_soft_and_smoothed_labels(scale, smoothing, x64):
  z, other, y = logits_and_labels(scale)
  for labels, q in ((y, np.eye(5)[y]), (soft(y), soft(y))):
    target = (1 - smoothing) * q + smoothing / 5

    def ce(logits, target=target):
      return -(target * numpy_log_softmax(logits)).sum(axis=1)

    labels = jnp.asarray(labels)
    np.testing.assert_allclose(
        objectives.cross_entropy(z, labels, smoothing), ce(z), rtol=1e-10)
    for objective, wanted in (
        (objectives.natural(smoothing), ce(z)),
        (objectives.adversarial(smoothing), ce(z)),
        (objectives.trades(6.0, smoothing), ce(other) + 6 * numpy_kl(other, z)),
        (objectives.mart(5.0, smoothing),
         numpy_mart(z, other, y, 5) - numpy_ce(z, y) + ce(z))):
      np.testing.assert_allclose(
          objective.train_loss(z, other, labels), wanted, rtol=1e-9,
          atol=1e-10)
    # The inputs ascend the loss without smoothing.
    np.testing.assert_allclose(
        objectives.adversarial(smoothing).attack_loss(z, None, labels),
        -(q * numpy_log_softmax(z)).sum(axis=1), rtol=1e-10)


@pytest.mark.parametrize('smoothing', [1.0, -0.1, float('nan')])
@pytest.mark.parametrize('make', [
    objectives.natural, objectives.adversarial, objectives.trades,
    objectives.mart])
def test_bad_smoothing(make, smoothing):
  with pytest.raises(ValueError, match=r'^label_smoothing must be'):
    make(label_smoothing=smoothing)


def test_records_of_the_published_code():
  both = ('adversarial', 'natural')
  wanted = {
      objectives.natural: ('natural', ('adversarial',), False, 'train',
                           ('adversarial',), False, 0),
      objectives.adversarial: ('AT', ('adversarial',), False, 'train',
                               ('adversarial',), True, 1e-10),
      objectives.trades: ('TRADES', both, True, 'eval', (*both, 'natural'),
                          False, 0),
      objectives.mart: ('MART', both[::-1], False, 'eval', both[::-1], False,
                        0)}
  for make, values in wanted.items():
    record = make()._asdict()
    assert (record.pop('attack_loss') is None) == (make is objectives.natural)
    record.pop('train_loss')
    assert tuple(record.values()) == values


@pytest.mark.parametrize('make,beta', [
    (objectives.trades, 6.0), (objectives.mart, 5.0)])
def test_defaults(make, beta, x64):
  z, other, y = logits_and_labels(1.0)
  np.testing.assert_array_equal(
      make().train_loss(z, other, y), make(beta, 0.0).train_loss(z, other, y))
  # Without the robust term only cross-entropies remain.
  plain = make(0).train_loss(z, other, y)
  assert np.abs(make().train_loss(z, other, y) - plain).min() > 0.01
  assert make(0, 0.999) and objectives.adversarial(0.999)


def test_constants_of_mart(x64):
  # With softmax values that round to 0 and 1, only the constants remain.
  wrong, right = np.array([[0.0, 800.0]]), np.array([[800.0, 0.0]])
  y = np.array([0])
  boosted = objectives.mart(0).train_loss(wrong, right, y)
  np.testing.assert_allclose(
      boosted - 800, -np.log(1.0001 - 1 + 1e-12), rtol=0, atol=2e-12)
  weighted = objectives.mart(3).train_loss(wrong, right, y) - boosted
  np.testing.assert_allclose(weighted, 3 * 800 * 1e-7, rtol=1e-6)
  # The second factor depends on the natural image: 1.0000001 - 0.
  flipped = (objectives.mart(3).train_loss(right, wrong, y)
             - objectives.mart(0).train_loss(right, wrong, y))
  np.testing.assert_allclose(flipped, 3 * 800 * 1.0000001, rtol=1e-10)


@pytest.mark.parametrize('labels', [
    np.array([2, 0, 1, 1]),
    np.array([[.2, .3, .5], [.4, .3, .3], [.1, .6, .3], [0, 1, 0]])])
def test_correctness_needs_finite_logits(labels):
  nan, inf = np.nan, np.inf
  best = np.array([[0, 1, 2.], [3, 2, 1], [0, 5, 1], [0, 0, 1]])
  assert objectives.is_correct(best, labels).tolist() == [True] * 3 + [False]
  # argmax would give 0, 0, 1 and 1.
  bad = np.array([[0, 1, inf], [nan, 2, 1], [-inf, 5, 1], [0, nan, 1]])
  assert not np.any(objectives.is_correct(bad, labels))
  mixed = np.where(np.arange(4)[:, None] % 2, bad, best)
  assert objectives.is_correct(mixed, labels).tolist() == [True, False] * 2
  assert objectives.hard_labels(labels).tolist() == [2, 0, 1, 1]


def test_half_precision_is_widened():
  # In bfloat16 log softmax of 8 equal logits plus 1e-3 would be 2.078 or 2.094.
  z = jnp.zeros((1, 8), jnp.bfloat16)
  for loss in (objectives.cross_entropy(z, jnp.array([0])),
               -objectives.kl_divergence(z, z) + jnp.log(8.0),
               objectives.cw_margin(z, jnp.array([0])) + jnp.log(8.0)):
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)


@pytest.mark.parametrize('make,arguments', [
    (objectives.natural, ()), (objectives.natural, (0.1,)),
    (objectives.adversarial, ()), (objectives.adversarial, (0.1,)),
    (objectives.trades, (3.0,)), (objectives.trades, (3.0, 0.1)),
    (objectives.mart, (3.0,)), (objectives.mart, (3.0, 0.1))])
def test_equal_arguments_give_one_object(make, arguments):
  traces = []

  @functools.partial(jax.jit, static_argnums=0)
  def mean(objective, z):
    traces.append(1)
    return jnp.mean(objective.train_loss(z, z, jnp.array([0])))

  objective = make(*arguments)
  assert make(*arguments) is objective
  for _ in range(2):
    mean(make(*arguments), jnp.ones((1, 3)))
  assert len(traces) == 1
  assert make(*arguments[:-1], 0.25) != objective


def test_objectives_of_a_long_sweep_stay_the_same_objects():
  first = [objectives.trades(beta) for beta in range(5000)]
  assert all(objectives.trades(beta) is first[beta] for beta in range(5000))


def test_the_type_of_beta_is_kept(x64):
  # A float leaves float32 losses alone; an equal np.float64 widens them.
  z = jnp.ones((1, 3), jnp.float32)
  for beta, dtype in ((np.float64(2.75), np.float64), (2.75, np.float32)):
    losses = objectives.trades(beta).train_loss(z, z, jnp.array([0]))
    assert losses.dtype == dtype


@pytest.mark.parametrize('make', [objectives.trades, objectives.mart])
def test_beta_may_be_traced_or_on_a_device(make, x64):
  z, other, y = logits_and_labels(1.0)

  def losses(beta):
    return make(beta).train_loss(z, other, y)

  compiled = jax.jit(losses)
  for beta in (2.0, 5.0):
    wanted = losses(beta)
    for got in (losses(jnp.asarray(beta)), losses(np.float64(beta)),
                compiled(beta)):
      np.testing.assert_allclose(got, wanted, rtol=1e-12)
  # The cache keeps no tracer for the next trace.
  again = jax.jit(lambda beta: losses(beta) + 0)
  np.testing.assert_allclose(again(2.0), losses(2.0), rtol=1e-12)
  slope = jax.grad(lambda beta: jnp.sum(losses(beta)))(2.0)
  np.testing.assert_allclose(
      slope, np.sum(losses(1.0) - losses(0.0)), rtol=1e-10)
