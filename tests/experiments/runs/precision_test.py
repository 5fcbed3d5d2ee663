"""Tests of the precision of training and evaluation, and of statistics."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import models
from awp_jax.models import layers
from experiments.config import networks
from experiments.modes import train
from experiments.parallel import mapping, placement
from experiments.reports import curves
from experiments.runs import (
  metrics as metrics_lib,
)
from experiments.runs import (
  precision as precision_lib,
)
from experiments.runs import (
  run as run_lib,
)
from experiments.training import step as step_lib
from experiments.training import training_data
from experiments.util import environment
from tests.experiments.modes import train_test


class TypedNet(nn.Module):
  """A tiny network of our layers, with their dtypes."""

  dtype: str = 'float32'
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train=False):
    parts = layers.Parts(
        dtype=jnp.dtype(self.dtype), axis_name=self.axis_name,
        param_dtype=jnp.promote_types(self.dtype, jnp.float32))
    x = layers.normalize_pixels(x, (0.5,), (1.0,), jnp.dtype(self.dtype))
    x = parts.activate(parts.conv(4, 3, 1, 'conv')(x), train, 'bn')
    return nn.Dense(4, dtype=self.dtype, param_dtype=parts.param_dtype)(
        x.mean(axis=(1, 2))).astype(parts.param_dtype)


def build(config, dataset):
  del dataset
  return TypedNet(
      config.model.dtype,
      mapping.AXIS if config.model.sync_batch_norm else None)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """Prepares a run with `TypedNet`, in the given precision."""
  monkeypatch.setattr(networks, 'build', build)
  monkeypatch.setattr(curves, 'plot_curves', lambda *_: None)
  train_test.without_report(monkeypatch)

  def prepare(**fields):
    return run_lib.prepare(train_test.small(
        dataset='npz', npz_path=train_test.write_images(
            tmp_path / 'mine.npz', num_train=16), epochs=1,
        attack__num_steps=1, eval__num_steps=1, awp__gamma=0.01, **fields),
        tmp_path / str(fields))

  return prepare


def products(jaxpr):
  """(dtype of the factors, precision) of each product in a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
      yield (
          {str(var.aval.dtype) for var in equation.invars},
          equation.params['precision'])
    for value in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from products(inner)


def programs(run):
  """The jaxprs of a run's training and evaluation steps."""
  state = jax.eval_shape(lambda: run_lib.initial_state(run))
  data, devices = training_data.of_run(run), placement.device_numbers()
  spread = (run.num_devices, 2)
  return (
      jax.make_jaxpr(step_lib.make_train_fn(run, 16, 1.0))(
          state, step_lib.zero_sums(), data, np.arange(len(data.labels)),
          run_lib.keys(run.config), devices).jaxpr,
      jax.make_jaxpr(step_lib.make_eval_fn(run))(
          state, np.zeros((*spread, 8, 8, 1), np.uint8), np.zeros(spread, int),
          np.ones(spread, bool), jax.random.key(0)).jaxpr)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_evaluation_is_in_float32_and_training_as_the_config_says(
    dtype, prepared):
  trained, judged = (
      list(products(jaxpr)) for jaxpr in programs(prepared(model__dtype=dtype)))
  assert len(trained) > 6 and len(judged) > 6
  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert all(
      factors == {'float32'} and precision in (
          jax.lax.Precision.HIGHEST, highest)
      for factors, precision in judged), judged
  assert all(factors == {dtype} and precision is None
             for factors, precision in trained), trained


def test_a_run_in_bfloat16_keeps_its_parameters_and_says_how_it_was_judged(
    prepared):
  run = prepared(model__dtype='bfloat16', batch_size=8)
  summary = train.train(run)
  (line,) = metrics_lib.read_metrics(run.workdir)
  assert np.isfinite(line['train_loss'])
  judge = line['judged_by']
  assert summary['judged_by'] == judge
  assert judge['precision'] == judge['matmul_precision'] == 'float32'
  assert judge['devices'] == environment.devices()
  assert judge['versions']['awp_jax'] == awp_jax.__version__
  state = run_lib.initial_state(run)
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(
      (state.params, state.batch_stats))} == {'float32'}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_whatever_the_type_a_network_is_judged_in_float32(dtype, x64):
  network = precision_lib.network(models.PreActResNet(
      4, depth=10, width=1, dtype=jnp.dtype(dtype),
      param_dtype=jnp.dtype(dtype)))
  assert network.dtype == network.param_dtype == jnp.float32
  found = precision_lib.variables({
      'w': jnp.ones(2, dtype), 'count': jnp.ones(2, jnp.int16)})
  assert {name: str(leaf.dtype) for name, leaf in found.items()} == {
      'w': 'float32', 'count': 'int16'}


