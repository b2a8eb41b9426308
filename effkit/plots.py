"""Figures in the house's style: the title is the question, axes have units, and colour is never alone.

The palette is Okabe & Ito's (2008), told apart by colour-blind readers; every series has its own line style and marker
as well, for paper. Figures are plain objects: nothing touches matplotlib's global state, a window or a backend.
Numbers may be plain or Readings, whose spread is then drawn.
"""

import base64
import html
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from effkit.core.checks import require_choice
from effkit.notebook import display, live

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"
Named = Mapping[str, Any]  # one entry a bar, a line or a point
DPI = 130  # of the stored picture, which is shown at 100


def figure(title: str, xlabel: str, ylabel: str, *, panels: int = 1, size: tuple[float, float] = (6.4, 3.8)):
    """A figure and its axes, or the array of its `panels`, which share scales. Raises ValueError for an empty text."""
    for name, text in {"title": title, "xlabel": xlabel, "ylabel": ylabel}.items():
        if not text.strip():
            raise ValueError(f"{name} is empty; a title asks the figure's question, axes say what in which unit")
    fig = Figure(figsize=size, layout="constrained")
    grid = fig.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
    for axes in grid:
        axes.set_xlabel(xlabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    grid[0].set_ylabel(ylabel)
    fig.suptitle(textwrap.fill(title, int(size[0] * 10)), x=0.01, ha="left", fontsize=12, fontweight="bold")
    return fig, grid[0] if panels == 1 else grid


def lines(series: Named, *, title: str, xlabel: str, ylabel: str, logx=False, logy=False) -> Figure:
    """One line a series: name -> (x, y) or (x, y, spread); the spread becomes a band."""
    fig, axes = figure(title, xlabel, ylabel)
    draw_lines(axes, series)
    _finish(axes, logx, logy)
    return fig


def draw_lines(axes: Axes, series: Named) -> None:
    """The lines of `lines` on axes of your own, such as a panel of small multiples."""
    for (name, (x, y, *spread)), style in zip(series.items(), _styles(), strict=False):
        values = _values(y)
        axes.plot(_values(x), values, label=name, markersize=4, **style)
        band = _values(spread[0]) if spread else _spreads(y)
        if band is not None:
            axes.fill_between(_values(x), values - band, values + band, color=style["color"], alpha=0.2, linewidth=0)
    if all((_values(x) % 1 == 0).all() for x, *_ in series.values()):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def draw_image(axes: Axes, matrix) -> None:
    """A matrix in greys, 0 white and 1 black, on axes of your own: a picture, or who sees whom."""
    axes.imshow(_array(matrix), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)


def crossings(x, a, b, *, logx=False, logy=False) -> list[float]:
    """Where the curves a and b cross, by straight lines between the points in the scales that the axes show."""
    place = np.log(_values(x)) if logx else _values(x)
    gap = np.log(_values(a) / _values(b)) if logy else _values(a) - _values(b)
    i = np.flatnonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) < 0)
    between = place[i] - gap[i] * (place[i + 1] - place[i]) / (gap[i + 1] - gap[i])
    found = np.sort(np.concatenate((between, place[gap == 0])))
    return (np.exp(found) if logx else found).tolist()


def crossover(x, a, b, *, names: tuple[str, str], title: str, xlabel: str, ylabel: str, logx=False, logy=False):
    """Two curves and where one stops being the better choice; says so where they never cross."""
    fig, axes = figure(title, xlabel, ylabel)
    draw_lines(axes, {names[0]: (x, a), names[1]: (x, b)})
    _finish(axes, logx, logy)
    places = crossings(x, a, b, logx=logx, logy=logy)
    for place in places:
        axes.axvline(place, color=GREY, linestyle=":", linewidth=1)
        axes.annotate(f" {_plain(place)}", (place, 0.02), xycoords=("data", "axes fraction"), color=GREY)
    if not places:
        axes.annotate("no crossing in this range", (0.5, 0.02), xycoords="axes fraction", ha="center", color=GREY)
    return fig


