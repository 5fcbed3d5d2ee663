"""Shortened runs of the examples: tables, and errors for wrong input.

Nothing is downloaded. `graph_gcn` reads its graphs from `graphs/` in the folder
AWP_TEST_DATA, if set, and otherwise a small generated graph.
"""

import csv
import doctest
import hashlib
import importlib
import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

import awp_jax
from examples import (
  equinox_model,
  graph_gcn,
  nnx_model,
  report,
  tabular,
  text_classification,
  train_step_equinox,
  train_step_nnx,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    path.stem for path in (ROOT / 'examples').glob('*.py')
    if path.stem not in ('__init__', 'report', 'robust_digits'))
#: Pages of `docs/` with examples, and the fewest that each must run.
PAGES = {'in_your_project.md': 41, 'evaluation.md': 12, 'landscape.md': 9,
         'pytorch.md': 10}


def check(rows, out, data, methods, above):
  """Checks that rows match the printed table and exceed an accuracy."""
  assert [row[:2] for row in rows] == [
      (name, method) for name in data for method in methods]
  lines = out.splitlines()[-len(rows):]
  for row, line in zip(rows, lines, strict=True):
    assert line.startswith(row.data)
    assert row.method in line
    assert f'{100 * np.mean(row.accuracies):.2f}' in line
    assert all(0 <= value <= 1 for value in row.accuracies)
    assert np.mean(row.accuracies) > above
    assert row.seconds > 0


@pytest.fixture
def graphs(tmp_path):
  """A folder with a small `cora.npz`: two communities and an isolated pair."""
  rng = np.random.default_rng(0)
  labels = np.repeat([0, 1], 30)
  same = labels[:, None] == labels
  adjacency = np.triu(rng.random((60, 60)) < np.where(same, 0.3, 0.01), 1)
  adjacency = sp.block_diag(
      [sp.coo_array(adjacency), sp.coo_array([[0, 1], [0, 0]])], format='csr')
  features = sp.csr_matrix(rng.integers(0, 2, (62, 8)))
  arrays = {'labels': np.append(labels, [0, 1]).astype(np.int8)}
  for part, matrix in (('adj', adjacency), ('attr', features)):
    arrays |= {
        f'{part}_data': matrix.data.astype(np.float32),
        f'{part}_indices': matrix.indices, f'{part}_indptr': matrix.indptr,
        f'{part}_shape': np.array(matrix.shape)}
  np.savez(tmp_path / 'cora.npz', **arrays)
  return tmp_path


def test_graph_is_normalized_and_connected(graphs):
  graph = graph_gcn.load(graphs / 'cora.npz')
  with np.load(graphs / 'cora.npz') as file:
    a = sp.csr_matrix((file['adj_data'], file['adj_indices'],
                       file['adj_indptr']), file['adj_shape']).toarray()
  a = (a + a.T)[:60, :60] + np.eye(60)  # without the isolated pair
  degree = a.sum(0)
  np.testing.assert_allclose(
      graph.adjacency.todense(), a / np.sqrt(degree[:, None] * degree),
      rtol=1e-6)
  assert graph.features.shape == (60, 8)
  assert np.bincount(graph.labels).tolist() == [30, 30]


def test_graph_network_is_its_formula(graphs):
  graph = graph_gcn.load(graphs / 'cora.npz')
  model = graph_gcn.GCN(2)
  params = model.init(jax.random.key(0), graph)['params']
  a, x = graph.adjacency.todense(), graph.features.todense()
  first, second = params['first'], params['second']
  hidden = jnp.maximum(a @ x @ first['kernel'] + first['bias'], 0)
  np.testing.assert_allclose(
      model.apply({'params': params}, graph),
      a @ hidden @ second['kernel'] + second['bias'], rtol=1e-4, atol=1e-6)


