"""What keeps the library small and its imports one way: read from the source, so that nothing can pass by not being run."""

import ast
import io
import json
import sys
import tokenize
from pathlib import Path

import pytest

from effkit.catalog import PARADIGMS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "effkit").rglob("*.py"))
PEERS = {
    "torchao",
    "transformers",
    "peft",
    "tensorly",
    "torch_pruning",
    "onnxruntime",
    "onnx",
    "codecarbon",
    "bitsandbytes",
}
THEMES = ("sustainability", "combining", "selection")

#: from a layer of the library to the layers that it may import
MAY_IMPORT = {
    "core": {"core"},
    "measure": {"core", "measure"},
    "zoo": {"core", "zoo"},
    **{chapter: {"core", "measure", "zoo", chapter} for chapter in PARADIGMS},
}
#: pure tensor functions that one chapter takes from another: (from, to)
BORROWED = {("caching", "quantization")}  # the affine map, for keys and values of few bits
#: lines of code (docstrings, comments and blank lines are the book around them); why these: docs/decisions.md
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 250, 40
MOST_LINES_OF_A_CHAPTER, MOST_LINES_OF_A_DEEP_CHAPTER = 1_100, 1_890
DEEP = {"quantization", "caching", "speculative"}  # chapters with every method of their ladder
MOST_LINES_OF_THE_LIBRARY = 12_370  # whatever a chapter takes
MOST_LINES_OF_THE_FRAME = 4_030  # core, measure, zoo, training and the modules beside them: may only be lowered
#: a study is part of the chapter or theme that it serves
STUDY_OF = {"caching": "caching", "decoding": "speculative", "eagle": "speculative", "pairs": "combining"}
STUDY_OF |= {"quantization": "quantization", "qat": "quantization"}


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT / "effkit").parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    allowed = MAY_IMPORT.get(layer(path))
    if allowed is None:
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("effkit.")}
    wrong = {to for to in ours - allowed if (layer(path), to) not in BORROWED}
    # core/technique and the like may name a module of effkit's root only where it is a layer below
    assert not wrong, f"{path.name} in {layer(path)} imports {sorted(wrong)}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_peer_and_no_ready_made_quantization_or_pruning(path):
    if path.relative_to(ROOT / "effkit") == Path("zoo/hf.py"):
        return
    names = imports(path)
    assert not {n for n in names if n.split(".")[0] in PEERS}
    assert not {n for n in names if n.startswith(("torch.ao", "torch.quantization", "torch.nn.utils.prune"))}


def measured_claims(tree: ast.AST) -> list[int]:
    """Lines that name the provenance "measured" other than to compare with it: however a Reading is then called, renamed,
    replaced or filled from a dictionary, the word has to stand somewhere. The table of provenances gives it away as well."""
    sides = [side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)]
    compared = {id(word) for side in sides for word in (side, *getattr(side, "elts", ()))}
    found = []
    for node in ast.walk(tree):
        word = isinstance(node, ast.Constant) and node.value == "measured" and id(node) not in compared
        indexed = isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("PROVENANCES")
        indexed = indexed and not isinstance(node.slice, ast.Slice)
        if word or indexed:
            found.append(node.lineno)
    return found


def test_only_measure_makes_measured_readings():
    """In core/report.py the word stands once: in the list of provenances."""
    for path in FILES:
        if layer(path) != "measure":
            claims = measured_claims(ast.parse(path.read_text()))
            listed = path == ROOT / "effkit" / "core" / "report.py"
            assert len(claims) == listed, f"{path}:{claims} makes a measured reading"


def test_no_notebook_makes_measured_readings():
    """A figure may label a curve so; a cell that speaks of readings may not."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and ("Reading" in source or "provenance" in source):
                assert not measured_claims(ast.parse(source)), f"{path.name}, cell {number}"


@pytest.mark.parametrize("code, lines", [
    ("Reading(1.0, 's', 'measured')", [1]), ("report.Reading(1.0, 's', provenance='measured')", [1]),
    ("from effkit.core.report import Reading as R\nR(1.0, 's', 'measured')", [2]), ("replace(r, provenance='measured')", [1]),
    ("how = 'measured'\nReading(1.0, 's', how)", [1]), ("Reading(**{'provenance': 'measured'})", [1]),
    ("Reading(1.0, 's', PROVENANCES[2])", [1]), ("Reading(1.0, 's', report.PROVENANCES[-2])", [1]),
    ("Reading(1.0, 's', 'measured') == r", [1]), ("r.provenance == 'measured'", []),
    ("r.provenance in ('counted', 'measured')", []), ("say('measured here')", []),
])  # fmt: skip
def test_every_road_to_a_measured_reading_is_seen(code, lines):
    assert measured_claims(ast.parse(code)) == lines


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, no comment, no docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)} - documented


def test_the_library_stays_small():
    sizes = {path: len(code_lines(path.read_text())) for path in FILES if layer(path) != "exercises"}
    chapters = {*PARADIGMS, *THEMES}
    owner = {path: STUDY_OF.get(path.stem, "studies") if layer(path) == "studies" else layer(path) for path in sizes}
    way_out = "say once what is said twice; docs/decisions.md says why there is a limit"
    for chapter in chapters:
        held = sum(n for path, n in sizes.items() if owner[path] == chapter)
        most = MOST_LINES_OF_A_DEEP_CHAPTER if chapter in DEEP else MOST_LINES_OF_A_CHAPTER
        assert held <= most, f"{chapter} has {held} lines of code, at most {most}: {way_out}"
    assert sum(sizes.values()) <= MOST_LINES_OF_THE_LIBRARY, f"{sum(sizes.values())} lines of code in all: {way_out}"
    frame = sum(n for path, n in sizes.items() if owner[path] not in chapters)
    assert frame <= MOST_LINES_OF_THE_FRAME, f"the frame has {frame} lines of code, at most {MOST_LINES_OF_THE_FRAME}: {way_out}"
    long = {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > MOST_LINES_OF_A_FILE}
    assert not long, f"files over {MOST_LINES_OF_A_FILE} lines of code: {long}"


@pytest.mark.slow
def test_functions_stay_short():
    long = []
    for path in FILES:
        code = code_lines(path.read_text())
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef)
                and len(code & set(range(node.lineno, node.end_lineno + 1))) > MOST_LINES_OF_A_FUNCTION
            ):
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long, long


def test_every_chapter_shows_itself():
    from effkit import tour

    assert [showcase.paradigm for showcase in tour.showcases()] == list(PARADIGMS)
    assert all(showcase.exhibits for showcase in tour.showcases())


@pytest.mark.slow
def test_importing_effkit_brings_no_peer():
    import subprocess

    code = f"import sys, effkit; print(sorted({PEERS!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
