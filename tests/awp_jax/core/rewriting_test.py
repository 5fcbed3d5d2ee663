"""Rewritten convolutions: equal results, other programs, any surroundings."""

import functools
import itertools
import re

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.core import convolution, equations, loops, rewriting
from awp_jax.core import convolution_forms as forms
from awp_jax.models import PreActResNet

NHWC = ('NHWC', 'HWIO', 'NHWC')


def ones_and_zeros(seed, shape, dtype=np.float32):
  """-1, 0 and 1: sums of a few hundred products are exact in any order."""
  draw = np.random.default_rng(seed).integers(-1, 2, shape)
  return jnp.asarray(draw, dtype)


def conv(x, kernel, stride=1, padding=1, numbers=NHWC):
  pads = padding if isinstance(padding, str) else [
      pair if isinstance(pair, tuple) else (pair, pair)
      for pair in (padding if isinstance(padding, list) else [padding] * (
          x.ndim - 2))]
  strides = (stride,) * (x.ndim - 2) if isinstance(stride, int) else stride
  return lax.conv_general_dilated(
      x, kernel, strides, pads, dimension_numbers=numbers)


def gradients(fn, x, kernel, cotangent):
  return jax.vjp(fn, x, kernel)[1](cotangent)


def dilated(fn, *args, platform='cpu'):
  """Number of convolutions of inputs with inserted zeros, in the program."""
  text = jax.jit(fn).trace(*args).lower(
      lowering_platforms=(platform,)).as_text()
  return len(re.findall(r'lhs_dilate = \[(?!1(?:, 1)*\])', text))


CASES = [
    (shape, taps, stride, padding)
    for shape, taps, stride, padding in itertools.product(
        [(5, 6), (8, 8)], [(1, 1), (2, 3), (3, 3)], [(1, 1), (2, 2), (3, 2)],
        [[(0, 0), (0, 0)], [(1, 1), (1, 1)], [(0, 2), (2, 1)]])]


def test_gradients_are_equal_for_any_stride_padding_and_size():
  def all_gradients(arguments):
    return [
        gradients(functools.partial(conv, stride=stride, padding=padding), *a)
        for (_, _, stride, padding), a in zip(CASES, arguments, strict=True)]

  arguments = []
  for shape, taps, stride, padding in CASES:
    x = ones_and_zeros(0, (2, *shape, 3))
    kernel = ones_and_zeros(1, (*taps, 3, 4))
    out = jax.eval_shape(
        functools.partial(conv, stride=stride, padding=padding), x, kernel)
    arguments.append((x, kernel, ones_and_zeros(2, out.shape)))
  assert dilated(all_gradients, arguments) > 20
  assert not dilated(awp_jax.cpu_convolutions(all_gradients), arguments)
  want = jax.jit(all_gradients)(arguments)
  got = jax.jit(awp_jax.cpu_convolutions(all_gradients))(arguments)
  for case, a, b in zip(CASES, want, got, strict=True):
    for name, plain, new in zip(('x', 'kernel'), a, b, strict=True):
      np.testing.assert_array_equal(plain, new, err_msg=f'{case}, {name}')
      assert np.any(plain), case


SMALL = [
    (shape, taps, stride, padding, dilation, numbers)
    for shape, taps, stride, padding, dilation, numbers in itertools.product(
        [(1, 1), (2, 2), (3, 1)], [(3, 3), (5, 2)], [(1, 1), (2, 1)],
        [[(1, 1), (1, 1)], [(4, 3), (2, 5)], [(9, 9), (9, -1)]],
        [(1, 1), (2, 3)], [NHWC, ('WNHC', 'IHOW', 'CWHN')])] + [
    # The matrix would be large: the input is padded first.
    ((4, 4), (5, 5), stride, [(2, 2), (2, 3)], (1, 1), NHWC)
    for stride in ((1, 1), (2, 2), (3, 1))]


