"""Weighted truncated AWP (WT-AWP) for a graph convolutional network.

  python examples/graph_gcn.py --data=FOLDER --datasets cora citeseer

The nodes of a citation graph are classified from a tenth of the labels. WT-AWP
perturbs only the first layer and mixes the perturbed loss with the plain one:

  (1 - lam) L(w) + lam L(w + v),    |v_1| = gamma |w_1|

`FOLDER` holds `cora.npz` and `citeseer.npz`. Without `--data` the first run
downloads them into `~/.cache/awp_jax`.

References:
  Wu, Bojchevski, Huang, Adversarial Weight Perturbation Improves Generalization
  in Graph Neural Networks, AAAI 2023.
"""

from collections.abc import Iterator, Sequence
import functools
import hashlib
import pathlib
import sys
from typing import Any, NamedTuple
import urllib.request

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from flax import linen as nn
import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp
from sklearn.model_selection import train_test_split

from awp_jax import Method, methods, perturbed_step
from examples import report

#: The files that the paper's code downloads, at a fixed commit.
URL = ('https://raw.githubusercontent.com/danielzuegner/gnn-meta-attack/'
       'df95d2164bd28a392172997bf7ea010c184431d5/data/')
SHA256 = {
    'cora': '398a5c8f949a4f2a3c8fb248f777d2756c654de714762d6a18c04eaa19a96271',
    'citeseer':
        '36e9a5bbe84eaa0c3c6b226f8b27450bb79246a5df22c375b3bacddb856efa8e'}
CACHE = pathlib.Path('~/.cache/awp_jax').expanduser()


class Graph(NamedTuple):
  """The largest connected component of a graph.

  Attributes:
    features: [N, F], sparse.
    adjacency: D^-1/2 (A + I) D^-1/2, [N, N], sparse.
    labels: [N].
  """

  features: sparse.BCOO
  adjacency: sparse.BCOO
  labels: jax.Array


class Nodes(NamedTuple):
  """Nodes for training (10 %), validation (10 %) and test (80 %)."""

  train: jax.Array
  validation: jax.Array
  test: jax.Array


def fetch(name: str) -> pathlib.Path:
  """Downloads the file of a graph once, verified, and returns its path."""
  path = CACHE / f'{name}.npz'
  if not path.exists():
    with urllib.request.urlopen(f'{URL}{name}.npz', timeout=30) as response:
      content = response.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256[name]:
      raise ValueError(
          f'{URL}{name}.npz must have SHA-256 {SHA256[name]}, got {digest}.')
    CACHE.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return path


def load(path: pathlib.Path) -> Graph:
  """Reads the largest component of a graph, undirected and unweighted."""
  with np.load(path) as file:
    missing = {'adj_data', 'attr_data', 'labels'} - set(file)
    if missing:
      raise ValueError(
          f'{path} must hold adj_data, attr_data and labels, got {list(file)}.')
    adjacency, features = (
        sp.csr_matrix((file[f'{part}_data'], file[f'{part}_indices'],
                       file[f'{part}_indptr']), file[f'{part}_shape'])
        for part in ('adj', 'attr'))
    labels = file['labels'].astype(np.int32)
  adjacency = ((adjacency + adjacency.T) > 0).astype(np.float32)
  component = sp.csgraph.connected_components(adjacency)[1]
  largest = np.flatnonzero(component == np.argmax(np.bincount(component)))
  adjacency = adjacency[largest][:, largest].tolil()
  adjacency.setdiag(1)
  scale = sp.diags(np.asarray(adjacency.sum(0)).ravel() ** -0.5)
  return Graph(
      _sparse(features[largest]), _sparse(scale @ adjacency @ scale),
      jnp.asarray(labels[largest]))


def _sparse(matrix: Any) -> sparse.BCOO:
  """Converts a SciPy matrix; sorted indices speed up products."""
  matrix = matrix.tocsr().astype(np.float32)
  matrix.sum_duplicates()
  coo = matrix.tocoo()
  indices = np.stack([coo.row, coo.col], axis=1)
  return sparse.BCOO(
      (jnp.asarray(coo.data), jnp.asarray(indices)), shape=coo.shape,
      indices_sorted=True, unique_indices=True)


