"""Records of evaluations: what is resumed, kept, and started over."""

import json
import shutil

import jax
import pytest

from awp_jax.evaluation import evaluate as evaluate_lib
from experiments.config import networks
from experiments.evaluation import attacks
from experiments.modes import evaluate, train
from experiments.reports import page
from experiments.runs import restore, warm_start, workdirs
from experiments.runs import run as run_lib
from experiments.util import atomic
from experiments.util.errors import UserError
from tests.experiments.modes.evaluated_run import (
    ATTACKS,
    HalfNet,
    without_seconds,
)


def test_resumes_after_the_finished_groups(evaluated, monkeypatch):
  run, values = evaluated
  monkeypatch.setattr(
      evaluate_lib, '_attack_group',
      lambda *a: pytest.fail('a finished group was attacked again'))
  again = evaluate.evaluate(run)
  assert without_seconds(again) == without_seconds(values)
  monkeypatch.undo()
  # A killed process has not written the last record.
  lost = sorted(run.workdir.glob('evaluation/apgd-ce-*/*.npz'))[-1]
  lost.unlink()
  assert without_seconds(evaluate.evaluate(run)) == without_seconds(values)
  assert lost.exists()


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
    entry['evaluations']['fgsm']['seconds'] = 1234.0  # not measured again
  atomic.write_json(path, before)
  found = evaluate.evaluate(run)
  assert json.loads(path.read_text()) == json.loads(json.dumps(found))
  for kind in ('best', 'last'):
    kept = found['subjects'][kind]['evaluations']
    assert kept.keys() == set(ATTACKS)
    assert kept['fgsm']['seconds'] == 1234.0
    assert without_seconds(kept) == without_seconds(
        values['subjects'][kind]['evaluations'])
  # The images may move.
  elsewhere = {'dataset': {**before['dataset'], 'source': 'elsewhere'}}
  atomic.write_json(path, before | elsewhere)
  kept = evaluate.evaluate(run)['subjects']['best']['evaluations']
  assert kept.keys() == set(ATTACKS)
  # Other weights, threat models or numbers of images are not kept.
  for change in (
      {'threat': {**before['threat'], 'epsilon': 0.1}}, {'num_examples': 8},
      {'subjects': {kind: {**entry, 'weights': 'others'}
                    for kind, entry in before['subjects'].items()}}):
    atomic.write_json(path, before | change)
    for entry in evaluate.evaluate(run)['subjects'].values():
      assert list(entry['evaluations']) == ['cw-2']


def test_moved_data_and_run_change_nothing(evaluated, tmp_path, monkeypatch):
  run, values = evaluated
  monkeypatch.setattr(networks, 'build', lambda config, dataset: HalfNet())
  moved = shutil.copytree(run.workdir, tmp_path / 'moved')
  path = shutil.copy(run.config.npz_path, tmp_path / 'elsewhere.npz')
  config = workdirs.reader_config(
      moved, run.config, {'npz_path': str(path)})
  assert config.npz_path == str(path) and config.ema_decay == 0.7
  again = run_lib.reopen(config, moved)
  monkeypatch.setattr(
      evaluate_lib, '_attack_group',
      lambda *a: pytest.fail('an image was attacked again'))
  found = without_seconds(evaluate.evaluate(again))
  assert found['subjects'] == without_seconds(values)['subjects']
  monkeypatch.undo()
  # Other images are another evaluation.
  facts = attacks._facts(
      run, next(restore.restore_models(run)), 'fgsm',
      attacks.load_test_set(run))
  darker = run._replace(dataset=run.dataset._replace(
      x_test=run.dataset.x_test // 2))
  assert facts != attacks._facts(
      darker, next(restore.restore_models(run)), 'fgsm',
      attacks.load_test_set(darker))


def test_reading_a_run_that_trains_changes_nothing_of_it(
    evaluated, tmp_path, monkeypatch):
  run, values = evaluated
  monkeypatch.setattr(networks, 'build', lambda config, dataset: HalfNet())
  folder = shutil.copytree(run.workdir, tmp_path / 'run')
  # An unfinished save, and a checkpoint that is being removed.
  for part in ('last/99.orbax-checkpoint-tmp/state', 'best/1/state'):
    (folder / 'checkpoints' / part).mkdir(parents=True)
    (folder / 'checkpoints' / part / 'd').write_bytes(b'half')
  before = {
      path: path.stat().st_mtime_ns
      for part in ('checkpoints', 'tensorboard')
      for path in (folder / part).rglob('*')} | {
          path: path.stat().st_mtime_ns for path in (
              folder / 'config.json', folder / 'metrics.jsonl')}
  with workdirs.locked(folder):  # as held by its training process
    config = workdirs.reader_config(folder, run.config, {})
    reading = run_lib.reopen(config, folder)
    found = evaluate.evaluate(reading)
    page.write(reading)
    warm_start.read(str(folder))
    with pytest.raises(workdirs.WorkdirBusy):
      train.train(reading)
  assert (folder / 'report.html').exists()
  assert without_seconds(found['subjects']) == without_seconds(
      values['subjects'])
  assert before == {path: path.stat().st_mtime_ns for path in before}


def test_records_of_another_evaluation_are_one_error(evaluated, tmp_path):
  """Two of its attacks have exchanged their records."""
  run, _ = evaluated
  folder = shutil.copytree(run.workdir, tmp_path / 'run')
  first, second = sorted(
      path for path in (folder / 'evaluation').iterdir() if path.is_dir())[:2]
  for place, name in ((first, 'x'), (second, first.name), (first.with_name(
      'x'), second.name)):
    place.rename(place.with_name(name))
  with pytest.raises(UserError, match='of another evaluation: remove them'):
    evaluate.evaluate(run._replace(workdir=folder))


def test_other_versions_and_batch_sizes_start_over(evaluated, monkeypatch):
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
