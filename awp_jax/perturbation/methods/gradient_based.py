"""Methods that follow the gradient: AWP, RWP, WT-AWP, SAM and others.

Each method is only a set of settings for the engine:

  >>> awp(gamma=0.01).ball
  Ball(size=0.01, norm='tensor', scale='relative', filter_axis=-1, eps=0.0, \
floor=0.0, stretched=None, stack_axes=0)
"""

from typing import Literal

from awp_jax.core import checks
from awp_jax.perturbation import directions
from awp_jax.perturbation.balls import Ball, Size
from awp_jax.perturbation.base import Method, UpdateAt, mixture, size_of
from awp_jax.perturbation.leaves import Mask, StackAxes, is_any, is_weight
from awp_jax.types import Scalar


def awp(
    gamma: Size = 0.01, *, num_steps: int = 1, mask: Mask = is_weight,
    update_at: UpdateAt = 'perturbed', stack_axes: StackAxes = 0) -> Method:
  """v_l <- project(v_l + (gamma / K) |w_l| g_l / |g_l|), K times.

  Args:
    gamma: |v_l| / |w_l|, or a function of the step count.
    num_steps: K.
    mask: which leaves are perturbed.
    update_at: the parameters passed to the optimizer; see `Method`.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method.

  References:
    Wu, Xia, Wang, Adversarial Weight Perturbation Helps Robust Generalization,
    NeurIPS 2020.
  """
  return Method(
      'AWP', Ball(size_of('gamma', gamma), stack_axes=stack_axes),
      num_steps=num_steps, mask=mask, update_at=update_at)


def rwp(
    gamma: Size = 0.01, *, c_min: Scalar | None = 1.7, num_steps: int = 10,
    mask: Mask = is_weight, update_at: UpdateAt = 'perturbed',
    stack_axes: StackAxes = 0) -> Method:
  """Robust weight perturbation: only small-loss examples drive the ascent.

    D <- D + grad (1/B) sum of the losses < c_min, at w + v;
    v = gamma |w| D / |D|,   one norm over all perturbed leaves.

  If no loss is below c_min in any pass, v is zero. The loss function must
  return losses [B].

  Args:
    gamma: |v| / |w|.
    c_min: the loss stationary condition: 1.7 for CIFAR-10 and SVHN, 4.0 for
      CIFAR-100; None for no condition.
    num_steps: the number of ascent passes.
    mask: which leaves are perturbed.
    update_at: the parameters passed to the optimizer; see `Method`.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method.

  References:
    Yu et al., Robust Weight Perturbation for Adversarial Training, IJCAI 2022.
  """
  if c_min is not None:
    checks.not_negative('c_min', c_min)
  return Method(
      'RWP', Ball(size_of('gamma', gamma), 'tree', stack_axes=stack_axes),
      num_steps=num_steps, moves='summed', examples_below=c_min, mask=mask,
      update_at=update_at)


def wt_awp(
    gamma: Size = 0.7, *, mask: Mask, lam: Scalar = 0.5, eps: float = 1e-5,
    update_at: UpdateAt = 'natural', stack_axes: StackAxes = 0) -> Method:
  """Weighted truncated AWP: (1 - lam) L(w) + lam L(w + v), in some layers.

    v_l = gamma |w_l| g_l / (|g_l| + eps)

  Ascent and mixture share the gradient at w, so a step costs two passes.

  Args:
    gamma: |v_l| / |w_l|, 0.7 to 1 in the paper.
    mask: the perturbed layers; in the paper the first one, e.g. 'conv1/kernel'.
      Required, because a parameter tree does not define the order of layers.
    lam: the weight of the perturbed loss, in [0, 1]; 0.5 to 0.7 in the paper.
    eps: added to |g_l|, as in the published code.
    update_at: the parameters passed to the optimizer; see `Method`.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method.

  References:
    Wu, Bojchevski, Huang, Adversarial Weight Perturbation Improves
    Generalization in Graph Neural Networks, AAAI 2023.
  """
  return Method(
      'WT-AWP',
      Ball(size_of('gamma', gamma), eps=eps, stack_axes=stack_axes),
      mask=mask, mix=mixture('lam', lam), update_at=update_at)


def sam(
    rho: Size = 0.05, *, num_steps: int = 1, mask: Mask = is_any) -> Method:
  """Sharpness-aware minimization: v = rho g / |g| over the whole tree.

  Args:
    rho: |v|.
    num_steps: the number of moves, each of length rho / num_steps.
    mask: which leaves are perturbed.

  Returns:
    The method.

  References:
    Foret et al., Sharpness-Aware Minimization for Efficiently Improving
    Generalization, ICLR 2021.
  """
  return Method(
      'SAM', Ball(size_of('rho', rho), 'tree', 'absolute'), num_steps=num_steps,
      mask=mask)


