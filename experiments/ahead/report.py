"""The text and the values that describe the compiled programs of a config."""

from collections import Counter
import importlib.metadata
from typing import Any

import ml_collections

from experiments.ahead import advice, analysis, programs, roofline, targets
from experiments.config import networks
from experiments.runs import run as run_lib
from experiments.util import console


def values(
    run: run_lib.Run, target: targets.Target,
    found: list[programs.Program]) -> dict[str, Any]:
  """What is known of the programs, as plain JSON values.

  Args:
    run: from `programs.prepare`.
    target: the chips.
    found: the training step and the evaluation.

  Returns:
    Bytes, operations and seconds by program, and seconds of the whole run.
  """
  described = {
      program.name: _of_program(run.config, target, program)
      for program in found}
  steps = run.config.epochs * run.steps_per_epoch
  record: dict[str, Any] = {
      'target': target.name, 'devices': target.num_devices,
      'hosts': target.num_hosts, 'versions': _versions(target),
      'steps': steps, 'evaluations': _evaluations(run),
      'programs': described}
  if all('seconds' in part for part in described.values()):
    training, evaluation = described.values()
    record['run_seconds'] = [
        steps * training['seconds'][i]
        + _evaluations(run) * evaluation['seconds'][i] for i in (0, 1)]
    record['epoch_seconds'] = [
        run.steps_per_epoch * training['seconds'][i] for i in (0, 1)]
  return record


def _versions(target: targets.Target) -> dict[str, str]:
  compiler = {'tpu': 'libtpu', 'gpu': 'jax-cuda13-pjrt'}
  return {name: importlib.metadata.version(name)
          for name in ('jax', compiler[target.chip.platform])}