def test_kernels_with_more_taps_than_pixels():
  """The convolution and both gradients, as one product of all pixels."""
  def form(specs):
    stride, padding, dilation, numbers = specs
    return lambda x, kernel: lax.conv_general_dilated(
        x, kernel, stride, padding, rhs_dilation=dilation,
        dimension_numbers=numbers)

  def shaped(seed, letters, sizes):
    return ones_and_zeros(seed, [sizes[letter] for letter in letters])

  cases, arguments = [], []
  for shape, taps, *specs in SMALL:
    *_, numbers = specs
    x = shaped(0, numbers[0], dict(zip('NHWC', (2, *shape, 3), strict=True)))
    kernel = shaped(
        1, numbers[1], dict(zip('HWIO', (*taps, 3, 4), strict=True)))
    out = jax.eval_shape(form(specs), x, kernel).shape
    if 0 not in out:
      cases.append((shape, taps, *specs))
      arguments.append((x, kernel, ones_and_zeros(2, out)))

  def everything(arguments):
    return [
        (form(specs)(x, kernel), *gradients(form(specs), x, kernel, cotangent))
        for (_, _, *specs), (x, kernel, cotangent) in zip(
            cases, arguments, strict=True)]

  assert len(cases) > 100
  want = jax.jit(everything)(arguments)
  got = jax.jit(awp_jax.cpu_convolutions(everything))(arguments)
  for case, a, b in zip(cases, want, got, strict=True):
    for name, plain, new in zip(('y', 'x', 'kernel'), a, b, strict=True):
      np.testing.assert_array_equal(plain, new, err_msg=f'{case}, {name}')
  x, kernel, _ = arguments[0]
  faster = awp_jax.cpu_convolutions(form(cases[0][2:]))
  assert 'stablehlo.convolution' not in jax.jit(faster).lower(
      x, kernel).as_text()


def test_rank_one_and_three_and_bfloat16():
  def run(arguments):
    line, line_kernel, cube, cube_kernel = arguments
    one = conv(line, line_kernel, 2, numbers=('NHC', 'HIO', 'NHC'))
    three = conv(cube, cube_kernel, 2, numbers=('NDHWC', 'DHWIO', 'NDHWC'))
    return jnp.sum(one * one), jnp.sum(three[..., :1] * three)

  arguments = (
      ones_and_zeros(0, (2, 7, 3), jnp.bfloat16),
      ones_and_zeros(1, (3, 3, 2), jnp.bfloat16),
      ones_and_zeros(2, (1, 4, 5, 3, 2), jnp.bfloat16),
      ones_and_zeros(3, (2, 2, 3, 2, 2), jnp.bfloat16))

  def grad(arguments):
    return jax.grad(lambda a: sum(run(a)).astype(jnp.float32))(arguments)

  assert dilated(grad, (arguments)) == 2
  faster = awp_jax.cpu_convolutions(grad)
  assert not dilated(faster, (arguments))
  for plain, new in zip(
      jax.jit(grad)(arguments), jax.jit(faster)(arguments), strict=True):
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        plain.astype(np.float32), new.astype(np.float32))


def test_plain_convolution_against_numpy():
  """The gradient by the inputs, summed by loops over pixels and taps."""
  x, kernel = ones_and_zeros(0, (2, 5, 4, 3)), ones_and_zeros(1, (3, 3, 3, 2))
  y = ones_and_zeros(2, (2, 3, 2, 2))
  fn = functools.partial(conv, stride=2)
  got, _ = jax.jit(awp_jax.cpu_convolutions(
      functools.partial(gradients, fn)))(x, kernel, y)
  want = np.zeros((2, 7, 6, 3))
  for i, j, k, m in np.ndindex(3, 2, 3, 3):
    want[:, 2 * i + k, 2 * j + m] += np.asarray(y)[:, i, j] @ np.asarray(
        kernel)[k, m].T
  np.testing.assert_array_equal(got, want[:, 1:-1, 1:-1])


@pytest.mark.parametrize('surround', [
    'jit', 'scan', 'while', 'cond', 'remat', 'custom_jvp', 'custom_vjp', 'vmap',
    'grad'])
