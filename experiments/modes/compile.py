r"""Compiles the programs of a config for chips that are not there.

  python experiments/main.py --mode=compile --target=v5e:2x4 \
    --config=experiments/configs/cifar10_awp.py

It prints whether training step and evaluation fit, their memory, collectives
and operations, and an estimate of their time. No data are loaded and nothing is
written.
"""

import json
from typing import Any

import jax
import ml_collections

from experiments.ahead import programs, report, targets


def compile_for(
    config: ml_collections.ConfigDict, name: str, as_json: bool = False
) -> dict[str, Any]:
  """Compiles the training step and the evaluation, and prints a report.

  Args:
    config: with the fields of `experiments/configs/base.py`.
    name: the target, such as 'v5e:2x4' or 'h100:8'.
    as_json: whether to print one line of JSON instead.

  Returns:
    The values in the report.

  Raises:
    UserError: for an invalid target or config, a compiler that is not
      installed, and data whose size is unknown.
  """
  target = targets.parse(name)
  run = programs.prepare(config, target.num_devices)
  targets.check_installed(target)
  # No device of this machine is needed, and none should be taken.
  jax.config.update('jax_platforms', 'cpu')
  devices = targets.devices(target)
  record = report.values(run, target, [
      programs.training_step(run, devices), programs.evaluation(run, devices)])
  print(json.dumps(record) if as_json else report.text(run, target, record))
  return record
