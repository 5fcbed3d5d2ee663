"""Evaluation of a finished run: numbers, records, resuming, refusals."""

import dataclasses
import json
import shutil
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

import awp_jax
from awp_jax.attacks import evaluation as evaluation_lib
from experiments import (
    checkpoints,
    evaluate,
    identity,
    initial,
    judging,
    loop,
    report,
    results,
    runs,
    setup,
    steps,
    subjects,
    train,
    workdirs,
)
from experiments.errors import UserError
from tests import train_test

ATTACKS = ('fgsm', 'pgd-2', 'cw-2', 'apgd-ce')


class HalfNet(nn.Module):
  """A tiny network of a chosen type, whose logits are of that type too."""

  dtype: Any = jnp.bfloat16
  param_dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x, train=False):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    x = nn.Conv(4, (3, 3), use_bias=False, **types)(x - 0.5)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, **types)(x))
    return nn.Dense(4, **types)(x.mean(axis=(1, 2)))


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """A bfloat16 run with a moving average, evaluated on 20 images."""
  folder = tmp_path_factory.mktemp('evaluate')
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=4, eval__every_epochs=4, ema_decay=0.7, threat__epsilon=0.3,
      awp__gamma=0.0,
      model__dtype='bfloat16', model__param_dtype='bfloat16',
      evaluation__attacks=ATTACKS, evaluation__batch_size=16,
      evaluation__save_examples=True)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(
        setup, 'build_model', lambda config, dataset: HalfNet())
    train_test.without_report(monkeypatch)
    train.train(runs.prepare(config, folder / 'run'))
    run = runs.reopen(config, folder / 'run')
  return run, evaluate.evaluate(run)


def logits_of(run, kind):
  subject = next(
      s for s in subjects.load_subjects(run) if s.name == kind)
  return lambda images: np.asarray(subject.logits_fn(images))


def average_of(run):
  """The moving average in the newest checkpoint, read without our code."""
  (path,) = (run.workdir / 'checkpoints/last').iterdir()
  like = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype),
      ocp.metadata(path).metadata, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  tree = ocp.load(path, like)
  return tree['average'], {k: tree[k] for k in ('params', 'batch_stats')}


def to_float32(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def test_bfloat16_run_is_judged_in_float32_by_its_average(evaluated):
  run, values = evaluated
  average, last = average_of(run)
  assert average['params']['Conv_0']['kernel'].dtype == jnp.bfloat16
  images, labels = run.dataset.x_test / np.float32(255), run.dataset.y_test
  exact = HalfNet(jnp.float32, jnp.float32)
  wanted = exact.apply(to_float32(average), images)
  assert wanted.dtype == np.float32
  np.testing.assert_allclose(logits_of(run, 'last')(images), wanted, atol=1e-6)
  # The weights themselves, or bfloat16, would show.
  for other in (exact.apply(to_float32(last), images),
                HalfNet().apply(average, images)):
    assert np.abs(np.asarray(other, np.float32) - wanted).max() > 1e-3
  natural = np.mean(np.argmax(wanted, axis=-1) == labels)
  assert values['subjects']['last']['natural']['accuracy'] == natural


def test_evaluation_in_training_is_in_float32_and_of_the_average(evaluated):
  run, _ = evaluated
  average, last = average_of(run)
  images, labels = run.dataset.x_test / np.float32(255), run.dataset.y_test
  line = results.read_metrics(run.workdir)[-1]

  def loss(model, variables):
    logits = np.asarray(model.apply(variables, images), np.float64)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[
        np.arange(len(labels)), labels])

  exact = HalfNet(jnp.float32, jnp.float32)
  wanted = loss(exact, to_float32(average))
  assert line['test_natural_loss'] == pytest.approx(wanted, rel=1e-6)
  for other in (
      loss(exact, to_float32(last)), loss(HalfNet(), average)):
    assert abs(other / wanted - 1) > 2e-5


class BrokenNet(train_test.TinyNet):
  """Bright images have a gradient of NaN, and finite logits, when judged."""

  @nn.compact
  def __call__(self, x, train=False):
    if not train:
      fine = x.mean(axis=(1, 2, 3), keepdims=True) < 0.6
      x = x + jnp.sqrt(fine + 0 * x) - fine  # sqrt'(0) * 0
    return super().__call__(x, train)