def test_convolutions_inside_other_functions(surround):
  x, kernel = ones_and_zeros(0, (2, 4, 4, 2)), ones_and_zeros(1, (3, 3, 2, 2))

  def grad(x):
    return jax.grad(lambda x: jnp.sum(conv(x, kernel, 2) ** 2))(x)

  def custom(wrapper, rule):
    wrapped = wrapper(grad)
    rule(wrapped)
    return wrapped

  inside = {
      'jit': jax.jit(grad),
      'scan': lambda x: lax.scan(
          lambda carry, _: (carry, grad(carry)), x, None, 2)[1],
      'while': lambda x: lax.fori_loop(0, 1, lambda _, x: grad(x), x),
      'cond': lambda x: lax.cond(x[0, 0, 0, 0] > -5, grad, lambda x: x, x),
      'remat': jax.remat(grad),
      'custom_jvp': custom(jax.custom_jvp, lambda f: f.defjvp(
          lambda p, t: (grad(*p), t[0]))),
      'custom_vjp': custom(jax.custom_vjp, lambda f: f.defvjp(
          lambda x: (grad(x), None), lambda _, g: (g,))),
      'vmap': jax.vmap(lambda x: grad(x[None])[0]),
      'grad': jax.grad(lambda x: jnp.sum(grad(x) ** 2))}[surround]
  faster = awp_jax.cpu_convolutions(inside)
  assert dilated(inside, x) > 0 and not dilated(faster, x)
  np.testing.assert_array_equal(jax.jit(inside)(x), jax.jit(faster)(x))


def test_differentiates_and_maps_from_outside():
  x, kernel = ones_and_zeros(0, (3, 4, 4, 2)), ones_and_zeros(1, (3, 3, 2, 2))

  def loss(x):
    return jnp.sum(jax.grad(lambda x: jnp.sum(conv(x, kernel, 2) ** 2))(x) ** 2)

  faster = awp_jax.cpu_convolutions(loss)
  np.testing.assert_array_equal(
      jax.jit(jax.grad(loss))(x), jax.jit(jax.grad(faster))(x))
  np.testing.assert_array_equal(
      jax.jvp(loss, (x,), (x,))[1], jax.jvp(faster, (x,), (x,))[1])
  rows = x[:, None]
  np.testing.assert_array_equal(
      jax.jit(jax.vmap(loss))(rows), jax.jit(jax.vmap(faster))(rows))


@pytest.mark.parametrize('mapping', ['pmap', 'shard_map', 'tracked'])
def test_under_a_mapped_axis(mapping):
  x, kernel = ones_and_zeros(0, (4, 4, 4, 2)), ones_and_zeros(1, (3, 3, 2, 2))

  def step(x, kernel):
    grad = jax.grad(lambda k: jnp.sum(conv(x, k, 2) ** 2))(kernel)
    return lax.psum(grad, 'batch')

  def mapped(fn):
    if mapping == 'pmap':
      return lambda x, kernel: jax.pmap(
          fn, axis_name='batch', in_axes=(0, None), out_axes=None,
          devices=jax.devices()[:2])(x.reshape(2, 2, 4, 4, 2), kernel)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('batch',))
    spec = jax.sharding.PartitionSpec
    return jax.jit(jax.shard_map(
        fn, mesh=mesh, in_specs=(spec('batch'), spec()), out_specs=spec(),
        check_vma=mapping == 'tracked'))

  if mapping == 'tracked':
    step = jax.tree_util.Partial(lambda x, kernel: lax.psum(
        conv(x, kernel, 2).sum((0, 1, 2)), 'batch'))
  faster = mapped(awp_jax.cpu_convolutions(step))
  np.testing.assert_array_equal(mapped(step)(x, kernel), faster(x, kernel))


def test_inside_shard_map():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('batch',))
  spec = jax.sharding.PartitionSpec
  x, kernel = ones_and_zeros(0, (4, 4, 4, 2)), ones_and_zeros(1, (3, 3, 2, 2))
  mapped = jax.shard_map(
      lambda x: jax.grad(lambda x: jnp.sum(conv(x, kernel, 2) ** 2))(x),
      mesh=mesh, in_specs=spec('batch'), out_specs=spec('batch'),
      check_vma=False)
  assert dilated(mapped, x) == 1
  assert not dilated(awp_jax.cpu_convolutions(mapped), x)


