"""AWP as used in text competitions: clipped per entry, starting after a while.

  python examples/text_classification.py
  python examples/text_classification.py --csv=FILE     # columns: text, label

A small transformer classifies short texts. Without `--csv` they are the first
sentences of SciPy's documentation, and the label is the subpackage:
`Compute the Kolmogorov-Smirnov test ...` -> `stats`. All weights, including
embeddings, are perturbed by moves clipped to adv_eps |w_ij|:

  v = clip( adv_lr |w_l| g_l / |g_l| ),  within +- adv_eps |w_ij|

The first `--start` steps are plain steps, at the cost of plain steps.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
import csv
import functools
import pathlib
import re
import sys
from typing import Any, NamedTuple

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy
from sklearn.model_selection import train_test_split

from awp_jax import Method, methods, perturbed_step
from examples import report

LENGTH = 16  # words read per text
WORDS = 2000  # words in the vocabulary, at most
BATCH = 64
FEWEST = 100  # texts of a subpackage, at least, for a class


class Texts(NamedTuple):
  """Texts and their labels.

  Attributes:
    texts: N strings.
    labels: class indices [N], in 0..C-1.
    classes: names of the C classes.
  """

  texts: list[str]
  labels: np.ndarray
  classes: list[str]


def scipy_docs() -> Texts:
  """First sentences of SciPy's docstrings, read without importing them."""
  root = pathlib.Path(scipy.__file__).parent
  pairs: dict[str, str] = {}
  for path in sorted(root.glob('[a-z]*/**/*.py')):
    package, *folders = path.relative_to(root).parts
    if 'tests' in folders:
      continue
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        first = (ast.get_docstring(node) or '').split('\n\n')[0]
        if len(first.split()) > 3:  # a repeated sentence counts once
          pairs.setdefault(' '.join(first.split()), package)
  sizes = Counter(pairs.values())
  return _number([pair for pair in pairs.items() if sizes[pair[1]] >= FEWEST])


def read_csv(path: pathlib.Path) -> Texts:
  """Reads texts from a file with the columns `text` and `label`."""
  with path.open(newline='', encoding='utf-8') as file:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or []
    if not {'text', 'label'} <= set(columns):
      raise ValueError(
          f'{path} must have the columns text and label, got {list(columns)}.')
    texts = _number([(row['text'], row['label']) for row in reader])
  fewest = min(np.bincount(texts.labels), default=0)
  if len(texts.classes) < 2 or fewest < 2:
    raise ValueError(
        f'{path} must hold two labels or more, each twice or more, got '
        f'{len(texts.labels)} texts of the labels {texts.classes}.')
  return texts


def _number(pairs: list[tuple[str, str]]) -> Texts:
  classes, labels = np.unique([label for _, label in pairs],
                              return_inverse=True)
  return Texts(
      [text for text, _ in pairs], labels.astype(np.int32), classes.tolist())


def tokens(texts: list[str], vocabulary: dict[str, int]) -> np.ndarray:
  """Word indices [N, LENGTH]: 0 is padding, 1 an unknown word."""
  numbers = np.zeros((len(texts), LENGTH), np.int32)
  for row, text in zip(numbers, texts, strict=True):
    words = re.findall(r'\w+', text.lower())[:LENGTH]
    row[:len(words)] = [vocabulary.get(word, 1) for word in words]
  return numbers


def vocabulary_of(texts: list[str]) -> dict[str, int]:
  """Maps the most common words, seen twice or more, to 2, 3, ..."""
  counts = Counter(
      word for text in texts for word in re.findall(r'\w+', text.lower()))
  common = [word for word, times in counts.most_common(WORDS) if times > 1]
  return {word: number for number, word in enumerate(common, start=2)}


