"""AWP as used in text competitions, beside FGM and SMART.

  python examples/text_classification.py
  python examples/text_classification.py --csv=FILE     # columns: text, label
  python examples/text_classification.py --methods plain embeddings --bfloat16

A small transformer classifies short texts. Without `--csv` they are the first
sentences of SciPy's documentation, and the label is the subpackage:
`Compute the Kolmogorov-Smirnov test ...` -> `stats`. The methods:

  boxed       AWP of all weights by moves clipped to adv_eps |w_ij|,
              v = clip( adv_lr |w_l| g_l / |g_l| ),  within +- adv_eps |w_ij|.
  embeddings  the same for the token embeddings alone, chosen by their path.
  fgm         FGM (Miyato, Dai, Goodfellow 2017) as in competitions: the token
              embeddings E move by fgm_eps g / |g|, and the gradients at w and
              at w + v are added.
  smart       a smoothness term as in SMART (Jiang et al. 2020), which moves
              inputs and not weights: loss + smart_weight (KL(p || q) + KL(q ||
              p)), with q at embeddings of the texts moved by one step of PGD
              within +- smart_eps.

All start after `--start` plain steps, at the cost of plain steps, except smart.
The learning rate rises over the first tenth of the steps. With `--bfloat16` the
network computes in bfloat16 with float32 weights.
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

from awp_jax import (
    Ball,
    Method,
    ThreatModel,
    kl_divergence,
    methods,
    perturbed_step,
    pgd,
)
from examples import report

LENGTH = 16  # words read per text
WORDS = 2000  # words in the vocabulary, at most
BATCH = 64
FEWEST = 100  # texts of a subpackage, at least, for a class
EMBEDDINGS = 'Embed_0/*'  # their path
METHODS = ('plain', 'boxed', 'embeddings', 'fgm', 'smart')


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
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
      self, words: jax.Array, train: bool = False,
      noise: jax.Array | None = None) -> jax.Array:
    """Words [B, LENGTH] -> logits [B, num_classes].

    Args:
      words: indices of words.
      train: whether dropout is active.
      noise: added to the embedded words, [B, LENGTH, features], or None.
    """
    present, dtype = words > 0, self.dtype
    place = self.param('place', nn.initializers.normal(0.1),
                       (words.shape[1], self.features))
    dropout = nn.Dropout(0.2, deterministic=not train)
    x = nn.Embed(WORDS + 2, self.features)(words)
    x = dropout((x + place if noise is None else x + noise + place).astype(
        dtype))
    y = nn.MultiHeadDotProductAttention(4, dtype=dtype)(
        nn.LayerNorm(dtype=dtype)(x),
        mask=nn.make_attention_mask(present, present))
    x = x + dropout(y)
    y = nn.Dense(self.features, dtype=dtype)(nn.gelu(nn.Dense(
        2 * self.features, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))))
    x = jnp.where(
        present[..., None], x + dropout(y), 0).sum(1, dtype=jnp.float32)
    x = x / jnp.maximum(present.sum(1, keepdims=True), 1)
    return nn.Dense(self.num_classes)(x)


class Variant(NamedTuple):
  """How to train.

  Attributes:
    method: the weight perturbation.
    smart_weight: of the smoothness term; 0: none.
    smart_eps: largest change of an embedded word's entry in it.
  """

  method: Method
  smart_weight: float = 0.0
  smart_eps: float = 0.0


def smoothness(
    run: Any, clean: jax.Array, key: jax.Array, eps: float) -> jax.Array:
  """Symmetric KL [B] of the predictions at clean and at moved embeddings.

  Args:
    run: noise [B, LENGTH, features] -> logits [B, C].
    clean: the logits without noise.
    key: a PRNG key.
    eps: largest change of an entry.
  """
  fixed = jax.lax.stop_gradient(clean)
  # The box is far away: embeddings are not bounded.
  noise = pgd(
      key, lambda noise: kl_divergence(fixed, run(noise)),
      jnp.zeros((len(clean), LENGTH, Transformer.features)),
      ThreatModel('Linf', eps, lower=-1e3, upper=1e3), step_size=eps,
      num_steps=1, start='gaussian')
  moved = run(noise)
  return kl_divergence(clean, moved) + kl_divergence(moved, clean)


@functools.partial(jax.jit, static_argnames=('model', 'variant', 'steps'))
def train(
    model: Transformer, x: jax.Array, y: jax.Array, key: jax.Array,
    variant: Variant, steps: int) -> Any:
  """Trains on words [N, LENGTH] and labels [N]; returns the parameters."""
  init_key, loop_key = jax.random.split(key)
  params = model.init(init_key, x[:1])['params']
  method = variant.method
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(
      0.0, 2e-3, max(steps // 10, 1), max(steps, 2)), weight_decay=0.01)

  def loss_fn(
      params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:

    def run(noise: jax.Array | None = None) -> jax.Array:
      found: Any = model.apply({'params': params}, x, train=True, noise=noise,
                               rngs={'dropout': key})
      return found

    logits = run()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    if variant.smart_weight:
      losses += variant.smart_weight * smoothness(
          run, logits, jax.random.fold_in(key, 1), variant.smart_eps)
    return losses

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
    texts: Texts, variant: Variant, seed: int, steps: int, dtype: Any
) -> float:
  """Trains on four fifths of the texts; returns accuracy on the others."""
  known, held_out = train_test_split(
      np.arange(len(texts.labels)), test_size=0.2, stratify=texts.labels,
      random_state=seed)
  vocabulary = vocabulary_of([texts.texts[i] for i in known])
  x, labels = tokens(texts.texts, vocabulary), texts.labels
  model = Transformer(len(texts.classes), dtype=dtype)
  params = train(model, jnp.asarray(x[known]), jnp.asarray(labels[known]),
                 jax.random.key(seed), variant, steps)
  logits = logits_of(model, params, x[held_out])
  return float((logits.argmax(-1) == labels[held_out]).mean())


def variants_of(arguments: Any) -> dict[str, Variant]:
  """The chosen methods, `plain` always first."""
  boxed = functools.partial(
      methods.boxed_awp, arguments.adv_lr, arguments.adv_eps)
  fgm = Method(
      'FGM', Ball(arguments.fgm_eps, 'tensor', 'absolute'), mask=EMBEDDINGS,
      mix=(1, 1))
  found = {
      'plain': Variant(methods.boxed_awp(0)),
      'boxed': Variant(boxed()),
      'embeddings': Variant(boxed(mask=EMBEDDINGS)),
      'fgm': Variant(fgm),
      'smart': Variant(
          methods.boxed_awp(0), arguments.smart_weight, arguments.smart_eps)}
  return {
      name: variant._replace(
          method=methods.start_after(variant.method, arguments.start))
      for name, variant in found.items()
      if name == 'plain' or name in arguments.methods}


def compare(arguments: Any) -> Iterator[report.Row]:
  """Rows of the chosen methods."""
  csv_file = arguments.csv
  texts = read_csv(csv_file) if csv_file else scipy_docs()
  largest = np.max(np.bincount(texts.labels)) / len(texts.labels)
  print(f'{len(texts.labels)} texts of {len(texts.classes)} classes; the '
        f'largest is {100 * largest:.2f} %')
  dtype = jnp.bfloat16 if arguments.bfloat16 else jnp.float32
  yield from report.rows(
      csv_file.stem if csv_file else 'scipy', variants_of(arguments),
      arguments.seeds,
      lambda variant, seed: accuracy(
          texts, variant, seed, arguments.steps, dtype))


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints the test accuracies of all methods."""
  parser = report.Parser(__doc__, seeds=3, steps=400)
  parser.add_argument(
      '--methods', nargs='+', choices=METHODS, default=METHODS,
      help=f'of {", ".join(METHODS)} (default: all)')
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
  parser.add_argument(
      '--fgm_eps', type=report.size, default=0.5,
      help='|v| of FGM (default: 0.5)')
  parser.add_argument(
      '--smart_weight', type=report.size, default=1.0,
      help='of the smoothness term (default: 1)')
  parser.add_argument(
      '--smart_eps', type=report.size, default=0.01,
      help='largest change of an entry of an embedded word (default: 0.01)')
  parser.add_argument(
      '--bfloat16', action='store_true', help='compute in bfloat16')
  return report.run(parser, compare, argv)


if __name__ == '__main__':
  main()