@pytest.mark.parametrize('size, stride', [(2, 1), (4, 1), (8, 2)])
def test_inside_and_around_a_checked_shard_map(size, stride, monkeypatch):
  """Types name the axes over which values vary: no convolution changes."""
  monkeypatch.setattr(forms, '_FEWEST_TAPS', 1)
  monkeypatch.setattr(forms, '_MOST_BYTES', 200)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('batch',))
  spec = jax.sharding.PartitionSpec
  x = ones_and_zeros(0, (4, size, size, 4))
  kernel = ones_and_zeros(1, (3, 3, 4, 4))

  def grad(x, kernel):
    return jax.grad(
        lambda x, k: jnp.sum(conv(x, k, stride) ** 2), (0, 1))(x, kernel)

  def mapped(fn):
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(spec('batch'), spec()),
        out_specs=(spec('batch'), spec()), check_vma=True)

  want = jax.jit(mapped(grad))(x, kernel)
  for fn in (awp_jax.cpu_convolutions(mapped(grad)),
             mapped(awp_jax.cpu_convolutions(grad))):
    jax.tree.map(np.testing.assert_array_equal, want, jax.jit(fn)(x, kernel))


@pytest.mark.parametrize('size', [2, 4, 16])
def test_a_symbolic_batch(size):
  """As in exported programs, whose batch is not known."""
  kernel = ones_and_zeros(1, (3, 3, 2, 2))

  def grad(x):
    return jax.grad(
        lambda x, k: jnp.sum(conv(x, k) ** 2), (0, 1))(x, kernel)

  batch, = export.symbolic_shape('b')
  x = jax.ShapeDtypeStruct((batch, size, size, 2), np.float32)
  exported = export.export(jax.jit(awp_jax.cpu_convolutions(grad)))(x)
  images = ones_and_zeros(0, (3, size, size, 2))
  jax.tree.map(
      np.testing.assert_array_equal, exported.call(images), grad(images))


def test_explicit_sharding_stays():
  """Types with mesh axes keep their convolutions, and so their sharding."""
  mesh = jax.make_mesh(
      (2,), ('batch',), axis_types=(jax.sharding.AxisType.Explicit,))
  spec = jax.sharding.PartitionSpec
  with jax.set_mesh(mesh):
    x = jax.device_put(
        ones_and_zeros(0, (4, 2, 2, 2)),
        jax.sharding.NamedSharding(mesh, spec('batch')))
    kernel = jax.device_put(
        ones_and_zeros(1, (3, 3, 2, 2)),
        jax.sharding.NamedSharding(mesh, spec()))

    def run(x, kernel):
      y = jax.nn.relu(conv(x, kernel))
      return y, jax.grad(
          lambda kernel: jnp.sum(jax.nn.relu(conv(x, kernel)) ** 2))(kernel)

    want = jax.jit(run)(x, kernel)
    got = jax.jit(awp_jax.cpu_convolutions(run))(x, kernel)
  for a, b in zip(want, got, strict=True):
    np.testing.assert_array_equal(a, b)
    assert jax.typeof(a) == jax.typeof(b) and a.sharding == b.sharding


