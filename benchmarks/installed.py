"""Uses an installed awp_jax outside of a clone; `make release` runs it."""

from importlib import metadata
import pathlib
import warnings

warnings.filterwarnings(
    'error', category=DeprecationWarning, module=r'awp_jax(\.|$)')

import jax
import jax.numpy as jnp
import optax

import awp_jax


def main() -> None:
  """Checks where the package is, then takes a step and attacks."""
  place = pathlib.Path(awp_jax.__file__)
  assert 'site-packages' in place.parts, place
  assert (place.parent / 'py.typed').exists()
  assert metadata.version('awp_jax') == awp_jax.__version__
  x, y = jnp.eye(4), jnp.array([0, 1, 2, 3])

  def loss_fn(params, x, y):
    return jnp.mean(awp_jax.cross_entropy(x @ params['w'], y))

  params, tx = {'w': jnp.eye(4)}, optax.sgd(0.5)
  opt_state = tx.init(params)
  before = loss_fn(params, x, y)
  for _ in range(3):
    out = awp_jax.awp_step(loss_fn, tx, params, opt_state, x, y, gamma=0.01)
    params, opt_state = out.params, out.opt_state
  assert loss_fn(params, x, y) < before
  result = awp_jax.auto_attack(
      jax.random.key(0), lambda x: x @ params['w'], x, y,
      awp_jax.ThreatModel('Linf', 0.3), attacks=('apgd-ce',))
  print(f'awp_jax {awp_jax.__version__} in {place.parent}: robust accuracy '
        f'{result.robust_accuracy:.2f}')


if __name__ == '__main__':
  main()
