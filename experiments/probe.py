"""Small looks at a trained model: attacked images, and the worst direction.

The host drives PGD step by step, so that one gradient is all that compiles: a
look at a model shall cost seconds, on the CPU too.
"""

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax import weights
from awp_jax.types import Array
from experiments import checkpoints, evaluate, pipeline, runs

#: Test images in the gallery.
GALLERY = 12

#: Images that a gradient in the weights is taken of, and that are attacked.
BATCH = 32

#: Of the weight adversary where the run has none.
DEFAULT_GAMMA = 0.01


@functools.partial(jax.jit, static_argnames=('model',))
def logits(model: Any, variables: Any, images: Array) -> Array:
  """Logits [B, C] with the running statistics."""
  return model.apply(variables, images, train=False)


@functools.partial(
    jax.jit, static_argnames=('model', 'threat', 'step_size'))
def _pgd_step(
    model: Any, variables: Any, x_adv: Array, images: Array,
    labels: Array, threat: awp_jax.ThreatModel, step_size: float) -> Array:
  return awp_jax.pgd(
      jax.random.key(0),
      lambda x: awp_jax.cross_entropy(
          model.apply(variables, x, train=False), labels),
      images, threat, step_size=step_size, num_steps=1, start=x_adv)


@functools.partial(jax.jit, static_argnames=('model',))
def _gradient(
    model: Any, variables: Any, images: Array, labels: Array,
    valid: Array) -> Any:
  """The gradient in the parameters of the sum over the valid examples."""

  def loss(params: Any) -> Array:
    found = model.apply({**variables, 'params': params}, images, train=False)
    return jnp.sum(jnp.where(valid, awp_jax.cross_entropy(found, labels), 0))

  return jax.grad(loss)(variables['params'])


def pixels(images: np.ndarray) -> Array:
  """Images of a data set as the attacks take them, float32 in [0, 1]."""
  return pipeline.to_pixels(jnp.asarray(images), jnp.dtype(jnp.float32))


def attacked(
    key: Array, model: Any, variables: Any, images: Array,
    labels: Array, threat: awp_jax.ThreatModel, *, step_size: float,
    num_steps: int) -> Array:
  """PGD from a random start, on the cross-entropy.

  Args:
    key: a PRNG key.
    model: the network.
    variables: its parameters and running statistics.
    images: [B, ...] in [0, 1].
    labels: [B].
    threat: the ball and the box.
    step_size: of a step.
    num_steps: how many.

  Returns:
    Adversarial images like `images`.
  """
  x_adv = threat.random_start(key, images)
  for _ in range(num_steps):
    x_adv = _pgd_step(
        model, variables, x_adv, images, labels, threat, step_size)
  return x_adv


def _blocks(count: int, size: int) -> Iterator[np.ndarray]:
  for begin in range(0, count, size):
    yield np.arange(begin, begin + size)


def robust_gradient(
    key: Array, model: Any, variables: Any, images: np.ndarray,
    labels: np.ndarray, threat: awp_jax.ThreatModel, *, step_size: float,
    num_steps: int, batch_size: int) -> Any:
  """The gradient of the mean robust loss in the parameters.

  Args:
    key: a PRNG key; each batch folds in its number.
    model: the network.
    variables: its parameters and running statistics.
    images: [N, ...] of a data set, N >= 1.
    labels: [N].
    threat: the ball and the box.
    step_size: of a step of PGD.
    num_steps: of PGD.
    batch_size: images at a time.

  Returns:
    A pytree like the parameters.
  """
  total = None
  for number, rows in enumerate(_blocks(len(labels), batch_size)):
    kept = np.minimum(rows, len(labels) - 1)
    batch, targets = pixels(images[kept]), jnp.asarray(labels[kept])
    x_adv = attacked(
        jax.random.fold_in(key, number), model, variables, batch, targets,
        threat, step_size=step_size, num_steps=num_steps)
    part = _gradient(model, variables, x_adv, targets, rows < len(labels))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return jax.tree.map(lambda leaf: leaf / len(labels), total)