def test_the_summary_of_older_lines_does_not_claim_a_precision():
  line = {
      'epoch': 1, 'seconds_training': 1.0, 'seconds_evaluating': 1.0,
      'images': 4, 'train_robust_accuracy': 0.5, 'test_robust_accuracy': 0.25,
      'test_natural_accuracy': 0.5}
  assert metrics_lib.summarize([line], 'test', {})['judged_by'] == {}


#: Objectives whose attacks use batch statistics or running statistics.
OBJECTIVES = {'AT': awp_jax.adversarial(), 'TRADES': awp_jax.trades(6.0)}


def step_of(model, state, objective, axis_name):
  def step(images, labels, start):
    return awp_jax.train_step(
        state.replace(apply_fn=model.apply), (images, labels),
        jax.random.key(0), objective=OBJECTIVES[objective],
        threat=awp_jax.ThreatModel('Linf', 0.1),
        attack=awp_jax.Attack(0.04, 2, start=start),
        perturbation=awp_jax.methods.awp(0.02),
        statistics='reference', axis_name=axis_name)

  return step


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_synchronized_statistics_are_those_of_one_device(
    objective, prepared, x64):
  run = prepared(model__sync_batch_norm=True, model__dtype='float64')
  assert run.model.axis_name == mapping.AXIS
  state = jax.tree.map(np.asarray, run_lib.initial_state(run))
  # Flax initializes them in float32, and a step keeps their dtype.
  state = state.replace(batch_stats=jax.tree.map(
      np.float64, state.batch_stats))
  rng = np.random.default_rng(0)
  labels = np.arange(16) % 4
  # Devices get different classes, so local statistics would differ.
  images = (rng.random((16, 8, 8, 1)) * (1 + labels[:, None, None, None])
            / 4)[np.argsort(labels, kind='stable')]
  labels = np.sort(labels)
  # Not at the images, where the gradient of TRADES's attack is zero.
  start = np.clip(images + 0.02 * np.sign(rng.normal(size=images.shape)), 0, 1)
  batch = images, labels, start
  whole, metrics = jax.jit(
      step_of(TypedNet('float64'), state, objective, None))(*batch)

  def spread(model):
    return jax.pmap(
        step_of(model, state, objective, mapping.AXIS),
        axis_name=mapping.AXIS, out_axes=None)(
            *(x.reshape(8, 2, *x.shape[1:]) for x in batch))

  found, its_metrics = spread(run.model)
  for name in ('params', 'batch_stats'):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        getattr(found, name), getattr(whole, name))
  np.testing.assert_allclose(its_metrics.loss, metrics.loss, rtol=1e-10)
  apart, _ = spread(TypedNet('float64'))
  assert np.abs(apart.batch_stats['bn']['var']
                - whole.batch_stats['bn']['var']).max() > 1e-4


@pytest.mark.parametrize('batch, devices, accumulate, sync, says', [
    (96, 2, 1, False, '20 images on each of 2 devices'),  # the last batch
    (16, 8, 1, False, '2 images on each of 8 devices'),
    (248, 8, 1, False, '31 images on each of 8 devices'),
    (256, 8, 1, False, ''), (16, 8, 1, True, ''), (16, 1, 1, False, ''),
    (64, 2, 1, False, ''), (62, 2, 1, False, '31 images on each of 2 devices'),
    (128, 2, 4, False, '16 images in each of 4 parts on each of 2 devices'),
    (128, 2, 2, False, ''), (128, 2, 4, True, ''),
    (64, 2, 4, True, '16 images in each of 4 parts,'),
    (64, 1, 4, False, '16 images in each of 4 parts,')])
def test_few_images_are_worth_a_notice(
    batch, devices, accumulate, sync, says, prepared):
  run = prepared(model__sync_batch_norm=sync)
  run.config.batch_size, run.config.accumulate = batch, accumulate
  images = np.zeros((2 * batch + (40 if batch == 96 else 0), 8, 8, 1))
  notice = train.few_images(run._replace(
      num_devices=devices, dataset=run.dataset._replace(x_train=images)))
  assert bool(notice) == bool(says)
  assert f'over {says}' in notice or not says
  assert ('model.sync_batch_norm' in notice) == ('devices' in says)
