"""Whether a program fits into the memory of a chip, and what would make it fit.

Of the temporaries, gradients and the weight perturbation have the size of the
state of training, or less. The others grow with the images that a device
processes at once, at most in proportion. So the advice is an estimate.
"""

from typing import NamedTuple

import ml_collections

from experiments.ahead import programs, targets


class Fit(NamedTuple):
  """Room on each device.

  Attributes:
    used: bytes of the program.
    usable: bytes that JAX allocates by default.
    memory: bytes of the chip.
    is_compiled: whether the compiler found room.
  """

  used: int
  usable: int
  memory: int
  is_compiled: bool = True

  @property
  def is_enough(self) -> bool:
    """Whether the program fits."""
    return self.is_compiled and self.used <= self.usable


def fit(target: targets.Target, program: programs.Program) -> Fit:
  """Compares the memory of a program with that of the chip."""
  chip = target.chip
  return Fit(
      program.memory.total, int(chip.memory * chip.usable), chip.memory,
      program.module is not None)


def most_images(room: Fit, program: programs.Program) -> int:
  """Images per device that would fit; 0 if the rest alone does not."""
  temporaries = program.memory.temporaries
  fixed = program.memory.total - temporaries
  if program.name == 'training step':
    kept = min(program.arguments.get('state', 0), temporaries)
    fixed, temporaries = fixed + kept, temporaries - kept
  left = room.usable - fixed
  if left <= 0 or temporaries <= 0:
    return 0
  return int(min(left / temporaries, 1) * program.images)


def remedies(
    config: ml_collections.ConfigDict, target: targets.Target,
    program: programs.Program) -> list[str]:
  """What would make a program fit; [] if it does.

  Args:
    config: of the run.
    target: the chips.
    program: compiled for them.

  Returns:
    Changes of flags. Each of them probably suffices by itself, but for
    rematerialization, whose effect is not known without compiling.
  """
  room = fit(target, program)
  if room.is_enough:
    return []
  images = most_images(room, program)
  found = []
  if room.used <= 0.95 * room.memory and target.chip.platform == 'gpu':
    found.append(
        'XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, since JAX allocates '
        f'{target.chip.usable:.0%} by default')
  if images == 0:
    fixed = sum(program.arguments.values())
    return [*found, (
        f'chips with more memory: not one image fits beside the arguments of '
        f'the {program.name}, {fixed / 1e9:.2f} GB on each device')]
  parts = -(-program.images // images)
  name = ('batch_size' if program.name == 'training step'
          else 'eval.batch_size')
  found += [
      f'--config.{name}={images * target.num_devices} or less, {images} '
      'images a device',
      f'{parts} times as many chips, at the same batch size']
  if program.name == 'training step':
    needed = [number for number in range(1, program.images + 1)
              if program.images % number == 0
              and number >= parts * config.accumulate]
    if needed:
      found.append(
          f'--config.accumulate={needed[0]}: that many parts of '
          f'{program.images // needed[0]} images in turn, at the same '
          'batch size')
    if not config.model.remat:
      found.append(
          'perhaps --config.model.remat=True, which recomputes activations')
  return found
