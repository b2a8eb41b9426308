"""Every figure has its words, looks the same twice, and leaves matplotlib as it was."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from effkit import plots
from effkit.core.report import Reading

X = np.array([1.0, 2.0, 4.0, 8.0])
WORDS = {"title": "Which is faster?", "xlabel": "tokens", "ylabel": "time (ms)"}
SPEED = {"title": "What bounds it?"}


def seconds(value, spread=None):
    return Reading(value, "s", "measured", spread)


FIGURES = {
    "lines": lambda: plots.lines(
        {"a": (X, X), "b": (X, X**2, X / 4), "c": (X, [seconds(x, x / 9) for x in X])}, **WORDS
    ),
    "crossover": lambda: plots.crossover(X, X**2, 3 * X, names=("a", "b"), logx=True, logy=True, **WORDS),
    "bars": lambda: plots.bars({"a": 1.0, "b": seconds(2.0, 0.2)}, **WORDS),
    "heatmap": lambda: plots.heatmap(torch.arange(6).view(2, 3), "ab", range(3), unit="nats", center=0, **WORDS),
    "roofline": lambda: plots.roofline({"float32": 6e10}, {"memory": seconds(1e10)}, {"decode": (0.2, 1e9)}, **SPEED),
    "small_multiples": lambda: plots.small_multiples(
        lambda axes, bits: plots.draw_lines(axes, {"x": (X, X / bits)}), (2, 4), name="bits", **WORDS
    ),
    "pictures": lambda: plots.small_multiples(
        lambda axes, k: plots.draw_image(axes, torch.eye(4).roll(k, 0)), (0, 1), name="by", **WORDS
    ),
    "pareto": lambda: plots.pareto({"a": (1, 2), "b": (2, 1), "c": (2, 2.5)}, logx=True, **WORDS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_title_labels_and_the_same_bytes_twice(name):
    fig = FIGURES[name]()
    assert isinstance(fig, Figure) and fig.get_suptitle().endswith("?")
    assert all(axes.get_xlabel() for axes in fig.axes[:1]) and fig.axes[0].get_ylabel()
    png = plots.to_png(fig)
    assert png.startswith(b"\x89PNG") and png == plots.to_png(FIGURES[name]()) and len(png) < 60_000


@pytest.mark.slow
def test_nothing_global_is_left_behind():
    before, backend = dict(matplotlib.rcParams), matplotlib.rcParams._get("backend")
    pyplot = "matplotlib.pyplot" in sys.modules
    for make in FIGURES.values():
        plots.to_png(make())
    assert dict(matplotlib.rcParams) == before and matplotlib.rcParams._get("backend") == backend
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    if pyplot:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_series_are_told_apart_without_colour():
    fig = plots.lines({str(i): (X, X + i) for i in range(7)}, **WORDS)
    drawn = fig.axes[0].get_lines()
    assert len({line.get_marker() for line in drawn}) == len({line.get_color() for line in drawn}) == 7
    assert len({(line.get_linestyle(), line._dash_pattern[1] and tuple(line._dash_pattern[1])) for line in drawn}) == 7


@pytest.mark.parametrize("missing", WORDS)
def test_an_empty_word_is_refused(missing):
    with pytest.raises(ValueError, match=f"{missing} is empty"):
        plots.lines({"a": (X, X)}, **WORDS | {missing: " "})


def test_crossings_are_where_the_curves_meet():
    assert plots.crossings(X, 2 * X, X + 3) == pytest.approx([3.0])
    assert plots.crossings(X, X, np.full(4, 2.0)) == [2.0]
    assert plots.crossings(X, X, X + 1) == []
    assert plots.crossings(X, np.log(X), np.full(4, np.log(3)), logx=True) == pytest.approx([3.0])
    assert plots.crossings([1, 100], [1, 100], [10, 10], logx=True, logy=True) == pytest.approx([10.0])
    assert plots.crossings([1, 100], [1, 100], [10, 10]) == pytest.approx([10.0]), "a line is a line in either scale"


def test_the_crossing_that_is_marked_is_the_one_that_is_seen():
    """Drawn straight between points on logarithmic axes: in log2 y, 0 to 4 meets 3 to 1: 0 + 4 t = 3 - 2 t, so t = 1/2, halfway from 1 to 4 in log x: at 2."""
    fig = plots.crossover([1.0, 4.0], [1.0, 16.0], [8.0, 2.0], names=("a", "b"), logx=True, logy=True, **WORDS)
    assert [text.get_text().strip() for text in fig.axes[0].texts] == ["2"]


def test_numbers_on_axes_are_written_as_people_write_them():
    fig = plots.lines({"a": ([1, 2, 3], [70.0, 90.0, 130.0])}, logy=True, **WORDS)
    for axis, wanted in ((fig.axes[0].xaxis, ["1", "2", "3"]), (fig.axes[0].yaxis, ["70", "80", "90", "100"])):
        low, high = axis.get_view_interval()
        shown = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        assert [label.get_text() for place, label in shown if low <= place <= high] == wanted
        assert not any(label.get_text() for label in axis.get_minorticklabels())


def test_panels_share_one_legend_where_there_is_something_to_tell_apart():
    two = lambda axes, bits: plots.draw_lines(axes, {"one": (X, X / bits), "other": (X, X)})  # noqa: E731
    fig = plots.small_multiples(two, (2, 4), name="bits", **WORDS)
    assert [axes.get_legend() is not None for axes in fig.axes] == [True, False]


def test_no_crossing_is_said():
    fig = plots.crossover(X, X, X + 1, names=("a", "b"), **WORDS)
    assert "no crossing in this range" in [text.get_text() for text in fig.axes[0].texts]


def test_the_front_is_what_nothing_beats():
    points = {"a": (1, 1.0), "b": (2, 3.0), "c": (3, 2.0), "d": (2, 3.0)}
    assert plots.front(points) == ["a", "b", "d"] or plots.front(points) == ["a", "d", "b"]
    assert plots.front(points, higher_y=False) == ["a"]
    assert plots.front(points, lower_x=False, higher_y=True)[-1] == "c"


def test_a_guess_is_drawn_where_there_is_one():
    fig = plots.lines({"a": (X, X)}, **WORDS)
    before = len(fig.axes[0].lines)
    assert plots.guess(fig, None) is fig and len(fig.axes[0].lines) == before
    plots.guess(fig, 3.0, axis="x")
    assert len(fig.axes[0].lines) == before + 1
    assert "your guess: 3" in [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    with pytest.raises(ValueError, match="axis must be one of 'x', 'y', got 'z'"):
        plots.guess(fig, 3.0, axis="z")


@pytest.mark.parametrize("many", [4, 5, 7])
def test_a_legend_of_many_lines_stands_below_them(many):
    fig = plots.guess(plots.lines(dict.fromkeys("abcdef"[: many - 1], (X, X)), **WORDS), 3.0)
    fig.draw_without_rendering()
    axes, legend = fig.axes[0], fig.axes[0].get_legend()
    assert len(legend.get_texts()) == many and not fig.legends
    assert (legend.get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0) == (many > 4)
    assert legend.get_window_extent().y0 >= 0


def test_a_figure_is_shown_with_its_words(capsys, monkeypatch):
    fig = plots.lines({"a": (X, X)}, **WORDS)
    with pytest.raises(ValueError, match="alt is empty"):
        plots.show_figure(fig, alt="")
    assert plots.show_figure(fig, alt="a line rises") is None
    assert capsys.readouterr().out == "a line rises\n"
    shown = []
    monkeypatch.setattr(plots, "live", lambda: True)
    monkeypatch.setattr(plots, "display", lambda *bundle: shown.append(bundle))
    plots.show_figure(fig, alt="a line rises <fast>")
    (picture, metadata), (words,) = shown
    assert set(picture) == {"image/png", "text/plain"} and picture["text/plain"] == "a line rises <fast>"
    assert metadata["image/png"]["alt"] == "a line rises <fast>" and "&lt;fast&gt;" in words["text/html"]


def test_an_image_is_white_where_it_is_0_and_black_where_it_is_1():
    fig, axes = plots.figure(**WORDS)
    plots.draw_image(axes, torch.tensor([[0.0, 1.0], [0.5, 2.0]], requires_grad=True))
    (image,) = axes.images
    colours = image.cmap(image.norm(np.array([0.0, 1.0])))[:, :3]
    assert np.allclose(colours[0], 1) and np.allclose(colours[1], 0, atol=0.02)
    assert image.get_array().shape == (2, 2) and axes.get_aspect() == 1