def test_graph_split(graphs):
  labels = graph_gcn.load(graphs / 'cora.npz').labels
  nodes = graph_gcn.split(labels, 0)
  everyone = np.concatenate(nodes)
  assert len(set(everyone.tolist())) == len(everyone)
  # Rounding as in the paper's code leaves some nodes out.
  assert [len(part) for part in nodes] == [5, 6, 48]
  assert np.bincount(labels[nodes.test]).tolist() == [24, 24]
  other = graph_gcn.split(labels, 1)
  assert not np.array_equal(nodes.test, other.test)


def test_graph_gcn(graphs, capsys):
  rows = graph_gcn.main([f'--data={graphs}', '--seeds=2', '--steps=30'])
  check(rows, capsys.readouterr().out, ['cora'], ['plain', 'WT-AWP'], 0.6)


@pytest.mark.slow
def test_graph_gcn_on_cora(data_folder):
  graph = graph_gcn.load(data_folder / 'graphs' / 'cora.npz')
  # The sizes of the largest component and of the split in the paper's code.
  assert graph.features.shape == (2485, 1433)
  nodes = graph_gcn.split(graph.labels, 0)
  assert [len(part) for part in nodes] == [247, 249, 1988]
  rows = graph_gcn.main([
      f'--data={data_folder}/graphs', '--seeds=1', '--steps=30'])
  assert all(row.accuracies[0] > 0.7 for row in rows)  # the largest: 0.29


def test_download_is_verified_and_kept(monkeypatch, tmp_path):
  content, asked = b'a graph', []

  def urlopen(url, timeout):
    asked.append(url)
    return io.BytesIO(content)

  monkeypatch.setattr(graph_gcn.urllib.request, 'urlopen', urlopen)
  monkeypatch.setattr(graph_gcn, 'CACHE', tmp_path / 'cache')
  with pytest.raises(ValueError, match='must have SHA-256 398a5c8'):
    graph_gcn.fetch('cora')
  assert not (tmp_path / 'cache').exists()
  monkeypatch.setitem(
      graph_gcn.SHA256, 'cora', hashlib.sha256(content).hexdigest())
  assert graph_gcn.fetch('cora').read_bytes() == content
  graph_gcn.fetch('cora')
  assert len(asked) == 2
  assert asked[0].startswith('https://') and asked[0].endswith('/cora.npz')


def test_text_of_scipy():
  texts = text_classification.scipy_docs()
  assert {'stats', 'signal', 'linalg'} <= set(texts.classes)
  assert len(set(texts.texts)) == len(texts.texts) > 2000
  assert np.bincount(texts.labels).min() >= text_classification.FEWEST


def test_tokens():
  vocabulary = text_classification.vocabulary_of(
      ['The tree, the leaf.', 'a leaf'])
  assert vocabulary == {'the': 2, 'leaf': 3}
  row = text_classification.tokens(['THE old leaf'], vocabulary)[0]
  assert row[:4].tolist() == [2, 1, 3, 0]


def test_text_from_csv(tmp_path, capsys):
  path = tmp_path / 'mine.csv'
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['label', 'text'])
    for i in range(40):
      writer.writerow(['good', f'a fine, fine day {i % 7}'])
      writer.writerow(['bad', f'a dull, dull night {i % 5}'])
  rows = text_classification.main([
      f'--csv={path}', '--seeds=1', '--steps=40', '--start=5', '--methods',
      'boxed', 'smart'])
  out = capsys.readouterr().out
  assert out.startswith('80 texts of 2 classes; the largest is 50.00 %')
  check(rows, out, ['mine'], ['plain', 'boxed', 'smart'], 0.9)


