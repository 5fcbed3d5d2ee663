"""Tests of the parts in this folder."""

import jax
import jax.numpy as jnp
import ml_collections
import my_config
import my_data
import my_loss
import my_network
import my_perturbation
import numpy as np
import pytest


def test_data() -> None:
  data = my_data.stripes(noise=0.0, num_train=8, num_test=4)
  assert data['x_train'].shape == (8, 12, 12, 1)
  # Rows of class 1 do not change from the top to the bottom.
  first = data['x_train'][1, ..., 0]
  np.testing.assert_allclose(first, np.broadcast_to(first[0], (12, 12)))


def test_network() -> None:
  net = my_network.Net(num_classes=4, hidden=4)
  images = jnp.ones((2, 12, 12, 1))
  variables = net.init(jax.random.key(0), images, train=False)
  assert net.apply(variables, images, train=False).shape == (2, 4)
  method = my_perturbation.in_convolutions(gamma=0.1)
  chosen = method.chosen(variables['params'])
  assert chosen['conv0'] == {'kernel': True}
  assert chosen['out'] == {'bias': False, 'kernel': False}


def test_loss() -> None:
  config = ml_collections.FrozenConfigDict(
      {'user': {'natural_weight': 0.25}})
  objective = my_loss.half_natural(config)
  adversarial, natural = jnp.zeros((1, 4)), jnp.full((1, 4), -40.0)
  natural = natural.at[0, 2].set(0.0)
  np.testing.assert_allclose(objective.train_loss(
      adversarial, natural, jnp.array([2])), 0.75 * np.log(4), rtol=1e-6)
  with pytest.raises(ValueError, match='natural_weight'):
    my_loss.half_natural(ml_collections.FrozenConfigDict(
        {'user': {'natural_weight': 2.0}}))


def test_config() -> None:
  assert my_config.get_config().user.natural_weight == 0.5
