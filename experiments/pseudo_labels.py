"""Labels images with a naturally trained network, for robust self-training.

  python experiments/pseudo_labels.py --workdir=runs/natural \
    --images=unlabeled.npz --output=extra.npz --per_class=50000

The output holds `image`, `label`, `confidence` (the largest probability) and
`origin` (the network, as JSON). Training reads it as `extra.path`. The formats
of the images are those of `experiments/data/extra_images.py`; existing labels
are ignored.

`--torch_checkpoint` labels with a PyTorch file instead of the run's network.
The run in the workdir still determines the data set.
"""

from collections.abc import Callable, Sequence
import json
import pathlib
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from awp_jax.core import checks
from experiments.config import build
from experiments.data import batches, extra_images
from experiments.modes import evaluate
from experiments.runs import precision, reading, restore, workdirs
from experiments.runs import run as run_lib
from experiments.util import atomic, console, paths
from experiments.util.errors import UserError, user_errors


class Labeled(NamedTuple):
  """Labels that a network assigns to images.

  Attributes:
    labels: most probable classes, int32 [N].
    confidence: their probabilities, float32 [N].
  """

  labels: np.ndarray
  confidence: np.ndarray


def predict(
    logits_fn: Callable[[Any], Any], images: np.ndarray, batch_size: int
) -> Labeled:
  """Labels images in batches of one shape, sharded over all devices.

  Args:
    logits_fn: images [B, H, W, C] in [0, 1] -> logits [B, K].
    images: [N, H, W, C], uint8 or floats in [0, 1].
    batch_size: over all devices; a multiple of their number.

  Returns:
    The label and its probability for each image.

  Raises:
    UserError: for a wrong batch size or non-finite logits.
  """
  with user_errors():
    checks.count('batch_size', batch_size)
  num_devices = jax.device_count()
  build.check_devices(batch_size, num_devices, 'batch_size')

  @jax.pmap
  def label(batch: Any) -> Any:
    logits = logits_fn(batches.to_pixels(batch, jnp.dtype(jnp.float32)))
    logits = logits.astype(jnp.float32)
    # Softmax may hide a non-finite logit, so mark such images with NaN.
    finite = jnp.where(jnp.isfinite(logits).all(axis=-1), 0.0, jnp.nan)
    return logits.argmax(axis=-1), jax.nn.softmax(logits).max(axis=-1) + finite

  labels = np.zeros(len(images), np.int32)
  confidence = np.zeros(len(images), np.float32)
  bar = tqdm.tqdm(
      total=len(images), unit='image', disable=not sys.stderr.isatty())
  with bar:
    for begin in range(0, len(images), batch_size):
      part = images[begin:begin + batch_size]
      end = begin + len(part)
      padded = np.zeros((batch_size, *images.shape[1:]), images.dtype)
      padded[:len(part)] = part
      found = label(padded.reshape(num_devices, -1, *images.shape[1:]))
      labels[begin:end], confidence[begin:end] = (
          np.asarray(array).reshape(-1)[:len(part)] for array in found)
      bar.update(len(part))
  if not np.isfinite(confidence).all():
    raise UserError(
        'the logits of the network are not finite, first for image '
        f'{int(np.flatnonzero(~np.isfinite(confidence))[0])}.')
  return Labeled(labels, confidence)


def check_selection(min_confidence: float, per_class: int) -> None:
  """Raises UserError for values out of range."""
  if not 0 <= min_confidence <= 1:
    raise UserError(
        f'min_confidence must be in [0, 1], got {min_confidence!r}.')
  with user_errors():
    checks.count('per_class', per_class, minimum=0)


def select(
    labeled: Labeled, num_classes: int, *, min_confidence: float = 0.0,
    per_class: int = 0) -> np.ndarray:
  """Chooses images by confidence.

  Args:
    labeled: from `predict`.
    num_classes: K.
    min_confidence: in [0, 1]; drops less confident images.
    per_class: keeps the n most confident images of each class; 0 keeps all.
      Ties are broken by position.

  Returns:
    Positions of the chosen images in ascending order.

  Raises:
    UserError: for values out of range, if no image is left, or if a class has
      fewer than `per_class` images.
  """
  check_selection(min_confidence, per_class)
  positions = np.flatnonzero(labeled.confidence >= min_confidence)
  if not len(positions):
    raise UserError(
        f'min_confidence={min_confidence} leaves no image; the highest '
        f'confidence is {np.max(labeled.confidence):.4f}.')
  if not per_class:
    return positions
  labels = labeled.labels[positions]
  counts = np.bincount(labels, minlength=num_classes)
  if np.min(counts) < per_class:
    raise UserError(
        f'per_class={per_class}: only {np.min(counts)} images are labeled '
        f'{np.argmin(counts)} with a confidence of {min_confidence} or more.')
  order = np.lexsort((-labeled.confidence[positions], labels))
  starts = np.cumsum(counts) - counts
  chosen = order[(starts[:, None] + np.arange(per_class)).reshape(-1)]
  return np.sort(positions[chosen])


