"""Parts of AutoAttack against outputs of the reference implementation.

`data/autoattack_parts.npz` holds inputs and outputs of fra31/auto-attack, run
once with PyTorch on a random two-layer network.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import threat as threats
from awp_jax.attacks import apgd_steps, hyperplanes, square_patterns
from awp_jax.evaluation import losses
from awp_jax.evaluation import model as models
from awp_jax.evaluation.protocol import Examples
from awp_jax.threat import ThreatModel

DATA = dict(np.load(
    pathlib.Path(__file__).parents[2] / 'data' / 'autoattack_parts.npz'))
NORMS = ('Linf', 'L2', 'L1')
LOSS = {'Linf': 'dlr', 'L2': 'ce', 'L1': 'ce'}


def network(x):
  flat = x.reshape(x.shape[0], -1)
  return jnp.tanh(flat @ DATA['w1']) @ DATA['w2']


def examples():
  x, y = jnp.asarray(DATA['x']), jnp.asarray(DATA['y'])
  none = jnp.zeros_like(y)
  return Examples(x, y, none[:, None], jax.random.split(jax.random.key(0), 4),
                  none)


def trajectory(norm, see):
  """Ours, from the reference's start: x, step sizes and state of each t."""
  threat = ThreatModel(norm, float(DATA[f'apgd/{norm}/eps']))
  schedule = apgd_steps.make_schedule(threat, 100, staged=False)
  batch = examples()
  state = apgd_steps.start(batch, threat, schedule)
  begin = jnp.asarray(DATA[f'apgd/{norm}/xs'][0])
  state = state._replace(x=begin)
  points, steps = [], []
  for time in range(101):
    points.append(np.asarray(state.x))
    state, report = apgd_steps.advance(
        state, see(time, state.x), batch.images, threat, schedule)
    steps.append(np.asarray(state.step_size))
    assert bool(report.finished.all()) == (time == 100)
  return np.stack(points), np.stack(steps), state


@pytest.mark.parametrize('norm', NORMS)
def test_apgd_makes_the_steps_of_the_reference(norm):
  part = f'apgd/{norm}/'
  none = jnp.zeros(4, bool)
  points, steps, state = trajectory(
      norm, lambda time, _: models.Gradients(
          jnp.asarray(DATA[part + 'gradients'][time]),
          jnp.asarray(DATA[part + 'losses'][time]), none))
  np.testing.assert_allclose(points, DATA[part + 'xs'], atol=1e-5)
  np.testing.assert_allclose(
      steps[DATA[part + 'checkpoints']], DATA[part + 'step_sizes'], rtol=1e-5)
  np.testing.assert_allclose(
      state.best_loss, DATA[part + 'best_loss'], atol=1e-5)


# Not L_2: rounding of the gradients, which depends on how XLA compiles them,
# grows along its trajectory, where nothing clips it away. The test above
# compares all of that trajectory, on the reference's own gradients.
@pytest.mark.parametrize('norm', ['Linf', 'L1'])
def test_apgd_runs_the_trajectory_of_the_reference(norm):
  part = f'apgd/{norm}/'
  batch = examples()
  model = models.make_model(network, 6)
  losses = []

  def see(_, x):
    seen = model.gradients(
        LOSS[norm], x, batch.labels, batch.labels, batch.keys)
    losses.append(np.asarray(seen.losses))
    return seen

  _, steps, _ = trajectory(norm, see)
  np.testing.assert_allclose(
      np.stack(losses), DATA[part + 'losses'], atol=1e-5)
  np.testing.assert_allclose(
      steps[DATA[part + 'checkpoints']], DATA[part + 'step_sizes'], rtol=1e-5)


