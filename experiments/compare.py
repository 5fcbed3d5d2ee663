"""Compares finished runs: a table, a figure of their curves, and a page.

  python experiments/compare.py runs/demo/AT runs/demo/AT-AWP

The page, `comparison.html`, is self-contained and opens offline. It shows the
curves of all runs, and their weight loss landscapes and attacks if measured.
Over five or more runs with a landscape, the rank correlation of its mean rise
and the robust gap is printed.

Runs whose configs differ only in the seed share a row, with mean and standard
deviation.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.reports import comparison, curves, flatness
from experiments.util import console, paths


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the table; writes the figure and the page."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdirs', nargs='+', help='local or in a bucket')
  parser.add_argument(
      '--output', type=pathlib.Path, default=pathlib.Path('comparison.png'),
      help='path of the figure (default: comparison.png); the page is written '
      'next to it as .html')
  options = parser.parse_args(argv)
  try:
    groups = comparison.group_by_config(
        [comparison.read_run(paths.parse(text))
         for text in options.workdirs])
    comparison.check_seeds(groups)
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print('Accuracies on test images in percent. The gap is robust accuracy on '
        'training images minus\nrobust accuracy on test images at the last '
        'epoch.\n')
  print(console.table(comparison.rows(groups)))
  correlated = flatness.sentence(flatness.points(groups))
  if correlated:
    print(f'\n{textwrap.fill(correlated, 80)}')
  curves.plot_comparison(
      {name: [run['lines'] for run in runs] for name, runs in groups.items()},
      options.output)
  page = options.output.with_suffix('.html')
  comparison.write_page(groups, page)
  print(f'\ncurves: {options.output}\npage: {page}')


if __name__ == '__main__':
  main()
