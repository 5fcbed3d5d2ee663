"""Tests of streamed images: the batches and the runs of resident images."""

import itertools
import pathlib
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import batches
from experiments.modes import train
from experiments.parallel import mapping, placement
from experiments.reports import curves
from experiments.runs import run as run_lib
from experiments.training import compiled, streaming, training_data
from experiments.training import step as step_lib
from tests.experiments.modes import train_test
from tests.experiments.training.resume_test import assert_same, stop_after

RESIDENT, STREAMED = {'data_on_device_gib': 1.0}, {'data_on_device_gib': 0.0}


@pytest.fixture(scope='module', autouse=True)
def one_network():
  with pytest.MonkeyPatch.context() as patch:
    train_test.use_tiny_net(patch)
    train_test.without_report(patch)
    patch.setattr(curves, 'plot_curves', lambda *_: None)
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Training images, and extra images in both types."""
  path = tmp_path_factory.mktemp('streaming')
  train_test.write_images(path / 'mine.npz', num_train=40)
  levels = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 1), np.uint8)
  floats = levels / np.float32(255)
  for name, images in (('levels', levels), ('floats', floats)):
    (path / name).mkdir()
    np.save(path / name / 'images.npy', images)
    np.save(path / name / 'labels.npy', np.arange(30) % 4)
  return path


def prepared(folder, workdir, extra=None, **fields):
  """A run of two epochs; without extra images, of batches of 16, 16 and 8."""
  if extra:
    fields |= {'extra__path': str(folder / extra), 'extra__fraction': 0.3}
  return run_lib.prepare(train_test.small(
      dataset='npz', npz_path=str(folder / 'mine.npz'), epochs=2,
      attack__num_steps=1, eval__num_steps=1, awp__gamma=0.0, **fields),
      workdir)


@pytest.fixture(scope='module')
def resident(folder, tmp_path_factory):
  """An uninterrupted run with the images on the devices."""
  run = prepared(folder, tmp_path_factory.mktemp('resident'), **RESIDENT)
  train.train(run)
  return run


def test_a_streamed_run_is_the_resident_one_also_if_resumed(
    folder, resident, tmp_path):
  run = prepared(folder, tmp_path, **STREAMED)
  assert run.batch_sizes == [16, 16, 8]
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, 4)
    assert train.train(run) is None
  run = prepared(folder, tmp_path, **RESIDENT)
  train.train(run)
  assert_same(run, resident)


def gathered(run, size, is_split):
  """The mapped batch, all rows on every device."""

  def batch(source, order, keys, step, device):
    found = training_data.device_batch(
        run, source, order, keys, step, size, device)
    assert len(found[0]) == size // 8
    return jax.tree.map(lambda x: jax.lax.all_gather(
        x, mapping.AXIS, tiled=True), found)

  return mapping.over_devices(batch, rows=(0, 4) if is_split else (4,))


@pytest.mark.parametrize('extra, fields', [
    ('floats', {'augmentation__rotation': 20.0, 'augmentation__cutout': 3}),
    ('floats', {'augmentation__mixup': 0.5})])
def test_devices_have_the_rows_of_the_global_batch(
    extra, fields, folder, tmp_path):
  fields = fields | {
      'augmentation__pad': 2, 'augmentation__flip': True, 'batch_size': 16}
  runs = {
      name: prepared(folder, tmp_path / name, extra, **fields, **kind)
      for name, kind in (('resident', RESIDENT), ('streamed', STREAMED))}
  run = runs['resident']
  keys = placement.replicate(run_lib.keys(run.config))
  make_order = training_data.make_order_fn(run, placement.replicated())
  data = placement.replicate(training_data.of_run(run))
  stream = streaming.Stream(runs['streamed'])
  needs_all = training_data.needs_all_rows(run)
  fns = gathered(run, 16, False), gathered(run, 16, not needs_all)
  whole = jax.jit(
      lambda order, step: training_data.global_batch(
          run, jax.tree.map(jax.numpy.asarray, training_data.of_run(run)),
          order, run_lib.keys(run.config), step, 16))
  seen = []
  for step in (0, 1, 3, 4):  # the third step of an epoch is smaller
    order = make_order(
        keys['order'], training_data.order_number(run, step))
    number = placement.replicate(np.int32(step))
    wanted = whole(order, step)
    for fn, source in zip(fns, (data, stream.rows(step)), strict=True):
      found = fn(source, order, keys, number, placement.device_numbers())
      jax.tree.map(np.testing.assert_array_equal, found, wanted)
    seen.append(np.asarray(wanted[0]))
  stream.close()
  assert not any((a == b).all() for a, b in itertools.pairwise(seen))


def expected(run, step):
  """The images of a step in NumPy, but for the random numbers."""
  key = run_lib.keys(run.config)['order']
  own, extra = run.dataset.x_train, run.extra
  if extra is None:
    epoch, position = divmod(step, 3)
    order = np.asarray(batches.permutation(key, epoch, 40))
    return own[order[16 * position:16 * position + 16]]
  # Five of 16 are extra; eleven of 40 a step, so a pass takes four steps.
  order = np.asarray(batches.permutation(key, step // 4, 40))
  taken = order[(step % 4 * 11 + np.arange(11)) % 40]
  drawn = np.asarray(jax.random.randint(jax.random.fold_in(
      jax.random.fold_in(key, step), 1), (5,), 0, 30))
  is_extra = batches.extra_rows(16, 0.3)
  rows = np.zeros((16, 8, 8, 1), extra.images.dtype)
  rows[is_extra], rows[~is_extra] = extra.images[drawn], own[taken]
  return rows


def test_levels_and_floats_are_the_same_pixels(folder, tmp_path):
  for name in ('levels', 'floats'):
    run = prepared(folder, tmp_path / name, name, **RESIDENT)
    keys = run_lib.keys(run.config)
    images, _ = training_data.global_batch(
        run, jax.tree.map(jnp.asarray, training_data.of_run(run)),
        training_data.make_order_fn(run)(keys['order'], 0), keys, 1, 16)
    wanted = expected(run, 1).astype(np.float64)
    wanted[wanted.max(axis=(1, 2, 3)) > 1] /= 255
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, wanted, rtol=1e-6)


@pytest.mark.parametrize('extra', [None, 'levels', 'floats'])
def test_rows_of_any_step_in_any_order(extra, folder, tmp_path):
  run = prepared(folder, tmp_path, extra, **STREAMED)
  stream = streaming.Stream(run)
  # On, the same again, back, far on, and on to the end.
  for step in (1, 2, 2, 0, 1, 4, 5):
    images = stream.rows(step).images
    wanted = expected(run, step)
    assert images.dtype == wanted.dtype and images.shape[0] == 8
    np.testing.assert_array_equal(images.reshape(wanted.shape), wanted)
  stream.close()


def test_a_process_gathers_the_rows_of_its_devices(folder, tmp_path):
  run = prepared(folder, tmp_path, **STREAMED)
  mine = np.array([4, 5, 12, 13])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(placement, 'local_rows', lambda size: mine)
    patch.setattr(placement, 'split_local', lambda rows, size: (rows, size))
    stream = streaming.Stream(run)
    rows, size = stream.rows(1)
    stream.close()
  assert size == 16
  np.testing.assert_array_equal(
      rows.images.reshape(-1, 8, 8, 1), expected(run, 1)[mine])


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_mapped_files_are_not_read_ahead(folder, tmp_path):
  def flags():
    text = pathlib.Path('/proc/self/smaps').read_text()
    _, _, mapping = text.partition(str(tmp_path / 'images.npy'))
    return mapping.partition('VmFlags:')[2].partition('\n')[0].split()

  for file in (folder / 'levels').iterdir():
    shutil.copy(file, tmp_path)  # other tests may still map the original
  run = prepared(folder, tmp_path / 'run', tmp_path, **STREAMED)
  assert 'mr' in flags() and 'rr' not in flags()
  streaming.Stream(run)
  assert 'rr' in flags()


def test_threads_end_with_the_stream(folder, tmp_path):
  before = set(threading.enumerate())
  steps = compiled.CompiledSteps(prepared(folder, tmp_path, **STREAMED))
  steps.arguments(None, step_lib.zero_sums(), 0)
  started = set(threading.enumerate()) - before
  assert started
  steps.close()
  for thread in started:
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_few_steps_are_in_flight(folder, tmp_path, monkeypatch):
  waited = []
  monkeypatch.setattr(
      jax, 'block_until_ready', lambda value: waited.append(float(value)))
  stream = streaming.Stream(prepared(folder, tmp_path, **STREAMED))
  for step in range(5):
    stream.wait(step_lib.Sums(*(np.full((), step, np.float32),) * 5))
  assert waited == [0, 1, 2]


@pytest.mark.parametrize('extra, images', [(None, 40), ('levels', 70)])
def test_images_up_to_the_limit_are_resident(extra, images, folder, tmp_path):
  size = images * 8 * 8 / 2**30
  for limit, streams in ((size, False), (0.99 * size, True)):
    run = prepared(
        folder, tmp_path / str(limit), extra, data_on_device_gib=limit)
    assert training_data.is_streamed(run) == streams