def test_dlr_losses():
  z, y, t = (DATA[f'dlr/{k}'] for k in ('logits', 'labels', 'targets'))
  np.testing.assert_allclose(
      losses.dlr(z, y), DATA['dlr/untargeted'], atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(
      losses.targeted_dlr(z, y, t), DATA['dlr/targeted'], atol=1e-5, rtol=1e-5)


def test_dlr_ignores_shift_and_scale_and_needs_classes():
  z, y = DATA['dlr/logits'], DATA['dlr/labels']
  np.testing.assert_allclose(
      losses.dlr(z, y), losses.dlr(7 * z + 3, y), rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='at least 3 classes, got 2'):
    losses.dlr(z[:, :2], y % 2)
  with pytest.raises(ValueError, match='at least 4 classes, got 3'):
    losses.targeted_dlr(z[:, :3], y % 3, y % 3)


@pytest.mark.parametrize('norm', NORMS)
def test_hyperplane_projections(norm):
  points, normals, offsets = (
      DATA[f'hyperplane/{k}'] for k in ('points', 'normals', 'offsets'))
  ours = hyperplanes.project(points, normals, offsets, norm)
  np.testing.assert_allclose(ours, DATA[f'hyperplane/{norm}'], atol=1e-5)


@pytest.mark.parametrize('norm', NORMS)
def test_hyperplane_projection_of_tiny_and_zero_normals(norm):
  points, normals, offsets = (
      DATA[f'hyperplane/{k}'] for k in ('points', 'normals', 'offsets'))
  # Every second one, so that each is scaled by itself.
  scale = np.where(np.arange(len(offsets)) % 2, 1e-25, 1).astype(np.float32)
  tiny = hyperplanes.project(
      points, normals * scale[:, None], offsets * scale, norm)
  np.testing.assert_allclose(tiny, DATA[f'hyperplane/{norm}'], atol=1e-4)
  none = hyperplanes.project(points, 0 * normals, offsets, norm)
  np.testing.assert_array_equal(none, 0)


def test_l1_ball_projection():
  x, delta = DATA['l1ball/x'], DATA['l1ball/delta']
  ours = np.asarray(threats.project_l1(delta, x, 2.0))
  np.testing.assert_allclose(ours[:12], DATA['l1ball/result'][:12], atol=1e-5)
  # Here the perturbations are 100 radii long, where float32 sums lose 1e-5.
  np.testing.assert_allclose(ours[12:], DATA['l1ball/result'][12:], atol=4e-5)
  assert np.abs(ours).sum(-1).max() <= 2 + 1e-5
  assert (x + ours).min() >= -1e-7 and (x + ours).max() <= 1 + 1e-7


def test_l1_ball_projection_is_the_nearest_point():
  x, delta = DATA['l1ball/x'], DATA['l1ball/delta']
  ours = np.asarray(threats.project_l1(delta, x, 2.0))
  rng = np.random.default_rng(0)
  gap = np.sum((ours - delta) ** 2, -1)
  for scale in (1e-3, 1e-1, 1.0):
    other = ours + scale * rng.normal(size=ours.shape)
    other = np.clip(x + other, 0, 1) - x
    other *= np.minimum(1, 2 / np.abs(other).sum(-1, keepdims=True))
    assert (np.sum((other - delta) ** 2, -1) >= gap - 1e-5).all()


def test_square_schedule():
  for rescale in (False, True):
    course = square_patterns.SquareSchedule(5000, 0.8, rescale)
    ours = [square_patterns.window_share(int(q), course)
            for q in DATA['square/queries']]
    np.testing.assert_allclose(ours, DATA[f'square/share_{rescale}'])
  sides = square_patterns.window_sides(
      square_patterns.SquareSchedule(5000, 0.8, False), 32, 32, False)
  assert sides[0] == 29 and sides[-1] == 3 and (np.diff(sides) <= 0).all()


@pytest.mark.parametrize('norm', ('L2', 'L1'))
def test_square_bumps(norm):
  names = [k for k in DATA if k.startswith(f'square/bump_{norm}_')]
  assert names
  for name in names:
    height, width = map(int, name.split('_')[2:])
    bump = square_patterns.bump(height, width, 2 if norm == 'L2' else 4)
    size = np.sqrt((bump ** 2).sum()) if norm == 'L2' else bump.sum()
    np.testing.assert_allclose(bump / size, DATA[name], atol=1e-6)


def test_checkpoints_of_shorter_runs():
  windows = apgd_steps.checkpoint_windows(100)
  assert [t for t, w in enumerate(windows) if w] == [
      22, 41, 57, 70, 80, 87, 93, 99]
  assert [windows[t] for t in (22, 41, 80, 99)] == [22, 19, 10, 6]
  assert len(apgd_steps.checkpoint_windows(1)) == 2
