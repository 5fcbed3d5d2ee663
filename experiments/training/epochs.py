"""The metrics of an epoch, as a line of `metrics.jsonl` and as text."""

from typing import Any

from experiments.config import optimizers
from experiments.runs import run as run_lib


def training_line(
    run: run_lib.Run, step: int, means: dict[str, float]) -> dict[str, Any]:
  """The training metrics of an epoch.

  Args:
    run: the run.
    step: number of completed steps, at the end of the epoch.
    means: from `Guard.fetch`.

  Returns:
    Plain values by name; the learning rate is that of the last step.
  """
  rate = optimizers.build_schedule(run.config, run.steps_per_epoch)(step - 1)
  return {
      'epoch': step // run.steps_per_epoch,
      'learning_rate': float(rate),
      'train_loss': means['loss'],
      'train_batch_robust_accuracy': means['robust_accuracy'],
      'gradient_norm': means['gradient_norm'],
      'perturbation_ratio': means['perturbation_ratio'],
      'images': int(means['images'])}


def nonfinite_warning(line: dict[str, Any]) -> str:
  """A warning if non-finite values weakened the attack, else ''."""
  shares = {
      name.removesuffix('_nonfinite'): value for name, value in line.items()
      if name.endswith('_nonfinite') and value}
  if not shares:
    return ''
  return 'warning: logits or gradients are not finite on ' + ', '.join(
      f'{100 * value:.2f} % of the {split} images'
      for split, value in shares.items()) + (
          '. The attack is weaker there, so robust accuracy is too high.')


def text(line: dict[str, Any], epochs: int) -> str:
  """The line for the console.

  Args:
    line: of `metrics.jsonl`.
    epochs: number of epochs of the run.

  Returns:
    One line.
  """
  shown = f'epoch {line["epoch"]}/{epochs}  loss {line["train_loss"]:.4f}'
  if 'test_robust_accuracy' in line:
    shown += ''.join(
        f'  {split}: natural {100 * line[f"{split}_natural_accuracy"]:.2f} %, '
        f'robust {100 * line[f"{split}_robust_accuracy"]:.2f} %'
        for split in ('train', 'test'))
  return f'{shown}  {line["images_per_second"]:.0f} images/s'
