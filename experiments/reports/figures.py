"""Figures of reports, for light and dark pages, print and color-blind readers.

Each figure is saved as PNG, as SVG, and its numbers as JSON. A page embeds the
SVG with CSS variables for its colors, so it follows the page's light or dark
scheme. Curves differ in color (Okabe and Ito's palette), marker and line style.
"""

from collections.abc import Iterator, Sequence
import contextlib
import html
import io
import math
import re
from typing import Any, NamedTuple

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.ticker import MaxNLocator
import numpy as np

from experiments.util import atomic, paths

#: Colors of a page: CSS variable -> (on light, on dark). The SVG contains the
#: color on light; a page replaces it by the variable.
COLORS = {
    'ink': ('#23262b', '#dfe2e7'),
    'grid': ('#c9ccd1', '#454a52'),
    'c0': ('#0072b2', '#4fa8e0'),
    'c1': ('#d55e00', '#ff8f45'),
    'c2': ('#009e73', '#38c79c'),
    'c3': ('#cc79a7', '#e6a3c9'),
    'c4': ('#b37c00', '#f0b429'),
    'c5': ('#56b4e9', '#a5dafa'),
}
MARKERS = ('o', 's', '^', 'D', 'v', 'P')
DASHES = ('-', '--', '-.', ':')

_STYLE: Any = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'figure',
    'font.size': 10.5, 'axes.labelsize': 10.5,
    'legend.fontsize': 10, 'xtick.labelsize': 9.5, 'ytick.labelsize': 9.5,
    'text.color': COLORS['ink'][0], 'axes.labelcolor': COLORS['ink'][0],
    'axes.edgecolor': COLORS['ink'][0], 'xtick.color': COLORS['ink'][0],
    'ytick.color': COLORS['ink'][0], 'grid.color': COLORS['grid'][0],
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
    'grid.linewidth': 0.6, 'legend.frameon': False,
    'axes.axisbelow': True, 'lines.markersize': 4.5}

#: In inches of 72 CSS pixels, so that a panel fits a phone.
_SIZE = (4.3, 3.2)

#: The axis is logarithmic if the largest value exceeds this times the smallest.
_LOG_FROM = 60