def bars(values: Named, *, title: str, xlabel: str, ylabel: str) -> Figure:
    """One horizontal bar a name, so that names stay readable, each with its number; a Reading's spread as a whisker."""
    fig, axes = figure(title, xlabel, ylabel, size=(6.4, 1.2 + 0.4 * len(values)))
    numbers, spread = _values(values.values()), _spreads(values.values())
    drawn = axes.barh(list(values), numbers, xerr=spread, color=COLOURS[0], height=0.6,
                      error_kw={"ecolor": "black", "capsize": 3, "zorder": 3})  # fmt: skip
    for bar, hatch in zip(drawn, itertools.cycle(("", "//", "..", "\\\\", "xx")), strict=False):
        bar.set(hatch=hatch, edgecolor="white")
    reach = np.maximum(0, numbers + (0 if spread is None else spread))  # a negative bar's number would hide its name
    for bar, number, end in zip(drawn, numbers, reach, strict=True):
        place = (end, bar.get_y() + bar.get_height() / 2)
        axes.annotate(f"{number:.3g}", place, (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    return fig


def heatmap(
    matrix, rows: Sequence, columns: Sequence, *, title: str, xlabel: str, ylabel: str, unit: str, center=None, marks: Named | None = None
) -> Figure:
    """A matrix as colours, its numbers in the cells where they fit; around `center`, two hues tell the sides apart.

    marks   name -> (column, row), counted from 0, of points to be told apart; they may lie between cells"""
    values = _array(matrix)
    fig, axes = figure(title, xlabel, ylabel, size=(6.4, 1.8 + 0.35 * min(len(rows), 12)))
    reach = np.nanmax(np.abs(values - (center or 0)))
    limits = {} if center is None else {"vmin": center - reach, "vmax": center + reach}
    image = axes.imshow(values, aspect="auto", cmap="cividis" if center is None else "PuOr", **limits)
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    axes.set_yticks(range(len(rows)), [str(r) for r in rows])
    axes.grid(False)
    if values.size <= 120 and len(columns) <= 16:
        for (i, j), value in ((at, v) for at, v in np.ndenumerate(values) if np.isfinite(v)):
            dark = sum(image.cmap(image.norm(value))[:3]) < 1.5
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    for i, (name, place) in enumerate((marks or {}).items()):  # ever smaller, so that none hides another
        axes.plot(*_values(place), MARKERS[i % len(MARKERS)], color="white", mec="black", ms=max(6, 15 - 1.5 * i), label=name)
    if marks:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, labelspacing=0.9, fontsize=8, frameon=False)
    fig.colorbar(image, ax=axes, label=unit)
    return fig


def roofline(peaks: Named, bandwidths: Named, points: Named, *, title: str) -> Figure:
    """What bounds each point, arithmetic or memory (Williams et al. 2009, doi:10.1145/1498765.1498785).

    peaks       dtype -> macs/s, such as a measured Roofline's `peaks`
    bandwidths  level -> bytes/s, such as {"memory": roof.bandwidth, "cache": roof.cache_bandwidth}
    points      name -> (intensity in macs a byte, speed in macs/s)
    """
    fig, axes = figure(title, "arithmetic intensity (macs a byte)", "speed (Gmacs/s)")
    tops, slopes = 1e-9 * _values(peaks.values()), 1e-9 * _values(bandwidths.values())
    where = [*_values(x for x, _ in points.values()), tops.min() / slopes.max(), tops.max() / slopes.min()]
    left, right = min(where) / 3, max(where) * 12  # room for names
    for name, slope, dash in zip(bandwidths, slopes, itertools.cycle(DASHES), strict=False):
        ridge = tops.max() / slope
        axes.plot([left, ridge], [left * slope, tops.max()], color=GREY, linestyle=dash, label=f"memory: {name}")
    for name, top, style in zip(peaks, tops, _styles(), strict=False):
        ends = [top / slopes.max(), right]
        axes.plot(ends, [top, top], color=style["color"], linestyle=style["linestyle"], label=f"arithmetic: {name}")
    placed: list[np.ndarray] = []
    for (name, point), marker in zip(points.items(), itertools.cycle(MARKERS), strict=False):
        place = _values(point) * (1, 1e-9)
        crowd = sum((np.abs(np.log10(place / other)) < (1, 0.12)).all() for other in placed)  # names would overlap
        axes.plot(*place, marker, color="black", markersize=4, linestyle="none")
        axes.annotate(name, place, (5, 9 * crowd - 3), textcoords="offset points", fontsize=8)
        placed.append(place)
    _finish(axes, True, True, fontsize=8, loc="lower right")
    return fig


def small_multiples(
    draw: Callable[[Axes, object], None], values: Sequence, *, name: str, title: str, xlabel: str, ylabel: str
) -> Figure:
    """A row of panels with shared scales, `draw(axes, value)` on each: the still picture of a slider."""
    fig, grid = figure(title, xlabel, ylabel, panels=len(values), size=(max(6.4, 2.2 * len(values)), 2.8))
    for axes, value in zip(np.atleast_1d(grid), values, strict=True):
        draw(axes, value)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _label(axis, most=4)  # narrow panels
        axes.set_title(f"{name} = {value}", fontsize=10)
    if len(fig.axes[0].get_legend_handles_labels()[0]) > 1:
        fig.axes[0].legend(fontsize=8, frameon=False)
    return fig


def front(points: Named, *, lower_x=True, higher_y=True) -> list[str]:
    """The names that no other point beats on both axes, in order of x (Pareto)."""
    signs = np.array([1 if lower_x else -1, -1 if higher_y else 1])
    costs = {name: _values(point) * signs for name, point in points.items()}
    beaten = {n for n, c in costs.items() for o in costs.values() if (o <= c).all() and (o < c).any()}
    return sorted(costs.keys() - beaten, key=lambda n: tuple(_values(points[n])))


def pareto(points: Named, *, title: str, xlabel: str, ylabel: str, lower_x=True, higher_y=True, logx=False) -> Figure:
    """Each choice a point, named unless its name begins with "_"; a line joins those that none beats on both axes."""
    fig, axes = figure(title, xlabel, ylabel)
    best = front(points, lower_x=lower_x, higher_y=higher_y)
    x, y = np.array([_values(points[name]) for name in best]).T
    axes.step(x, y, where="post" if lower_x else "pre", color=COLOURS[0], linewidth=1.5)
    for name, point in points.items():
        px, py = _values(point)
        axes.plot(px, py, "o", color=COLOURS[0] if name in best else GREY, fillstyle="full" if name in best else "none")
        axes.annotate("" if name[0] == "_" else name, (px, py), (5, 4), textcoords="offset points", fontsize=9)
    axes.margins(0.15)
    _scale(axes, logx, False)
    return fig


def guess(fig: Figure, value: float | None, *, axis: str = "y") -> Figure:
    """Draws the learner's guess into the result, where there is one: a dotted line across the first panel."""
    require_choice("axis", axis, ("x", "y"))
    if isinstance(value, int | float):
        draw = fig.axes[0].axhline if axis == "y" else fig.axes[0].axvline
        draw(value, color=COLOURS[3], linestyle=(0, (1, 2)), linewidth=2, label=f"your guess: {value:g}")
        _finish(fig.axes[0], False, False)
    return fig


def to_png(fig: Figure) -> bytes:
    """The picture, the same bytes on every run; in 256 colours it is a third of the size, and notebooks stay light."""
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, format="png", dpi=DPI)
    picture = Image.open(raw).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def show_figure(fig: Figure, *, alt: str) -> None:
    """Displays the picture with a text of what is to be seen, which screen readers and terminals get instead.

    JupyterLab drops the alt text of a picture, so the text follows once more, folded. Raises ValueError without one.
    """
    if not alt.strip():
        raise ValueError("alt is empty; say in a sentence what is to be seen, as in alt='loss rises below 4 bits'")
    png = base64.b64encode(to_png(fig)).decode()
    display({"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt, "width": int(100 * fig.get_figwidth())}})
    if live():
        folded = f"<details><summary>the figure in words</summary>{html.escape(alt)}</details>"
        display({"text/html": folded, "text/plain": ""})


def _styles() -> Iterator[dict]:
    cycle = zip(itertools.cycle(COLOURS), itertools.cycle(DASHES), itertools.cycle(MARKERS), strict=False)
    return ({"color": c, "linestyle": d, "marker": m} for c, d, m in cycle)


def _finish(axes: Axes, logx: bool, logy: bool, **place) -> None:
    """Scales and a legend: among the lines where they are few, and below them where it would hide some."""
    _scale(axes, logx, logy)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2} if len(axes.get_legend_handles_labels()[1]) > 4 else {}
    axes.legend(frameon=False, **(place or below))


def _scale(axes: Axes, logx: bool, logy: bool) -> None:
    for name in ("x",) * logx + ("y",) * logy:
        axes.set(**{f"{name}scale": "log"})
        _label(getattr(axes, f"{name}axis"))


def _label(axis, most: int = 12) -> None:
    """Numbers as people write them, on as many ticks of a logarithmic axis as there is room for."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits = range(1, 10) if decades < 0.6 else (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.8 else (1,)
    axis.set_major_locator(LogLocator(subs=tuple(digits), numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    """Three digits, thousands and millions by their letters."""
    scale, letter = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1.0, "")
    return f"{value:,.0f}" if 100 <= abs(value) < 1e4 else f"{value / scale:.3g}{letter}"


def _array(numbers) -> np.ndarray:
    """A tensor of any dtype, on any device, with or without a gradient; or anything that numpy takes."""
    return np.asarray(numbers.detach().cpu().double() if hasattr(numbers, "detach") else numbers, dtype=float)


def _values(numbers) -> np.ndarray:
    """A row of plain numbers, tensors or Readings."""
    return _array(numbers if hasattr(numbers, "detach") else [float(getattr(n, "value", n)) for n in numbers])


def _spreads(numbers) -> np.ndarray | None:
    """Readings' spreads; None where none has one."""
    spreads = [getattr(n, "spread", None) for n in numbers]
    return np.array([s or 0.0 for s in spreads]) if any(spreads) else None