def test_methods_of_text():
  """Which leaves move, in bfloat16 with float32 weights; SMART's term."""
  parser = text_classification.report.Parser('', seeds=1, steps=1)
  arguments = parser.parse_args([])
  vars(arguments).update(
      adv_lr=1.0, adv_eps=0.05, fgm_eps=0.5, smart_weight=1.0, smart_eps=0.01,
      start=0, methods=text_classification.METHODS)
  variants = text_classification.variants_of(arguments)
  model = text_classification.Transformer(3, dtype=jnp.bfloat16)
  words = jnp.ones((2, text_classification.LENGTH), jnp.int32)
  params = model.init(jax.random.key(0), words)['params']
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {'float32'}
  assert model.apply({'params': params}, words).dtype == jnp.float32

  def loss_fn(params):
    return model.apply({'params': params}, words).sum(1)

  moved = {}
  for name, variant in variants.items():
    v = jax.jit(awp_jax.find_perturbation(variant.method, loss_fn))(
        params, variant.method.init(params))
    moved[name] = [path for path, leaf in zip(
        awp_jax.perturbation.leaves.leaf_paths(v), jax.tree.leaves(v),
        strict=True) if np.any(leaf)]
    if name == 'fgm':
      np.testing.assert_allclose(
          np.linalg.norm(v['Embed_0']['embedding']), 0.5, rtol=1e-5)
  assert moved['plain'] == moved['smart'] == []
  assert moved['embeddings'] == moved['fgm'] == ['Embed_0/embedding']
  assert len(moved['boxed']) > 5

  def run(noise):
    return noise.sum((1, 2))[:, None] * jnp.array([[1.0, 0.0, -1.0]])

  # From equal predictions the noise moves almost to a corner, smart_eps away:
  # the start is random.
  clean = jnp.zeros((2, 3))
  found = text_classification.smoothness(run, clean, jax.random.key(0), 0.01)
  size = 0.01 * text_classification.LENGTH * model.features
  p = jax.nn.softmax(jnp.array([size, 0.0, -size]))
  uniform = jnp.full(3, 1 / 3)
  corner = jnp.sum((p - uniform) * (jnp.log(p) - jnp.log(uniform)))
  assert np.all(found <= corner) and np.all(found > 0.9 * corner)


def test_equinox_model(capsys):
  rows = equinox_model.main(['--seeds=1', '--steps=60'])
  check(rows, capsys.readouterr().out, ['digits'], ['plain', 'AWP'], 0.6)


def test_nnx_model(capsys):
  rows = nnx_model.main(['--seeds=1', '--steps=40'])
  check(rows, capsys.readouterr().out, ['digits'], ['plain', 'AWP'], 0.3)


@pytest.mark.slow
@pytest.mark.parametrize('module,steps', [
    (train_step_nnx, 15), (train_step_equinox, 30)])
def test_train_step_of_other_libraries(module, steps, capsys):
  rows = module.main(['--seeds=1', f'--steps={steps}'])
  check(rows, capsys.readouterr().out, ['digits'], ['AT', 'AT-AWP'], 0.2)


def test_tabular(capsys):
  rows = tabular.main(['--seeds=2', '--steps=60'])
  check(rows, capsys.readouterr().out, ['cancer', 'wine'], ['plain', 'AWP'],
        0.7)


def test_tabular_attack_costs_accuracy_and_stays_near():
  x = jnp.linspace(0, 1, 40).reshape(20, 2)
  y = (x[:, 0] > 0.5).astype(int)
  params = tabular.init(jax.random.key(0), 2, 2)
  key = jax.random.key(1)
  moved = tabular.attacked(key, params, x, y, 0.1)
  assert jnp.abs(moved - x).max() <= 0.1 + 1e-6
  assert moved.min() >= 0 and moved.max() <= 1
  assert tabular.mean_loss(params, moved, y) > tabular.mean_loss(params, x, y)
  assert tabular.attacked(key, params, x, y, 0) is x


def test_same_seed_same_accuracy():
  arguments = ['--seeds=1', '--steps=5', '--gamma=0']
  plain, off = tabular.main(arguments)[:2]
  assert plain.accuracies == off.accuracies


@pytest.mark.parametrize('name', EXAMPLES)
@pytest.mark.parametrize('argument, words', [
    ('--seeds=0', "argument --seeds: must be a whole number >= 1, got '0'."),
    ('--steps=1.5', "argument --steps: must be a whole number >= 1, got '1.5'"),
    ('--nonsense', 'unrecognized arguments: --nonsense')])
def test_wrong_arguments_in_one_line(name, argument, words, capsys):
  with pytest.raises(SystemExit) as left:
    importlib.import_module(f'examples.{name}').main([argument])
  assert left.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert words in error


