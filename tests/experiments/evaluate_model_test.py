"""The command that judges a classifier of another package or a PyTorch file."""

import json
import re

import jax
import numpy as np
from PIL import Image
import pytest

import awp_jax
from awp_jax.models import PreActResNet, torch_exchange
from awp_jax.models.torch_exchange import write_state_dict
from experiments import evaluate_model
from tests.helpers import named_parts
from tests.helpers.torch_layout import random_variables

PARTS = 'tests.helpers.named_parts'
#: Two classes are few for APGD-T.
pytestmark = pytest.mark.filterwarnings('ignore::awp_jax.RobustnessWarning')
DATA = f'--dataset={PARTS}:blobs(num=24)'


@pytest.fixture(scope='module')
def judged(tmp_path_factory):
  """A run of the command with a curve and smallest perturbations."""
  folder = tmp_path_factory.mktemp('judged') / 'run'
  arguments = [
      f'--model={PARTS}:linear(scale=8.0)', DATA, f'--workdir={folder}',
      '--version=fast', '--epsilon=0.1', '--epsilons=0.05,0.1,0.2',
      '--minimal', '--num_examples=20']
  assert evaluate_model.main(arguments) == 0
  return folder, arguments


def logits_and_labels():
  data = named_parts.blobs(num=24)
  images = data['x_test'][:20].astype(np.float32) / 255
  return images, np.asarray(
      named_parts.linear(2, (4, 4, 1), 8.0)(images)), data['y_test'][:20]


def test_result(judged):
  """Numbers of a linear model in closed form."""
  folder, _ = judged
  found = json.loads((folder / 'result.json').read_text())
  images, logits, labels = logits_and_labels()
  natural = logits.argmax(1) == labels
  assert found['clean_acc'] == f'{100 * natural.mean():.2f}'
  # With C = 2: broken from margin / |w_0 - w_1|_1 on.
  weights = named_parts.linear(2, (4, 4, 1), 8.0)(
      np.eye(16, dtype=np.float32).reshape(16, 4, 4, 1) + 0.5)
  slope = np.abs(weights[:, 0] - weights[:, 1]).sum()
  rows = np.arange(20)
  distances = (logits[rows, labels] - logits[rows, 1 - labels]) / slope
  robust = distances > 0.1
  assert found['autoattack_acc'] == f'{100 * robust.mean():.2f}'
  assert 5 < robust.sum() < natural.sum()
  assert (found['num_examples'], found['eps'], found['norm']) == (
      20, 0.1, 'Linf')
  assert found['name'] == f'{PARTS}:linear(scale=8.0)'
  assert re.fullmatch('[0-9a-f]{64}', found['source_sha256'])

  examples = awp_jax.load_examples(folder / 'examples.npz')
  np.testing.assert_array_equal(examples.robust, robust)
  assert np.abs(examples.adversarial - images).max() <= 0.1 + 1e-6

  curve = json.loads((folder / 'curve.json').read_text())
  assert curve['robust_accuracy'] == [
      np.mean(distances > epsilon) for epsilon in (0.05, 0.1, 0.2)]
  with Image.open(folder / 'curve.png') as image:
    assert image.format == 'PNG'
  with np.load(folder / 'minimal.npz') as archive:
    np.testing.assert_allclose(
        archive['distances'], np.maximum(distances, 0), rtol=2e-3, atol=1e-5)


def test_the_same_command_resumes(judged, capsys, monkeypatch):
  folder, arguments = judged
  before = json.loads((folder / 'result.json').read_text())
  (folder / 'result.json').unlink()
  assert evaluate_model.main(arguments) == 0
  assert 'attacked' not in capsys.readouterr().out  # nothing is attacked again
  assert json.loads((folder / 'result.json').read_text()) == before


def test_a_pytorch_file(tmp_path, capsys):
  model = PreActResNet(2, depth=10, width=2, mean=(0.25,), std=(0.5,))
  variables = random_variables(model, channels=1)
  path = tmp_path / 'net.pth'
  write_state_dict(path, torch_exchange.to_torch(variables, model))
  assert evaluate_model.main([
      f'--torch={path}', DATA, f'--workdir={tmp_path}/run', '--version=fast',
      '--epsilon=1/1000', '--num_examples=4', '--mean=0.25', '--std=1/2']) == 0
  found = json.loads((tmp_path / 'run' / 'result.json').read_text())
  images, _, labels = logits_and_labels()
  logits = jax.jit(model.apply)(variables, images[:4])
  assert found['clean_acc'] == (
      f'{100 * np.mean(logits.argmax(1) == labels[:4]):.2f}')
  assert found['mean'] == [0.25]
  assert found['architecture'] == 'PreActResNet-10, width 2, relu'
  assert found['eps'] == 0.001
  capsys.readouterr()
  for arguments, shown in (
      (['--dataset=digits', '--mean=0', '--std=1'],
       'classifies into 2 classes, digits has 10'),
      ([DATA], 'does not hold the mean and standard deviation'),
      ([DATA, '--mean=0'], "--std must be numbers like"),
      ([DATA, '--mean=0', '--std=1/0'], "got '1/0'")):
    assert evaluate_model.main([
        f'--torch={path}', f'--workdir={tmp_path}/b', *arguments]) == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize('arguments, shown', [
    ([], 'one of the arguments --model --torch is required'),
    (['--model=a:b', '--torch=c'], 'not allowed with'),
    (['--model=no_such:load'], "there is no module 'no_such'"),
    ([f'--model={PARTS}:wrong'], 'must return a function of images, got dict'),
    ([f'--model={PARTS}:linear(scal=1)'], "Did you mean 'scale'?"),
    ([f'--model={PARTS}:linear', '--epsilon=0'], 'epsilon must be'),
    ([f'--model={PARTS}:linear', '--num_examples=25'], 'must be in 0..24'),
    ([f'--model={PARTS}:linear', '--num_examples=-1'], 'must be in 0..24'),
    ([f'--model={PARTS}:linear', '--batch_size=0'], '--batch_size must be'),
    ([f'--model={PARTS}:linear', '--epsilons=a'], "like '0.01,8/255', got 'a'"),
    ([f'--model={PARTS}:linear', '--epsilons=0.2,0.1'], 'must be rising'),
    ([f'--model={PARTS}:linear', '--epsilons=0,0.1'], 'must be rising'),
    ([f'--model={PARTS}:linear', '--epsilon=1,2'], 'must be one number'),
    ([f'--model={PARTS}:linear', '--norm=L2'], '--norm=L2 needs --epsilon'),
    ([f'--model={PARTS}:linear(num_classes=1)'], 'logits'),
    ([f'--model={PARTS}:linear', '--version=rand'], 'for randomized models'),
    ([f'--model={PARTS}:linear', '--workdir=gs://a/b'], 'gs://a/b'),
    (['--torch=nowhere.pt'], 'nowhere.pt'),
    ([f'--model={PARTS}:linear', '--dataset=cifar11'], 'data set must be one')])
def test_wrong_arguments(arguments, shown, tmp_path, capsys):
  folder = tmp_path / 'run'
  try:
    code = evaluate_model.main([DATA, f'--workdir={folder}', *arguments])
  except SystemExit as exit_:
    code = exit_.code
  out, err = capsys.readouterr()
  assert code == 2 and out == '' and err.count('\n') == 1
  assert shown in err, err
  assert not folder.exists()