def test_gradients_that_are_not_finite_are_told(
    evaluated, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
      setup, 'build_model', lambda config, dataset: BrokenNet())
  train_test.without_report(monkeypatch)
  run = runs.prepare(train_test.small(
      dataset='npz', npz_path=evaluated[0].config.npz_path, epochs=1,
      threat__epsilon=0.02, awp__gamma=0.0, attack__num_steps=1), tmp_path)
  summary = train.train(run)
  (line,) = results.read_metrics(run.workdir)
  # The brightest of four classes: 5 of 20 test images, and of 16 others as
  # many as `eval.num_train` shows.
  shown = run.dataset.y_train[np.linspace(0, 47, 16).astype(int)]
  share = np.mean(shown == 3)
  assert line['test_nonfinite'] == 0.25 and line['train_nonfinite'] == share
  assert summary['last']['nonfinite'] == 0.25
  assert (
      'warning: logits or gradients are not finite on '
      f'{100 * share:.2f} % of the train images, 25.00 % of the test images. '
      'The attack is weaker there, so robust accuracy is too high.\n'
  ) in capsys.readouterr().out


def test_finite_gradients_are_no_news(evaluated):
  line = results.read_metrics(evaluated[0].workdir)[-1]
  assert line['train_nonfinite'] == line['test_nonfinite'] == 0
  assert loop._doubt(line) == ''


def test_every_evaluation_in_training_has_its_own_noise(evaluated):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.seed, config.eval.batch_size = 3, 8
  run, used = run._replace(config=config), []

  def eval_fn(state, images, labels, valid, key):
    used.append(tuple(map(int, jax.random.key_data(key))))
    return awp_jax.EvalMetrics(*(
        np.ones(()) for _ in awp_jax.EvalMetrics._fields))

  state, wanted = runs.initial_state(run), []
  for step in (2, 7):
    steps.evaluate(run, eval_fn, state.replace(step=step))
    for split, batches in enumerate((2, 3)):  # 16 and 20 images
      for batch in range(batches):
        key = jax.random.split(jax.random.key(3), 5)[4]
        for number in (step, split, batch):
          key = jax.random.fold_in(key, number)
        wanted.append(tuple(map(int, jax.random.key_data(key))))
  assert used == wanted and len(set(used)) == 10


def test_every_result_says_who_judged(evaluated):
  run, values = evaluated
  wanted = {
      'precision': 'float32', 'matmul_precision': 'float32',
      'devices': [device.device_kind for device in jax.devices()]}
  line = results.read_metrics(run.workdir)[-1]
  judges = [line['judged_by']]
  for entry in values['subjects'].values():
    for part in (entry['natural'], *entry['evaluations'].values()):
      assert len(part['judged_by']) == 1
      judges += part['judged_by']
  for judge in judges:
    assert {name: judge[name] for name in wanted} == wanted
    for name, version in (
        ('awp_jax', awp_jax.__version__), ('jax', jax.__version__)):
      assert judge['versions'][name] == version
    assert 'jaxlib' in judge['versions']


def test_precision_holds_in_gradients_and_other_threads():
  model = HalfNet()
  images = np.zeros((2, 8, 8, 1), np.float32)
  variables = judging.variables(model.init(jax.random.key(0), images))
  network = judging.network(model)
  assert network == judging.network(HalfNet())

  def loss(x):
    return judging.logits(network, variables, x).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(images))
  products = text.count('dot_general[') + text.count(
      'conv_general_dilated[')
  assert products == 4  # a convolution, a matrix product, and their gradients
  assert text.count('precision=(Precision.HIGHEST') == products
  assert 'bf16[' not in text


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
  stands = logits_fn(archive['adversarial']).argmax(axis=1) == labels
  assert entry['natural']['accuracy'] == is_right.mean()
  assert reported['robust']['accuracy'] == (is_right & stands).mean()
  assert {'nonfinite_logits', 'nonfinite_gradient', 'outside'} <= (
      reported['attacks'][0]['anomalies'].keys())
  broken = sorted(
      index for a in reported['attacks'] for index in a['broken'])
  np.testing.assert_array_equal(broken, np.flatnonzero(is_right & ~stands))
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

  wanted = np.clip(images + 0.3 * np.sign(jax.grad(loss)(images)), 0, 1)
  (attack,) = reported['attacks']
  broken = attack['broken']
  assert len(broken) > 2
  adversarial = np.load(run.workdir / reported['examples'])['adversarial']
  np.testing.assert_allclose(adversarial[broken], wanted[broken], atol=1e-6)


