"""What cells call works in a terminal, in a kernel and under nbval, and says the same in each."""

import subprocess
import sys
import textwrap

import nbformat
import pytest

import effkit.exercises as course
from effkit import notebook, widgets
from effkit.core.checks import require_int
from effkit.core.paths import checkout
from effkit.course import execute
from effkit.stages import offline

CELLS = [
    """
    import effkit.exercises, numpy as np
    from effkit.notebook import say, show, stamp
    from effkit.plots import lines, show_figure, small_multiples, draw_lines, guess
    from effkit.widgets import Predict, interactive
    from effkit.core.checks import require_int
    q = effkit.exercises.exercise("quantization.affine")
    """,
    "stamp()",
    "Predict(q, 'how many times faster?', unit='x')",
    "Predict(q, 'what bounds it?', options=('memory', 'arithmetic'))",
    "assert q.guess is None\nshow(require_int)\nsay(f'**{1 + 1}** times')",
    """
    x = np.arange(1, 9)
    for _ in __import__("tqdm.auto").auto.tqdm(range(2)): ...
    def draw(axes, bits): draw_lines(axes, {"error": (x, x / bits)})
    def one(bits): show_figure(lines({"error": (x, x / bits)}, title="How?", xlabel="x", ylabel="y"), alt="a line")
    def still():
        row = small_multiples(draw, [2, 4], name="bits", title="How?", xlabel="x", ylabel="y")
        show_figure(row, alt="two lines")
    interactive(one, still=still, bits=(2, 8))
    """,
    "def affine(x, *, bits):\n    ...",
    "q.check(affine)",
    "q",
    "q.hint()",
    "effkit.exercises.progress()",
    """
    import socket
    try: socket.create_connection(("192.0.2.1", 80), timeout=1)
    except RuntimeError as refused: print(refused)
    """,
]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFKIT_WORK", str(tmp_path / "work"))


@pytest.mark.slow
def test_all_of_it_runs_twice_alike_in_a_kernel(tmp_path, monkeypatch):
    """Executed once and saved, then by nbval, which compares every cell but the stamp and the sliders."""
    monkeypatch.setenv("PYTHONPATH", str(checkout()))  # the kernel runs elsewhere
    cells = [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in CELLS if "progress" not in c]
    for cell in cells:
        if "stamp" not in cell.source and "interactive" not in cell.source:
            cell.source = "# NBVAL_CHECK_OUTPUT\n" + cell.source
    path = tmp_path / "cells.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    execute(path)
    saved = nbformat.read(path, as_version=4)
    images = [o for cell in saved.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert images and all(image.metadata["image/png"]["alt"] == image.data["text/plain"] for image in images)
    assert "Not attempted yet" in str(saved.cells[7].outputs)
    assert "effkit works without a network" in str(saved.cells[-1].outputs)
    assert "jupyter.widget" not in str(saved), "a bar or a box that no kernel moves was saved"
    nbval = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider"]
    done = subprocess.run([*nbval, str(path)], capture_output=True, text=True, cwd=tmp_path, env=offline())
    assert done.returncode == 0, done.stdout


def test_show_prints_the_source_as_it_stands(capsys):
    notebook.show(require_int)
    printed = capsys.readouterr().out
    assert printed.startswith("def require_int(") and "whole number" in printed
    with pytest.raises(ValueError, match="has no source to show"):
        notebook.show(len)


def test_the_highlighted_source_names_it_and_is_escaped():
    page = notebook.highlighted("x = '<b>'", "effkit.a.b")
    assert (
        "<code>effkit.a.b</code>" in page
        and "<b>" not in page
        and "class=" not in page.replace('class="highlight"', "")
    )


def test_say_and_stamp_print_where_there_is_no_kernel(capsys):
    notebook.say("  four\n  lines")
    notebook.stamp()
    said, stamped = capsys.readouterr().out.split("\n*", 1)
    assert said == "four\nlines" and "Python 3." in stamped and "torch" in stamped


def test_a_note_is_text_everywhere():
    note = notebook.Note("**bold**")
    assert note == repr(note) == note._repr_markdown_() == "**bold**"


def test_without_a_kernel_a_guess_is_asked_in_words():
    question = course.exercise("quantization.affine")
    ask = widgets.Predict(question, "how many times faster?", unit="x")
    assert ask.widget() is None and ask.value is None
    assert "how many times faster? (x)" in repr(ask) and "q.predict(...)" in repr(ask)


def test_a_widget_keeps_what_is_typed(monkeypatch):
    monkeypatch.setattr(widgets, "live", lambda: True)
    question = course.exercise("quantization.affine")
    entry, answer = widgets.Predict(question, "how many times faster?").widget().children
    assert question.guess is None
    entry.value = "about four"
    assert question.guess is None and "no number" in answer.value
    entry.value = "3,5"
    assert question.guess == 3.5 and "3.5" in answer.value
    choice, _ = widgets.Predict(question, "what bounds it?", options=("memory", "arithmetic")).widget().children
    choice.value = "memory"
    assert question.guess == "memory"


def test_interactive_shows_its_still_picture_without_a_kernel(capsys):
    calls = []
    widgets.interactive(lambda bits: calls.append(bits), still=lambda: calls.append("still"), bits=(2, 8))
    assert calls == ["still"] and "sliders for bits" in capsys.readouterr().out


FRAMES = [widgets.Frame(f"pass {i}", (("token", "coin"), (f"'<{i}>'", "0.5")), f"text {i} & so on") for i in range(3)]


def test_a_frame_is_a_table_in_text_and_in_html():
    assert str(FRAMES[1]) == "pass 1\ntoken  coin\n'<1>'  0.5\ntext 1 & so on"
    page = FRAMES[1].html()
    assert "<tr><th>token</th><th>coin</th></tr><tr><td>&#x27;&lt;1&gt;&#x27;</td><td>0.5</td></tr>" in page and "1 &amp; so" in page


def test_a_frame_without_a_line_below_has_none():
    assert str(widgets.Frame("pass", (("a", "b"), ("1", "2")))) == "pass\na  b\n1  2"


def test_the_player_shows_its_still_frames_without_a_kernel(capsys):
    widgets.play(FRAMES, still=(2, 0))
    printed = capsys.readouterr().out
    assert printed.index("pass 2") < printed.index("pass 0") and "pass 1" not in printed and "all 3 steps" in printed


def test_the_player_goes_through_all_frames(monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "live", lambda: True)
    monkeypatch.setattr(widgets, "display", lambda bundle: None)
    monkeypatch.setattr(widgets, "display_alive", shown.append)
    widgets.play(FRAMES, still=())
    controls, page = shown[0].children
    player, place = controls.children
    assert page.value == FRAMES[0].html() and player.max == place.max == 2
    place.value = 2
    assert page.value == FRAMES[2].html()
