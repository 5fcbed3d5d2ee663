"""Parts of other packages by name: what they get, give, and refuse."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import awp_jax
from experiments.config import build, networks, optimizers, schema
from experiments.configs import base, digits_awp
from experiments.data import augmentation, datasets
from experiments.evaluation import attacks
from experiments.util import named
from experiments.util.errors import UserError
from tests.helpers import named_parts

PARTS = 'tests.helpers.named_parts'


def config_with(**fields):
  config = digits_awp.get_config()
  schema.update(config, {
      name.replace('__', '.'): value for name, value in fields.items()})
  schema.check(config, base.get_config())
  return config


@pytest.mark.parametrize('text, call', [
    ('sam', ('sam', {})), ('sam()', ('sam', {})),
    (' a.b:c ( x = 1, y=(2, "3)") ) ', ('a.b:c', {'x': 1, 'y': (2, '3)')})),
    ('a:b', ('a:b', {}))])
def test_calls(text, call):
  assert named.parse_call(text) == call


@pytest.mark.parametrize('text', [
    '', 'a:', ':b', 'a:b:c', 'a:b.c', 'a b', 'a(1)', 'a(**{})', 'a(x=y)',
    'a(x=1', 'a)', 'a(x=1)(y=2)', 'a(x=1) + b', '1a', 'a(x=__import__("os"))'])
def test_other_text(text):
  with pytest.raises(UserError, match='must be a name, with options') as caught:
    named.parse_call(text, 'f')
  assert repr(text) in str(caught.value)


def test_a_broken_module(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'broken_part.py').write_text('1 / 0')
  (tmp_path / 'lacking_part.py').write_text('import not_there_at_all')
  (tmp_path / 'typing_part.py').write_text('def f(:')
  for name, shown in (
      ('broken_part', 'failed with ZeroDivisionError: division by zero'),
      ('lacking_part', "failed with ModuleNotFoundError: No module named "
       "'not_there_at_all'"),
      ('typing_part', 'failed with SyntaxError')):
    with pytest.raises(UserError, match='importing') as caught:
      named.load('f', f'{name}:x')
    assert shown in str(caught.value)


@pytest.mark.parametrize('fields, shown', [
    ({'objective': 'no_such_module:x'}, "there is no module 'no_such_module'"),
    ({'objective': f'{PARTS}.more:x'}, f"there is no module '{PARTS}.more'"),
    ({'objective': f'{PARTS}:objectiv'}, "Did you mean 'objective'?"),
    ({'objective': f'{PARTS}:NUMBER'}, "'NUMBER' is not callable but int"),
    ({'objective': f'{PARTS}:wrong'}, 'must return an awp_jax.Objective, got '
     'dict'),
    ({'objective': f'{PARTS}:objective(wait=1)'},
     "takes no option 'wait', only label_smoothing, weight"),
    ({'objective': f'{PARTS}:failing'},
     'failed with ValueError: an own check failed'),
    ({'objective': f'{PARTS}:objective', 'beta': 3.0},
     'beta=3.0 has no effect'),
    ({'objective': f'{PARTS}:failing', 'label_smoothing': 0.1},
     'label_smoothing=0.1 has no effect'),
    ({'weight_perturbation': f'{PARTS}:wrong'},
     'must return an awp_jax.Method, got dict'),
    ({'weight_perturbation': f'{PARTS}:perturbation(gamma=-1)',
      'awp__gamma': 0.0}, 'failed with ValueError: gamma must be'),
    ({'attack__name': 'sgd'}, "attack.name must be one of 'pgd', got 'sgd'"),
    ({'attack__name': f'{PARTS}:darken'}, 'must be a function of key, loss_fn'),
    ({'attack__name': f'{PARTS}:scaled_attack'}, 'must be a function of key'),
    ({'augmentation__function': f'{PARTS}:attack'},
     'must be a function of key, image'),
    ({'augmentation__function': f'{PARTS}:darken(most=1)'}, 'its options'),
    ({'optimizer__name': f'{PARTS}:no_rate'},
     'must have an argument learning_rate'),
    ({'optimizer__name': f'{PARTS}:no_decay'},
     'optimizer.weight_decay=0.0005 has no effect'),
    ({'optimizer__name': f'{PARTS}:optimizer', 'optimizer__momentum': 0.5},
     'optimizer.momentum=0.5 has no effect'),
    ({'optimizer__name': f'{PARTS}:optimizer', 'optimizer__decay': 'weights'},
     'has no argument mask'),
    ({'model__name': f'{PARTS}:narrow_net'}, 'set model.kwargs.width'),
    ({'model__name': f'{PARTS}:narrow_net', 'model__kwargs__width': 4,
      'model__dtype': 'bfloat16'}, 'with an argument dtype'),
    ({'model__name': f'{PARTS}:NnxNet', 'model__dtype': 'bfloat16'},
     "model.dtype='bfloat16' needs a network with an argument dtype"),
    ({'model__name': f'{PARTS}:NnxNet', 'model__sync_batch_norm': True},
     'model.sync_batch_norm=True needs a network with an argument axis_name'),
    ({'model__name': f'{PARTS}:NnxNet', 'model__remat': True},
     'needs a network with an argument remat'),
    ({'model__name': f'{PARTS}:NnxNet(hidden=3)', 'model__kwargs__hidden': 4},
     'hidden is set in model.name='),
])
def test_refusals_of_the_config(fields, shown):
  with pytest.raises(UserError) as caught:
    build.build(config_with(**fields))
  assert shown in str(caught.value), caught.value


def test_parts_of_a_setup():
  setup = build.build(config_with(
      objective=f'{PARTS}:objective(weight=2.0)', label_smoothing=0.25,
      weight_perturbation=f'{PARTS}:perturbation(gamma=0.5)', awp__gamma=0.0,
      attack__name=f'{PARTS}:scaled_attack(scale=2.0)'))
  logits, labels = jnp.array([[1.0, -1.0, 0.5]]), jnp.array([1])
  plain = awp_jax.adversarial(0.25)
  np.testing.assert_allclose(
      setup.objective.train_loss(logits, None, labels),
      2 * plain.train_loss(logits, None, labels))
  assert (setup.perturbation.name, setup.perturbation.ball.size) == (
      'mine', 0.5)
  assert setup.attack.algorithm.keywords == {'scale': 2.0}
  assert setup.eval_attack.algorithm is None


def test_gamma_of_the_config_reaches_a_weight_perturbation():
  text = f'{PARTS}:perturbation'
  for given, size in (({}, 0.25), ({'num_steps': 3}, 0.25)):
    built = build.build(config_with(
        weight_perturbation=text, awp__gamma=0.25, **{
            f'awp__{name}': value for name, value in given.items()}))
    assert built.perturbation.ball.size == size
  with pytest.raises(UserError, match=r'by awp\.gamma=0\.25'):
    build.build(config_with(
        weight_perturbation=f'{text}(gamma=0.5)', awp__gamma=0.25))


def test_defaults_of_an_optimizer_are_its_own():
  """optax.lion has b2 = 0.99, the config 0.999."""
  import optax
  config = config_with(optimizer__name='optax:lion')
  params = {'w': jnp.ones(2)}
  gradients = [{'w': jnp.array([3.0, -1.0])}, {'w': jnp.array([-2.9, 1.1])}]
  found = []
  for tx in (optimizers.build_optimizer(config, 3),
             optax.lion(optimizers.build_schedule(config, 3),
                        weight_decay=config.optimizer.weight_decay)):
    state = tx.init(params)
    for gradient in gradients:
      updates, state = tx.update(gradient, state, params)
    found.append(updates['w'])
  np.testing.assert_allclose(*found, rtol=1e-6)


def test_a_parameter_called_std_alone_is_not_that_of_the_pixels():
  model = networks.build(
      config_with(model__name=f'{PARTS}:scaled_net'), DATA)
  plain = networks.build(config_with(model__name=f'{PARTS}:LinenNet'), DATA)
  images = jax.random.uniform(jax.random.key(1), (6, 4, 4, 1))
  one, two = (net.init(jax.random.key(0), images, train=False)['params']
              for net in (model, plain))
  np.testing.assert_allclose(one['first']['kernel'], two['first']['kernel'])


def test_equinox_has_no_synchronized_statistics():
  with pytest.raises(UserError, match='is not for Equinox'):
    networks.build(config_with(
        model__name=f'{PARTS}:synced_equinox_net',
        model__sync_batch_norm=True), DATA)


def test_an_unbound_axis_is_an_error_without_synchronization():
  with pytest.raises(UserError, match='unbound axis name'):
    networks.build(config_with(model__name=f'{PARTS}:other_axis_net'), DATA)


def test_an_optimizer():
  config = config_with(optimizer__name=f'{PARTS}:optimizer(b1=0.25)')
  optimizers.check(config)
  tx = optimizers.build_optimizer(config, steps_per_epoch=3)
  params = {'w': jnp.ones(2)}
  updates, _ = tx.update({'w': jnp.array([3.0, -1.0])}, tx.init(params), params)
  rate = optimizers.build_schedule(config, 3)(0)
  decay = config.optimizer.weight_decay
  np.testing.assert_allclose(
      updates['w'], [-rate * (1 + decay), -rate * (-1 + decay)], rtol=1e-6)
  config.optimizer.name = f'{PARTS}:wrong'
  with pytest.raises(UserError, match='must have an argument learning_rate'):
    optimizers.check(config)


def test_a_data_set():
  text = f'{PARTS}:blobs(num=20, seed=3)'
  found = datasets.load(text, num_train=12)
  made = named_parts.blobs(20, 3)
  assert found.x_train.shape == (12, 4, 4, 1) and found.num_classes == 2
  np.testing.assert_array_equal(found.x_test, made['x_test'])
  assert (found.name, found.mean, found.std) == (text, (0.25,), (0.5,))
  assert found.source.endswith('named_parts.py')


@pytest.mark.parametrize('change, shown', [
    ({'x_test': None}, 'got the keys x_train, y_train, y_test'),
    ({'labels': 1}, 'got the keys'),
    ({'mean': (0.1, 0.2)}, 'a value for each of 1 channels'),
    ({'std': (0.0,)}, 'std > 0'),
    ({'y_train': np.full(32, 0.5)}, 'whole numbers of an integer type'),
    ({'x_train': np.full((32, 4, 4, 1), 2.0)}, 'must lie in [0, 1]'),
    ({'num_classes': 1}, 'must lie in 0..0'),
])
def test_refused_data(change, shown, monkeypatch):
  made = named_parts.blobs() | change
  made = {key: value for key, value in made.items() if value is not None}
  monkeypatch.setattr(named_parts, 'changed', lambda: made, raising=False)
  with pytest.raises(UserError) as caught:
    datasets.load(f'{PARTS}:changed')
  assert shown in str(caught.value)


def test_an_augmentation_does_not_depend_on_the_rows_of_a_device():
  policy = augmentation.Augmentation(
      0, 'reflect', False, function=f'{PARTS}:darken(least=0.25)')
  images = jnp.full((6, 4, 4, 1), 200, jnp.uint8)
  draws = augmentation.draw(jax.random.key(0), 6, (4, 4, 1), policy)
  whole = augmentation.apply(draws, images, policy)
  half = augmentation.apply(
      jax.tree.map(lambda leaf: leaf[3:], draws), images[3:], policy)
  np.testing.assert_array_equal(whole[3:], half)
  levels = np.unique(whole.reshape(6, -1), axis=1)[:, 0]
  assert len(set(levels.tolist())) == 6
  assert 50 <= levels.min() and levels.max() < 200
  with pytest.raises(UserError, match='keep shape and dtype'):
    augmentation.apply(draws, images, policy._replace(
        function=f'{PARTS}:to_float'))


def test_an_attack_of_evaluations():
  config = config_with(eval__step_size=0.125)
  name = f'{PARTS}:evaluation_attack(num_steps=7)'
  attacks.check_names((name, 'fgsm'))
  (spec,) = attacks.make_specs(name, config)
  assert spec.name == 'mine'
  assert spec.settings['num_steps'] == 7
  assert spec.settings['step_size'] == 0.125
  with pytest.raises(UserError, match=r'must return an awp_jax\.AttackSpec'):
    attacks.make_specs(f'{PARTS}:wrong', config)


DATA = datasets.Dataset(
    'x', np.zeros((4, 4, 4, 1), np.uint8), np.zeros(4, np.int32),
    np.zeros((4, 4, 4, 1), np.uint8), np.zeros(4, np.int32), 3, (0.25,), (0.5,),
    '')
KINDS = ('LinenNet', 'NnxNet', 'equinox_net')


@pytest.mark.parametrize('kind', KINDS)
def test_networks_have_one_interface(kind):
  config = config_with(
      model__name=f'{PARTS}:{kind}', model__kwargs__hidden=5)
  model = networks.build(config, DATA)
  images = jax.random.uniform(jax.random.key(1), (6, 4, 4, 1))
  variables = model.init(jax.random.key(0), images, train=False)
  first, other = ([
      leaf for leaf in jax.tree.leaves(model.init(
          jax.random.key(seed), images, train=False)['params'])
      if leaf.ndim > 1] for seed in (0, 1))
  assert {tuple(sorted(leaf.shape)) for leaf in first} == {(5, 16), (3, 5)}
  assert not np.array_equal(first[0], other[0])
  logits = model.apply(variables, images, train=False)
  assert logits.shape == (6, 3)
  # Normalized by mean and std, which evaluation does not move.
  raw = config_with(
      model__name=f'{PARTS}:{kind}', model__kwargs__hidden=5,
      model__normalize=False)
  np.testing.assert_allclose(logits, networks.build(raw, DATA).apply(
      variables, (images - 0.25) / 0.5, train=False), rtol=1e-6)
  # Dropout depends on the key alone; statistics move towards the batch's.
  passes = [model.apply(
      variables, images, train=True, mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(number)}) for number in (0, 0, 1)]
  np.testing.assert_array_equal(passes[0][0], passes[1][0])
  before, after = (
      np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(stats)])
      for stats in (variables['batch_stats'], passes[0][1]['batch_stats']))
  assert before.shape == after.shape and not np.array_equal(before, after)
  assert jax.tree.structure(passes[0][1]['batch_stats']) == (
      jax.tree.structure(variables['batch_stats']))
  assert model.filter_axis == (0 if kind == 'equinox_net' else -1)


@pytest.mark.parametrize('kind', KINDS)
def test_equal_networks_are_equal(kind):
  """They are static arguments of compiled functions."""
  one, two, other = (networks.build(config_with(
      model__name=f'{PARTS}:{kind}(hidden={hidden})'), DATA)
                     for hidden in (4, 4, 5))
  assert one == two and hash(one) == hash(two) and one != other
  if kind == 'LinenNet':
    narrow = one.clone(dtype=jnp.dtype('bfloat16'))
    assert narrow != one and narrow.clone(dtype=jnp.dtype('float32')) == one
    assert narrow.dtype == 'bfloat16'
    assert one.clone(dtype=jnp.dtype('float32')) is one
  else:
    assert one.clone() is one and not hasattr(one, 'dtype')


@pytest.mark.parametrize('name, shown', [
    (f'{PARTS}:blobs', 'makes a linen module, an nnx module or an Equinox '
     'module (or a pair of that and its state), got dict'),
    (f'{PARTS}:LinenNet(hiden=3)', "no option 'hiden', only num_classes"),
    (f'{PARTS}:LinenNet(num_classes=7)', 'must return logits of shape (2, 3) '
     'for two images of shape (4, 4, 1), got (2, 7)'),
    (f'{PARTS}:LinenNet(hidden="wide")', 'a pass over images of shape'),
    (f'{PARTS}:darken', 'requires image'),
])
def test_refused_networks(name, shown):
  config = config_with(model__name=name)
  with pytest.raises(UserError) as caught:
    networks.build(config, DATA)
  assert shown in str(caught.value), caught.value


def test_our_networks_take_no_kwargs():
  with pytest.raises(UserError, match="not for 'wide_resnet'"):
    networks.build(config_with(model__kwargs__width=3), DATA)


def test_free_fields(tmp_path):
  """They are kept in a run's folder, read back, and compared."""
  from experiments.runs import workdirs
  config = config_with(
      user__size=3, user__deep__names=('a', 'b'), model__kwargs__hidden=4)
  folder = workdirs.open_workdir(tmp_path / 'run', config)
  workdirs.claim(folder, config)
  stored = workdirs.stored_config(folder)
  assert schema.flatten(stored) == schema.flatten(config)
  assert stored.user.deep.names == ('a', 'b')
  assert workdirs.reader_config(folder, config, None) is config
  for other in (config_with(user__size=4), config_with()):
    with pytest.raises(UserError, match=r'user\.size \(3 there'):
      workdirs.open_workdir(folder, other)
    with pytest.raises(UserError, match=r'user\.size'):
      workdirs.reader_config(folder, other, None)


