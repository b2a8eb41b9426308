"""The form every notebook keeps: readable aloud, executed from top to bottom, short cells, the library's plots.

`complaints` is the lint; the course's notebooks must give it none, and planted faults must each give it one.
"""

import ast
import html
import importlib
import re
from functools import reduce
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from effkit import notebook as shown
from effkit.core.checks import require_int
from effkit.course import BAR, WIDGET, save_still, shipped

ROOT = Path(__file__).resolve().parents[1]
COURSE = [
    "00_measure",
    "01_quantization",
    "02_pruning",
    "03_distillation",
    "04_factorization",
    "05_compilation",
    "06_peft",
    "07_caching",
    "08_speculative_decoding",
    "09_sustainability",
    "10_combining",
    "11_selection",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

MOST_CELLS, MOST_CELLS_OF_A_DEEP_CHAPTER, MOST_LINES, LEAST_COMPARED, MOST_WIDTH = 45, 80, 15, 5, 110
DEEP = {"01_quantization", "07_caching", "08_speculative_decoding"}  # chapters with every method of their ladder
NARROW = {"01_quantization"}  # notebooks whose lines of code fit a page; in the others they have yet to be broken
VAGUE = {"", "here", "link", "this", "this link", "click here", "page", "paper", "source"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    found = complaints(notebook, MOST_CELLS_OF_A_DEEP_CHAPTER if path.stem in DEEP else MOST_CELLS)
    found += wide_lines(notebook) if path.stem in NARROW else []
    assert not found, "\n".join((f"{path.name}:", *found))


def test_the_course_is_complete_and_nothing_else():
    assert [path.stem for path in shipped()] == [path.stem for path in NOTEBOOKS] == COURSE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_source_it_shows_is_the_present_one(path):
    """A cell that ends in show(x) displays the library's source: change that, and the notebook has to be run again."""
    found = list(stale(nbformat.read(path, as_version=4)))
    again = f"run it again: python -m effkit notebooks {path.stem}"
    assert not found, "\n".join((f"{path.name}:", *found, again))


def complaints(notebook, most_cells: int = MOST_CELLS) -> list[str]:
    """Everything that is wrong with a notebook, one sentence each."""
    markdown = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [*heading_faults(markdown), *run_faults(code), *machine_faults(code), *still_faults(notebook)]
    found += part_faults(without_code("\n".join(markdown)), "\n".join(cell.source for cell in code))
    for text in markdown:
        found += [*image_faults(text), *link_faults(text)]
    for cell in code:
        found += source_faults(cell.source)
    if len(notebook.cells) > most_cells:
        found.append(f"{len(notebook.cells)} cells, at most {most_cells}")
    return found


def heading_faults(markdown):
    """One H1, first; no level is jumped over on the way down."""
    levels = [len(mark) for text in markdown for mark in re.findall(r"^(#{1,6}) ", without_code(text), re.M)]
    if levels.count(1) != 1 or levels[0] != 1:
        yield f"one H1, and it first: the levels are {levels}"
    for above, below in zip(levels, levels[1:], strict=False):
        if below > above + 1:
            yield f"an H{below} follows an H{above}"


def image_faults(text):
    for alt, source in re.findall(r"!\[(.*?)\]\((.*?)\)", without_code(text), re.S):
        if len(alt.split()) < 3:
            yield f"alt text of {source[:60]!r} says nothing: {alt!r}"
    for tag in re.findall(r"<img\b[^>]*>", text):
        if not re.search(r"""alt=(["'])\s*\S+\s+\S+\s+\S.*?\1""", tag, re.S):
            yield f"an image without alt text: {tag[:80]!r}"


def link_faults(text):
    prose = without_code(text)
    for label, target in re.findall(r"(?<!!)\[([^\]]*)\]\(([^)]*)\)", prose):
        if label.strip().lower() in VAGUE or label.startswith("http"):
            yield f"the link to {target} is called {label!r}, which does not say where it leads"
    for address in re.findall(r"(?<!\()\bhttps?://\S+", re.sub(r"\[[^\]]*\]\([^)]*\)|<img\b[^>]*>", "", prose)):
        yield f"a bare address: {address}"


def run_faults(code):
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"not executed in order, every cell once: {counts}"
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {cell.execution_count} ends in {output.ename}"
    compared = [cell for cell in code if is_compared(cell)]
    if len(compared) < LEAST_COMPARED:
        yield f"{len(compared)} cells with an output are marked NBVAL_CHECK_OUTPUT, at least {LEAST_COMPARED}"


def is_compared(cell) -> bool:
    """nbval compares a marked cell; without an output there would be nothing to compare."""
    marked = re.search(r"^\s*#\s*NBVAL_CHECK_OUTPUT", cell.source, re.M) or "nbval-check-output" in cell.metadata.get(
        "tags", []
    )
    return bool(marked and cell.outputs)


def machine_faults(code):
    """What a cell shows must not depend on where the course was built."""
    for cell in code:
        for output in cell.outputs:
            shown = str(output.get("text", "")) + str(output.get("data", ""))
            for place in {str(ROOT), str(Path.home())} - {"/"}:
                if f"{place}/" in shown:
                    yield f"cell {cell.execution_count} shows a path of this machine: {place}"


def still_faults(notebook):
    """What only a kernel can move has no place in a file: `effkit notebooks` leaves it out."""
    if "widgets" in notebook.metadata:
        yield "the metadata hold the state of widgets"
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if WIDGET in output.get("data", {}):
                yield f"cell {cell.execution_count} holds a widget or a progress bar: {output.data.get('text/plain', '')[:40]!r}"
            elif bar := BAR.search(output.get("text", "")):
                yield f"cell {cell.execution_count} holds a progress bar: {bar[0][:40]!r}"


#: what every notebook has: a complaint, where to look for it, and by what it is known
PARTS = {
    "no exercise: no cell calls check on the learner's function": ("code", r"\.check\("),
    "no interactive view: no cell calls interactive(draw, still=...)": ("code", r"\binteractive\("),
    "no guess: no cell asks with Predict(...)": ("code", r"\bPredict\("),
    "no real model: no cell speaks of smollm2": ("code", r"\bsmollm2\b"),
    "no section '## References'": ("prose", r"^## References$"),
}


def part_faults(prose, code):
    for complaint, (place, pattern) in PARTS.items():
        if not re.search(pattern, {"prose": prose, "code": code}[place], re.M):
            yield complaint


def stale(notebook):
    """For each show(subject): the output where it is not what the library's present source renders to."""
    imported = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        imported |= imports(tree)
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "show"]
        pages = [output.data for output in cell.outputs if "<figcaption>" in output.get("data", {}).get("text/html", "")]
        if len(calls) != len(pages):
            yield f"cell {number} shows {len(pages)} sources and calls show {len(calls)} times"
            continue
        for call, page in zip(calls, pages, strict=True):
            what = subject(call.args[0], imported, page)
            if what is None or as_read(page) != as_read(rendered(what)):
                yield f"cell {number}: show({ast.unparse(call.args[0])}) is not what the source says now"


def imports(tree) -> dict[str, str]:
    """What the cell's import statements bind: name -> dotted name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def subject(argument, imported, page):
    """The object that a call of show names, found without running the notebook; None where the library has none such.

    The class of a value, as in show(type(roof).attainable), is what the output's caption says."""
    path = ast.unparse(argument).split(".")
    if isinstance(argument, ast.Attribute) and isinstance(argument.value, ast.Call):
        caption = re.search(r"<figcaption><code>(.*?)</code>", page["text/html"])[1]
        return resolved(caption) if caption.endswith(f".{argument.attr}") else None
    return resolved(".".join((imported.get(path[0], path[0]), *path[1:])))


def resolved(dotted: str):
    """The object of this name, out of the longest module in it; None where there is none. A package may hold a function
    of the same name as one of its modules, so what lies deeper is asked of the module."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            return reduce(getattr, parts[cut:], importlib.import_module(".".join(parts[:cut])))
        except (ModuleNotFoundError, AttributeError):
            continue
    return None


def rendered(what) -> dict:
    """The MIME bundle that show displays."""
    bundles = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "display", bundles.append)
        shown.show(what)
    return bundles[0]


def as_read(page) -> tuple[str, str]:
    """Plain text, and what a browser shows of the HTML: colours are the highlighter's, and change with its version."""
    return page["text/plain"], html.unescape(re.sub(r"<[^>]*>", "", page["text/html"])).strip()


def source_faults(source):
    lines = source.splitlines()
    if len(lines) > MOST_LINES:
        yield f"a code cell of {len(lines)} lines, at most {MOST_LINES}: {lines[0]!r}"
    for plotting in re.findall(r"\bplt\.|\.plot\(|\bimport matplotlib|\bfrom matplotlib", source):
        yield f"plotting code belongs to effkit/plots.py: {plotting!r} in {lines[0]!r}"
    if re.search(r"NBVAL_SKIP|NBVAL_RAISES_EXCEPTION", source):
        yield f"every cell is executed and passes: {lines[0]!r} is exempt"


def wide_lines(notebook):
    """Lines of code, or of the prose in them, that a page of a notebook does not show whole."""
    lines = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    return [f"a line of {len(line)} characters, at most {MOST_WIDTH}: {line[:60]!r}" for line in lines if len(line) > MOST_WIDTH]


def without_code(text: str) -> str:
    """Markdown without fenced and inline code, in which # is a comment and []() may be a call."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


# Planted faults: a good notebook gives no complaint, and each fault is found.


def good_notebook():
    prose = "# Title\n\n## References\n\n![a line falls and flattens](a.png), after [Jacob et al. 2018](https://arxiv.org/abs/1712.05877)"
    cells = [new_markdown_cell(prose)]
    for count in range(1, 7):
        output = new_output("execute_result", data={"text/plain": "2"}, execution_count=count)
        cells.append(new_code_cell("# NBVAL_CHECK_OUTPUT\n1 + 1", execution_count=count, outputs=[output]))
    calls = "Predict(q, 'how many?')\ninteractive(draw, still=still)\nq.check(mine)\nzoo.load('smollm2')"
    cells.append(new_code_cell(calls, execution_count=7))
    return new_notebook(cells=cells)


def test_a_good_notebook_gives_no_complaint():
    assert complaints(good_notebook()) == []


@pytest.mark.parametrize(
    "prose, said",
    [
        ("# Another title", "one H1"),
        ("#### Deep", "an H4 follows an H2"),
        ("![](b.png)", "alt text"),
        ("![figure](b.png)", "alt text"),
        ("<img src='b.png'>", "without alt text"),
        ("<img src='b.png' alt=''>", "without alt text"),
        ("[here](https://example.org)", "does not say where it leads"),
        ("[https://example.org](https://example.org)", "does not say where it leads"),
        ("see https://example.org", "a bare address"),
    ],
)
def test_a_fault_in_prose_is_found(prose, said):
    notebook = good_notebook()
    notebook.cells.append(new_markdown_cell(prose))
    (found,) = complaints(notebook)
    assert said in found


def test_code_in_prose_is_no_fault():
    notebook = good_notebook()
    notebook.cells.append(
        new_markdown_cell("`table[0](x)` and\n```python\n# a comment\n[here](x)\n```\n<img src='b' alt='a b c'>")
    )
    assert complaints(notebook) == []


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(source="# NBVAL_CHECK_OUTPUT\n" + "x = 1\n" * 15), "a code cell of 16 lines"),
        (dict(source="# NBVAL_CHECK_OUTPUT\nplt.title('x')"), "plotting code"),
        (dict(source="# NBVAL_CHECK_OUTPUT\naxis.plot(x)"), "plotting code"),
        (dict(source="# NBVAL_CHECK_OUTPUT\n# NBVAL_SKIP"), "is exempt"),
        (dict(execution_count=None), "not executed in order"),
        (dict(execution_count=9), "not executed in order"),
        (dict(outputs=[new_output("error", ename="ValueError", evalue="", traceback=[])]), "ends in ValueError"),
        (dict(outputs=[new_output("stream", text=f"{ROOT}/effkit/x.py:1: warning")]), "shows a path of this machine"),
    ],
)
def test_a_fault_in_code_is_found(change, said):
    notebook = good_notebook()
    notebook.cells[2].update(change)
    (found,) = complaints(notebook)
    assert said in found


def test_marked_cells_without_an_output_do_not_count():
    notebook = good_notebook()
    for cell in notebook.cells[1:3]:
        cell.outputs = []
    assert complaints(notebook) == ["4 cells with an output are marked NBVAL_CHECK_OUTPUT, at least 5"]


def test_a_line_that_is_too_wide_is_found_and_prose_may_be_wider():
    notebook = good_notebook()
    notebook.cells[0].source += "\n\n" + "word " * MOST_WIDTH
    notebook.cells[1].source = "x = " + "1" * (MOST_WIDTH - 4)
    assert wide_lines(notebook) == []
    notebook.cells[1].source += "1"
    (found,) = wide_lines(notebook)
    assert f"a line of {MOST_WIDTH + 1} characters" in found


def test_too_many_cells_are_too_many():
    notebook = good_notebook()
    notebook.cells += [new_markdown_cell("prose")] * 38
    assert complaints(notebook) == ["46 cells, at most 45"]


@pytest.mark.parametrize("call, said", [
    ("q.check", "no exercise"), ("interactive", "no interactive view"), ("Predict", "no guess"), ("smollm2", "no real model"),
])  # fmt: skip
def test_a_missing_part_is_missed(call, said):
    notebook = good_notebook()
    notebook.cells[-1].source = notebook.cells[-1].source.replace(call, "x")
    (found,) = complaints(notebook)
    assert said in found


@pytest.mark.parametrize("heading", ["## Sources", "### References", "```\n## References\n```", ""])
def test_a_missing_list_of_references_is_missed(heading):
    notebook = good_notebook()
    notebook.cells[0].source = notebook.cells[0].source.replace("## References", heading)
    assert "no section '## References'" in complaints(notebook)


BAR_OF_CHARACTERS = "timing:  44%|####4     | 75/170 [00:01<00:01, 61.89it/s]"
MOVING = [
    new_output("display_data", data={WIDGET: {"model_id": "a"}, "text/plain": BAR_OF_CHARACTERS}),
    new_output("display_data", data={WIDGET: {"model_id": "b"}}),
    new_output("stream", name="stderr", text=BAR_OF_CHARACTERS),
]


@pytest.mark.parametrize("moving", MOVING)
def test_what_only_a_kernel_can_move_is_found_and_left_out(moving, tmp_path):
    """The words, the tables and the pictures beside it stay."""
    notebook = good_notebook()
    stays = new_output("stream", text="44%|of what was asked for|")
    notebook.cells[2].outputs += [moving, stays]
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    state, found = complaints(notebook)
    assert "state of widgets" in state and ("a widget or" in found or "a progress bar" in found)
    save_still(notebook, tmp_path / "still.ipynb")
    saved = nbformat.read(tmp_path / "still.ipynb", as_version=4)
    assert complaints(saved) == [] and [o.output_type for o in saved.cells[2].outputs] == ["execute_result", "stream"]
    assert saved.cells[2].outputs[1] == stays


SHOWN = "from effkit.core import checks\nfrom effkit.notebook import show\n"


def showing(call: str, *subjects):
    output = [new_output("display_data", data=rendered(what)) for what in subjects]
    return new_notebook(cells=[new_code_cell(SHOWN), new_code_cell(call, outputs=output)])


@pytest.mark.parametrize("call", [
    "show(checks.require_int)", "from effkit.core.checks import require_int as r\nshow(r)",
    "import effkit.core.checks as c\nshow(c.require_int)", "import effkit.core.checks\nshow(effkit.core.checks.require_int)",
    "show(type(x).require_int)", "from effkit.core.checks import require_int\nfrom effkit.core import checks\nshow(require_int)",
])  # fmt: skip
def test_the_present_source_is_not_stale(call):
    assert list(stale(showing(call, require_int))) == []


@pytest.mark.parametrize("call, subjects, said", [
    ("show(checks.require_choice)", [require_int], "show(checks.require_choice) is not what"),
    ("show(checks.gone)", [require_int], "show(checks.gone) is not what"),
    ("show(type(x).other)", [require_int], "is not what"),
    ("show(checks.require_int)", [], "shows 0 sources and calls show 1 times"),
    ("1 + 1", [require_int], "shows 1 sources and calls show 0 times"),
])  # fmt: skip
def test_an_old_output_of_show_is_found(call, subjects, said):
    (found,) = stale(showing(call, *subjects))
    assert said in found


def test_a_module_behind_a_function_of_its_name_is_seen():
    from effkit.sustainability.payback import inferences

    assert resolved("effkit.sustainability.payback.inferences") is inferences
    assert resolved("effkit.sustainability.payback").__name__ == "payback"


@pytest.mark.parametrize("kind", ["text/plain", "text/html"])
def test_one_changed_word_of_a_shown_source_is_found(kind):
    notebook = showing("show(checks.require_int)", require_int)
    page = notebook.cells[1].outputs[0].data
    assert "require_int" in page[kind]
    page[kind] = page[kind].replace("whole", "round")
    assert len(list(stale(notebook))) == 1
