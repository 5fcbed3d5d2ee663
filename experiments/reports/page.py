"""The report of a run: one self-contained page that opens offline.

`write` makes `report.html` from the files in the workdir: the config, the
metrics, the summary, and the evaluation and the landscape if they exist. It
probes the best checkpoint for a gallery of adversarial images and for the
weight perturbation by layer. The probe is saved, so the next report is fast.
"""

import pathlib
import shlex
import sys
from typing import Any

import jinja2

from experiments.config import networks, schema
from experiments.evaluation import probe
from experiments.reports import figures, gallery, panels, tables
from experiments.runs import metrics, reading
from experiments.runs import run as run_lib
from experiments.util import atomic, paths

TEMPLATES = pathlib.Path(__file__).resolve().parent / 'templates'


def render(template: str, context: dict[str, Any]) -> str:
  """Renders a page from its template.

  Args:
    template: name of a file in `templates/`.
    context: the values of its variables; a missing one is an error.

  Returns:
    HTML.
  """
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  return environment.get_template(template).render(
      context | {'colors': figures.COLORS})


def write(run: run_lib.Run, mode: str = '') -> paths.Path:
  """Writes `report.html` and its figures.

  Args:
    run: from `run.prepare` or `run.reopen`.
    mode: the mode of this process, whose command the report lists: 'train',
      'evaluate', 'landscape', or '' for none.

  Returns:
    The path of the page.
  """
  path = run.workdir / 'report.html'
  atomic.write_text(path, render('report.html.j2', _context(run, mode)))
  return path


def write_or_warn(run: run_lib.Run, mode: str = '') -> None:
  """Like `write`, but prints one line if it fails."""
  try:
    write(run, mode)
  except Exception as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    print(
        f'report.html could not be written ({reason}); all results are saved.',
        flush=True)


def _context(run: run_lib.Run, mode: str) -> dict[str, Any]:
  folder, name = run.workdir / 'figures', run.workdir.name
  lines = metrics.read_metrics(run.workdir)
  summary, evaluation, landscape = (
      atomic.read_json(run.workdir / f'{part}.json')
      for part in ('summary', 'evaluation', 'landscape'))
  has_best = reading.Reader(run.workdir, 'best').step() is not None
  probed = probe.measure(run) if has_best else None
  cards, magnification = (
      gallery.draw(folder, probed, run.setup.threat, run.dataset.name)
      if probed else ([], 1.0))
  config = run.config
  return {
      'title': name, 'method': method(config),
      'model': networks.describe(config),
      'dataset_name': run.dataset.name,
      'threat': f'{config.threat.norm}, epsilon {config.threat.epsilon:.4g}',
      'tiles': tables.tiles(summary, evaluation),
      'training': panels.training(folder, {name: lines})
      if metrics.evaluated(lines) else [],
      'training_note': _training_note(run),
      'attacks': [
          panels.attacks(folder, {name: evaluation}),
          *panels.epsilons(folder, {name: evaluation})]
      if evaluation else [],
      'attacks_note': _attacks_note(evaluation),
      'attacks_table': tables.attacks({name: evaluation}),
      'warnings': tables.warnings(evaluation),
      'broken': tables.broken_images(evaluation),
      'landscape': panels.landscapes(folder, {name: landscape})
      if landscape else [],
      'landscape_note': landscape_note({name: landscape}),
      'landscape_table': tables.flatness({name: landscape}),
      'layers': panels.layers(folder, probed, config.awp.gamma)
      if probed else [],
      'cards': cards, 'cards_note': _cards_note(probed, magnification),
      'commands': _commands(run.workdir, mode),
      'facts': tables.facts(run, summary),
      'config': [['field', 'value'], *(
          [field, str(value)]
          for field, value in schema.flatten(config).items())]}


def method(config: Any) -> str:
  """The name of the method in papers, such as 'TRADES-AWP'."""
  return config.objective + ('-AWP' if config.awp.gamma else '')


def _training_note(run: run_lib.Run) -> str:
  evaluation, config = run.config.eval, run.config
  train = min(evaluation.num_train, len(run.dataset.y_train))
  every = evaluation.every_epochs
  when = 'every epoch' if every == 1 else f'every {every} epochs'
  return (
      f'Robust accuracy and loss are under PGD-{evaluation.num_steps} with '
      f'step size {evaluation.step_size:.4g}, on {train} training and '
      f'{len(run.dataset.y_test)} test images, after {when}. The best epoch '
      f'has the highest robust accuracy on the {config.select_on} images.')


def _attacks_note(evaluation: dict[str, Any]) -> str:
  if not evaluation:
    return ''
  return (
      f'On {evaluation["num_examples"]} test images. Each evaluation starts '
      'from all images. Within AutoAttack, each attack sees the images that '
      f'survived the earlier attacks. {tables.environments(evaluation)}')


LANDSCAPE_NOTE = (
    'Robust loss g(alpha) at the weights w + alpha d, with new adversarial '
    'examples at every point. The mean rise is the mean of g(alpha) - g(0) '
    'over the range; smaller is flatter. It is comparable only between runs '
    'with the same setting.')


def landscape_note(records: dict[str, dict[str, Any]]) -> str:
  """Explains the landscapes of one or more runs; states how they were made."""
  environments = dict.fromkeys(
      filter(None, map(tables.environments, records.values())))
  return ' '.join([LANDSCAPE_NOTE, *environments])


def _cards_note(probed: probe.Probe | None, magnification: float) -> str:
  if probed is None:
    return ''
  return (
      'The first test image of each class, then others, with the best '
      f'checkpoint (step {probed.step}): the image, its perturbation '
      f'({probed.attack}) magnified {magnification:.3g} times around gray, and '
      'the adversarial image. Below: the predicted class before and after the '
      'attack.')


def _commands(workdir: paths.Path, mode: str) -> list[str]:
  """The latest command of each mode, including that of this process."""
  path = workdir / 'figures' / 'commands.json'
  commands = atomic.read_json(path)
  if mode and pathlib.Path(sys.argv[0]).name == 'main.py':
    commands[mode] = 'python ' + shlex.join(sys.argv)
    atomic.write_json(path, commands)
  return list(commands.values())