@dataclasses.dataclass(frozen=True)
class FromTheImage(awp_jax.ThreatModel):
  """A ball whose random starts are the image itself."""

  def random_start(self, key, x):
    del key
    return x


#: Logits x @ LINEAR. From class 0, coordinate 0 leads towards class 1 upwards
#: and towards class 2 downwards, and class 2 is nearly as likely as class 1.
LINEAR = np.array([[0.0, 1.0, -3.0], [0.0, 0.7, 1.2], [0.0, 0.6, 0.9]])
SHIFT = np.array([0.30, 0.0, -0.05]) - 0.5 * LINEAR.sum(axis=0)


def ascent(name, step_size, epsilon):
  """PGD and CW on the linear network, from the image, by their formulas."""
  kind, steps = name.split('-')
  natural = x = np.full(3, 0.5)
  for _ in range(int(steps)):
    logits = x @ LINEAR + SHIFT
    if kind == 'cw':  # z_1 - z_0 or z_2 - z_0, whichever is larger
      gradient = LINEAR[:, 1 + np.argmax(logits[1:])] - LINEAR[:, 0]
    else:
      weights = np.exp(logits) / np.exp(logits).sum() - [1, 0, 0]
      gradient = LINEAR @ weights
    x = np.clip(
        x + step_size * np.sign(gradient), natural - epsilon,
        natural + epsilon)
  return x


@pytest.mark.parametrize('name', ['pgd-6', 'pgd-7', 'cw-6', 'cw-7'])
def test_pgd_and_cw_take_n_steps_on_their_losses(name):
  config = train_test.small(eval__step_size=0.05, eval__num_steps=1)
  result = evaluation_lib.evaluate(
      jax.random.key(0), lambda x: x @ LINEAR + SHIFT,
      np.full((2, 3), 0.5, np.float32), np.zeros(2, int),
      FromTheImage('Linf', 0.45), evaluate.make_specs(name, config),
      options=evaluation_lib.EvalOptions(batch_size=2, check_model=False))
  assert not result.robust.any()
  wanted = {
      other: ascent(other, 0.05, 0.45)
      for other in ('pgd-6', 'pgd-7', 'cw-6', 'cw-7')}
  for other, x in wanted.items():
    far = np.abs(result.adversarial - x).max()
    assert far < 1e-6 if other == name else far > 0.04, other


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
  lost = sorted(run.workdir.glob('evaluation/apgd-ce-*/*.npz'))[-1]
  lost.unlink()
  assert without_seconds(evaluate.evaluate(run)) == without_seconds(values)
  assert lost.exists()


def test_equal_checkpoints_are_attacked_once(evaluated):
  run, values = evaluated  # evaluated once: the best is the last
  best, last = values['subjects'].values()
  assert last['same_weights_as'] == 'best'
  assert last['evaluations'] == best['evaluations']
  assert last['natural'] == best['natural']
  assert [entry['origin']['checkpoint'] for entry in (best, last)] == [
      'best', 'last']
  # One group of records for each attack, none for the same weights again.
  folders = [p for p in (run.workdir / 'evaluation').iterdir() if p.is_dir()]
  assert sorted(p.name.rpartition('-')[0] for p in folders) == sorted(ATTACKS)


def test_each_checkpoint_is_judged_by_its_own_weights(evaluated, tmp_path):
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
  logits, judged = {
      s.name: jax.jit(s.logits_fn) for s in subjects.load_subjects(run)}, []
  for kind, step in (('best', 3), ('last', 7)):
    store = checkpoints.Checkpoints(tmp_path, kind)
    variables, _ = store.load(init(jax.random.key(0), images[:1]))
    store.close()
    wanted = np.asarray(jax.jit(exact.apply)(variables, images))
    np.testing.assert_allclose(logits[kind](images), wanted, atol=1e-5)
    entry = values[kind]
    assert entry['origin'] == {'checkpoint': kind, 'step': step}
    assert entry['weights'] == identity.of_arrays(variables)
    assert 'same_weights_as' not in entry
    natural = np.mean(wanted.argmax(axis=1) == labels)
    assert entry['natural']['accuracy'] == natural
    judged.append((wanted, natural))
  (first, one), (second, other) = judged
  assert np.abs(first - second).max() > 0.1 and one != other