class Curve(NamedTuple):
  """One curve of a panel.

  Attributes:
    label: for the legend.
    x: [P].
    y: [P]; None for non-finite values.
    color: index of its color and marker.
    dash: index of its line style.
    spread: half the height of a band around it, [P], or None.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float | None]
  color: int
  dash: int = 0
  spread: Sequence[float | None] | None = None


class Drawn(NamedTuple):
  """A figure in a page.

  Attributes:
    name: of its files.
    title: its heading.
    caption: its caption.
    svg: its SVG element.
  """

  name: str
  title: str
  caption: str
  svg: str


def color(number: int) -> str:
  """The color of curve `number`."""
  return COLORS[f'c{number % 6}'][0]


def _numbers(values: Sequence[float | None]) -> np.ndarray:
  return np.array([np.nan if v is None else v for v in values], float)


@contextlib.contextmanager
def _panel(size: tuple[float, float] = _SIZE) -> Iterator[Any]:
  with plt.rc_context(_STYLE):
    figure, axis = plt.subplots(figsize=size, layout='constrained')
    try:
      yield axis
    finally:
      plt.close(figure)


def inline(svg: str, name: str, title: str) -> str:
  """Prepares an SVG for a page: CSS variables for colors, no fixed size.

  Args:
    svg: the text of an SVG file.
    name: of the figure; prefixes its ids, so that they are unique in a page.
    title: the accessible label.

  Returns:
    The SVG element.
  """
  svg = svg[svg.index('<svg'):]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.S)
  head, _, rest = svg.partition('>')
  head = re.sub(r'\s(width|height|xmlns:xlink|version)="[^"]*"', '', head)
  rest = rest.replace('xlink:href="#', f'href="#{name}-')
  rest = rest.replace('url(#', f'url(#{name}-')
  rest = re.sub(r'\bid="', f'id="{name}-', rest)
  for variable, (light, _) in COLORS.items():
    rest = re.sub(light, f'var(--{variable}, {light})', rest, flags=re.I)
  return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'


def _save(
    axis: Any, folder: paths.Path, name: str, title: str, caption: str,
    numbers: Any) -> Drawn:
  folder.mkdir(parents=True, exist_ok=True)
  figure, buffer = axis.figure, io.StringIO()
  # Uses canvases directly: `savefig` would lay out and draw five times.
  for patch in (figure.patch, *(each.patch for each in figure.axes)):
    patch.set_alpha(0)
  FigureCanvasSVG(figure).print_svg(buffer, metadata={'Date': None})
  atomic.write_text(folder / f'{name}.svg', buffer.getvalue())
  figure.set_layout_engine('none')
  figure.patch.set(alpha=1, facecolor='white')
  figure.set_dpi(150)
  with atomic.replacing(folder / f'{name}.png') as file:
    FigureCanvasAgg(figure).print_png(file)
  atomic.write_json(
      folder / f'{name}.json',
      {'title': title, 'caption': caption, 'numbers': numbers})
  return Drawn(name, title, caption, inline(buffer.getvalue(), name, title))


def _needs_log(curves: Sequence[Curve]) -> bool:
  values = np.concatenate([_numbers(curve.y) for curve in curves])
  values = values[np.isfinite(values)]
  return bool(
      len(values) and values.min() > 0
      and values.max() > _LOG_FROM * values.min())


#: Height of a line of the legend in inches.
_LINE = 0.21


def name_curves(figure: Any) -> None:
  """Adds a legend above a panel: two columns, else one, else a smaller font."""
  for columns in (2, 1):
    legend = figure.legend(
        loc='outside upper left', ncols=columns, handlelength=3.2,
        borderpad=0.1)
    if legend.get_window_extent().width <= figure.bbox.width:
      break
    if columns == 2:
      legend.remove()
      # Keeps the height of the panel.
      rows = len(legend.get_texts()) // 2
      figure.set_figheight(figure.get_figheight() + _LINE * rows)
  while legend.get_window_extent().width > figure.bbox.width:
    for text in legend.get_texts():
      text.set_fontsize(0.9 * text.get_fontsize())


def lines(
    folder: paths.Path, name: str, curves: Sequence[Curve], *, title: str,
    caption: str, xlabel: str, ylabel: str,
    ylim: tuple[float, float] | None = None, zero: bool = False,
    legend: bool = True, joined: bool = True) -> Drawn:
  """Draws curves, or separate points.

  Args:
    folder: of its files.
    name: of its files.
    curves: the curves.
    title: its heading.
    caption: its caption.
    xlabel: label of the x axis.
    ylabel: label of the y axis, which is logarithmic if the values span a wide
      range and `ylim` is None.
    ylim: limits of the y axis, or None.
    zero: whether to mark y = 0.
    legend: whether to add a legend.
    joined: whether lines join the points. Otherwise every point has a marker.

  Returns:
    The figure.
  """
  with _panel() as axis:
    if zero:
      axis.axhline(0, color=COLORS['ink'][0], linewidth=0.8)
    for curve in curves:
      x, y, shade = _numbers(curve.x), _numbers(curve.y), color(curve.color)
      axis.plot(
          x, y, color=shade,
          linestyle=DASHES[curve.dash % 4] if joined else 'none',
          marker=MARKERS[curve.color % 6],
          markevery=max(1, len(x) // 10) if joined else 1,
          markerfacecolor=shade if curve.dash == 0 else 'none',
          linewidth=1.8, label=curve.label)
      if curve.spread is not None:
        half = _numbers(curve.spread)
        axis.fill_between(
            x, y - half, y + half, color=shade, alpha=0.18, linewidth=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if ylim is not None:
      axis.set_ylim(*ylim)
    elif _needs_log(curves):
      axis.set_yscale('log')
    axis.xaxis.set_major_locator(MaxNLocator(
        6, steps=[1, 2, 5, 10], integer=xlabel == 'epoch'))
    if legend:
      name_curves(axis.figure)
    numbers = {curve.label: {
        'x': list(curve.x), 'y': list(curve.y),
        'spread': None if curve.spread is None else list(curve.spread)}
        for curve in curves}
    return _save(axis, folder, name, title, caption, numbers)


def dots(
    folder: paths.Path, name: str, labels: Sequence[str],
    groups: dict[str, Sequence[tuple[float, float, float] | None]], *,
    title: str, caption: str, xlabel: str,
    xlim: tuple[float | None, float | None] = (None, None)) -> Drawn:
  """Draws one value per row, with an interval, for one or more groups.

  Args:
    folder: of its files.
    name: of its files.
    labels: of the rows, from top to bottom.
    groups: name -> (value, low, high) or None for each row.
    title: its heading.
    caption: its caption.
    xlabel: label of the x axis.
    xlim: limits of the x axis.

  Returns:
    The figure.
  """
  height = 0.9 + 0.18 * len(labels) * max(1.6, len(groups))
  with _panel((_SIZE[0], max(height, 1.8))) as axis:
    for number, (group, values) in enumerate(groups.items()):
      shift = (number - (len(groups) - 1) / 2) * 0.6 / max(len(groups), 2)
      rows = [(row, v) for row, v in enumerate(values) if v is not None]
      center = np.array([v[0] for _, v in rows])
      ends = np.array([[v[0] - v[1], v[2] - v[0]] for _, v in rows])
      axis.errorbar(
          center, [row + shift for row, _ in rows],
          xerr=np.maximum(ends.T, 0) if ends.any() else None, linestyle='none',
          marker=MARKERS[number % 6], color=color(number), label=group,
          markerfacecolor=color(number) if number == 0 else 'none',
          capsize=2.5, linewidth=1.4)
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel=xlabel, ylim=(len(labels) - 0.4, -0.6), xlim=xlim)
    if len(groups) > 1:
      axis.figure.legend(
          loc='outside upper left', ncols=2, borderpad=0.1)
    return _save(
        axis, folder, name, title, caption,
        {'rows': list(labels),
         'groups': {group: list(values) for group, values in groups.items()}})


def contour(
    folder: paths.Path, name: str, side: Sequence[float],
    values: Sequence[Sequence[float | None]], *, title: str,
    caption: str, scale: Sequence[Sequence[float | None]] = ()) -> Drawn:
  """Draws a loss over the plane of two directions.

  Args:
    folder: of its files.
    name: of its files.
    side: coordinates along both directions, [P].
    values: [P, P], one row per coordinate along the first direction.
    title: its heading.
    caption: its caption.
    scale: rows of other planes, which then share the color scale.

  Returns:
    The figure.
  """
  table = np.array([_numbers(row) for row in values])
  finite = np.concatenate([_numbers(row) for row in (*values, *scale)])
  finite = finite[np.isfinite(finite)]
  low, high = float(finite.min()), float(finite.max())
  if low > 0 and high > 4 * low:
    levels = np.geomspace(low, high, 13)
  else:
    levels = np.linspace(low, high if high > low else low + 1, 13)
  levels[-1] = math.nextafter(levels[-1], math.inf)
  with _panel((_SIZE[0], 3.6)) as axis:
    filled = axis.contourf(
        side, side, np.ma.masked_invalid(table.T), levels, cmap='cividis')
    drawn = axis.contour(
        side, side, np.ma.masked_invalid(table.T), levels[1:-1:2],
        colors='white', linewidths=0.7)
    axis.clabel(drawn, fmt='%.2g', fontsize=8.5)
    axis.plot(0, 0, marker='P', markersize=9, color='white',
              markeredgecolor='black')
    axis.grid(False)
    axis.set(xlabel='first direction', ylabel='second direction',
             aspect='equal')
    bar = axis.figure.colorbar(filled, ax=axis, format='%.2g')
    bar.outline.set_visible(False)
    return _save(
        axis, folder, name, title, caption,
        {'side': list(side), 'values': [list(row) for row in values]})