@pytest.mark.parametrize('value', [np.ones(2), object(), (1, [2])])
def test_free_fields_are_plain(value):
  config = digits_awp.get_config()
  config.user.mine = value
  with pytest.raises(UserError, match=r'user\.mine must be a plain value'):
    schema.check(config, base.get_config())
  other = digits_awp.get_config()
  other.mine = ml_collections.ConfigDict({'a': 1})
  with pytest.raises(UserError, match='belong in the group user'):
    schema.check(other, base.get_config())


def test_a_mask_that_does_not_fit_the_network_is_one_line(tmp_path):
  from experiments.runs import run as run_lib
  config = config_with(
      dataset=f'{PARTS}:blobs', model__name=f'{PARTS}:equinox_net',
      batch_size=8, eval__batch_size=8, num_train=0, num_test=0,
      weight_perturbation='awp(gamma=0.1, mask="first/kernel")')
  with pytest.raises(UserError, match=r'does not fit .*first/weight') as caught:
    run_lib.prepare(config, tmp_path / 'run')
  assert not list((tmp_path / 'run').glob('*.json'))
  assert '\n' not in str(caught.value)


def test_an_attack_that_is_none_is_refused_before_the_others(tmp_path):
  from experiments.modes import evaluate
  config = config_with(evaluation__attacks=('pgd-2', f'{PARTS}:coner'))
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match="no such name"):
    evaluate.check(config, tmp_path)


def test_losses_of_another_shape_are_refused():
  """[B, C] instead of [B] would train on a mean over classes."""
  objective = awp_jax.adversarial()._replace(
      name='mine', train_loss=lambda z, _, y: -jax.nn.log_softmax(z))
  import optax
  state = awp_jax.TrainState.create(
      forward_fn=lambda params, stats, x, train, key: (x @ params['w'], stats),
      params={'w': jnp.ones((4, 3))}, tx=optax.sgd(0.1))
  batch = jnp.ones((2, 4)) / 2, jnp.array([0, 1])
  for changed, name in ((objective, 'train_loss'), (objective._replace(
      attack_loss=lambda z, _, y: jnp.sum(z)), 'attack_loss')):
    with pytest.raises(
        ValueError, match=f"{name} of objective 'mine' must return losses"):
      awp_jax.train_step(
          state, batch, jax.random.key(0), objective=changed,
          threat=awp_jax.ThreatModel('Linf', 0.1),
          attack=awp_jax.Attack(0.1, 1))
