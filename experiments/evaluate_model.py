"""Evaluates any JAX classifier, or a PyTorch file, on a data set.

  python experiments/evaluate_model.py --model=my_package:load \
    --dataset=cifar10 --norm=Linf --epsilon=8/255 --workdir=runs/mine

`my_package:load` is a function that returns the classifier, a function of
images [B, H, W, C] in [0, 1] that returns logits [B, classes], with the
normalization inside. Options go in parentheses, and it gets `num_classes` and
`image_shape` if it has these arguments. `--torch=FILE` evaluates a PyTorch file
of one of the architectures that docs/pytorch.md lists.

The workdir then holds `result.json`, with the keys of RobustBench's model
cards, and `examples.npz`, the adversarial images; with `--epsilons`, also
`curve.json` and `curve.png`; with `--minimal`, `minimal.npz`. The same command
resumes after an interruption.
"""

import argparse
from collections.abc import Callable, Sequence
import fractions
import hashlib
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax.attacks import autoattack
from awp_jax.core import checks
from awp_jax.evaluation import arguments
from awp_jax.models import torch_exchange
from awp_jax.threat import NORMS
from experiments.data import batches, datasets
from experiments.reports import curves
from experiments.util import atomic, console, named, paths
from experiments.util.errors import UserError, user_errors


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(__doc__)
  subject = parser.add_mutually_exclusive_group(required=True)
  subject.add_argument('--model', help='package.module:function')
  subject.add_argument('--torch', type=pathlib.Path, help='a PyTorch file')
  parser.add_argument(
      '--torch_key', help='entry of the file with the weights')
  parser.add_argument(
      '--mean', help='with --torch: subtracted from the pixels, by channel, as '
      '0.49,0.48,0.45, or 0; only for files that do not hold it')
  parser.add_argument('--std', help='with --torch: divisors, or 1')
  parser.add_argument(
      '--activation', choices=('relu', 'silu'), help='with --torch')
  parser.add_argument(
      '--shortcut', choices=('normalized', 'plain'),
      help='with --torch: of a PreActResNet')
  parser.add_argument(
      '--dataset', default='cifar10',
      help=f'{", ".join(datasets.NAMES)}, or package.module:function')
  parser.add_argument('--data_dir', default='')
  parser.add_argument('--npz_path', default='')
  parser.add_argument(
      '--image_size', type=int, default=0,
      help='side of images averaged over squares of pixels; 0: as stored')
  parser.add_argument(
      '--num_test', type=int, default=0,
      help='size of a class-balanced subset of the test images; 0: all')
  parser.add_argument(
      '--data_seed', type=int, default=0, help='selects the subset')
  parser.add_argument(
      '--num_examples', type=int, default=0,
      help='the first of the test images; 0: all (default)')
  parser.add_argument('--norm', choices=NORMS, default='Linf')
  parser.add_argument(
      '--epsilon', help='as 0.5 or 8/255; by default 8/255 for Linf')
  parser.add_argument(
      '--version', choices=tuple(autoattack.VERSIONS), default='standard',
      help='of AutoAttack')
  parser.add_argument(
      '--epsilons', default='',
      help='separated by commas: the curve of robust accuracy over them')
  parser.add_argument(
      '--minimal', action='store_true',
      help='search the smallest perturbation of each image')
  parser.add_argument('--batch_size', type=int, default=None)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--workdir', required=True)
  return parser.parse_args(argv)


def _from_package(
    text: str, dataset: datasets.Dataset) -> tuple[Callable[..., Any], Any]:
  """The classifier of a function in another package, and facts about it."""
  name, options = named.parse_call(text, '--model')
  found = named.load('--model', name)
  made = named.call('--model', found, name, options=options, offered={
      'num_classes': dataset.num_classes,
      'image_shape': tuple(dataset.x_test.shape[1:])})
  if not callable(made):
    raise UserError(
        f'--model: {text!r} must return a function of images, got '
        f'{type(made).__name__}.')
  return made, {'name': text, 'source_sha256': named.digest(found)}


