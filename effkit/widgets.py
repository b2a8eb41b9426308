"""What a reader moves: a guess before the result, a setting of it, and a run that is looked at step by step.

All say in text what they are: a notebook read without a kernel, or run by nbval, misses nothing but the moving.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ipywidgets as widgets

from effkit.exercises.base import Question
from effkit.notebook import display, live, say


class Predict:
    """Asks for a guess, keeps it in the question, and shows itself as the value of a cell.

    `value` is None until the reader has typed or chosen something. Without ipywidgets or a kernel only the text is
    shown, which names the other way: q.predict(...).
    """

    def __init__(self, question: Question, ask: str, *, options: Sequence[object] = (), unit: str = ""):
        self.question, self.ask, self.options, self.unit = question, ask, tuple(options), unit

    @property
    def value(self) -> object:
        return self.question.guess

    def __repr__(self) -> str:
        choice = f" ({', '.join(map(str, self.options))})" if self.options else f" ({self.unit})" if self.unit else ""
        return f"**Your guess:** {self.ask}{choice}\n\nNo box below? Then write `{self.question.name}.predict(...)` in a cell of your own."

    def _ipython_display_(self) -> None:
        say(repr(self))
        widget = self.widget()
        if widget is not None:
            display_alive(widget)

    def widget(self):
        """The box or the choices with a line that confirms; None without ipywidgets or a kernel."""
        if not live():
            return None
        if self.options:
            entry = widgets.RadioButtons(options=self.options, value=None, description="your guess")
        else:
            entry = widgets.Text(placeholder="a number", description="your guess", continuous_update=False)
        answer = widgets.HTML()
        entry.observe(lambda change: setattr(answer, "value", self._keep(change["new"])), names="value")
        return widgets.VBox([entry, answer])

    def _keep(self, entered: object) -> str:
        try:
            guess = entered if self.options else float(str(entered).replace(",", "."))
        except ValueError:
            return "That is no number; write it as in 2.5."
        return str(self.question.predict(guess))


def display_alive(widget: widgets.Widget) -> None:
    """The widget without its repr, which would stand in its place where there is no kernel and say nothing to a reader."""
    display({kind: shown for kind, shown in widget._repr_mimebundle_().items() if kind != "text/plain"})


def interactive(function: Callable, *, still: Callable[[], object], **ranges: object) -> None:
    """Shows `still()`, small multiples of the sweep for paper and nbval, and below it `function` with sliders.

    `ranges` are ipywidgets' abbreviations, one an argument of the function: bits=(2, 8), method=["rtn", "gptq"].
    Both functions display what they draw, by plots.show_figure. Not for a cell that nbval compares: it can't follow
    output into a widget.
    """
    still()
    if not live():
        say("*With a notebook's kernel and ipywidgets, sliders for " + ", ".join(ranges) + " appear here.*")
        return
    view = widgets.interactive(function, **ranges)
    for control in view.children:
        if hasattr(control, "continuous_update"):
            control.continuous_update = False  # a model evaluated at every pixel of a drag falls behind
    display_alive(view)


@dataclass(frozen=True)
class Frame:
    """One moment of a run: what happens, a table whose first row is its head, and what came of it."""

    caption: str
    rows: Sequence[Sequence[str]]
    below: str = ""

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows)
        return "\n".join(filter(None, (self.caption, *lines, self.below)))

    def html(self) -> str:
        cells = [f"<t{kind}>" + f"</t{kind}><t{kind}>".join(map(html.escape, row)) + f"</t{kind}>"
                 for kind, row in zip("h" + "d" * len(self.rows), self.rows, strict=False)]  # fmt: skip
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><caption>{html.escape(self.caption)}</caption>{body}</table><pre>{html.escape(self.below)}</pre>"


def play(frames: Sequence[Frame], *, still: Sequence[int]) -> None:
    """Shows the frames of these numbers one below another, for paper and nbval, and below them a player of all frames."""
    for i in still:
        display({"text/plain": str(frames[i]), "text/html": frames[i].html()})
    if not live():
        say(f"*With a notebook's kernel and ipywidgets, a player of all {len(frames)} steps appears here.*")
        return
    page, last = widgets.HTML(frames[0].html()), len(frames) - 1
    player, place = widgets.Play(max=last, interval=1500), widgets.IntSlider(max=last, description="step")
    widgets.jslink((player, "value"), (place, "value"))
    place.observe(lambda change: setattr(page, "value", frames[change["new"]].html()), names="value")
    display_alive(widgets.VBox([widgets.HBox([player, place]), page]))
