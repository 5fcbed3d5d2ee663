"""The report: its content, and how a real browser shows it."""

import html.parser
import json
import pathlib
import re
import shutil

import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

import awp_jax
from experiments import compare
from experiments.evaluation import probe
from experiments.modes import landscape, train
from experiments.reports import gallery, tables
from experiments.reports import page as page_lib
from experiments.runs import metrics, restore
from experiments.runs import run as run_lib
from experiments.util import atomic
from tests.experiments.modes import landscape_test, train_test
from tests.experiments.reports.browser import browse


def attack(name, broken, after):
  return {'name': name, 'seconds': 1.5, 'robust_accuracy_after': after,
          'largest_distance': 0.1, 'broken': broken}


def evaluation(accuracy, attacks, warnings=()):
  return {
      'robust': {'accuracy': accuracy, 'interval_95': [0.125, 0.625]},
      'seconds': 1.5 * len(attacks), 'largest_distance': 0.1,
      'attacks': attacks, 'warnings': [
          {'kind': 'few-classes', 'message': text, 'attack': '',
           'num_examples': 0} for text in warnings],
      'judged_by': [{
          'precision': 'float32', 'matmul_precision': 'float32',
          'devices': ['abacus'] * 2, 'versions': {
              'awp_jax': '1', 'jax': '2', 'jaxlib': '3', 'flax': '4'}}]}


#: As written by `evaluate`, for 8 images of which 7 are classified correctly.
EVALUATION = {'num_examples': 8, 'subjects': {'last': {
    'origin': {}, 'natural': {'accuracy': 0.875, 'interval_95': [0.5, 1.0]},
    'evaluations': {
        'fgsm': evaluation(0.5, [attack('fgsm', [0, 1, 2], 0.5)]),
        'aa-fast': evaluation(0.375, [
            attack('apgd-ce', [1, 2], 0.625), attack('apgd-t', [5, 7], 0.375)],
            ['there are <few> classes'])}}}}


@pytest.fixture(scope='module')
def reported(tmp_path_factory):
  """A report and a comparison with all sections, and a report with few."""
  folder = tmp_path_factory.mktemp('report')
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=2, awp__gamma=0.01, **landscape_test.SETTINGS)
  with pytest.MonkeyPatch.context() as monkeypatch:
    train_test.use_tiny_net(monkeypatch)
    run = run_lib.prepare(config, folder / 'AT-AWP')
  train.train(run)
  shutil.copytree(run.workdir, folder / 'AT')
  early = (run.workdir / 'report.html').read_text()
  atomic.write_json(run.workdir / 'evaluation.json', EVALUATION)
  landscape.measure(run)
  page_lib.write(run)
  stored = json.loads((folder / 'AT/config.json').read_text())
  stored['awp.gamma'] = 0.0
  (folder / 'AT/config.json').write_text(json.dumps(stored))
  compare.main([
      str(folder / 'AT'), str(folder / 'AT-AWP'),
      f'--output={folder / "comparison.png"}'])
  return run, early, folder / 'comparison.html'


class Reader(html.parser.HTMLParser):
  """The references, figures and text of a page."""

  def __init__(self, text):
    super().__init__()
    self.references, self.figures, self.text, self.svgs = [], [], '', 0
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    named = dict(attributes)
    self.references += [
        named[name] for name in ('src', 'href', 'xlink:href', 'data')
        if name in named]
    if tag == 'figure' and 'id' in named:
      self.figures.append(named['id'])
    self.svgs += tag == 'svg'
    assert tag not in ('script', 'iframe', 'object', 'embed')

  def handle_data(self, data):
    self.text += data


def pages(reported):
  run, _, comparison = reported
  return {'report': run.workdir / 'report.html', 'comparison': comparison}


@pytest.mark.parametrize('name', ['report', 'comparison'])
def test_page_needs_nothing_else(reported, name):
  text = pages(reported)[name].read_text()
  page = Reader(text)
  assert page.references
  for reference in page.references:
    assert reference.startswith(('#', 'data:')), reference
  assert not re.search(r'url\((?!#)|@import', text)
  assert page.svgs == len(page.figures) > 10
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(ids) == len(set(ids))


def test_every_figure_has_its_files(reported):
  run, early, comparison = reported
  assert len(Reader(early).figures) == 8
  for page, folder in (
      (run.workdir / 'report.html', run.workdir / 'figures'),
      (comparison, comparison.with_name('comparison_figures'))):
    for name in Reader(page.read_text()).figures:
      with Image.open(folder / f'{name}.png') as picture:
        assert np.ptp(np.asarray(picture.convert('L'))) > 100
      assert json.loads((folder / f'{name}.json').read_text())['numbers']