def split(labels: Any, seed: int) -> Nodes:
  """The stratified split of the paper's code for a seed."""
  rng = np.random.RandomState(seed)
  labels = np.asarray(labels)
  # The order of operations in the paper's code: rounding affects the split.
  one_tenth = 1 - 0.1 - 0.8
  known, test = train_test_split(
      np.arange(len(labels)), train_size=one_tenth + 0.1, test_size=0.8,
      stratify=labels, random_state=rng)
  train, validation = train_test_split(
      known, train_size=one_tenth / (one_tenth + 0.1),
      test_size=0.1 / (one_tenth + 0.1), stratify=labels[known],
      random_state=rng)
  return Nodes(*map(jnp.asarray, (train, validation, test)))


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  bound = shape[-1] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class GraphConvolution(nn.Module):
  """adjacency @ (x @ kernel) + bias."""

  features: int

  @nn.compact
  def __call__(self, x: Any, adjacency: sparse.BCOO) -> jax.Array:
    """x [N, F] -> [N, features]."""
    kernel = self.param('kernel', _uniform, (x.shape[1], self.features),
                        jnp.float32)
    bias = self.param('bias', _uniform, (self.features,), jnp.float32)
    return adjacency @ (x @ kernel) + bias


class GCN(nn.Module):
  """Two graph convolutions, with dropout in between."""

  num_classes: int
  hidden: int = 64
  dropout: float = 0.5

  @nn.compact
  def __call__(self, graph: Graph, train: bool = False) -> jax.Array:
    """Logits [N, num_classes]."""
    x = GraphConvolution(self.hidden, name='first')(
        graph.features, graph.adjacency)
    x = nn.Dropout(self.dropout)(nn.relu(x), deterministic=not train)
    return GraphConvolution(self.num_classes, name='second')(
        x, graph.adjacency)


@functools.partial(
    jax.jit, static_argnames=('method', 'steps', 'num_classes'))
def train(
    graph: Graph, nodes: Nodes, key: jax.Array, method: Method, steps: int,
    num_classes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Trains a network.

  Returns:
    Validation loss, validation accuracy and test accuracy of each step.
  """
  model = GCN(num_classes)
  init_key, dropout_key = jax.random.split(key)
  params = model.init(init_key, graph)['params']
  # Weight decay in the paper's code is coupled: part of the gradient.
  tx = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(0.01))

  def losses(logits: Any, which: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[which], graph.labels[which])

  def loss_fn(params: Any, key: jax.Array) -> jax.Array:
    logits = model.apply(
        {'params': params}, graph, train=True, rngs={'dropout': key})
    return losses(logits, nodes.train)

  def step(carry: Any, key: jax.Array) -> Any:
    out = perturbed_step(method, loss_fn, tx, *carry, key)
    logits: Any = model.apply({'params': out.params}, graph)
    right = logits.argmax(-1) == graph.labels
    return out[:3], (
        losses(logits, nodes.validation).mean(),
        right[nodes.validation].mean(), right[nodes.test].mean())

  return jax.lax.scan(
      step, (params, tx.init(params), method.init(params)),
      jax.random.split(dropout_key, steps))[1]


def chosen_step(loss: np.ndarray, accuracy: np.ndarray) -> int:
  """Last step at which validation loss or accuracy was the best so far.

    >>> chosen_step(np.array([3., 2., 4., 3.]), np.array([0.1, 0.2, 0.3, 0.3]))
    2
  """
  best_loss = np.minimum.accumulate(loss)
  best_accuracy = np.maximum.accumulate(accuracy)
  records = [0] + [
      i for i in range(1, len(loss))
      if loss[i] < best_loss[i - 1] or accuracy[i] > best_accuracy[i - 1]]
  return records[-1]


def compare(arguments: Any) -> Iterator[report.Row]:
  """Rows for every graph, without and with WT-AWP."""

  def wt_awp(gamma: float) -> Method:
    return methods.wt_awp(gamma, mask='first/kernel', lam=arguments.lam)

  variants = {'plain': wt_awp(0), 'WT-AWP': wt_awp(arguments.gamma)}
  for name in arguments.datasets:
    path = arguments.data / f'{name}.npz' if arguments.data else fetch(name)
    graph = load(path)
    num_classes = int(graph.labels.max()) + 1

    def accuracy(
        method: Method, seed: int, graph: Graph = graph,
        num_classes: int = num_classes) -> float:
      loss, validation, test = map(np.asarray, train(
          graph, split(graph.labels, seed), jax.random.key(seed), method,
          arguments.steps, num_classes))
      return test[chosen_step(loss, validation)]

    yield from report.rows(name, variants, arguments.seeds, accuracy)


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints test accuracies without and with WT-AWP."""
  parser = report.Parser(__doc__, seeds=2, steps=200)
  parser.add_argument('--data', type=pathlib.Path, help='folder of the graphs')
  parser.add_argument(
      '--datasets', nargs='+', choices=SHA256, default=['cora'],
      help='which graphs (default: cora)')
  parser.add_argument(
      '--gamma', type=report.size, default=0.7, help='|v| / |w| (default: 0.7)')
  parser.add_argument(
      '--lam', type=report.size, default=0.5,
      help='weight of the perturbed loss (default: 0.5)')
  return report.run(parser, compare, argv)


if __name__ == '__main__':
  main()
