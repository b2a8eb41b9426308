"""The form every notebook keeps: readable aloud, executed from top to bottom, short cells, the library's plots.

`complaints` is the lint; the course's notebooks must give it none, and planted faults must each give it one.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

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

MOST_CELLS, MOST_LINES, LEAST_COMPARED = 45, 15, 5
VAGUE = {"", "here", "link", "this", "this link", "click here", "page", "paper", "source"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stem in COURSE
    found = complaints(notebook)
    assert not found, "\n".join((f"{path.name}:", *found))


def complaints(notebook) -> list[str]:
    """Everything that is wrong with a notebook, one sentence each."""
    markdown = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [*heading_faults(markdown), *run_faults(code), *machine_faults(code)]
    for text in markdown:
        found += [*image_faults(text), *link_faults(text)]
    for cell in code:
        found += source_faults(cell.source)
    if len(notebook.cells) > MOST_CELLS:
        found.append(f"{len(notebook.cells)} cells, at most {MOST_CELLS}")
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


def source_faults(source):
    lines = source.splitlines()
    if len(lines) > MOST_LINES:
        yield f"a code cell of {len(lines)} lines, at most {MOST_LINES}: {lines[0]!r}"
    for plotting in re.findall(r"\bplt\.|\.plot\(|\bimport matplotlib|\bfrom matplotlib", source):
        yield f"plotting code belongs to effkit/plots.py: {plotting!r} in {lines[0]!r}"
    if re.search(r"NBVAL_SKIP|NBVAL_RAISES_EXCEPTION", source):
        yield f"every cell is executed and passes: {lines[0]!r} is exempt"


def without_code(text: str) -> str:
    """Markdown without fenced and inline code, in which # is a comment and []() may be a call."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


# Planted faults: a good notebook gives no complaint, and each fault is found.


def good_notebook():
    prose = "# Title\n\n## Part\n\n![a line falls and flattens](a.png), after [Jacob et al. 2018](https://arxiv.org/abs/1712.05877)"
    cells = [new_markdown_cell(prose)]
    for count in range(1, 7):
        output = new_output("execute_result", data={"text/plain": "2"}, execution_count=count)
        cells.append(new_code_cell("# NBVAL_CHECK_OUTPUT\n1 + 1", execution_count=count, outputs=[output]))
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


def test_too_many_cells_are_too_many():
    notebook = good_notebook()
    notebook.cells += [new_markdown_cell("prose")] * 39
    assert complaints(notebook) == ["46 cells, at most 45"]
