"""A whole run in a bucket, against the same run in a local folder."""

import json
import pathlib
import re

import numpy as np
import pytest

from experiments import compare, table
from experiments.modes import evaluate, landscape, train
from experiments.runs import metrics, workdirs
from experiments.runs import run as run_lib
from experiments.util import paths
from experiments.util.errors import UserError
from tests.experiments.modes import evaluated_run, train_test
from tests.experiments.training.resume_test import stop_after
from tests.helpers import fake_buckets

pytestmark = pytest.mark.slow

NAME = 'digits_awp-seed0'


def make_config(folder):
  return train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=2, awp__gamma=0.01, checkpoint_every_steps=1,
      evaluation__attacks=('fgsm', 'pgd-2'), evaluation__batch_size=16,
      evaluation__save_examples=True, landscape__num_directions=1,
      landscape__points=3, landscape__num_steps=1, landscape__num_train=8,
      landscape__num_test=8, landscape__plane_points=0,
      landscape__adversarial_range=0.0)


def whole_run(config, workdir):
  """Trains, stopped once, then evaluates and measures the landscape."""
  with pytest.MonkeyPatch.context() as patch:
    train_test.use_tiny_net(patch)
    with patch.context() as stopped:
      stop_after(stopped, 4)
      assert train.train(run_lib.prepare(config, workdir)) is None
    assert train.train(run_lib.prepare(config, workdir)) is not None
    stored = workdirs.reader_config(paths.parse(workdir), config, None)
    run = run_lib.reopen(stored, workdir)
    evaluate.check(stored, run.workdir)
    evaluate.evaluate(run)
    evaluate.evaluate(run)  # reads the finished groups
    landscape.run_all(stored, workdir, [])
  return run.workdir


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  folder = tmp_path_factory.mktemp('local')
  config = make_config(folder)
  return config, whole_run(config, folder / 'table' / NAME)


@pytest.fixture(scope='module', params=['gs', 's3'])
def remote(request, local, tmp_path_factory):
  with fake_buckets.served() as systems, pytest.MonkeyPatch.context() as patch:
    here = tmp_path_factory.mktemp('here')
    patch.chdir(here)
    workdir = whole_run(local[0], f'{request.param}://bucket/table/{NAME}')
    yield workdir, systems[request.param].objects, here


def names_in(files):
  """Names of files, without random parts and without the lock."""
  return sorted({
      re.sub(r'[0-9a-f]{32}|tfevents.*', '*', name)
      for name in files if name != workdirs.LOCK and not re.search(
          # Orbax's own files, of which a bucket has more.
          r'checkpoints/.*(commit_success|ocdbt|/d/)', name)})


def files_of(folder):
  return [path.relative_to(folder).as_posix()
          for path in folder.rglob('*') if path.is_file()]


def test_the_files_are_the_same(local, remote):
  _, objects, here = remote
  names = [name.removeprefix(f'bucket/table/{NAME}/') for name in objects]
  assert names_in(names) == names_in(files_of(local[1]))
  assert list(here.iterdir()) == []  # no folder called gs:
  assert not any('.tmp' in name for name in names)


def test_the_numbers_are_the_same(local, remote):
  lines = [[
      {name: value for name, value in line.items()
       if name not in metrics.TIMING_FIELDS}
      for line in metrics.read_metrics(workdir)]
      for workdir in (local[1], remote[0])]
  assert len(lines[0]) == 2
  assert lines[0] == lines[1]
  for name in ('evaluation.json', 'landscape.json', 'config.json'):
    one, other = (
        evaluated_run.without_seconds(
            json.loads((workdir / name).read_text()))
        for workdir in (local[1], remote[0]))
    assert one == other
  for path in ('evaluation/best-fgsm.npz', 'figures/probe.npz'):
    with (local[1] / path).open('rb') as a, (remote[0] / path).open('rb') as b:
      one, other = np.load(a), np.load(b)
      for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_pictures_are_the_same(local, remote):
  for name in ('curves.png', 'figures/gallery.png', 'figures/robust_loss.svg',
               'figures/robust_loss.png'):
    one, other = ((workdir / name).read_bytes()
                  for workdir in (local[1], remote[0]))
    assert one == other and len(one) > 1000


def test_a_finished_run_is_compared_and_tabled(
    remote, tmp_path, monkeypatch, capsys):
  workdir, objects, _ = remote
  before = set(objects)
  monkeypatch.chdir(tmp_path)
  compare.main([str(workdir), '--output', str(tmp_path / 'both.png')])
  assert (tmp_path / 'both.html').exists()
  parent = str(workdir.parent)
  assert table.main([f'--workdir={parent}', '--only_table']) == 0
  written = json.loads(objects['bucket/table/table.json'])
  assert written['digits_awp']['runs'][0]['kind'] == 'finished'
  assert 'bucket/table/table.png' in objects
  for name in set(objects) - before:  # pytest-xdist may run others later
    assert name.startswith('bucket/table/table.')
    del objects[name]
  capsys.readouterr()
  config = pathlib.Path(table.__file__).parent / 'configs/digits_awp.py'
  assert table.main([f'--workdir={parent}', f'--configs={config}']) == 2
  assert f'{parent} is in a bucket, which has no locks' in (
      capsys.readouterr().err)


def test_another_config_is_refused_there(local, remote):
  config = local[0].copy_and_resolve_references()
  config.seed = 5
  with pytest.raises(UserError, match=rf"'{remote[0]}' holds a run with"):
    run_lib.prepare(config, str(remote[0]))
