"""Quick measurements for reports: attacked images, the weight perturbation.

The host runs PGD step by step, so only one gradient function is compiled. The
probe of a model takes seconds, also on the CPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax.perturbation import engine
from awp_jax.perturbation import leaves as leaf_utils
from awp_jax.types import Array
from experiments.data import batches
from experiments.runs import precision, reading, restore
from experiments.runs import run as run_lib
from experiments.util import atomic

#: Test images in the gallery.
GALLERY = 12

#: Images per batch, attacked or used for the gradient of the weights.
BATCH = 32

#: Gamma of the weight adversary if the run was trained without one.
DEFAULT_GAMMA = 0.01


class _Pass(NamedTuple):
  """Results of one forward and backward pass.

  Attributes:
    logits: [B, C], with the running statistics.
    by_image: gradient of the summed cross-entropy of the valid examples with
      respect to the images, [B, ...].
    by_weight: gradient with respect to the parameters.
  """

  logits: Array
  by_image: Array
  by_weight: Any


@functools.partial(jax.jit, static_argnames=('model',))
def _run_pass(
    model: Any, variables: Any, images: Array, labels: Array, valid: Array
) -> _Pass:
  """Logits and both gradients in one function, so that one compiles."""

  def loss(params: Any, images: Array) -> tuple[Array, Array]:
    logits = precision.logits(model, {**variables, 'params': params}, images)
    losses = awp_jax.cross_entropy(logits, labels)
    return jnp.sum(jnp.where(valid, losses, 0)), logits

  (by_weight, by_image), logits = jax.grad(loss, (0, 1), has_aux=True)(
      variables['params'], images)
  return _Pass(logits, by_image, by_weight)


@functools.partial(jax.jit, static_argnames=('threat',))
def _start(
    key: Array, images: Array, threat: awp_jax.ThreatModel) -> Array:
  return threat.random_start(key, images)


@functools.partial(jax.jit, static_argnames=('threat', 'step_size'))
def _step(
    x_adv: Array, gradient: Array, images: Array, threat: awp_jax.ThreatModel,
    step_size: float) -> Array:
  """One step of PGD."""
  step = step_size * threat.linear_maximizer(gradient)
  return threat.project(x_adv + step, images)


def pixels(images: np.ndarray) -> Array:
  """Images of a data set as float32 in [0, 1]."""
  return batches.to_pixels(jnp.asarray(images), jnp.dtype(jnp.float32))


class _Network(NamedTuple):
  """A network with its variables and the labels of a batch."""

  model: Any
  variables: Any
  labels: Array
  valid: Array

  def run(self, images: Array) -> _Pass:
    return _run_pass(
        self.model, self.variables, images, self.labels, self.valid)

  def attack(
      self, key: Array, images: Array, threat: awp_jax.ThreatModel,
      step_size: float, num_steps: int) -> Array:
    """PGD on the cross-entropy from a random start."""
    x_adv = _start(key, images, threat)
    for _ in range(num_steps):
      x_adv = _step(x_adv, self.run(x_adv).by_image, images, threat, step_size)
    return x_adv


def robust_gradient(
    key: Array, model: Any, variables: Any, images: np.ndarray,
    labels: np.ndarray, threat: awp_jax.ThreatModel, *, step_size: float,
    num_steps: int, batch_size: int) -> Any:
  """The gradient of the mean robust loss with respect to the parameters.

  Args:
    key: a PRNG key; each batch folds in its index.
    model: the network, from `precision.network`.
    variables: its parameters and running statistics, in float32.
    images: [N, H, W, C] of a data set, N >= 1.
    labels: [N].
    threat: the ball and the box of the attack.
    step_size: of a step of PGD.
    num_steps: of PGD.
    batch_size: images per batch.

  Returns:
    A pytree like the parameters.
  """
  total = None
  for number, begin in enumerate(range(0, len(labels), batch_size)):
    rows = np.arange(begin, begin + batch_size)
    kept = np.minimum(rows, len(labels) - 1)
    network = _Network(
        model, variables, jnp.asarray(labels[kept]),
        jnp.asarray(rows < len(labels)))
    x_adv = network.attack(
        jax.random.fold_in(key, number), pixels(images[kept]), threat,
        step_size, num_steps)
    # Summed by NumPy: compiling one sum per leaf would take longer.
    part = jax.device_get(network.run(x_adv).by_weight)
    total = part if total is None else jax.tree.map(np.add, total, part)
  return jax.tree.map(lambda leaf: leaf / leaf.dtype.type(len(labels)), total)


class Probe(NamedTuple):
  """Measurements of the best checkpoint for the report.

  Attributes:
    step: of the checkpoint.
    attack: description of the attack on the images.
    images: test images [G, H, W, C], float32 in [0, 1].
    adversarial: the adversarial images.
    labels: [G].
    before: predicted classes of the images, [G]; -1 for non-finite logits.
    after: predicted classes of the adversarial images, [G].
    layers: names of the weights, [L].
    gamma: of the weight adversary.
    ratios: |v_l| / |w_l| of its perturbation v, [L].
    rises: <g_l, v_l>, the first-order rise of the loss by layer, [L].
  """

  step: int
  attack: str
  images: np.ndarray
  adversarial: np.ndarray
  labels: np.ndarray
  before: np.ndarray
  after: np.ndarray
  layers: np.ndarray
  gamma: float
  ratios: np.ndarray
  rises: np.ndarray


def measure(run: run_lib.Run) -> Probe:
  """Probes a run's best checkpoint, or reads the record of an earlier probe.

  The record, `figures/probe.npz`, is valid for one checkpoint. It depends only
  on the config and that checkpoint.

  Args:
    run: from `run.prepare`.

  Returns:
    The measurements.

  Raises:
    ValueError: if there is no best checkpoint or it cannot be read.
  """
  step = reading.Reader(run.workdir, 'best').step()
  path = run.workdir / 'figures' / 'probe.npz'
  if path.exists():
    with path.open('rb') as file, np.load(
        file, allow_pickle=False) as archive:
      if archive['step'] == step:
        return Probe(*(archive[name][()] for name in Probe._fields))
  ((_, step, variables),) = restore.load_variables(run, ('best',))
  found = _measure(run, step, variables)
  path.parent.mkdir(exist_ok=True)
  with atomic.replacing(path) as file:
    np.savez_compressed(file, **found._asdict())
  return found


def _measure(run: run_lib.Run, step: int, variables: Any) -> Probe:
  settings, threat = run.setup.eval_attack, run.setup.threat
  key = jax.random.key(run.config.seed)
  size = min(BATCH, max(len(run.dataset.y_test), GALLERY))
  shown = _first_of_each_class(run.dataset.y_test, GALLERY)
  rows = np.resize(shown, size)  # repeated, so that one shape is compiled
  images, labels = pixels(run.dataset.x_test[rows]), run.dataset.y_test[rows]
  model = precision.network(run.model)
  network = _Network(
      model, variables, jnp.asarray(labels), jnp.ones(size, bool))
  x_adv = network.attack(
      key, images, threat, settings.step_size, settings.num_steps)
  before, after = (
      _classes(np.asarray(network.run(x).logits)) for x in (images, x_adv))
  part = slice(0, len(shown))
  train = np.linspace(0, len(run.dataset.y_train) - 1, size).astype(int)
  gradient = robust_gradient(
      key, model, variables, run.dataset.x_train[train],
      run.dataset.y_train[train], threat, step_size=settings.step_size,
      num_steps=settings.num_steps, batch_size=size)
  gamma = run.config.awp.gamma or DEFAULT_GAMMA
  return Probe(
      step, f'PGD-{settings.num_steps}, step {settings.step_size:.4g}',
      np.asarray(images)[part], np.asarray(x_adv)[part], labels[part],
      before[part], after[part],
      *_layers(variables['params'], gradient, gamma))


def _classes(logits: np.ndarray) -> np.ndarray:
  """Predicted classes of logits [N, C]; -1 for non-finite logits."""
  finite = np.isfinite(logits).all(axis=-1)
  return np.where(finite, logits.argmax(axis=-1), -1)


def _first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
  """Indices of the first example of each class, then others, up to `count`."""
  _, first = np.unique(labels, return_index=True)
  others = np.setdiff1d(np.arange(len(labels)), first)
  return np.concatenate([first, others])[:count]


@jax.jit
def _ascend(gradient: Any, params: Any, gamma: float) -> Any:
  method = awp_jax.methods.awp(gamma)
  ascent = engine.move(
      method, engine.Ascent(),
      leaf_utils.select(gradient, method.chosen(params)), params, jnp.int32(0))
  return leaf_utils.restore(ascent.perturbation, params)


def _layers(
    params: Any, gradient: Any, gamma: float
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
  """Names, gamma, |v| / |w| and <g, v> of the perturbed leaves."""
  v, params = jax.device_get(
      (_ascend(gradient, params, gamma), params))
  mask = jax.tree.leaves(awp_jax.weight_mask(params))
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  names, ratios, rises = [], [], []
  for is_moved, (path, w), g, dv in zip(
      mask, leaves, jax.tree.leaves(gradient), jax.tree.leaves(v),
      strict=True):
    if is_moved:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      names.append(name.removesuffix('/kernel'))
      norm = float(np.linalg.norm(w))
      ratios.append(float(np.linalg.norm(dv)) / norm if norm else 0.0)
      rises.append(float(np.vdot(g, dv)))
  return np.array(names), gamma, np.array(ratios), np.array(rises)
