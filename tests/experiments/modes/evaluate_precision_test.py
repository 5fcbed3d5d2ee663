"""Models are evaluated in float32, with their own weights and noise."""

import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from experiments.config import networks
from experiments.modes import evaluate, train
from experiments.runs import checkpoints, metrics, precision, restore
from experiments.runs import run as run_lib
from experiments.training import epochs
from experiments.training import step as step_lib
from experiments.util import digests
from tests.experiments.modes import train_test
from tests.experiments.modes.evaluated_run import (
    HalfNet,
    average_of,
    logits_of,
    to_float32,
)


def test_bfloat16_run_is_evaluated_in_float32_with_its_average(evaluated):
  run, values = evaluated
  average, last = average_of(run)
  assert average['params']['Conv_0']['kernel'].dtype == jnp.bfloat16
  images, labels = run.dataset.x_test / np.float32(255), run.dataset.y_test
  exact = HalfNet(jnp.float32, jnp.float32)
  apply = jax.jit(exact.apply)
  wanted = np.asarray(apply(to_float32(average), images))
  assert wanted.dtype == np.float32
  np.testing.assert_allclose(logits_of(run, 'last')(images), wanted, atol=1e-6)
  # The last weights, or bfloat16, would differ.
  for other in (apply(to_float32(last), images),
                jax.jit(HalfNet().apply)(average, images)):
    assert np.abs(np.asarray(other, np.float32) - wanted).max() > 1e-3
  natural = np.mean(np.argmax(wanted, axis=-1) == labels)
  assert values['subjects']['last']['natural']['accuracy'] == natural


def test_evaluation_in_training_is_in_float32_and_of_the_average(evaluated):
  run, _ = evaluated
  average, last = average_of(run)
  images, labels = run.dataset.x_test / np.float32(255), run.dataset.y_test
  line = metrics.read_metrics(run.workdir)[-1]

  def loss(model, variables):
    logits = np.asarray(
        jax.jit(model.apply)(variables, images), np.float64)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[
        np.arange(len(labels)), labels])

  exact = HalfNet(jnp.float32, jnp.float32)
  wanted = loss(exact, to_float32(average))
  assert line['test_natural_loss'] == pytest.approx(wanted, rel=1e-6)
  for other in (
      loss(exact, to_float32(last)), loss(HalfNet(), average)):
    assert abs(other / wanted - 1) > 2e-5


def test_precision_holds_in_gradients_and_other_threads():
  model = HalfNet()
  images = np.zeros((2, 8, 8, 1), np.float32)
  variables = precision.variables(
      jax.jit(model.init)(jax.random.key(0), images))
  network = precision.network(model)
  assert network == precision.network(HalfNet())

  def loss(x):
    return precision.logits(network, variables, x).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(images))
  products = text.count('dot_general[') + text.count(
      'conv_general_dilated[')
  assert products == 4  # a convolution, a matrix product, and their gradients
  assert text.count('precision=(Precision.HIGHEST') == products
  assert 'bf16[' not in text


def test_each_checkpoint_is_evaluated_with_its_own_weights(evaluated, tmp_path):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.attacks = ('fgsm',)
  run = run._replace(config=config, workdir=tmp_path)
  images, labels = run.dataset.x_test / np.float32(255), run.dataset.y_test
  exact = HalfNet(jnp.float32, jnp.float32)
  init = jax.jit(exact.init)
  for kind, step, seed in (('best', 3, 4), ('last', 7, 8)):
    store = checkpoints.Checkpoints(tmp_path, kind)
    store.save(step, init(jax.random.key(seed), images[:1]), {})
    store.close()
  values = evaluate.evaluate(run)['subjects']
  assert list(values) == ['best', 'last']
  logits, accuracies = {
      s.name: jax.jit(s.logits_fn) for s in restore.restore_models(run)}, []
  for kind, step in (('best', 3), ('last', 7)):
    store = checkpoints.Checkpoints(tmp_path, kind)
    variables, _ = store.load(init(jax.random.key(0), images[:1]))
    store.close()
    wanted = np.asarray(jax.jit(exact.apply)(variables, images))
    np.testing.assert_allclose(logits[kind](images), wanted, atol=1e-5)
    entry = values[kind]
    assert entry['origin'] == {'checkpoint': kind, 'step': step}
    assert entry['weights'] == digests.of_arrays(variables)
    assert 'same_weights_as' not in entry
    natural = np.mean(wanted.argmax(axis=1) == labels)
    assert entry['natural']['accuracy'] == natural
    accuracies.append((wanted, natural))
  (first, one), (second, other) = accuracies
  assert np.abs(first - second).max() > 0.1 and one != other


class BrokenNet(train_test.TinyNet):
  """Has NaN gradients and finite logits on bright images in evaluation."""

  @nn.compact
  def __call__(self, x, train=False):
    if not train:
      fine = x.mean(axis=(1, 2, 3), keepdims=True) < 0.6
      x = x + jnp.sqrt(fine + 0 * x) - fine  # sqrt'(0) * 0
    return super().__call__(x, train)


