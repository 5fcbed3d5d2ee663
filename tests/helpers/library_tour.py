"""Short calls all over the library on float32 data, for switches of jax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import awp_jax
from awp_jax import models

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(6, 5, 5, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0], np.int32)
WEIGHTS = {
    'kernel': RNG.normal(size=(75, 5)).astype(np.float32),
    'bias': np.zeros(5, np.float32)}
NORMS = {'Linf': 0.05, 'L2': 0.5, 'L1': 2.0}
METHODS = {
    'awp': awp_jax.methods.awp(), 'rwp': awp_jax.methods.rwp(num_steps=2),
    'sam': awp_jax.methods.sam(), 'asam': awp_jax.methods.asam(),
    'random': awp_jax.methods.random(), 'sign': awp_jax.methods.sign(),
    'frwp': awp_jax.methods.frwp(), 'm_rwp': awp_jax.methods.m_rwp(),
    'arwp': awp_jax.methods.arwp(
        awp_jax.methods.cosine_increase(0.01, 3.0, 10)),
    'm_arwp': awp_jax.methods.m_arwp(), 'boxed': awp_jax.methods.boxed_awp(),
    'momentum': awp_jax.methods.momentum_awp(),
    'wt_awp': awp_jax.methods.wt_awp(mask='kernel'),
    'late': awp_jax.methods.start_after(awp_jax.methods.awp(), 1),
    'sometimes': awp_jax.methods.every_k(awp_jax.methods.awp(), 2)}
OBJECTIVES = {
    'AT': awp_jax.adversarial(0.1), 'TRADES': awp_jax.trades(),
    'MART': awp_jax.mart(), 'natural': awp_jax.natural()}


def logits_of(params, images):
  return images.reshape(images.shape[0], -1) @ params['kernel'] + (
      params['bias'])


def losses(params, images, labels):
  return awp_jax.cross_entropy(logits_of(params, images), labels)


def loss(params, images, labels):
  return jnp.mean(losses(params, images, labels))


def key():
  return jax.random.key(0)


def update(name):
  """A step of a weight perturbation."""
  method, tx = METHODS[name], optax.sgd(0.1, momentum=0.9)
  params = jax.tree.map(jnp.asarray, WEIGHTS)
  loss_fn = losses if method.examples_below is not None else loss
  data = IMAGES, LABELS

  @jax.jit
  def step(params, opt_state, state, images, labels):
    return awp_jax.perturbed_step(
        method, loss_fn, tx, params, opt_state, state, images, labels,
        natural_args=data if method.natural_batch == 'other' else None,
        noise_key=jax.random.key(1))

  out = step(params, tx.init(params), method.init(params), *data)
  out = step(out.params, out.opt_state, out.method_state, *data)
  return out.params, out.perturbation


def training(name):
  """Two steps of an objective on a network with batch norm, and a judgement."""
  model = models.PreActResNet(num_classes=5, depth=10, width=1)
  variables = model.init(key(), IMAGES, train=False)
  threat = awp_jax.ThreatModel('Linf', 0.05)
  attack = awp_jax.Attack(0.02, 2)
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=variables['params'],
      tx=optax.sgd(0.1, momentum=0.9), batch_stats=variables['batch_stats'],
      method=METHODS['awp'])
  step = jax.jit(functools.partial(
      awp_jax.train_step, objective=OBJECTIVES[name], threat=threat,
      attack=attack, perturbation=METHODS['awp']))
  state, metrics = step(state, (IMAGES, LABELS), key())
  state, metrics = step(state, (IMAGES, LABELS), key())
  judged = jax.jit(functools.partial(
      awp_jax.eval_step, threat=threat, attack=attack))(
          state, (IMAGES, LABELS, np.ones(6, bool)), key())
  return state.params, state.batch_stats, metrics, judged


def evaluation(norm):
  """PGD, the attacks of AutoAttack with few steps and, but for L_1, SPSA."""
  threat = awp_jax.ThreatModel(norm, NORMS[norm])
  specs = [
      awp_jax.pgd_spec('pgd', step_size=0.02, num_steps=2),
      awp_jax.apgd_spec('ce', loss='ce', num_steps=5),
      awp_jax.apgd_spec('dlr', loss='dlr-targeted', num_steps=5, num_targets=2),
      awp_jax.fab_spec('fab', targeted=True, num_steps=3, num_targets=2),
      awp_jax.square_spec(num_queries=8),
      awp_jax.spsa_spec(num_steps=2, num_samples=4)]
  result = awp_jax.evaluate(
      key(), functools.partial(logits_of, WEIGHTS), IMAGES, LABELS, threat,
      specs if norm != 'L1' else specs[:5],
      options=awp_jax.EvalOptions(check_model=False))
  return result.adversarial, result.robust


def measures():
  """The smallest perturbations."""
  model = functools.partial(logits_of, WEIGHTS)
  found = awp_jax.minimal_perturbations(
      key(), model, IMAGES, LABELS, 'L2', num_steps=3, num_targets=2)
  return (found.distances,)


def surface():
  """The loss along a direction."""
  params = jax.tree.map(jnp.asarray, WEIGHTS)
  direction = awp_jax.random_direction(key(), params)
  measure = awp_jax.robust_measure(
      logits_of, awp_jax.ThreatModel('Linf', 0.05), step_size=0.02,
      num_steps=2)
  return awp_jax.evaluate_points(
      key(), measure, params, [direction], np.array([[-0.5], [0.0], [0.5]]),
      (IMAGES, LABELS))


def drop_ins():
  """The three-line forms."""
  params, tx = jax.tree.map(jnp.asarray, WEIGHTS), optax.sgd(0.1)
  out = jax.jit(functools.partial(awp_jax.awp_step, loss, tx, gamma=0.01))(
      params, tx.init(params), IMAGES, LABELS)
  value, gradient = jax.jit(awp_jax.awp_value_and_grad(loss, gamma=0.01))(
      params, IMAGES, LABELS)
  wrapped = awp_jax.perturbed_optimizer(tx, METHODS['sam'], transparent=True)
  updates, _ = jax.jit(functools.partial(
      wrapped.update, grad_fn=lambda p, i: jax.grad(loss)(p, IMAGES, LABELS)))(
          gradient, wrapped.init(params), params)
  return out.params, value, gradient, updates


CASES = {
    **{f'update {name}': functools.partial(update, name) for name in METHODS},
    **{f'training {name}': functools.partial(training, name)
       for name in OBJECTIVES},
    **{f'evaluation {norm}': functools.partial(evaluation, norm)
       for norm in NORMS},
    'measures': measures, 'surface': surface, 'drop-ins': drop_ins}