@pytest.mark.parametrize('name, argument, words', [
    ('graph_gcn', ['--data=nowhere'], 'nowhere/cora.npz'),
    ('graph_gcn', ['--datasets', 'corra'], "invalid choice: 'corra'"),
    ('graph_gcn', ['--data={tmp}', '--lam=1.5'], 'lam must be'),
    ('graph_gcn', ['--data={tmp}'], 'must hold adj_data, attr_data and labels'),
    ('text_classification', ['--csv=nowhere.csv'], 'nowhere.csv'),
    ('text_classification', ['--csv={tmp}/a.csv'],
     "must have the columns text and label, got ['text', 'class']."),
    ('text_classification', ['--csv={tmp}/b.csv'], 'two labels or more'),
    ('text_classification', ['--adv_eps=-1'], 'must be a finite number >= 0'),
    ('equinox_model', ['--gamma=nan'], "must be a finite number >= 0, got 'na"),
    ('nnx_model', ['--gamma=inf'], 'must be a finite number >= 0'),
    ('tabular', ['--gamma=x'], "must be a finite number >= 0, got 'x'"),
    ('tabular', ['--eps=1'], '--eps must be < 1')])
def test_wrong_values_in_one_line(name, argument, words, tmp_path, capsys):
  np.savez(tmp_path / 'cora.npz', x=np.zeros(2))
  (tmp_path / 'a.csv').write_text('text,class\nwell,1\n')
  (tmp_path / 'b.csv').write_text('text,label\nwell,1\nill,2\n')
  with pytest.raises(SystemExit) as left:
    importlib.import_module(f'examples.{name}').main(
        [part.format(tmp=tmp_path) for part in argument])
  assert left.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert words in error


def test_table(capsys):
  first = report.Row('a', 'plain', [0.5, 0.7, 0.6], 1.25)
  # Seed by seed: +10, +30 and +20 points.
  second = report.Row('a', 'AWP', [0.6, 1.0, 0.8], 2.0)
  alone = report.Row('b', 'plain', [0.25], 3.0)
  assert report.show(iter([first, second, alone])) == [first, second, alone]
  lines = capsys.readouterr().out.splitlines()
  assert [line.split() for line in lines[1:]] == [
      ['a', 'plain', '3', '60.00', '±', '5.77', '1.2'],
      ['a', 'AWP', '3', '80.00', '±', '11.55', '+20.00', '±', '5.77', '2.0'],
      ['b', 'plain', '1', '25.00', '3.0']]


def test_command_needs_no_installation(tmp_path):
  """A command runs from any folder, without PYTHONPATH."""
  environment = {
      key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  # Values are checked after all imports.
  done = subprocess.run(
      [sys.executable, str(ROOT / 'examples/tabular.py'), '--eps=2'],
      cwd=tmp_path, env=environment, text=True, capture_output=True)
  assert done.returncode == 2
  assert done.stderr.startswith('error: --eps must be < 1'), done.stderr
  assert done.stderr.count('\n') == 1 and not done.stdout


@pytest.mark.parametrize('name', ['report', 'graph_gcn'])
def test_examples_in_docstrings(name):
  results = doctest.testmod(
      importlib.import_module(f'examples.{name}'),
      extraglobs={'np': np})
  assert results.attempted > 0 and results.failed == 0


def test_every_page_with_examples_is_tested():
  # `perturbation_docs_test.py` runs the page of the methods.
  pages = {
      str(path.relative_to(ROOT / 'docs'))
      for path in (ROOT / 'docs').rglob('*.md') if '>>> ' in path.read_text()}
  assert pages == {*PAGES, 'weight_perturbation.md'}


@pytest.mark.parametrize('page', PAGES)
def test_docs_page(page):
  results = doctest.testfile(str(ROOT / 'docs' / page), module_relative=False)
  assert results.attempted >= PAGES[page] and results.failed == 0


def test_docs_page_names_the_examples():
  text = (ROOT / 'docs/in_your_project.md').read_text()
  for name in EXAMPLES:
    assert f'`{name}.py`' in text