def test_what_is_not_faster_stays(x64):
  kernel = ones_and_zeros(1, (3, 3, 1, 4))

  def grouped(x):
    return jnp.sum(lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (2, 2), 'SAME', feature_group_count=2,
        dimension_numbers=NHWC) ** 2)

  def grouped_kernel(kernel):
    return jnp.sum(lax.conv_general_dilated(
        ones_and_zeros(0, (2, 4, 4, 2)), kernel, (1, 1), 'SAME',
        feature_group_count=2, dimension_numbers=NHWC) ** 2)

  def empty(x):
    return jnp.sum(conv(x, kernel, padding=-1))

  def as_large(x):
    return jnp.sum(conv(x, kernel))

  def wide(x):
    return jnp.sum(conv(x, kernel.astype(x.dtype), 2) ** 2)

  def upsampled(x):
    return jnp.sum(lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), lhs_dilation=(3, 3),
        dimension_numbers=NHWC))

  for fn, x in (
      (grouped, ones_and_zeros(0, (2, 4, 4, 2))),
      (wide, ones_and_zeros(0, (2, 4, 4, 1), np.float64)),
      (grouped_kernel, ones_and_zeros(1, (1, 1, 1, 4))),
      (empty, ones_and_zeros(0, (2, 4, 4, 1))),
      (empty, ones_and_zeros(0, (0, 8, 8, 1))),
      (as_large, ones_and_zeros(0, (2, 3, 3, 1))),
      (upsampled, ones_and_zeros(0, (2, 4, 4, 1)))):
    closed = jax.make_jaxpr(
        fn if fn in (upsampled, empty, as_large) else jax.grad(fn))(x)
    assert rewriting.with_cpu_convolutions(closed) is closed


def test_programs_for_accelerators_do_not_change():
  x, kernel = ones_and_zeros(0, (2, 4, 4, 2)), ones_and_zeros(1, (3, 3, 2, 2))
  grad = jax.grad(lambda x: jnp.sum(conv(x, kernel, 2) ** 2))
  faster = awp_jax.cpu_convolutions(grad)
  assert dilated(grad, x, platform='tpu') == 1
  assert dilated(faster, x, platform='tpu') == 1
  with loops.platform('gpu'):  # a new function: traces are kept
    new = awp_jax.cpu_convolutions(grad)
    assert str(jax.make_jaxpr(new)(x)) == str(jax.make_jaxpr(grad)(x))
    closed = jax.make_jaxpr(grad)(x)
    assert rewriting.with_cpu_convolutions(closed) is closed


def test_precision_of_the_products():
  x, kernel = ones_and_zeros(0, (2, 2, 2, 2)), ones_and_zeros(1, (3, 3, 2, 2))
  tap = ones_and_zeros(2, (1, 1, 2, 2))

  def run(x, kernel, tap):
    return jnp.sum(conv(conv(conv(x, kernel), tap, 2, 0), kernel) ** 2)

  with jax.default_matmul_precision('float32'):
    closed = jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(x, kernel, tap)
  # Outside, where the default is another one.
  text = str(rewriting.with_cpu_convolutions(closed))
  products = re.findall(r'(?:dot_general|conv_general_dilated)\[', text)
  assert len(products) > 8
  assert text.count('precision=(Precision.HIGHEST') == len(products)


def test_equal_convolutions_are_rewritten_once(monkeypatch):
  made, make = [], equations.on_cpus
  monkeypatch.setattr(
      equations, 'on_cpus', lambda *args: made.append(1) or make(*args))
  x, kernel = ones_and_zeros(0, (2, 2, 2, 2)), ones_and_zeros(1, (3, 3, 2, 2))
  jax.make_jaxpr(awp_jax.cpu_convolutions(
      lambda x: conv(conv(x, kernel), kernel)))(x)
  assert len(made) == 1


def test_arguments_results_and_repeated_functions():
  kernel = ones_and_zeros(1, (3, 3, 2, 2))

  @jax.jit
  def grad(x):
    return jax.grad(lambda x: jnp.sum(conv(x, kernel) ** 2))(x)

  def fn(tree, *, key):
    x = grad(grad(tree['x']))
    return {'x': x, 'noise': jax.random.uniform(key), 'same': tree['y']}

  arguments = {'x': ones_and_zeros(0, (1, 4, 4, 2)), 'y': (1, None)}
  plain = fn(arguments, key=jax.random.key(0))
  new = awp_jax.cpu_convolutions(fn)(arguments, key=jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, plain, new)
  # A function that is called twice is rewritten and compiled once.
  closed = jax.make_jaxpr(lambda x: grad(grad(x)))(arguments['x'])
  first, second = [
      equation.params['jaxpr'] for equation in
      rewriting.with_cpu_convolutions(closed).jaxpr.eqns]
  assert first is second
  assert first is not closed.jaxpr.eqns[0].params['jaxpr']