def test_numbers_are_those_of_the_run(reported):
  run, _, _ = reported
  folder, lines = run.workdir / 'figures', metrics.read_metrics(run.workdir)
  numbers = json.loads((folder / 'robust_accuracy.json').read_text())['numbers']
  assert numbers['test']['x'] == [1, 2]
  assert numbers['test']['y'] == [x['test_robust_accuracy'] for x in lines]
  gap = json.loads((folder / 'gap.json').read_text())['numbers']['robust']['y']
  np.testing.assert_allclose(gap, [
      x['train_robust_accuracy'] - x['test_robust_accuracy'] for x in lines])
  text = Reader((run.workdir / 'report.html').read_text()).text
  best = json.loads((run.workdir / 'summary.json').read_text())['best']
  assert f'{100 * best["robust_accuracy"]:.2f}\N{NO-BREAK SPACE}%' in text
  assert 'awp.gamma' in text and jax.__version__ in text
  for wanted in (
      '37.50\N{NO-BREAK SPACE}%', '12.50 to 62.50', 'there are <few> classes',
      'Images broken by aa-fast (last)',
      'Evaluated in float32 (matrix products in float32) on 2 x abacus, with '
      'awp_jax 1, jax 2, jaxlib 3.',
      f'on 8 x {jax.devices()[0].device_kind}, with awp_jax '
      f'{awp_jax.__version__}, jax {jax.__version__}'):
    assert wanted in text


def test_environments_name_the_type_of_the_attacks():
  environment = EVALUATION['subjects']['last']['evaluations']['fgsm'][
      'judged_by'][0]
  text = {
      dtype: tables.environments({'subjects': {'last': {
          'judged_by': [environment | {'attack_dtype': dtype}]}}})
      for dtype in ('float32', 'bfloat16')}
  assert '(matrix products in float32) on' in text['float32']
  assert '(matrix products in float32, attacks in bfloat16) on' in text[
      'bfloat16']


def test_broken_images():
  (first, within), (second, between) = tables.broken_images(EVALUATION)
  assert first == 'Images broken by aa-fast (last)' and '(last)' in second
  assert [row[:2] for row in within[1:]] == [['apgd-ce', '2'], ['apgd-t', '2']]
  assert between == [
      ['broken by', 'not by fgsm', 'not by aa-fast', 'total'],
      ['fgsm', '', '1', '3'], ['aa-fast', '2', '', '4']]


def test_gallery_is_the_best_checkpoint_attacked(reported):
  run, _, _ = reported
  found = probe.measure(run)
  ((_, step, variables),) = restore.load_variables(run, ('best',))
  assert found.step == step and len(found.labels) == probe.GALLERY
  assert set(found.labels[:4]) == {0, 1, 2, 3}
  change = np.abs(found.adversarial - found.images)
  assert 0.02 < change.max() <= run.config.threat.epsilon + 1e-6
  for images, seen in (
      (found.images, found.before), (found.adversarial, found.after)):
    logits = jax.jit(run.model.apply)(variables, images)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), seen)
  cards = json.loads((run.workdir / 'figures/gallery.json').read_text())
  assert cards['magnification'] == pytest.approx(5)  # 0.5 / 0.1
  for card, label, after in zip(
      cards['images'], found.labels, found.after, strict=True):
    assert (card['label'], card['after']) == (str(label), str(after))


def test_layers_are_perturbed_by_gamma(reported):
  run, _, _ = reported
  found = probe.measure(run)
  assert list(found.layers) == ['Conv_0', 'Dense_0']
  np.testing.assert_allclose(found.ratios, run.config.awp.gamma, rtol=1e-5)
  assert np.all(found.rises > 0)