@user_errors()
def _from_torch(
    options: argparse.Namespace, dataset: datasets.Dataset
) -> tuple[Callable[..., Any], Any]:
  """The classifier of a PyTorch file, and facts about it."""
  path = options.torch
  state_dict = torch_exchange.read_state_dict(path, key=options.torch_key)
  stored = torch_exchange.normalization(state_dict)
  given = options.mean is not None or options.std is not None
  if stored is None and not given:
    raise UserError(
        f'{path} does not hold the mean and standard deviation of the pixels: '
        'give --mean and --std, which are 0 and 1 if there is no '
        'normalization; awp_jax.models.torch_exchange lists those of '
        f'RobustBench. Those of {dataset.name} are '
        f'{",".join(f"{x:g}" for x in dataset.mean)} and '
        f'{",".join(f"{x:g}" for x in dataset.std)}.')
  if stored is not None and given:
    raise UserError(f'{path} holds a mean and a std: omit --mean and --std.')
  mean, std = stored or (
      _numbers('--mean', options.mean or ''),
      _numbers('--std', options.std or ''))
  model: Any = torch_exchange.model_from_torch(
      state_dict, mean=mean, std=std, activation=options.activation,
      shortcut=options.shortcut)
  if model.num_classes != dataset.num_classes:
    raise UserError(
        f'{path} classifies into {model.num_classes} classes, {dataset.name} '
        f'has {dataset.num_classes}.')
  variables = torch_exchange.from_torch(state_dict, model)
  return lambda images: model.apply(variables, images, train=False), {
      'name': path.stem,
      'architecture': f'{type(model).__name__}-{model.depth}, width '
      f'{model.width}, {model.activation}',
      'mean': list(mean), 'std': list(std),
      'weights_sha256': hashlib.sha256(path.read_bytes()).hexdigest()}


def _numbers(flag: str, text: str) -> tuple[float, ...]:
  """The numbers of a list like '0.01,8/255'; at least one."""
  try:
    return tuple(
        float(fractions.Fraction(part.strip())) for part in text.split(','))
  except (ValueError, ZeroDivisionError):
    raise UserError(
        f"{flag} must be numbers like '0.01,8/255', got {text!r}.") from None


def _radii(options: argparse.Namespace) -> tuple[float, tuple[float, ...]]:
  """Epsilon, and the epsilons of the curve."""
  if options.epsilon is None and options.norm != 'Linf':
    raise UserError(f'--norm={options.norm} needs --epsilon.')
  one = _numbers('--epsilon', options.epsilon or '8/255')
  if len(one) != 1:
    raise UserError(f'--epsilon must be one number, got {options.epsilon!r}.')
  radii = _numbers('--epsilons', options.epsilons) if options.epsilons else ()
  if any(radius <= 0 for radius in radii) or sorted(set(radii)) != list(radii):
    raise UserError(
        f'--epsilons must be rising numbers > 0, got {options.epsilons!r}.')
  return one[0], radii


def _load_data(options: argparse.Namespace) -> datasets.Dataset:
  dataset = datasets.load(
      options.dataset, data_dir=options.data_dir or None,
      npz_path=options.npz_path or None, num_test=options.num_test or None,
      seed=options.data_seed, image_size=options.image_size or None)
  available = len(dataset.y_test)
  if not 0 <= options.num_examples <= available:
    raise UserError(
        f'--num_examples must be in 0..{available}, got '
        f'{options.num_examples}.')
  count = options.num_examples or available
  return dataset._replace(
      x_test=dataset.x_test[:count], y_test=dataset.y_test[:count])


def _curve(
    workdir: paths.Path, logits_fn: Callable[..., Any], images: np.ndarray,
    labels: np.ndarray, options: argparse.Namespace,
    radii: tuple[float, ...], settings: awp_jax.EvalOptions) -> None:
  """Writes and prints the curve over epsilon."""
  found = awp_jax.robust_curve(
      jax.random.key(options.seed), logits_fn, images, labels, options.norm,
      radii, attacks=autoattack.VERSIONS[options.version],
      options=settings)
  atomic.write_json(workdir / 'curve.json', {
      'norm': options.norm,
      'attacks': list(autoattack.VERSIONS[options.version]),
      'epsilons': found.epsilons.tolist(),
      'robust_accuracy': found.robust_accuracy.tolist(),
      'interval_95': found.intervals.tolist(),
      'natural_accuracy': float(found.natural.mean())})
  curves.plot_epsilons(found, options.norm, workdir / 'curve.png')
  rows = [['epsilon', 'robust accuracy', '95 % interval']]
  for epsilon, share, (low, high) in zip(
      found.epsilons, found.robust_accuracy, found.intervals, strict=True):
    rows.append([f'{epsilon:.4g}', f'{100 * share:.2f} %',
                 f'{100 * low:.2f} - {100 * high:.2f}'])
  print(f'\n{console.table(rows)}')


