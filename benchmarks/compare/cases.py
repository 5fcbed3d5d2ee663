"""What is measured: tasks, implementations, and which of them are compared.

The processes of both sides import this file, so it imports neither JAX nor
PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

PRECISIONS = ('float32', 'bfloat16')
EPSILON = 8 / 255


class Setting(NamedTuple):
  """The published setting of a task.

  Attributes:
    gamma: the size of the weight perturbation; 0: none.
    beta: the weight of the robust term of TRADES; None: cross-entropy.
    step_size: of the attack, in pixels of [0, 1].
    num_steps: of the attack.
  """

  gamma: float
  beta: float | None
  step_size: float
  num_steps: int


SETTINGS = {
    'at': Setting(0.0, None, 2 / 255, 10),
    'at-awp': Setting(0.01, None, 2 / 255, 10),
    'trades-awp': Setting(0.005, 6.0, 0.007, 10),
    'pgd-20': Setting(0.0, None, 2 / 255, 20),
}
TRAINING = ('at', 'at-awp', 'trades-awp')
#: AT and AT-AWP in turns in one process: what AWP adds.
OVERHEAD = 'awp-overhead'
AUTOATTACK = 'autoattack'
TASKS = (*SETTINGS, OVERHEAD, AUTOATTACK)

#: Ours, with the policy of batch statistics; an evaluation has none.
OURS, OURS_REFERENCE = 'awp_jax', 'awp_jax-reference'
TUNED, COMPILED, RELEASED = 'torch-tuned', 'torch-compiled', 'released'
AUTO_ATTACK = 'auto-attack'
IMPLEMENTATIONS = (
    OURS, TUNED, COMPILED, OURS_REFERENCE, RELEASED, AUTO_ATTACK)
TITLES = {
    OURS: 'awp_jax',
    OURS_REFERENCE: 'awp_jax, `reference`',
    TUNED: 'PyTorch, tuned',
    COMPILED: 'PyTorch, compiled',
    RELEASED: 'released code',
    AUTO_ATTACK: 'fra31/auto-attack',
}


class Case(NamedTuple):
  """One comparison.

  Attributes:
    task: one of `TASKS`.
    width: channels of the first stage of PreActResNet-18; 0: not applicable.
    batch_size: images of a step; for AutoAttack, of the evaluation.
    precision: one of `PRECISIONS`.
    image_size: height and width of the images.
    num_steps: steps of the attack; 0: the published number.
  """

  task: str
  width: int
  batch_size: int
  precision: str
  image_size: int = 32
  num_steps: int = 0

  @property
  def setting(self) -> Setting:
    """The published setting, with this case's number of steps."""
    setting = SETTINGS[self.task]
    return setting._replace(num_steps=self.num_steps or setting.num_steps)


def opponent(implementation: str, task: str) -> str | None:
  """The measurement of ours with the same passes; None for ours.

  `torch-tuned` and `torch-compiled` compute the passes of the statistics policy
  `perturbed`. The released code adds passes that only update statistics, which
  are those of `reference`.
  """
  if implementation in (OURS, OURS_REFERENCE):
    return None
  if implementation == RELEASED and task in TRAINING:
    return OURS_REFERENCE
  return OURS


def implementations(case: Case, available: Sequence[str]) -> list[str]:
  """The implementations of a case, in the order in which they run.

  Args:
    case: the comparison.
    available: the rivals that can run.

  Returns:
    Ours, and the rivals with a version of this task. The released code computes
    in float32 only, and its network has the width 64.
  """
  if case.task == OVERHEAD:
    return [OURS]
  rivals = [AUTO_ATTACK] if case.task == AUTOATTACK else [TUNED, COMPILED]
  if case.task in SETTINGS and (case.precision, case.width) == ('float32', 64):
    rivals.append(RELEASED)
  rivals = [rival for rival in rivals if rival in available]
  ours = [OURS]
  if OURS_REFERENCE in [opponent(rival, case.task) for rival in rivals]:
    ours.append(OURS_REFERENCE)
  return [name for name in IMPLEMENTATIONS if name in ours + rivals]