def test_gradient_does_not_depend_on_the_batches(reported):
  run, _, _ = reported
  ((_, _, variables),) = restore.load_variables(run, ('best',))

  def gradient(size):
    # The random start depends on the batch; 30 steps make it irrelevant.
    return probe.robust_gradient(
        jax.random.key(0), run.model, variables, run.dataset.x_train[:10],
        run.dataset.y_train[:10], run.setup.threat, step_size=0.02,
        num_steps=30, batch_size=size)

  for a, b in zip(
      jax.tree.leaves(gradient(10)), jax.tree.leaves(gradient(4)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3)


def test_second_report_reuses_the_probe(reported, monkeypatch):
  run, _, _ = reported
  before = (run.workdir / 'report.html').read_text()
  monkeypatch.setattr(
      probe, '_measure', lambda *a: pytest.fail('probed the model again'))
  page_lib.write(run)
  assert (run.workdir / 'report.html').read_text() == before


def test_failing_report_prints_one_line(reported, monkeypatch, capsys):
  run, _, _ = reported
  before = (run.workdir / 'report.html').read_text()
  monkeypatch.setattr(
      page_lib, '_context', lambda *a: (_ for _ in ()).throw(
          KeyError('no such\nthing')))
  summary = train.train(run)
  assert summary == json.loads((run.workdir / 'summary.json').read_text())
  out = capsys.readouterr().out
  assert re.search(
      r'^report\.html could not be written \(KeyError: .*\); all results are '
      r'saved\.$', out, re.M)
  assert (run.workdir / 'report.html').read_text() == before


def test_comparison_lists_differences(reported):
  text = Reader(reported[2].read_text()).text
  assert 'AT vs. AT-AWP' in text
  assert re.search(r'awp\.gamma\s*0\.0\s*0\.01', text)
  assert 'landscape.points' not in text


@pytest.mark.parametrize('name', ['report', 'comparison'])
@pytest.mark.parametrize('width,dark', [(375, False), (1440, True)])
def test_browser_shows_everything(reported, name, width, dark, tmp_path):
  text = pages(reported)[name].read_text()
  seen = browse(text, tmp_path, width, dark)
  assert seen['width'] == width and seen['dark'] == dark
  assert not seen['errors'] and not seen['console'] and not seen['requests']
  assert not seen['resources']
  assert seen['content'] <= width
  assert [f['name'] for f in seen['figures']] == Reader(text).figures
  for figure in seen['figures']:
    assert figure['width'] > 250 and figure['height'] > 100, figure
    assert figure['right'] <= width
    assert figure['paths'] > 5 and figure['text'] > 3, figure
  assert len(seen['images']) == text.count('<img ') and all(seen['images'])
  ink, page = (
      int(re.match(r'rgb\((\d+)', seen[k])[1]) for k in ('ink', 'page'))
  assert (ink > 200 and page < 40) if dark else (ink < 60 and page > 240)


HOSTILE = '<script>alert(1)</script>"onload="x'


def hostile(value):
  """The same structure with every text made hostile."""
  if isinstance(value, dict):
    return {name: hostile(part) for name, part in value.items()}
  if isinstance(value, list):
    return [hostile(part) for part in value]
  return HOSTILE if isinstance(value, str) else value


def test_texts_of_files_are_escaped(reported):
  """Names, devices and warnings may come from anywhere."""
  run, _, _ = reported
  folder = run.workdir.parent / HOSTILE.replace('/', '|')
  shutil.copytree(run.workdir, folder)
  values = hostile(EVALUATION)
  for evaluations in values['subjects']['last']['evaluations'].values():
    for judged in evaluations['judged_by']:
      judged['precision'] = judged['matmul_precision'] = 'float32'
  atomic.write_json(folder / 'evaluation.json', values)
  config = ml_collections.ConfigDict(run.config)
  with config.unlocked():
    config.user.note = HOSTILE
  page_lib.write(run._replace(workdir=folder, config=config))
  text = (folder / 'report.html').read_text()
  assert text.count('&lt;script&gt;alert') >= 4
  assert '<script>alert' not in text and '"onload=' not in text


def test_browser_check_rejects_bad_pages(tmp_path):
  svg = '<svg><text>a</text></svg>'
  good = browse(f'<html><head></head><body>{svg}</body></html>', tmp_path, 375)
  assert not good['errors'] and not good['requests'] and not good['console']
  bad = browse(
      f'<html><head></head><body>{svg}<div style="width: 500px">wide</div>'
      '<img src="https://example.invalid/x.png"><script>missing()</script>'
      '</body></html>', tmp_path, 375)
  assert bad['content'] >= 500
  assert 'https://example.invalid/x.png' in bad['requests']
  assert any('missing' in message for message in bad['errors'])
  assert bad['console'] and bad['images'] == [0]


def test_logits_that_are_not_finite_have_no_class():
  logits = np.array([[0, 1.0], [np.nan, 0], [1, np.inf], [1, 0]])
  np.testing.assert_array_equal(probe._classes(logits), [1, -1, -1, 0])
  assert gallery._verdict(0, 0, -1) == 'broken'
  assert gallery._verdict(0, -1, -1) == 'misclassified'


def test_templates_are_where_the_code_looks():
  names = {path.name for path in pathlib.Path(page_lib.TEMPLATES).iterdir()}
  assert {'report.html.j2', 'comparison.html.j2'} <= names


def test_batches_of_the_gradient_start_at_points_of_their_own(reported):
  run, _, _ = reported
  ((_, _, variables),) = restore.load_variables(run, ('best',))
  rows = [0, 1, 2, 3]

  def gradient(rows):
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(
        probe.robust_gradient(
            jax.random.key(0), run.model, variables, run.dataset.x_train[rows],
            run.dataset.y_train[rows], run.setup.threat, step_size=1e-6,
            num_steps=1, batch_size=4))])

  # A second batch of the same images from the same starts would not show.
  one, two = gradient(rows), gradient(rows + rows)
  assert np.abs(two - one).max() > 1e-3 * np.abs(one).max()
  np.testing.assert_array_equal(gradient(rows + rows), two)