def test_network_step_agrees():
  model = PreActResNet(3, depth=10, width=4)
  x = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))
  y = jnp.arange(4) % 3
  variables = jax.jit(model.init)(jax.random.key(1), x)

  def loss(params, x):
    logits, _ = model.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats'])
    return jnp.mean(awp_jax.cross_entropy(logits, y))

  grad = jax.grad(loss, (0, 1))
  assert dilated(grad, variables['params'], x) == 6
  faster = awp_jax.cpu_convolutions(grad)
  assert not dilated(faster, variables['params'], x)
  want = jax.jit(grad)(variables['params'], x)
  got = jax.jit(faster)(variables['params'], x)
  scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale)


def test_forms_are_those_of_the_gradients():
  """Which convolutions change: gradients, but not the network's own."""
  x, kernel = ones_and_zeros(0, (2, 4, 4, 2)), ones_and_zeros(1, (1, 1, 2, 3))
  closed = jax.make_jaxpr(jax.vjp(
      functools.partial(conv, stride=2, padding=0), x, kernel)[1])(
          ones_and_zeros(2, (2, 2, 2, 3)))
  forms = []
  for equation in closed.jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      avals = [v.aval for v in (*equation.invars, *equation.outvars)]
      form = convolution.rewritten(
          convolution.parameters(equation.params), *avals)
      forms.append(getattr(form, 'func', form).__name__)
  assert sorted(forms) == ['as_product', 'by_residues']
  closed = jax.make_jaxpr(functools.partial(conv, stride=2))(x, jnp.ones(
      (3, 3, 2, 3)))
  assert rewriting.with_cpu_convolutions(closed) is closed


def test_large_kernels_are_summed_in_pieces(monkeypatch):
  """The convolution and both gradients, with 11 features in three pieces."""
  monkeypatch.setattr(forms, '_FEWEST_TAPS', 1)
  monkeypatch.setattr(forms, '_MOST_BYTES', 1000)
  cases = [
      functools.partial(conv, stride=stride, padding=padding, numbers=numbers)
      for stride, padding, numbers in (
          (1, 1, NHWC), ((2, 3), [(0, 2), (1, -1)], NHWC),
          (2, 1, ('NCHW', 'OIHW', 'NCHW')))]
  arguments = []
  for form in cases:
    nhwc = form.keywords['numbers'] == NHWC
    x = ones_and_zeros(0, (5, 9, 8, 11) if nhwc else (5, 11, 9, 8))
    kernel = ones_and_zeros(1, (3, 3, 11, 7) if nhwc else (7, 11, 3, 3))
    arguments.append((x, kernel, ones_and_zeros(
        2, jax.eval_shape(form, x, kernel).shape)))

  def everything(arguments):
    return [
        (form(x, kernel), *gradients(form, x, kernel, y))
        for form, (x, kernel, y) in zip(cases, arguments, strict=True)]

  faster = awp_jax.cpu_convolutions(everything)
  for form, (x, kernel, _) in zip(cases, arguments, strict=True):
    text = jax.jit(awp_jax.cpu_convolutions(form)).lower(x, kernel).as_text()
    assert text.count('stablehlo.convolution') == 3  # 2,772 bytes
  # In parts of the output features, by residues, and of the batch.
  for form, (x, kernel, y), count in zip(
      cases, arguments, (8, 8, 8), strict=True):
    backward = awp_jax.cpu_convolutions(jax.vjp(form, x, kernel)[1])
    text = jax.jit(backward).lower(y).as_text()
    assert text.count('stablehlo.convolution') == count
  want, got = jax.jit(everything)(arguments), jax.jit(faster)(arguments)
  for case, (a, b) in enumerate(zip(want, got, strict=True)):
    for name, plain, new in zip(('y', 'x', 'kernel'), a, b, strict=True):
      np.testing.assert_array_equal(plain, new, err_msg=f'{case}, {name}')
      assert np.any(plain)


