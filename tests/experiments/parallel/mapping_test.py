"""Mapped functions: pmap and shard_map give the same numbers."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parallel import mapping, placement

KEY = jax.random.key(5)


def step(total, images, device, key):
  """Uses rows, a replicated argument, the device number and its index."""
  noise = jax.random.normal(
      jax.random.fold_in(key, jax.lax.axis_index(mapping.AXIS)), images.shape)
  own = placement.own_rows(total, device)
  mean = jax.lax.pmean(
      jnp.sum(images * noise) + jnp.sum(own), mapping.AXIS)
  return total + mean, {'rows': jax.lax.psum(len(images), mapping.AXIS)}


def inputs():
  return (
      placement.replicate(np.arange(16.0, dtype=np.float32)),
      np.arange(48.0, dtype=np.float32).reshape(16, 3))


def expected(total, images):
  """The formula of `step`, device by device, in NumPy."""
  count = jax.device_count()
  size = len(images) // count
  values = []
  for device in range(count):
    part = slice(device * size, (device + 1) * size)
    noise = np.asarray(jax.random.normal(
        jax.random.fold_in(KEY, device), images[part].shape))
    values.append(np.sum(images[part] * noise) + np.sum(total[part]))
  return total + np.mean(values)


@pytest.fixture(params=['pmap', 'shard_map'])
def form(request, monkeypatch):
  if request.param == 'shard_map':
    monkeypatch.setattr(jax, 'process_count', lambda *_: 2)
  return request.param


def test_both_forms_are_the_formula(form):
  total, images = inputs()
  mapped = mapping.over_devices(step, rows=(1, 2))
  found, counts = mapped(
      total, placement.split(images), placement.device_numbers(),
      placement.replicate(KEY))
  np.testing.assert_allclose(
      found, expected(np.asarray(total), images), rtol=1e-5)
  assert counts['rows'] == 16 and found.is_fully_replicated


def test_a_compiled_step_takes_its_own_donated_result(form):
  total, images = inputs()
  arguments = (
      placement.split(images), placement.device_numbers(),
      placement.replicate(KEY))
  mapped = mapping.over_devices(step, rows=(1, 2), donate=(0,))
  program = mapped.lower(total, *arguments).compile()
  first = np.asarray(total)
  total, _ = program(total, *arguments)
  total, _ = program(total, *arguments)
  np.testing.assert_allclose(
      total, expected(expected(first, images), images), rtol=1e-5)


def test_replicated_arrays_are_whole_on_every_device(form):
  tree = placement.replicate({'a': np.arange(3), 'key': KEY})
  assert tree['a'].is_fully_replicated
  assert len(tree['a'].sharding.device_set) == jax.device_count()
  np.testing.assert_array_equal(tree['a'], np.arange(3))
  assert jax.random.key_impl(tree['key']) == jax.random.key_impl(KEY)
  np.testing.assert_array_equal(
      jax.random.key_data(tree['key']), jax.random.key_data(KEY))


def test_rows_of_own_devices_are_split_like_all(form):
  images = np.arange(48.0, dtype=np.float32).reshape(16, 3)
  rows = placement.local_rows(16)
  np.testing.assert_array_equal(rows, np.arange(16))
  for array in (images, images[:, 0].astype(np.int32)):
    wanted = placement.split(array)
    found = placement.split_local((array[rows],), 16)[0]
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)
    if form == 'shard_map':
      assert found.sharding == wanted.sharding


def test_rows_of_devices_in_turn(monkeypatch):
  """Devices 0, 2, 4 and 6 of eight belong to process 0."""
  devices = [
      types.SimpleNamespace(process_index=number % 2) for number in range(8)]
  monkeypatch.setattr(jax, 'devices', lambda *_: devices)
  np.testing.assert_array_equal(
      placement.local_rows(16), [0, 1, 4, 5, 8, 9, 12, 13])


def test_devices_that_do_not_run_can_be_compiled_for():
  devices = jax.devices()[::-1][:2]
  mapped = mapping.over_devices(step, rows=(1, 2), devices=devices)
  text = mapped.lower(
      jax.ShapeDtypeStruct((16,), np.float32),
      jax.ShapeDtypeStruct((16, 3), np.float32),
      jax.ShapeDtypeStruct((2,), np.int32), KEY).as_text()
  assert 'mhlo.num_partitions = 2' in text


@pytest.mark.parametrize('rank', [1, 2])
def test_convolutions_take_the_fast_form(form, rank):
  """Of replicated kernels too, whose gradients get a sharding."""
  letters = 'HW'[:rank]
  numbers = f'N{letters}C', f'{letters}IO', f'N{letters}C'

  def slope(kernel, images, device):
    def total(kernel, images):
      return jnp.sum(jax.lax.conv_general_dilated(
          images, kernel, (2,) * rank, 'SAME', dimension_numbers=numbers) ** 2)

    del device
    return jax.lax.psum(jax.tree.map(jnp.sum, jax.grad(
        total, (0, 1))(kernel, images)), mapping.AXIS)

  kernel = placement.replicate(np.ones((3,) * rank + (2, 4), np.float32))
  images = placement.split(np.ones((16, *(8,) * rank, 2), np.float32))
  arguments = kernel, images, placement.device_numbers()
  text = mapping.over_devices(slope, rows=(1, 2)).lower(*arguments).as_text()
  assert 'stablehlo.convolution' in text
  dilations = re.findall(r'lhs_dilate = \[([\d, ]*)\]', text)
  assert not [d for d in dilations if set(d.split(', ')) != {'1'}]
