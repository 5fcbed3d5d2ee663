"""Evaluation of a finished run: numbers, files and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from experiments.config import networks
from experiments.modes import evaluate
from experiments.runs import metrics
from experiments.runs import run as run_lib
from experiments.util import atomic
from experiments.util.errors import UserError
from tests.experiments.modes import train_test
from tests.experiments.modes.evaluated_run import (
    ATTACKS,
    HalfNet,
    average_of,
    logits_of,
    to_float32,
)


def test_every_result_records_its_environment(evaluated):
  run, values = evaluated
  wanted = {
      'precision': 'float32', 'matmul_precision': 'float32',
      'devices': [device.device_kind for device in jax.devices()]}
  line = metrics.read_metrics(run.workdir)[-1]
  environments = [line['judged_by']]
  for entry in values['subjects'].values():
    for part in (entry['natural'], *entry['evaluations'].values()):
      assert len(part['judged_by']) == 1
      environments += part['judged_by']
  for environment in environments:
    assert {name: environment[name] for name in wanted} == wanted
    for name, version in (
        ('awp_jax', awp_jax.__version__), ('jax', jax.__version__)):
      assert environment['versions'][name] == version
    assert 'jaxlib' in environment['versions']


def test_writes_what_it_returns(evaluated):
  run, values = evaluated
  stored = json.loads((run.workdir / 'evaluation.json').read_text())
  assert stored == json.loads(json.dumps(values))
  assert list(stored['subjects']) == ['best', 'last']
  assert stored['num_examples'] == 20
  for subject in stored['subjects'].values():
    assert list(subject['evaluations']) == list(ATTACKS)


@pytest.mark.parametrize('name', ATTACKS)
def test_accuracies_are_those_of_the_saved_examples(evaluated, name):
  run, values = evaluated
  entry = values['subjects']['last']
  reported = entry['evaluations'][name]
  archive = np.load(run.workdir / reported['examples'])
  logits_fn, labels = logits_of(run, 'last'), run.dataset.y_test
  natural = run.dataset.x_test / np.float32(255)
  is_right = logits_fn(natural).argmax(axis=1) == labels
  is_robust = logits_fn(archive['adversarial']).argmax(axis=1) == labels
  assert entry['natural']['accuracy'] == is_right.mean()
  assert reported['robust']['accuracy'] == (is_right & is_robust).mean()
  assert {'nonfinite_logits', 'nonfinite_gradient', 'outside'} <= (
      reported['attacks'][0]['anomalies'].keys())
  broken = sorted(
      index for a in reported['attacks'] for index in a['broken'])
  np.testing.assert_array_equal(broken, np.flatnonzero(is_right & ~is_robust))
  far = np.abs(archive['adversarial'] - natural).max()
  assert far <= 0.3 + 1e-6
  np.testing.assert_allclose(reported['largest_distance'], far, atol=1e-6)
  low, high = reported['robust']['interval_95']
  assert low <= reported['robust']['accuracy'] <= high


def test_fgsm_takes_one_step_of_epsilon(evaluated):
  run, values = evaluated
  reported = values['subjects']['best']['evaluations']['fgsm']
  images, labels = run.dataset.x_test / np.float32(255), run.dataset.y_test
  average, exact = to_float32(average_of(run)[0]), HalfNet(
      jnp.float32, jnp.float32)

  def loss(x):
    return -jax.nn.log_softmax(exact.apply(average, x))[
        np.arange(len(labels)), labels].sum()

  gradient = jax.jit(jax.grad(loss))(images)
  wanted = np.clip(images + 0.3 * np.sign(gradient), 0, 1)
  (attack,) = reported['attacks']
  broken = attack['broken']
  assert len(broken) > 2
  adversarial = np.load(run.workdir / reported['examples'])['adversarial']
  np.testing.assert_allclose(adversarial[broken], wanted[broken], atol=1e-6)


def test_equal_checkpoints_are_attacked_once(evaluated):
  run, values = evaluated  # evaluated once: the best is the last
  best, last = values['subjects'].values()
  assert last['same_weights_as'] == 'best'
  assert last['evaluations'] == best['evaluations']
  assert last['natural'] == best['natural']
  assert [entry['origin']['checkpoint'] for entry in (best, last)] == [
      'best', 'last']
  # One folder of records per attack: the same weights are not repeated.
  folders = [p for p in (run.workdir / 'evaluation').iterdir() if p.is_dir()]
  assert sorted(p.name.rpartition('-')[0] for p in folders) == sorted(ATTACKS)


def test_more_images_than_there_are_is_an_error(evaluated, tmp_path):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.num_examples = 21
  with pytest.raises(UserError, match=(
      r'evaluation\.num_examples=21: there are 20 test images; 0 uses all')):
    evaluate.evaluate(run._replace(config=config, workdir=tmp_path))
  assert not list(tmp_path.iterdir())


def test_images_of_another_data_set_are_rejected(
    evaluated, tmp_path, monkeypatch):
  run, _ = evaluated
  monkeypatch.setattr(networks, 'build', lambda config, dataset: HalfNet())
  config = run.config.copy_and_resolve_references()
  config.npz_path = train_test.write_images(tmp_path / 'other.npz', seed=1)
  with pytest.raises(ValueError, match='are not those of the run in'):
    run_lib.reopen(config, run.workdir)


def test_a_pytorch_checkpoint(evaluated, tmp_path):
  from awp_jax.models import WideResNet, torch_exchange
  from awp_jax.models.torch_exchange.files import write_state_dict

  run, values = evaluated
  model = WideResNet(4, depth=10, width=1)
  images = run.dataset.x_test / np.float32(255)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  path = tmp_path / 'net.pt'
  write_state_dict(path, torch_exchange.to_torch(variables, model))
  config = run.config.copy_and_resolve_references()
  config.evaluation.torch_checkpoint = str(path)
  config.evaluation.attacks = ('fgsm',)
  before = json.loads(json.dumps(values))
  atomic.write_json(run.workdir / 'evaluation.json', before)
  subjects = evaluate.evaluate(run._replace(config=config))['subjects']
  entry = subjects.pop('torch-net')
  assert subjects == before['subjects']  # those of the checkpoints are kept
  # The file has no normalization, so that of the data set is used.
  model = WideResNet(
      4, depth=10, width=1, mean=tuple(run.dataset.mean),
      std=tuple(run.dataset.std))
  logits = np.asarray(jax.jit(model.apply)(variables, images))
  wanted = logits.argmax(axis=1) == run.dataset.y_test
  assert entry['natural']['accuracy'] == wanted.mean()


def test_settings_are_checked_before_data_are_read(tmp_path):
  config = train_test.small()
  with pytest.raises(ValueError, match='holds no checkpoints'):
    evaluate.check(config, tmp_path)
  config.evaluation.torch_checkpoint = str(tmp_path / 'absent.pt')
  with pytest.raises(ValueError, match='there is no such file'):
    evaluate.check(config, tmp_path)