@pytest.mark.parametrize('x, kernel, count', [
    ((32, 4, 4, 512), (3, 3, 512, 512), 8),  # 9.4 MB
    ((64, 34, 34, 32), (32, 32, 32, 64), 8),  # 8.4 MB; 7 do not divide 32
    ((64, 34, 34, 31), (32, 32, 31, 64), 7),  # nor does any up to 13 divide 31
    ((32, 8, 8, 256), (3, 3, 256, 256), 2),
    ((32, 16, 16, 128), (3, 3, 128, 128), 1),
    ((1, 4, 4, 512), (3, 3, 512, 512), 1),  # 16 outputs
    ((1, 4, 6, 512), (3, 3, 512, 512), 8),  # 24
    ((9, 9, 9, 640), (1, 1, 640, 512), 1),  # 5 << 18 bytes
    ((9, 9, 9, 641), (1, 1, 641, 512), 2),
    ((2, 8, 8, 20), (100, 100, 20, 900), 20),  # not more than features
    ((64, 64, 64, 64), (64, 64, 64, 64), 32)])
def test_number_of_pieces(x, kernel, count, monkeypatch):
  equation, = jax.make_jaxpr(functools.partial(conv, padding='SAME'))(
      jax.ShapeDtypeStruct(x, np.float32),
      jax.ShapeDtypeStruct(kernel, np.float32)).eqns
  parameters = convolution.parameters(equation.params)
  lhs, rhs, out = equations.shapes(equation)
  monkeypatch.setattr(forms, '_FEWEST_TAPS', 1)
  assert forms.pieces(parameters, lhs, rhs) == count
  form = convolution.rewritten(parameters, lhs, rhs, out)
  assert (form is not None) == (count > 1)
  half = jax.ShapeDtypeStruct(kernel, jnp.bfloat16)
  assert forms.pieces(parameters, lhs, half) == 1
  monkeypatch.setattr(forms, '_FEWEST_TAPS', kernel[0] ** 2)
  assert forms.pieces(parameters, lhs, rhs) == count
  monkeypatch.setattr(forms, '_FEWEST_TAPS', kernel[0] ** 2 + 1)
  assert forms.pieces(parameters, lhs, rhs) == 1


@pytest.mark.parametrize('taps, old', [(14, 1), (15, 2)])
def test_fewest_taps_of_each_release(taps, old):
  parameters = convolution.parameters(jax.make_jaxpr(conv)(
      jnp.ones((1, 32, 32, 2)), jnp.ones((3, 3, 2, 1))).eqns[0].params)
  count = forms.pieces(
      parameters, jax.ShapeDtypeStruct((1, 32, 32, 50), np.float32),
      jax.ShapeDtypeStruct((taps, taps, 50, 40), np.float32))
  assert count == (2 if jax.__version_info__ >= (0, 11) else old)


@pytest.mark.parametrize('size, taps, form', [
    (2, 3, 'as_dense'), (4, 5, 'plain'), (3, 3, None), (200, 201, 'plain')])
def test_large_matrices_are_not_made(size, taps, form):
  x = jax.ShapeDtypeStruct((1, size, size, 64), np.float32)
  kernel = jax.ShapeDtypeStruct((taps, taps, 64, 64), np.float32)
  equation, = jax.make_jaxpr(functools.partial(
      conv, padding='SAME'))(x, kernel).eqns
  found = convolution.rewritten(
      convolution.parameters(equation.params), *equations.shapes(equation))
  assert getattr(getattr(found, 'func', None), '__name__', None) == form


def test_long_kernels_of_few_points():
  """The program of a matrix has a piece for each pair of points."""
  x = jax.ShapeDtypeStruct((1, 2, 4), np.float32)
  kernel = jax.ShapeDtypeStruct((1200, 4, 4), np.float32)
  for padding, form in ((300, None), (650, 'as_dense'), (1199, 'plain')):
    closed = jax.make_jaxpr(functools.partial(
        conv, padding=padding, numbers=('NHC', 'HIO', 'NHC')))(x, kernel)
    equation, = closed.eqns
    found = convolution.rewritten(
        convolution.parameters(equation.params), *equations.shapes(equation))
    assert getattr(getattr(found, 'func', None), '__name__', None) == form