def prepare(
    workdir: paths.Path, torch_checkpoint: pathlib.Path | None, *,
    is_trusted: bool = False) -> run_lib.Run:
  """Opens the run in a workdir to use its network.

  Args:
    workdir: contains the run's `config.json`.
    torch_checkpoint: a PyTorch file to use instead of the run's checkpoints.
    is_trusted: whether its config may name parts of other packages.

  Returns:
    The run. Its folder is not changed.

  Raises:
    UserError: if there is no run, or no checkpoint.
  """
  config = workdirs.stored_config(workdir, is_trusted=is_trusted)
  config.evaluation.torch_checkpoint = str(torch_checkpoint or '')
  evaluate.check(config, workdir)
  return run_lib.reopen(config, workdir)


def load_subject(run: run_lib.Run, kind: str) -> restore.RestoredModel:
  """Loads the run's checkpoint of that kind, or the PyTorch file."""
  return next(restore.restore_models(run, (kind,)))


def save(
    path: pathlib.Path, images: np.ndarray, labeled: Labeled,
    origin: dict[str, Any], *, compress: bool = False) -> None:
  """Writes the file that `extra_images.load` reads, atomically.

  Args:
    path: of the .npz file.
    images: the chosen images, [N, H, W, C].
    labeled: their labels.
    origin: the source of the labels, as plain values.
    compress: whether to compress the file, which may take longer than labeling.
  """
  write = np.savez_compressed if compress else np.savez
  with atomic.replacing(path) as file:
    write(
        file, image=images, label=labeled.labels,
        confidence=labeled.confidence,
        origin=np.array(json.dumps(origin)))


def counts_table(labeled: Labeled, num_classes: int) -> str:
  """A table of the number of images and the mean confidence of each class."""
  rows = [['class', 'images', 'mean confidence']]
  for label in range(num_classes):
    confidence = labeled.confidence[labeled.labels == label]
    mean = f'{confidence.mean():.4f}' if len(confidence) else '-'
    rows.append([str(label), str(len(confidence)), mean])
  return console.table(rows)


def run_all(options: Any) -> None:
  """Labels images, selects some and writes them."""
  check_selection(options.min_confidence, options.per_class)
  if options.output.suffix != '.npz':
    raise UserError(f'--output={options.output} must end in .npz.')
  folder = options.output.parent
  if not folder.is_dir():
    raise UserError(f'--output: there is no folder {str(folder)!r}.')
  workdir = paths.parse(options.workdir)
  run = prepare(
      workdir, options.torch_checkpoint, is_trusted=options.trust_run)
  num_classes = run.dataset.num_classes
  images = extra_images.load_images(
      options.images, image_shape=run.dataset.x_train.shape[1:])
  if options.per_class * num_classes > len(images):
    raise UserError(
        f'per_class={options.per_class} of {num_classes} classes are more than '
        f'the {len(images)} images in {options.images}.')
  subject = load_subject(run, options.checkpoint)
  labeled = predict(subject.logits_fn, images, options.batch_size)
  chosen = select(
      labeled, num_classes, min_confidence=options.min_confidence,
      per_class=options.per_class)
  total = len(images)
  if len(chosen) < total:
    images = images[chosen]
    labeled = Labeled(*(values[chosen] for values in labeled))
  origin = {
      **subject.origin, 'judged_by': precision.judged_by(),
      'workdir': str(workdir), 'images': str(options.images),
      'min_confidence': options.min_confidence,
      'per_class': options.per_class}
  save(options.output, images, labeled, origin, compress=options.compress)
  print(counts_table(labeled, num_classes))
  print(f'\n{len(images):,} of {total:,} images are in {options.output}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  parser = console.Parser(__doc__)

  def path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser()

  parser.add_argument(
      '--workdir', required=True, help='folder of a run')
  parser.add_argument(
      '--images', type=path, required=True, help='.npz or pickle')
  parser.add_argument('--output', type=path, required=True, help='an .npz')
  parser.add_argument('--checkpoint', choices=reading.KINDS, default='best')
  parser.add_argument(
      '--torch_checkpoint', type=path,
      help="use this file instead of the run's checkpoints")
  parser.add_argument(
      '--batch_size', type=int, default=512, help='over all devices')
  parser.add_argument(
      '--min_confidence', type=float, default=0.0,
      help='drops less confident images')
  parser.add_argument(
      '--per_class', type=int, default=0,
      help='keeps the N most confident images per class; 0: all')
  parser.add_argument(
      '--compress', action='store_true', help='writes a smaller file, slower')
  parser.add_argument(
      '--trust_run', action='store_true',
      help="run the code of other packages that the run's config names")
  try:
    run_all(parser.parse_args(argv))
  except (UserError, OSError) as error:
    console.complain(error)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