def test_earlier_evaluations_of_the_same_model_are_kept(evaluated, tmp_path):
  run, values = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.attacks = ('cw-2',)
  folder = shutil.copytree(run.workdir, tmp_path / 'run')
  run = run._replace(config=config, workdir=folder)
  path = folder / 'evaluation.json'
  before = json.loads(json.dumps(values))
  for entry in before['subjects'].values():
    del entry['evaluations']['cw-2']
    entry['evaluations']['fgsm']['seconds'] = 1234.0  # as it was
  results.write_json(path, before)
  found = evaluate.evaluate(run)
  assert json.loads(path.read_text()) == json.loads(json.dumps(found))
  for kind in ('best', 'last'):
    kept = found['subjects'][kind]['evaluations']
    assert kept.keys() == set(ATTACKS)
    assert kept['fgsm']['seconds'] == 1234.0
    assert without_seconds(kept) == without_seconds(
        values['subjects'][kind]['evaluations'])
  # The data may have moved.
  elsewhere = {'dataset': {**before['dataset'], 'source': 'elsewhere'}}
  results.write_json(path, before | elsewhere)
  kept = evaluate.evaluate(run)['subjects']['best']['evaluations']
  assert kept.keys() == set(ATTACKS)
  # Not those of other weights, of another threat model, of fewer images.
  for change in (
      {'threat': {**before['threat'], 'epsilon': 0.1}}, {'num_examples': 8},
      {'subjects': {kind: {**entry, 'weights': 'others'}
                    for kind, entry in before['subjects'].items()}}):
    results.write_json(path, before | change)
    for entry in evaluate.evaluate(run)['subjects'].values():
      assert list(entry['evaluations']) == ['cw-2']


def test_more_images_than_there_are_is_an_error(evaluated, tmp_path):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.num_examples = 21
  with pytest.raises(UserError, match=(
      r'evaluation\.num_examples=21: there are 20 test images; 0 takes all')):
    evaluate.evaluate(run._replace(config=config, workdir=tmp_path))
  assert not list(tmp_path.iterdir())


