"""Times this library, the released code of AWP and PyTorch in turns.

  python -m benchmarks.compare --torch_python=PYTHON --released=PATH \
    --output=times.jsonl

Every implementation of a case has its own process. In every round they measure
one after the other, each with all cores while the others wait, so that drift of
the machine's speed affects all alike; the ratios are those of each round. The
first call compiles and is reported separately; it loads what an earlier case of
the run compiled. Every measurement is a line of --output; run the command again
to continue. Markdown goes to standard output, progress to standard error.

Tasks, on random images and labels, PreActResNet-18, L_inf 8/255:
  at, at-awp     PGD-10 in steps of 2/255; gamma 0.01
  trades-awp     PGD-10 in steps of 0.007, beta 6; gamma 0.005
  pgd-20         natural and robust accuracy of a batch, steps of 2/255
  awp-overhead   AT and AT-AWP in turns in one process
  autoattack     `fast` on the network of --network, against --auto_attack

Implementations, each against the measurement of ours with the same passes:
  PyTorch, tuned     only the gradients that are needed, channels last, a fused
                     optimizer; bfloat16 by autocast. Ours: policy `perturbed`.
  PyTorch, compiled  the same under torch.compile
  released code      network and weight adversary of csdongxian/AWP in a loop
                     with the passes of its scripts, in float32 and at width
                     64 only. TRADES trains the same network. Ours: policy
                     `reference`.
"""

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys
import tempfile

from benchmarks.compare import cases, runner, table


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.compare', description=__doc__,
      formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument(
      '--tasks', nargs='+', choices=cases.TASKS, default=list(cases.TASKS))
  parser.add_argument('--widths', type=int, nargs='+', default=[64, 16])
  parser.add_argument(
      '--precisions', nargs='+', choices=cases.PRECISIONS,
      default=list(cases.PRECISIONS))
  parser.add_argument(
      '--batch_size', type=int, default=0,
      help='default: 32 from width 64 on, else 128')
  parser.add_argument('--image_size', type=int, default=32)
  parser.add_argument(
      '--num_steps', type=int, default=0, help='of the attack; default: above')
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument(
      '--repeats', type=int, default=5,
      help='timed calls of a measurement, at most')
  parser.add_argument(
      '--seconds', type=float, default=2.0,
      help='no timed call but the first starts after this time')
  parser.add_argument(
      '--torch_python', default='', help='an interpreter with PyTorch')
  parser.add_argument(
      '--released', default='', help='a checkout of csdongxian/AWP')
  parser.add_argument(
      '--auto_attack', default='', help='a checkout of fra31/auto-attack')
  parser.add_argument(
      '--network', default='',
      help='npz with a network for AutoAttack: the small one of\n'
      'autoattack_fixture.py, or flat Flax variables of a PreActResNet-18')
  parser.add_argument(
      '--images', default='', help='npz with images x, uint8 [N, 3, H, W], and '
      'labels y; default: NETWORK')
  parser.add_argument(
      '--count', type=int, default=64, help='images of AutoAttack')
  parser.add_argument('--output', required=True, type=pathlib.Path)
  return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses and checks the command line."""
  parser = _parser()
  options = parser.parse_args(argv)
  for name in ('rounds', 'repeats', 'image_size', 'count', *(
      ['batch_size'] if options.batch_size else []), *(
      ['num_steps'] if options.num_steps else [])):
    if getattr(options, name) < 1:
      parser.error(f'--{name} must be at least 1, got '
                   f'{getattr(options, name)}')
  if min(options.widths) < 1:
    parser.error(f'--widths must be at least 1, got {options.widths}')
  for name, file in (
      ('released', 'AT_AWP/utils_awp.py'),
      ('auto_attack', 'autoattack/autoattack.py'), ('network', ''),
      ('images', '')):
    value = getattr(options, name)
    if value and not (pathlib.Path(value) / file).exists():
      parser.error(f'--{name}={value}: no such file, '
                   f'{pathlib.Path(value) / file}')
  return options


def _available(options: argparse.Namespace) -> tuple[list[str], list[str]]:
  """The rivals that can run, and what cannot run and why."""
  needs = {
      cases.TUNED: ('torch_python',), cases.COMPILED: ('torch_python',),
      cases.RELEASED: ('torch_python', 'released'),
      cases.AUTO_ATTACK: ('torch_python', 'auto_attack')}
  found, skipped = [], []
  for name, flags in needs.items():
    missing = [flag for flag in flags if not getattr(options, flag)]
    if not missing:
      found.append(name)
    elif set(options.tasks) & ({cases.AUTOATTACK} if (
        name == cases.AUTO_ATTACK) else set(cases.SETTINGS)):
      skipped.append(f'{cases.TITLES[name]}: needs ' + ' and '.join(
          f'--{flag}' for flag in missing))
  return found, skipped


def main(argv: Sequence[str] | None = None) -> None:
  """Measures what the output lacks and prints the table."""
  options = parse(argv)
  rivals, skipped = _available(options)
  tasks = list(dict.fromkeys(options.tasks))
  if cases.AUTOATTACK in tasks and not options.network:
    tasks.remove(cases.AUTOATTACK)
    skipped.append('autoattack: needs --network; random weights have no '
                   'robust examples to find')
  sizes = {'image_size': options.image_size, 'num_steps': options.num_steps}
  chosen = runner.selected(
      tasks, options.widths, options.precisions,
      lambda width: options.batch_size or (32 if width >= 64 else 128), sizes,
      options.count)
  theirs = options.torch_python or sys.executable
  pythons = {
      name: sys.executable if name in (cases.OURS, cases.OURS_REFERENCE) else
      theirs for name in cases.IMPLEMENTATIONS}
  job = {
      name: str(pathlib.Path(value).resolve()) if value else '' for name, value
      in ((name, getattr(options, name)) for name in (
          'released', 'auto_attack', 'network', 'images'))}
  records, load = [], os.getloadavg()[0]
  if load > 0.5:
    print(f'The load average is {load:.1f}: other work on this machine makes '
          'the ratios unreliable.', file=sys.stderr)
  with tempfile.TemporaryDirectory() as cache:
    turns = runner.Turns(
        {**job, 'repeats': options.repeats, 'seconds': options.seconds},
        pythons, {python: runner.versions(python) for python in {
            *pythons.values()}}, pathlib.Path(cache), {'load': load})
    for record, new in turns.measurements(
        [(case, cases.implementations(case, rivals)) for case in chosen],
        options.rounds, options.output):
      records.append(record)
      case = cases.Case(**record['case'])
      print(
          'round', record['round'], case.task, case.width, case.batch_size,
          case.precision, record['implementation'],
          record.get('seconds', record.get('error')),
          '' if new else '(from the file)', file=sys.stderr, flush=True)
  print(table.markdown(records, skipped))