def _minimal(
    workdir: paths.Path, logits_fn: Callable[..., Any], images: np.ndarray,
    labels: np.ndarray, options: argparse.Namespace) -> None:
  """Writes the smallest perturbations and prints their median."""
  found = awp_jax.minimal_perturbations(
      jax.random.key(options.seed), logits_fn, images, labels, options.norm,
      batch_size=options.batch_size)
  with atomic.replacing(workdir / 'minimal.npz') as file:
    arrays: dict[str, Any] = found._asdict()
    np.savez_compressed(file, **arrays)
  correct = found.distances[found.natural]
  middle = f'{np.median(correct):.4g}' if correct.size else 'none'
  print(f'\nsmallest perturbations ({options.norm}) of the {correct.size} '
        f'correctly classified images: median {middle}')


def _check_pass(
    logits_fn: Callable[..., Any], images: np.ndarray, labels: np.ndarray,
    threat: awp_jax.ThreatModel) -> None:
  """Raises UserError unless the classifier can be traced on the images."""
  try:
    arguments.check_model_inputs(logits_fn, images, labels, threat)
  except ValueError as error:
    raise UserError(str(error)) from error
  except Exception as error:
    raise UserError(
        f'a pass over images of shape {images.shape[1:]} failed with '
        f'{type(error).__name__}: {error}') from error


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
  """Evaluates the model and writes the files of the workdir.

  Args:
    options: of the command.

  Returns:
    The contents of `result.json`.

  Raises:
    UserError: for a model, data set or number that cannot be used.
  """
  named.search_here('')
  workdir = paths.parse(options.workdir)
  if paths.is_bucket(workdir):
    raise UserError(f'--workdir must be a local folder, got {workdir}.')
  epsilon, radii = _radii(options)
  with user_errors():
    threat = awp_jax.ThreatModel(options.norm, epsilon)
    if options.batch_size is not None:
      checks.count('--batch_size', options.batch_size)
  dataset = _load_data(options)
  logits_fn, about = _from_package(options.model, dataset) if (
      options.model) else _from_torch(options, dataset)
  images = np.asarray(batches.to_pixels(
      jnp.asarray(dataset.x_test), jnp.dtype(jnp.float32)))
  _check_pass(logits_fn, images, dataset.y_test, threat)
  workdir.mkdir(parents=True, exist_ok=True)
  settings = awp_jax.EvalOptions(
      store=workdir / 'store', verbose=True, batch_size=options.batch_size)
  result = awp_jax.auto_attack(
      jax.random.key(options.seed), logits_fn, images, dataset.y_test, threat,
      version=options.version, options=settings)
  name = about.pop('name')
  summary = awp_jax.result_to_dict(
      result, threat, name=name, dataset=dataset.name, about={
          'version': options.version, 'seed': options.seed,
          'data': datasets.describe(dataset), **about})
  atomic.write_json(workdir / 'result.json', summary)
  with atomic.replacing(workdir / 'examples.npz') as file:
    awp_jax.save_examples(file, result)
  low, high = summary['autoattack_acc_interval_95']
  print(f'\n{name} on {len(dataset.y_test)} images of {dataset.name}: natural '
        f'{summary["clean_acc"]} %, AutoAttack ({options.version}, '
        f'{options.norm}, epsilon {epsilon:.4g}) '
        f'{summary["autoattack_acc"]} % ({low:.2f} - {high:.2f})')
  if radii:
    _curve(
        workdir, logits_fn, images, dataset.y_test, options, radii, settings)
  if options.minimal:
    _minimal(workdir, logits_fn, images, dataset.y_test, options)
  return summary


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code, 2 for wrong arguments."""
  options = _parse(argv)
  try:
    if options.version == 'rand':
      raise UserError(
          "--version=rand is for randomized models: use awp_jax.auto_attack "
          'with EvalOptions(takes_key=True).')
    with console.ended_by_signals(options.workdir):
      evaluate(options)
  except (UserError, OSError) as error:
    console.complain(error)
    return 2
  print(f'\nresult.json and examples.npz are in {options.workdir}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
