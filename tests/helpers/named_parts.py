"""Parts that configs of tests name, as those of another package."""

import dataclasses

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import awp_jax
from awp_jax.attacks import fixed_step


class LinenNet(nn.Module):
  """Batch normalization, dropout and one hidden layer."""

  num_classes: int
  hidden: int = 4
  rate: float = 0.1
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x, train):
    x = x.reshape(len(x), -1).astype(self.dtype)
    x = nn.Dense(self.hidden, dtype=self.dtype, name='first')(x)
    x = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, dtype=self.dtype,
        name='norm')(x)
    x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='last')(x)


class NnxNet(nnx.Module):
  """The same in nnx."""

  def __init__(self, num_classes, image_shape, rngs, hidden=4, rate=0.1):
    self.first = nnx.Linear(int(np.prod(image_shape)), hidden, rngs=rngs)
    self.norm = nnx.BatchNorm(hidden, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.last = nnx.Linear(hidden, num_classes, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.first(x.reshape(len(x), -1))))
    return self.last(self.dropout(x))


def equinox_net(num_classes, image_shape, key, hidden=4, rate=0.1):
  """The same in Equinox: the pair of a module and its state."""
  class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
      keys = jax.random.split(key)
      self.first = eqx.nn.Linear(
          int(np.prod(image_shape)), hidden, key=keys[0])
      self.norm = eqx.nn.BatchNorm(
          hidden, axis_name='batch', momentum=0.9, mode='batch')
      self.dropout = eqx.nn.Dropout(rate)
      self.last = eqx.nn.Linear(hidden, num_classes, key=keys[1])

    def __call__(self, x, state, key=None):
      x, state = self.norm(self.first(x.ravel()), state)
      x = self.dropout(jax.nn.relu(x), key=key)
      return self.last(x), state

  return eqx.nn.make_with_state(Net)(key)


def scaled_net(num_classes, std=0.02):
  """Its std is not that of the pixels."""
  assert std == 0.02
  return LinenNet(num_classes)


def synced_equinox_net(num_classes, image_shape, key, axis_name):
  """Claims to synchronize its statistics."""
  del axis_name
  return equinox_net(num_classes, image_shape, key)


def other_axis_net(num_classes, image_shape, key):
  """Names the axis of its layers otherwise."""
  net, state = equinox_net(num_classes, image_shape, key)
  return eqx.tree_at(
      lambda tree: tree.norm.axis_name, net, 'other',
      is_leaf=lambda leaf: isinstance(leaf, str)), state


def narrow_net(num_classes, width=2):
  """Takes a width, as our networks do."""
  return LinenNet(num_classes, width)


def darken(key, image, least=0.5):
  """Scales a uint8 image by a factor from U(least, 1)."""
  factor = jax.random.uniform(key, minval=least, maxval=1.0)
  return (factor * image).astype(image.dtype)


def to_float(key, image):
  """Changes the dtype, which is refused."""
  del key
  return image / 255


def attack(key, loss_fn, state, x, threat, *, step_size, num_steps, **_):
  """Far outside of the ball; `train_step` projects it."""
  del key, threat, step_size, num_steps
  _, state = loss_fn(x, state)
  return x + 1.0, state


def scaled_attack(
    key, loss_fn, state, x, threat, *, scale, step_size, **settings):
  """PGD with another step size."""
  return awp_jax.pgd_with_state(
      key, loss_fn, state, x, threat, step_size=scale * step_size, **settings)


def objective(label_smoothing, weight=1.0):
  """AT with a weighted loss."""
  plain = awp_jax.adversarial(label_smoothing)

  def train_loss(logits, natural, labels):
    return weight * plain.train_loss(logits, natural, labels)

  return plain._replace(name='weighted', train_loss=train_loss)


def perturbation(gamma=0.02):
  """AWP under another name."""
  return dataclasses.replace(awp_jax.methods.awp(gamma), name='mine')


def optimizer(learning_rate, weight_decay, b1=0.5):
  """Lion."""
  return optax.lion(learning_rate, b1, weight_decay=weight_decay)


def no_decay(learning_rate):
  """SGD that takes neither momentum nor weight decay."""
  return optax.sgd(learning_rate)


def no_rate(weight_decay):
  """Takes no learning rate, which is refused."""
  return optax.sgd(0.1 * weight_decay)


def blobs(num=32, seed=0, data_dir=None):
  """Two classes of dark and bright images [num, 4, 4, 1]."""
  del data_dir
  rng = np.random.default_rng(seed)

  def part():
    labels = np.arange(num) % 2
    levels = 60 + 100 * labels[:, None, None, None]
    return (rng.integers(0, 40, (num, 4, 4, 1)) + levels).astype(
        np.uint8), labels

  (x_train, y_train), (x_test, y_test) = part(), part()
  return {'x_train': x_train, 'y_train': y_train, 'x_test': x_test,
          'y_test': y_test, 'mean': (0.25,), 'std': (0.5,)}


def evaluation_attack(step_size, num_steps=3):
  """PGD as an attack of an evaluation."""
  return fixed_step.pgd_spec(
      'mine', step_size=step_size, num_steps=num_steps)


def wrong(**options):
  """Nothing that any field takes."""
  return options


def failing():
  """Raises an error of its own."""
  raise ValueError('an own check failed')


NUMBER = 3


def linear(num_classes, image_shape, scale=4.0):
  """A fixed linear classifier for `evaluate_model.py`."""
  rng = np.random.default_rng(0)
  weights = scale * rng.normal(
      size=(int(np.prod(image_shape)), num_classes)).astype(np.float32)
  return lambda images: (images.reshape(len(images), -1) - 0.5) @ weights