def asam(
    rho: Size = 0.5, *, eta: float = 0.01, stretched: Mask | None = None,
    mask: Mask = is_any) -> Method:
  """Adaptive SAM: v = rho T^2 g / |T g|, T = |w| + eta.

  Args:
    rho: |v / T|.
    eta: added to |w|, >= 0.
    stretched: a mask of the leaves with T = |w| + eta; T is 1 on the others. By
      default all but biases, as in the published code.
    mask: which leaves are perturbed.

  Returns:
    The method.

  References:
    Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks, ICML 2021.
  """
  checks.not_negative('eta', eta)
  return Method(
      'ASAM', Ball(size_of('rho', rho), 'tree', 'adaptive', floor=eta,
                   stretched=stretched), mask=mask)


def sign(
    gamma: Size = 0.01, *, num_steps: int = 1,
    natural_weight: Scalar = 0, perturbed_weight: Scalar = 1,
    mask: Mask = is_weight, stack_axes: StackAxes = 0) -> Method:
  """Device mismatch: a worst-case relative error in every entry.

    v_ij <- v_ij + (gamma / K) |w_ij| sign(g_ij),   within +- gamma |w_ij|

  Args:
    gamma: |v_ij| / |w_ij|.
    num_steps: K.
    natural_weight: the weight of L(w) in the loss.
    perturbed_weight: the weight of L(w + v) in the loss.
    mask: which leaves are perturbed.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method. The published attack instead ascends the divergence between the
    outputs at w and at w + v, from a random start.

  References:
    Buechel, Faber, Muir, Network Insensitivity to Parameter Noise via
    Adversarial Regularization, ICLR 2022.
  """
  return Method(
      'sign',
      Ball(size_of('gamma', gamma), 'element', stack_axes=stack_axes),
      num_steps=num_steps, mask=mask, mix=(natural_weight, perturbed_weight))


def boxed_awp(
    adv_lr: Size = 1.0, adv_eps: Size = 0.01, *,
    gradient: Literal['replace', 'add'] = 'replace', num_steps: int = 1,
    eps: float = 1e-6, mask: Mask = is_weight, stack_axes: StackAxes = 0
) -> Method:
  """AWP as in text competitions: moves per tensor, clipped per entry.

    v <- clip(v + adv_lr (|w_l| + eps) g_l / (|g_l| + eps)), +- adv_eps |w_ij|

  Args:
    adv_lr: the length of a move relative to |w_l|.
    adv_eps: the half-width of the box relative to |w_ij|, 1e-3 to 0.2.
    gradient: whether the gradient at w + v replaces the gradient at w
      ('replace') or is added to it ('add').
    num_steps: the number of moves, each of length adv_lr.
    eps: as in the published code.
    mask: which leaves are perturbed.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method. In the common public code, later moves are relative to
    |w_l + v_l|.
  """
  checks.one_of('gradient', gradient, ('replace', 'add'))
  return Method(
      'boxed AWP',
      Ball(size_of('adv_lr', adv_lr), eps=eps, floor=eps,
           stack_axes=stack_axes),
      box=Ball(size_of('adv_eps', adv_eps), 'element'), num_steps=num_steps,
      mask=mask, mix=(0, 1) if gradient == 'replace' else (1, 1))


def momentum_awp(
    adv_lr: Size = 1e-3, adv_eps: Size | None = 1e-3, *, decay: Scalar = 0.9,
    eps: float = 1e-6, mask: Mask = is_weight, stack_axes: StackAxes = 0
) -> Method:
  """AWP along the first moment of the gradients, without an ascent pass.

    v_l = adv_lr (|w_l| + eps) m_l / (|m_l| + eps),  clipped as in `boxed_awp`

  Args:
    adv_lr: |v_l| / |w_l|.
    adv_eps: the half-width of the box relative to |w_ij|; None for no box.
    decay: the decay rate of m. With Adam's b1, m is Adam's first moment.
    eps: as in the published code.
    mask: which leaves are perturbed.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method; its state holds m. The first step is unperturbed.
  """
  box = None
  if adv_eps is not None:
    box = Ball(size_of('adv_eps', adv_eps), 'element')
  return Method(
      'momentum AWP',
      Ball(size_of('adv_lr', adv_lr), eps=eps, floor=eps,
           stack_axes=stack_axes),
      direction=directions.momentum(decay), box=box, mask=mask)