def test_moved_data_and_run_change_nothing(evaluated, tmp_path, monkeypatch):
  run, values = evaluated
  monkeypatch.setattr(setup, 'build_model', lambda config, dataset: HalfNet())
  moved = shutil.copytree(run.workdir, tmp_path / 'moved')
  path = shutil.copy(run.config.npz_path, tmp_path / 'elsewhere.npz')
  config = workdirs.reader_config(
      moved, run.config, {'npz_path': str(path)})
  assert config.npz_path == str(path) and config.ema_decay == 0.7
  again = runs.reopen(config, moved)
  monkeypatch.setattr(
      evaluation_lib, '_attack_group',
      lambda *a: pytest.fail('an image was attacked again'))
  found = without_seconds(evaluate.evaluate(again))
  assert found['subjects'] == without_seconds(values)['subjects']
  monkeypatch.undo()
  # Other images are another evaluation; other weights too.
  facts = evaluate._facts(
      run, next(subjects.load_subjects(run)), 'fgsm', evaluate._test_set(run))
  darker = run._replace(dataset=run.dataset._replace(
      x_test=run.dataset.x_test // 2))
  assert facts != evaluate._facts(
      darker, next(subjects.load_subjects(run)), 'fgsm',
      evaluate._test_set(darker))


def test_reading_a_run_that_trains_changes_nothing_of_it(
    evaluated, tmp_path, monkeypatch):
  run, values = evaluated
  monkeypatch.setattr(setup, 'build_model', lambda config, dataset: HalfNet())
  folder = shutil.copytree(run.workdir, tmp_path / 'run')
  # A save under way, and an older checkpoint that is being removed.
  for part in ('last/99.orbax-checkpoint-tmp/state', 'best/1/state'):
    (folder / 'checkpoints' / part).mkdir(parents=True)
    (folder / 'checkpoints' / part / 'd').write_bytes(b'half')
  before = {
      path: path.stat().st_mtime_ns
      for part in ('checkpoints', 'tensorboard')
      for path in (folder / part).rglob('*')} | {
          path: path.stat().st_mtime_ns for path in (
              folder / 'config.json', folder / 'metrics.jsonl')}
  with workdirs.locked(folder):  # as its trainer holds it
    config = workdirs.reader_config(folder, run.config, {})
    reading = runs.reopen(config, folder)
    found = evaluate.evaluate(reading)
    report.write(reading)
    initial.read(str(folder))
    with pytest.raises(workdirs.WorkdirBusy):
      train.train(reading)
  assert (folder / 'report.html').exists()
  assert without_seconds(found['subjects']) == without_seconds(
      values['subjects'])
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_images_of_another_data_set_are_refused(
    evaluated, tmp_path, monkeypatch):
  run, _ = evaluated
  monkeypatch.setattr(setup, 'build_model', lambda config, dataset: HalfNet())
  config = run.config.copy_and_resolve_references()
  config.npz_path = train_test.write_images(tmp_path / 'other.npz', seed=1)
  with pytest.raises(ValueError, match='are not those of the run in'):
    runs.reopen(config, run.workdir)


def test_logits_that_are_not_finite_count_as_wrong():
  subject = subjects.Subject(
      'nan', {}, {}, lambda x: jnp.where(
          x[:, :1] > 0.5, jnp.array([1.0, 0.0]), jnp.array([jnp.nan, 0.0])))
  images = np.array([[0.2], [0.8], [0.1]], np.float32)
  # NumPy's and JAX's argmax of [nan, 0] is 0, the label.
  assert evaluate._count_correct(subject, images, np.zeros(3, int)) == 1


def test_other_versions_and_batch_sizes_start_anew(evaluated, monkeypatch):
  run, values = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.attacks = ('fgsm',)
  other = config.copy_and_resolve_references()
  other.evaluation.batch_size = 8
  for version, settings in (('0.0', config), (jax.__version__, other)):
    with monkeypatch.context() as patch:
      patch.setattr(jax, '__version__', version)
      found = evaluate.evaluate(run._replace(config=settings))
    assert without_seconds(found['subjects']['last']['evaluations'])[
        'fgsm']['robust'] == values['subjects']['last']['evaluations'][
            'fgsm']['robust']
  evaluate.evaluate(run)


def test_other_settings_have_their_own_records(evaluated):
  run, _ = evaluated
  config = run.config.copy_and_resolve_references()
  config.evaluation.num_examples = 8
  config.evaluation.attacks = ('fgsm',)
  values = evaluate.evaluate(run._replace(config=config))
  assert values['num_examples'] == 8


def test_a_pytorch_checkpoint(evaluated, tmp_path):
  from awp_jax.models import WideResNet, torch_exchange
  from awp_jax.models.torch_files import write_state_dict

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
  results.write_json(run.workdir / 'evaluation.json', before)
  subjects = evaluate.evaluate(run._replace(config=config))['subjects']
  entry = subjects.pop('torch-net')
  assert subjects == before['subjects']  # those of the checkpoints stay
  # The file holds no normalisation, so that of the data is taken.
  model = WideResNet(
      4, depth=10, width=1, mean=tuple(run.dataset.mean),
      std=tuple(run.dataset.std))
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


def test_randomised_evaluation_of_a_deterministic_network():
  with pytest.raises(
      ValueError, match=r"'aa-rand' is for randomised models.*'aa-standard'"):
    evaluate.check_names(('fgsm', 'aa-rand'))
  assert 'aa-rand' not in evaluate.allowed_names()


@pytest.mark.parametrize('name,attacks', [
    ('aa-standard', ['apgd-ce', 'apgd-t', 'fab-t', 'square']),
    ('aa-plus', ['apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t']),
    ('aa-fast', ['apgd-ce', 'apgd-t']), ('square', ['square']),
    ('spsa', ['spsa']), ('fgsm', ['fgsm']), ('cw-7', ['cw-7'])])
def test_every_name_makes_its_attacks(name, attacks):
  specs = evaluate.make_specs(name, train_test.small())
  assert [spec.name for spec in specs] == attacks
