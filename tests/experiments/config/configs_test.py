"""Tests that every config builds and trains three steps."""

import importlib
import pathlib
import re

import jax
import numpy as np
import pytest

from experiments import configs, main
from experiments.config import build, networks, schema
from experiments.configs import base, cifar10_awp, parts
from experiments.data import datasets
from experiments.modes import train
from experiments.runs import metrics
from experiments.runs import run as run_lib
from tests.experiments.modes import train_test

STEMS = sorted(
    path.stem for path in pathlib.Path(configs.__file__).parent.glob('*.py')
    if path.stem not in ('__init__', 'base', 'parts'))
ARGUMENTS = ('L2', 'WRN-34-10', 'L2,WRN-34-10', 'WRN-28-10', 'PreActResNet-18')


def load(stem, *argument):
  return importlib.import_module(
      f'experiments.configs.{stem}').get_config(*argument)


def has_argument(stem):
  return not stem.startswith(('digits', 'cifar10_small'))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Stand-ins for the data, the extra images and the checkpoint."""
  folder = tmp_path_factory.mktemp('configs')
  rng = np.random.default_rng(0)
  arrays = {}
  for part, num in (('train', 56), ('test', 16)):
    arrays[f'x_{part}'] = rng.integers(0, 256, (num, 8, 8, 3), np.uint8)
    arrays[f'y_{part}'] = np.arange(num) % 4
  np.savez(folder / 'mine.npz', **arrays)
  np.savez(
      folder / 'extra.npz', images=arrays['x_train'][:9],
      labels=arrays['y_train'][:9])
  return folder


def on_little_data(config, files):
  """The config with a few small images and a short attack."""
  config.update_from_flattened_dict({
      'dataset': 'npz', 'npz_path': str(files / 'mine.npz'), 'num_train': 0,
      'num_test': 0, 'num_validation': 8 if config.num_validation else 0,
      'init_from': '', 'image_size': 0,
      'attack.num_steps': 1, 'eval.num_steps': 1, 'eval.batch_size': 16,
      'eval.num_train': 16, 'eval.every_epochs': 1, 'epochs': 1,
      'awp.warmup_epochs': 0,
      'batch_size': 16, 'optimizer.warmup_epochs': 0.0})
  if config.extra.path:
    config.extra.path = str(files / 'extra.npz')
  if config.num_validation or config.extra.path:
    config.num_train = 40 + config.num_validation
  else:
    config.num_train = 48
  return config


@pytest.mark.slow
@pytest.mark.parametrize('stem', STEMS)
def test_every_config_trains_three_steps(stem, files, tmp_path, monkeypatch):
  train_test.use_tiny_net(monkeypatch)
  train_test.without_report(monkeypatch)
  config = on_little_data(load(stem), files)
  run = run_lib.prepare(config, tmp_path)
  assert run.steps_per_epoch == 3
  train.train(run)
  (line,) = metrics.read_metrics(tmp_path)
  assert line['images'] in (40, 48)
  # |v| = gamma |w|.
  assert line['perturbation_ratio'] == pytest.approx(
      config.awp.gamma, rel=1e-3, abs=0)


@pytest.mark.parametrize('stem', STEMS)
def test_every_config_builds(stem):
  config = load(stem)
  schema.check(config, base.get_config())
  built = build.build(config)
  assert built.threat.epsilon == config.threat.epsilon
  method = built.perturbation
  assert method.ball.size == config.awp.gamma
  assert method.is_off != ('awp' in stem or 'strong' in stem)
  model = networks.build(config, datasets.load('digits', num_train=10))
  # The config's network at full width, without computation.
  shapes = jax.eval_shape(
      lambda: model.init(
          jax.random.key(0), np.zeros((1, 32, 32, 1), np.float32)))
  assert jax.tree.leaves(shapes['params'])


@pytest.mark.parametrize('argument', ARGUMENTS)
@pytest.mark.parametrize('stem', [s for s in STEMS if has_argument(s)])
def test_arguments(stem, argument):
  config = load(stem, argument)
  schema.check(config, base.get_config())
  threat = build.build(config).threat
  assert threat.norm == ('L2' if 'L2' in argument else 'Linf')
  if 'L2' in argument:
    assert threat.epsilon == 128 / 255
  model = (config.model.name, config.model.depth, config.model.width)
  for name, wanted in parts.NETWORKS.items():
    assert (model == wanted) or name not in argument


@pytest.mark.parametrize('argument', ['l2', 'L1', 'WRN', 'L2;WRN-34-10'])
def test_unknown_arguments(argument):
  with pytest.raises(ValueError, match='Linf, L2 and PreActResNet-18'):
    load('cifar10_awp', argument)


def test_the_main_config_is_the_paper_s():
  config = cifar10_awp.get_config()
  assert (config.threat.norm, config.threat.epsilon) == ('Linf', 8 / 255)
  assert (config.attack.num_steps, config.attack.step_size) == (10, 2 / 255)
  assert (config.awp.gamma, config.awp.warmup_epochs) == (0.01, 0)
  assert (config.epochs, config.batch_size) == (200, 128)
  optimizer = config.optimizer
  assert (optimizer.learning_rate, optimizer.momentum) == (0.1, 0.9)
  assert (optimizer.weight_decay, optimizer.decay_at) == (5e-4, (0.5, 0.75))


def test_the_small_setting_changes_only_the_method():
  """Comparisons between the rows of the small setting are fair."""
  at = load('cifar10_small_at')
  assert at.optimizer == base.get_config().optimizer
  for stem in (s for s in STEMS if s.startswith('cifar10_small')):
    config = load(stem)
    for name in ('optimizer', 'epochs', 'batch_size', 'num_train', 'num_test',
                 'image_size', 'data_seed', 'eval', 'augmentation', 'threat',
                 'model', 'landscape', 'guard'):
      assert config[name] == at[name], (stem, name)
    for name in ('step_size', 'num_steps'):
      assert config.attack[name] == at.attack[name], (stem, name)
  assert (at.num_train, at.num_test, at.image_size) == (2500, 3000, 16)
  assert (at.epochs, at.batch_size, at.model.width) == (40, 100, 16)
  assert (at.eval.every_epochs, at.eval.num_steps) == (2, 10)
  gammas = {stem: load(stem).awp.gamma for stem in STEMS if 'small' in stem}
  assert gammas == {
      'cifar10_small_at': 0, 'cifar10_small_awp': 0.01,
      'cifar10_small_trades': 0, 'cifar10_small_trades_awp': 0.005,
      'cifar10_small_mart': 0, 'cifar10_small_mart_awp': 0.005}


def test_the_paper_s_settings_of_other_data():
  svhn, l2 = load('svhn_awp'), load('svhn_awp', 'L2')
  assert (svhn.optimizer.learning_rate, svhn.attack.step_size) == (
      0.01, 1 / 255)
  assert (svhn.awp.warmup_epochs, l2.awp.warmup_epochs) == (5, 0)
  assert l2.attack.step_size == 15 / 255
  cifar100 = load('cifar100_at')
  assert cifar100.augmentation.rotation == 15
  assert cifar100.augmentation.pad_mode == 'constant'
  trades = load('cifar10_trades_awp', 'WRN-34-10')
  assert (trades.threat.epsilon, trades.attack.step_size) == (0.031, 0.007)
  assert (trades.awp.gamma, trades.awp.warmup_epochs) == (0.005, 10)
  assert not trades.model.normalize and trades.attack.mode == 'eval'
  mart, wide = load('cifar10_mart'), load('cifar10_mart', 'WRN-34-10')
  assert (mart.beta, mart.epochs, mart.optimizer.weight_decay) == (
      5.0, 120, 3.5e-3)
  assert (wide.beta, wide.epochs, wide.optimizer.weight_decay) == (
      6.0, 90, 7e-4)
  rst = load('cifar10_rst_awp')
  assert (rst.model.depth, rst.batch_size, rst.extra.fraction) == (28, 256, 0.5)
  tuned = load('cifar10_pretrained')
  assert (tuned.epochs, tuned.optimizer.learning_rate) == (5, 0.001)


#: Options that no config of the paper enables, with their values when off.
OPTIONS = {
    'label_smoothing': 0.0, 'ema_decay': 0.0, 'model.activation': 'relu',
    'model.dtype': 'float32', 'model.sync_batch_norm': False,
    'optimizer.l1': 0.0, 'optimizer.clip_norm': 0.0, 'optimizer.decay': 'all',
    'optimizer.warmup_epochs': 0.0, 'augmentation.cutout': 0,
    'augmentation.mixup': 0.0, 'num_validation': 0, 'select_on': 'test',
    'statistics': 'reference', 'guard.action': 'stop'}

#: Those enabled in strong recipes.
STRONG = {
    'label_smoothing': 0.1, 'ema_decay': 0.995, 'model.activation': 'silu',
    'model.dtype': 'bfloat16', 'optimizer.decay': 'weights',
    'optimizer.warmup_epochs': 5.0, 'num_validation': 1024,
    'select_on': 'validation', 'statistics': 'perturbed'}


@pytest.mark.parametrize('stem', STEMS)
def test_the_recipes_of_today_are_on_in_strong_configs_only(stem):
  fields = schema.flatten(load(stem))
  differing = {
      name: fields[name] for name, off in OPTIONS.items()
      if fields[name] != off}
  if 'small' in stem:
    assert differing == {'model.dtype': 'bfloat16'}
  else:
    assert differing == (STRONG if 'strong' in stem else {})


@pytest.mark.parametrize('stem', STEMS)
def test_headers_name_their_own_file_and_no_other(stem):
  text = importlib.import_module(f'experiments.configs.{stem}').__doc__
  named = set(re.findall(r'experiments/configs/(\w+)\.py', text))
  # The default config of `main.py`.
  assert named == ({stem} if stem != 'digits_awp' else set())


def test_main_takes_digits_awp_without_a_config():
  assert main.DEFAULT.stem == 'digits_awp'