def _evaluations(run: run_lib.Run) -> int:
  """Batches of evaluation in the whole run."""
  config = run.config
  splits = (
      min(config.eval.num_train, len(run.dataset.x_train)),
      len(run.dataset.x_test), len(run.validation[0]))
  times = -(-config.epochs // config.eval.every_epochs)
  return times * sum(-(-size // config.eval.batch_size) for size in splits)


def _of_program(
    config: ml_collections.ConfigDict, target: targets.Target,
    program: programs.Program) -> dict[str, Any]:
  room = advice.fit(target, program)
  record: dict[str, Any] = {
      'images_per_device': program.images, 'fits': room.is_enough,
      'usable_bytes': room.usable,
      'memory': program.memory._asdict() | {'total': program.memory.total},
      'argument_bytes': program.arguments,
      'remedies': advice.remedies(config, target, program),
      'flops': program.flops, 'compile_seconds': program.seconds,
      'compile_processor_seconds': program.processor_seconds}
  if program.module is None:
    return record
  module = program.module
  kernels = analysis.kernels(module)
  estimate = roofline.estimate(target, program)
  return record | {
      'reused': len(analysis.reused_arguments(module)),
      'donated': program.donated,
      'collectives': [
          {'opcode': part.opcode, 'bytes': part.bytes, 'times': part.times,
           'in_loop': bool(part.loops)}
          for part in analysis.collectives(module)],
      'loops': [[loop.trips for loop in nest]
                for nest in analysis.loops_of_convolutions(module)],
      'convolutions': dict(
          analysis.kinds(analysis.convolutions(module))),
      'kernels': sum(part.times for part in kernels),
      'bytes_moved': sum(part.times * part.bytes for part in kernels),
      'estimate': estimate._asdict(),
      'seconds': [estimate.least, estimate.most]}


def text(
    run: run_lib.Run, target: targets.Target, record: dict[str, Any]) -> str:
  """The report for a terminal; `record` is from `values`."""
  config, parts = run.config, record['programs']
  model = config.model
  rows = [['', *parts], *(
      [label, *(read(part) for part in parts.values())]
      for label, read in _ROWS)]
  lines = [
      f'{target.name}: {target.num_devices} x {target.chip.description}, '
      f'{target.num_hosts} host{"s" if target.num_hosts > 1 else ""}; '
      + ', '.join(f'{k} {v}' for k, v in record['versions'].items()),
      f'{networks.describe(config)}, {model.dtype}; '
      f'{config.dataset}, {len(run.dataset.x_train)} training images of '
      f'{"x".join(map(str, run.dataset.x_train.shape[1:]))}; batch '
      f'{config.batch_size}', '', console.table(rows), '']
  for name, part in parts.items():
    lines += [f'The {name} does not fit. Any of these should make it fit:'
              ] * (not part['fits'])
    lines += [f'  {remedy}' for remedy in part['remedies']]
  if 'run_seconds' in record:
    low, high = record['run_seconds']
    first, last = record['epoch_seconds']
    lines += [
        f'Estimate: {first:.1f} - {last:.1f} s of training per epoch, '
        f'{low / 3600:.2f} - {high / 3600:.2f} h for {record["steps"]} steps '
        f'and {record["evaluations"]} batches of evaluation.',
        f'It assumes {roofline.assumptions(target)} Every step counts as a '
        'full batch with the weight perturbation. Compiling, loading and '
        'checkpoints are not included.']
  return '\n'.join(lines)


def _megabytes(number: float) -> str:
  return f'{number / 1e6:.1f} MB'


def _memory(kind: str) -> Any:
  return lambda part: _megabytes(part['memory'][kind])


def _collectives(part: dict[str, Any]) -> str:
  counts: Counter[str] = Counter()
  for found in part['collectives']:
    counts[found['opcode']] += found['times']
  return ', '.join(f'{n} {name}' for name, n in counts.items()) or 'none'


def _communicated(part: dict[str, Any]) -> str:
  return _megabytes(
      sum(found['bytes'] * found['times'] for found in part['collectives']))


def _compiled(read: Any) -> Any:
  """A cell that needs the compiled program."""
  return lambda part: read(part) if 'seconds' in part else '-'


def _milliseconds(kind: str) -> Any:
  return _compiled(lambda part: f'{1e3 * part["estimate"][kind]:.2f} ms')


_ROWS = (
    ('images per device', lambda part: str(part['images_per_device'])),
    ('fits', lambda part: (
        f'{"yes" if part["fits"] else "NO"}: '
        f'{_megabytes(part["memory"]["total"])} of '
        f'{_megabytes(part["usable_bytes"])}')),
    ('memory: arguments', _memory('arguments')),
    ('  of these data', lambda part: _megabytes(
        part['argument_bytes'].get('data', 0)
        + part['argument_bytes'].get('images', 0))),
    ('memory: outputs', _memory('outputs')),
    ('memory: temporaries', _memory('temporaries')),
    ('memory: code', _memory('code')),
    ('donated arrays reused', _compiled(
        lambda part: f'{part["reused"]} of {part["donated"]}')),
    ('collectives', _compiled(_collectives)),
    ('  bytes per device', _compiled(_communicated)),
    ('  inside loops', _compiled(lambda part: str(sum(
        found['times'] for found in part['collectives']
        if found['in_loop'])))),
    ('loops with convolutions', _compiled(lambda part: ', '.join(
        ' x '.join(map(str, nest)) for nest in part['loops']) or 'none')),
    ('convolutions', _compiled(lambda part: ', '.join(
        f'{n} {kind}' for kind, n in part['convolutions'].items()))),
    ('operations per device', lambda part: ', '.join(
        f'{n / 1e12:.3f} T {kind}' for kind, n in part['flops'].items())),
    ('kernels', _compiled(lambda part: str(part['kernels']))),
    ('memory traffic', _compiled(
        lambda part: f'{part["bytes_moved"] / 1e9:.2f} GB')),
    ('time: computing', _milliseconds('computing')),
    ('time: memory traffic', _milliseconds('memory')),
    ('time: kernels', _milliseconds('kernels')),
    ('time: communication', _milliseconds('communication')),
    ("time: compiler's estimate", _compiled(lambda part: (
        '-' if part['estimate']['compiler'] is None
        else f'{1e3 * part["estimate"]["compiler"]:.2f} ms'))),
    ('time: estimate', _compiled(lambda part: ' - '.join(
        f'{1e3 * seconds:.2f}' for seconds in part['seconds']) + ' ms')),
    ('compiling', lambda part: (
        f'{part["compile_seconds"]:.0f} s, processor '
        f'{part["compile_processor_seconds"]:.0f} s')),
)