def test_gradients_that_are_not_finite_are_reported(
    evaluated, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
      networks, 'build', lambda config, dataset: BrokenNet())
  train_test.without_report(monkeypatch)
  run = run_lib.prepare(train_test.small(
      dataset='npz', npz_path=evaluated[0].config.npz_path, epochs=1,
      threat__epsilon=0.02, awp__gamma=0.0, attack__num_steps=1), tmp_path)
  summary = train.train(run)
  (line,) = metrics.read_metrics(run.workdir)
  # The brightest of four classes: 5 of 20 test images, and a share of the 16
  # training images of `eval.num_train`.
  shown = run.dataset.y_train[np.linspace(0, 47, 16).astype(int)]
  share = np.mean(shown == 3)
  assert line['test_nonfinite'] == 0.25 and line['train_nonfinite'] == share
  assert summary['last']['nonfinite'] == 0.25
  assert (
      'warning: logits or gradients are not finite on '
      f'{100 * share:.2f} % of the train images, 25.00 % of the test images. '
      'The attack is weaker there, so robust accuracy is too high.\n'
  ) in capsys.readouterr().out


def test_finite_gradients_are_not_reported(evaluated):
  line = metrics.read_metrics(evaluated[0].workdir)[-1]
  assert line['train_nonfinite'] == line['test_nonfinite'] == 0
  assert epochs.nonfinite_warning(line) == ''


def test_every_evaluation_in_training_has_its_own_noise(evaluated):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.seed, config.eval.batch_size = 3, 8
  run, used = run._replace(config=config), []

  def eval_fn(state, images, labels, valid, key):
    used.append(tuple(map(int, jax.random.key_data(key))))
    return awp_jax.EvalMetrics(*(
        np.ones(()) for _ in awp_jax.EvalMetrics._fields))

  state, wanted = run_lib.initial_state(run), []
  for step in (2, 7):
    step_lib.evaluate(run, eval_fn, state.replace(step=step))
    for split, batches in enumerate((2, 3)):  # 16 and 20 images
      for batch in range(batches):
        key = jax.random.split(jax.random.key(3), 5)[4]
        for number in (step, split, batch):
          key = jax.random.fold_in(key, number)
        wanted.append(tuple(map(int, jax.random.key_data(key))))
  assert used == wanted and len(set(used)) == 10


def test_attacks_in_bfloat16_are_judged_in_float32(
    evaluated, tmp_path, capsys):
  run, values = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.attacks = ('pgd-2',)
  config.evaluation.attack_dtype = 'bfloat16'
  folder = shutil.copytree(run.workdir, tmp_path / 'run')
  run = run._replace(config=config, workdir=folder)
  capsys.readouterr()
  entry = evaluate.evaluate(run)['subjects']['last']
  found = entry['evaluations']['pgd-2-bfloat16']
  # The same attack in float32 stays; each row of the table says which it is.
  assert entry['evaluations']['pgd-2'] == values['subjects']['last'][
      'evaluations']['pgd-2']
  shown = capsys.readouterr().out
  assert 'evaluated in float32\n' in shown
  assert ' pgd-2 ' in shown and ' pgd-2-bfloat16 ' in shown
  before = values['subjects']['last']['evaluations']['pgd-2']
  for part, dtype in ((found, 'bfloat16'), (before, 'float32')):
    (environment,) = part['judged_by']
    assert environment['precision'] == 'float32'
    assert environment['attack_dtype'] == dtype
  assert 'attack_dtype' not in entry['natural']['judged_by'][0]
  assert len(list(folder.glob('evaluation/pgd-2-*'))) == 2 * len(
      list(run.workdir.glob('evaluation/fgsm-*')))
  stored = np.load(folder / found['examples'])
  wrong = logits_of(run, 'last')(
      stored['adversarial']).argmax(-1) != run.dataset.y_test
  np.testing.assert_array_equal(wrong, ~stored['robust'])
  assert abs(found['robust']['accuracy'] - before['robust']['accuracy']) <= 0.1


def test_type_of_the_attacks(evaluated):
  run, _ = evaluated
  model = next(restore.restore_models(run))
  images = np.zeros((2, *run.dataset.x_test.shape[1:]), np.float32)
  assert model.attack_fn('float32') is None
  text = str(jax.make_jaxpr(model.attack_fn('bfloat16'))(images))
  assert 'bf16[' in text
  assert 'bf16[' not in str(jax.make_jaxpr(model.logits_fn)(images))
  np.testing.assert_allclose(
      model.attack_fn('bfloat16')(images), model.logits_fn(images), atol=0.05)
  config = run.config.copy_and_resolve_references()
  config.evaluation.attack_dtype = 'float16'
  message = "evaluation.attack_dtype must be one of.*'float16'"
  with pytest.raises(ValueError, match=message):
    evaluate.check(config, run.workdir)