class Look(NamedTuple):
  """What a report shows of the best checkpoint, beside what was logged.

  Attributes:
    step: of the checkpoint.
    attack: how the images below were attacked, in words.
    images: test images [G, H, W, C], float32 in [0, 1].
    adversarial: the same, attacked.
    labels: [G].
    before: the classes that the model sees in the images, [G].
    after: in the adversarial images, [G].
    layers: names of the weights, [L].
    gamma: of the weight adversary that is looked at.
    ratios: |v_l| / |w_l| of its perturbation, [L].
    rises: <g_l, v_l>: what each layer adds to the loss to first order, [L].
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


def look(run: runs.Run) -> Look:
  """Looks at a run's best checkpoint, or reads what an earlier look found.

  The record, `figures/probe.npz`, holds for one checkpoint; everything in it
  follows from the config and that checkpoint.

  Args:
    run: of `runs.prepare`.

  Returns:
    The look.

  Raises:
    ValueError: if there is no best checkpoint, or it cannot be read.
  """
  store = checkpoints.Checkpoints(run.workdir, 'best')
  step = store.step()
  store.close()
  path = run.workdir / 'figures' / 'probe.npz'
  if path.exists():
    with np.load(path, allow_pickle=False) as archive:
      if archive['step'] == step:
        return Look(*(archive[name][()] for name in Look._fields))
  ((_, _, variables),) = evaluate.load_variables(run, ('best',))
  found = _look(run, step or 0, variables)
  path.parent.mkdir(exist_ok=True)
  temporary = path.with_suffix('.tmp.npz')
  np.savez_compressed(temporary, **found._asdict())
  temporary.replace(path)
  return found


def _look(run: runs.Run, step: int, variables: Any) -> Look:
  settings, threat = run.setup.eval_attack, run.setup.threat
  key = jax.random.key(run.config.seed)
  size = min(BATCH, max(len(run.dataset.y_test), GALLERY))
  shown = _first_of_each_class(run.dataset.y_test, GALLERY)
  rows = np.resize(shown, size)  # repeated, so that one shape compiles
  images, labels = pixels(run.dataset.x_test[rows]), run.dataset.y_test[rows]
  x_adv = attacked(
      key, run.model, variables, images, jnp.asarray(labels), threat,
      step_size=settings.step_size, num_steps=settings.num_steps)
  before, after = (
      np.asarray(logits(run.model, variables, x)).argmax(axis=-1)
      for x in (images, x_adv))
  part = slice(0, len(shown))
  train = np.linspace(0, len(run.dataset.y_train) - 1, size).astype(int)
  gradient = robust_gradient(
      key, run.model, variables, run.dataset.x_train[train],
      run.dataset.y_train[train], threat, step_size=settings.step_size,
      num_steps=settings.num_steps, batch_size=size)
  gamma = run.config.awp.gamma or DEFAULT_GAMMA
  return Look(
      step, f'PGD-{settings.num_steps}, step {settings.step_size:.4g}',
      np.asarray(images)[part], np.asarray(x_adv)[part], labels[part],
      before[part], after[part],
      *_layers(variables['params'], gradient, gamma))


def _first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
  """The first example of each class, then further ones; at most `count`."""
  _, first = np.unique(labels, return_index=True)
  others = np.setdiff1d(np.arange(len(labels)), first)
  return np.concatenate([first, others])[:count]


def _layers(
    params: Any, gradient: Any, gamma: float
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
  """Names, gamma, |v| / |w| and <g, v> of the perturbed leaves."""
  v = weights.ascend(None, gradient, params, gamma=gamma, step=gamma)
  mask = jax.tree.leaves(weights.weight_mask(params))
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  names, ratios, rises = [], [], []
  for is_moved, (path, w), g, dv in zip(
      mask, leaves, jax.tree.leaves(gradient), jax.tree.leaves(v),
      strict=True):
    if is_moved:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      names.append(name.removesuffix('/kernel'))
      norm = float(jnp.linalg.norm(w))
      ratios.append(float(jnp.linalg.norm(dv)) / norm if norm else 0.0)
      rises.append(float(jnp.vdot(g, dv)))
  return np.array(names), gamma, np.array(ratios), np.array(rises)