class Transformer(nn.Module):
  """One transformer layer and a mean over the words."""

  num_classes: int
  features: int = 64

  @nn.compact
  def __call__(self, words: jax.Array, train: bool = False) -> jax.Array:
    """Words [B, LENGTH] -> logits [B, num_classes]."""
    present = words > 0
    place = self.param('place', nn.initializers.normal(0.1),
                       (words.shape[1], self.features))
    dropout = nn.Dropout(0.2, deterministic=not train)
    x = dropout(nn.Embed(WORDS + 2, self.features)(words) + place)
    y = nn.MultiHeadDotProductAttention(4)(
        nn.LayerNorm()(x), mask=nn.make_attention_mask(present, present))
    x = x + dropout(y)
    y = nn.Dense(self.features)(
        nn.gelu(nn.Dense(2 * self.features)(nn.LayerNorm()(x))))
    x = jnp.where(present[..., None], x + dropout(y), 0).sum(1)
    x = x / jnp.maximum(present.sum(1, keepdims=True), 1)
    return nn.Dense(self.num_classes)(x)


@functools.partial(jax.jit, static_argnames=('model', 'method', 'steps'))
def train(
    model: Transformer, x: jax.Array, y: jax.Array, key: jax.Array,
    method: Method, steps: int) -> Any:
  """Trains on words [N, LENGTH] and labels [N]; returns the parameters."""
  init_key, loop_key = jax.random.split(key)
  params = model.init(init_key, x[:1])['params']
  tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.01)

  def loss_fn(
      params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    logits = model.apply({'params': params}, x, train=True,
                         rngs={'dropout': key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)

  def step(carry: Any, key: jax.Array) -> Any:
    batch_key, dropout_key = jax.random.split(key)
    rows = jax.random.randint(batch_key, (BATCH,), 0, len(y))
    out = perturbed_step(method, loss_fn, tx, *carry, x[rows], y[rows],
                         dropout_key)
    return out[:3], out.loss

  carry = (params, tx.init(params), method.init(params))
  return jax.lax.scan(step, carry, jax.random.split(loop_key, steps))[0][0]


@functools.partial(jax.jit, static_argnames='model')
def logits_of(model: Transformer, params: Any, x: jax.Array) -> Any:
  """Words [N, LENGTH] -> logits [N, C], without dropout."""
  return model.apply({'params': params}, x)


def accuracy(
    texts: Texts, method: Method, seed: int, steps: int) -> float:
  """Trains on four fifths of the texts; returns accuracy on the others."""
  known, held_out = train_test_split(
      np.arange(len(texts.labels)), test_size=0.2, stratify=texts.labels,
      random_state=seed)
  vocabulary = vocabulary_of([texts.texts[i] for i in known])
  x, labels = tokens(texts.texts, vocabulary), texts.labels
  model = Transformer(len(texts.classes))
  params = train(model, jnp.asarray(x[known]), jnp.asarray(labels[known]),
                 jax.random.key(seed), method, steps)
  logits = logits_of(model, params, x[held_out])
  return float((logits.argmax(-1) == labels[held_out]).mean())


def compare(arguments: Any) -> Iterator[report.Row]:
  """Rows without and with AWP."""
  csv_file = arguments.csv
  texts = read_csv(csv_file) if csv_file else scipy_docs()
  largest = np.max(np.bincount(texts.labels)) / len(texts.labels)
  print(f'{len(texts.labels)} texts of {len(texts.classes)} classes; the '
        f'largest is {100 * largest:.2f} %')
  boxed = methods.boxed_awp(arguments.adv_lr, arguments.adv_eps)
  variants = {
      'plain': methods.boxed_awp(0),
      'boxed AWP': methods.start_after(boxed, arguments.start)}
  yield from report.rows(
      csv_file.stem if csv_file else 'scipy', variants, arguments.seeds,
      lambda method, seed: accuracy(texts, method, seed, arguments.steps))


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints test accuracies without and with AWP."""
  parser = report.Parser(__doc__, seeds=3, steps=400)
  parser.add_argument('--csv', type=pathlib.Path, help='your texts')
  parser.add_argument(
      '--adv_lr', type=report.size, default=1.0,
      help='size of a move, relative to |w_l| (default: 1)')
  parser.add_argument(
      '--adv_eps', type=report.size, default=0.05,
      help='half side of the box, relative to |w_ij| (default: 0.05)')
  parser.add_argument(
      '--start', type=report.count, default=50,
      help='plain steps before AWP starts (default: 50)')
  return report.run(parser, compare, argv)


if __name__ == '__main__':
  main()
