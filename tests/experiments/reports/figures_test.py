"""Figures: unusual values, and legends that fit."""

import pytest

from experiments.reports import figures


@pytest.mark.parametrize('values', [[1.0, None, 2.0], [0.001, 1.0, 9.0]])
def test_lines_accept_non_finite_and_steep_values(tmp_path, values):
  drawn = figures.lines(
      tmp_path, 'a', [figures.Curve('one', [0, 1, 2], values, 0)], title='<A>',
      caption='', xlabel='x', ylabel='y')
  assert 'aria-label="&lt;A&gt;"' in drawn.svg
  assert 'var(--c0, #0072b2)' in drawn.svg and 'var(--ink' in drawn.svg


@pytest.mark.parametrize('name, columns', [
    ('AT', 2), ('cifar10_awp-seed0', 1), ('a_folder_with_a_long_name' * 3, 1)])
def test_names_of_curves_stay_inside_the_figure(name, columns, tmp_path):
  curves = [
      figures.Curve(f'{name}{run}, {which}', [0, 1], [0, 1], run)
      for run in (0, 1) for which in ('best', 'last')]
  seen = []

  def record(figure):
    name_curves(figure)
    (legend,) = figure.legends
    seen.append((legend.get_window_extent(), figure.bbox, legend._ncols))

  name_curves = figures.name_curves
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, 'name_curves', record)
    figures.lines(
        tmp_path, 'panel', curves, title='', caption='', xlabel='', ylabel='')
  (box, page, found), = seen
  assert page.x0 <= box.x0 and box.x1 <= page.x1
  assert found == columns
