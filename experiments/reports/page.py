"""The report of a run: one page that opens offline, with every figure inside.

`write` makes `report.html` from what lies in the workdir: the config, the
metrics, the summary, and the evaluation and the landscape where there are any.
It looks at the best checkpoint for a gallery of attacked test images and for
the weight adversary's work by layer; that look is kept, so that making the page
again takes a moment.
"""

import json
import pathlib
import shlex
import sys
from typing import Any

import jinja2

from experiments.config import build
from experiments.evaluation import probe
from experiments.reports import figures, gallery, panels, tables
from experiments.runs import checkpoints, metrics
from experiments.runs import run as run_lib
from experiments.util import atomic

TEMPLATES = pathlib.Path(__file__).resolve().parent / 'templates'


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The values of a JSON file; {} where there is none."""
  return json.loads(path.read_text()) if path.exists() else {}


def render(template: str, context: dict[str, Any]) -> str:
  """A page from its template.

  Args:
    template: name of a file in `templates/`.
    context: the values in it; one that is missing is an error.

  Returns:
    HTML.
  """
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
      undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
  return environment.get_template(template).render(
      context | {'colors': figures.COLORS})


def write(run: run_lib.Run, mode: str = '') -> pathlib.Path:
  """Writes `report.html` and its figures.

  Args:
    run: of `runs.prepare` or `runs.reopen`.
    mode: what has just been done, whose command is this process's: 'train',
      'evaluate', 'landscape', or '' for none.

  Returns:
    The path of the page.
  """
  path = run.workdir / 'report.html'
  atomic.write_text(path, render('report.html.j2', _context(run, mode)))
  return path


def write_or_say_why(run: run_lib.Run, mode: str = '') -> None:
  """`write`, but a report that fails costs one line, never the run."""
  try:
    write(run, mode)
  except Exception as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    print(
        f'report.html could not be written ({reason}); nothing else is lost.',
        flush=True)


def _context(run: run_lib.Run, mode: str) -> dict[str, Any]:
  folder, name = run.workdir / 'figures', run.workdir.name
  lines = metrics.read_metrics(run.workdir)
  summary, evaluation, landscape = (
      read_json(run.workdir / f'{part}.json')
      for part in ('summary', 'evaluation', 'landscape'))
  has_best = checkpoints.Reader(run.workdir, 'best').step() is not None
  look = probe.look(run) if has_best else None
  cards, magnification = (
      gallery.draw(folder, look, run.setup.threat, run.dataset.name)
      if look else ([], 1.0))
  config = run.config
  return {
      'title': name, 'method': method(config),
      'model': f'{config.model.name} {config.model.depth}, width '
      f'{config.model.width}',
      'dataset_name': run.dataset.name,
      'threat': f'{config.threat.norm}, epsilon {config.threat.epsilon:.4g}',
      'tiles': tables.tiles(summary, evaluation),
      'training': panels.training(folder, {name: lines})
      if metrics.evaluated(lines) else [],
      'training_note': _training_note(run),
      'attacks': [panels.attacks(folder, {name: evaluation})]
      if evaluation else [],
      'attacks_note': _attacks_note(evaluation),
      'attacks_table': tables.attacks({name: evaluation}),
      'warnings': tables.warnings(evaluation),
      'broken': tables.who_broke_what(evaluation),
      'landscape': panels.landscapes(folder, {name: landscape})
      if landscape else [],
      'landscape_note': landscape_note({name: landscape}),
      'landscape_table': tables.flatness({name: landscape}),
      'layers': panels.layers(folder, look, config.awp.gamma) if look else [],
      'cards': cards, 'cards_note': _cards_note(look, magnification),
      'commands': _commands(run.workdir, mode),
      'facts': tables.facts(run, summary),
      'config': [['field', 'value'], *(
          [field, str(value)]
          for field, value in build.flatten(config).items())]}


def method(config: Any) -> str:
  """What the run is called in papers, like 'TRADES-AWP'."""
  return config.objective + ('-AWP' if config.awp.gamma else '')


def _training_note(run: run_lib.Run) -> str:
  evaluation, config = run.config.eval, run.config
  train = min(evaluation.num_train, len(run.dataset.y_train))
  every = evaluation.every_epochs
  when = 'every epoch' if every == 1 else f'every {every} epochs'
  return (
      f'Robust numbers are under PGD-{evaluation.num_steps} with steps of '
      f'{evaluation.step_size:.4g}, on {train} training and '
      f'{len(run.dataset.y_test)} test images, after {when}. '
      f'The best epoch was chosen by robust accuracy on the {config.select_on} '
      'images.')


def _attacks_note(evaluation: dict[str, Any]) -> str:
  if not evaluation:
    return ''
  return (
      f'On {evaluation["num_examples"]} test images. Each evaluation starts '
      'from all images; within a version of AutoAttack each attack sees what '
      f'those before left standing. {tables.judges(evaluation)}')


LANDSCAPE_NOTE = (
    'Robust loss g(alpha) at the weights w + alpha d, with adversarial '
    'examples made afresh at every point. The mean rise is the mean of '
    'g(alpha) - g(0) over the range: the smaller, the flatter. It compares '
    'runs of one setting only.')


def landscape_note(records: dict[str, dict[str, Any]]) -> str:
  """What the landscapes of one run or of several show, and who judged."""
  judges = dict.fromkeys(
      filter(None, map(tables.judges, records.values())))
  return ' '.join([LANDSCAPE_NOTE, *judges])


def _cards_note(look: probe.Look | None, magnification: float) -> str:
  if look is None:
    return ''
  return (
      'The first test image of each class, then further ones, under the best '
      f'checkpoint (step {look.step}): the image, the perturbation '
      f'({look.attack}) magnified {magnification:.3g} times around grey, and '
      'their sum; below, what the model sees before and after.')


def _commands(workdir: pathlib.Path, mode: str) -> list[str]:
  """The commands that made the run, of which this process's is the latest."""
  path = workdir / 'figures' / 'commands.json'
  commands = read_json(path)
  if mode and pathlib.Path(sys.argv[0]).name == 'main.py':
    commands[mode] = 'python ' + shlex.join(sys.argv)
    atomic.write_json(path, commands)
  return list(commands.values())
