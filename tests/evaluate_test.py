"""Evaluation of a finished run: numbers, records, resuming, refusals."""

import json

import jax
import numpy as np
import pytest

from awp_jax.attacks import evaluation as evaluation_lib
from experiments import evaluate, runs, train
from tests import train_test

ATTACKS = ('fgsm', 'pgd-2', 'cw-2', 'apgd-ce')


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """A run of one epoch and its evaluation on 20 images of 4 classes."""
  folder = tmp_path_factory.mktemp('evaluate')
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=1, model__width=1, threat__epsilon=0.3,
      evaluation__attacks=ATTACKS, evaluation__batch_size=16,
      evaluation__save_examples=True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    train_test.use_tiny_net(monkeypatch)
    run = runs.prepare(config, folder / 'run')
  train.train(run)
  return run, evaluate.evaluate(run)


def logits_of(run, kind):
  subject = next(
      s for s in evaluate.load_subjects(run) if s.name == kind)
  return lambda images: np.asarray(subject.logits_fn(images))


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
  archive = np.load(run.workdir / f'evaluation/last-{name}.npz')
  logits_fn, labels = logits_of(run, 'last'), run.dataset.y_test
  natural = run.dataset.x_test / np.float32(255)
  is_right = logits_fn(natural).argmax(axis=1) == labels
  stands = logits_fn(archive['adversarial']).argmax(axis=1) == labels
  assert entry['natural']['accuracy'] == is_right.mean()
  reported = entry['evaluations'][name]
  assert reported['robust']['accuracy'] == (is_right & stands).mean()
  broken = sorted(
      index for a in reported['attacks'] for index in a['broken'])
  np.testing.assert_array_equal(broken, np.flatnonzero(is_right & ~stands))
  far = np.abs(archive['adversarial'] - natural).max()
  assert far <= 0.3 + 1e-6
  np.testing.assert_allclose(reported['largest_distance'], far, atol=1e-6)
  low, high = reported['robust']['interval_95']
  assert low <= reported['robust']['accuracy'] <= high


def test_attacks_break_something(evaluated):
  _, values = evaluated
  entry = values['subjects']['last']
  assert any(
      e['robust']['accuracy'] < entry['natural']['accuracy']
      for e in entry['evaluations'].values())


def without_seconds(values):
  if isinstance(values, dict):
    return {k: without_seconds(v) for k, v in values.items() if k != 'seconds'}
  if isinstance(values, list):
    return [without_seconds(v) for v in values]
  return values


def test_goes_on_behind_the_finished_groups(evaluated, monkeypatch):
  run, values = evaluated
  monkeypatch.setattr(
      evaluation_lib, '_attack_group',
      lambda *a: pytest.fail('a finished group was attacked again'))
  again = evaluate.evaluate(run)
  assert without_seconds(again) == without_seconds(values)
  monkeypatch.undo()
  # A process that was killed has not written the last record.
  lost = sorted(run.workdir.glob('evaluation/last-apgd-ce-*/*.npz'))[-1]
  lost.unlink()
  assert without_seconds(evaluate.evaluate(run)) == without_seconds(values)
  assert lost.exists()


def test_other_settings_have_their_own_records(evaluated):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.num_examples = 8
  config.evaluation.attacks = ('fgsm',)
  values = evaluate.evaluate(run._replace(config=config))
  assert values['num_examples'] == 8


def test_a_pytorch_checkpoint(evaluated, tmp_path):
  from awp_jax.models import PreActResNet, torch_exchange
  from awp_jax.models.torch_files import write_state_dict

  run, _ = evaluated
  model = PreActResNet(4, width=2)
  images = run.dataset.x_test / np.float32(255)
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  path = tmp_path / 'net.pt'
  write_state_dict(path, torch_exchange.to_torch(variables, model))
  config = run.config.copy_and_resolve_references()
  config.evaluation.torch_checkpoint = str(path)
  config.evaluation.attacks = ('fgsm',)
  entry = evaluate.evaluate(run._replace(config=config))['subjects']['net']
  # The file holds no normalisation, so that of the data is taken.
  model = PreActResNet(
      4, width=2, mean=tuple(run.dataset.mean), std=tuple(run.dataset.std))
  wanted = model.apply(variables, images).argmax(axis=1) == run.dataset.y_test
  assert entry['natural']['accuracy'] == wanted.mean()


@pytest.mark.parametrize('attacks,message', [
    ((), 'evaluation.attacks is empty'),
    (('pdg-20',), "evaluation.attacks must be one of .* got 'pdg-20'"),
    (('pgd-N',), "'pgd-N' needs a number"),
    (('pgd-0',), 'must be one of'),
    (('aa-standart',), "Did you mean 'aa-standard'"),
    (('fgsm', 'fgsm'), 'names one twice'),
])
def test_bad_names(attacks, message):
  with pytest.raises(ValueError, match=message):
    evaluate.check_names(attacks)


def test_refuses_before_data_are_read(tmp_path):
  config = train_test.small()
  with pytest.raises(ValueError, match='holds no checkpoints'):
    evaluate.check(config, tmp_path)
  config.evaluation.torch_checkpoint = str(tmp_path / 'absent.pt')
  with pytest.raises(ValueError, match='there is no such file'):
    evaluate.check(config, tmp_path)


@pytest.mark.parametrize('name,count', [
    ('aa-standard', 4), ('aa-fast', 2), ('square', 1), ('spsa', 1),
    ('pgd-100', 1)])
def test_every_name_makes_its_attacks(name, count):
  specs = evaluate.make_specs(name, train_test.small())
  assert len(specs) == count
  assert all(isinstance(spec.name, str) for spec in specs)
