"""What `effkit test` and `effkit check` run: each stage its own process, all of them whatever the earlier ones said.

The list is the whole definition; make and continuous integration only call it.
"""

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from effkit.core.paths import checkout


@dataclass(frozen=True)
class Stage:
    """A name and a module with its arguments, as after `python -m`."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: its exit code, 0 being success, and its seconds."""

    stage: Stage
    code: int
    seconds: float


LINT = Stage("lint", ("ruff", "check", "."))
TYPES = Stage("types", ("mypy",))
# Races are run by `effkit bench` alone; they compile for minutes and prove nothing on a busy machine.
QUIETLY = ("--ignore=tests/benchmarks",)
FAST_TESTS = Stage("fast tests", ("pytest", "-q", "-m", "not slow", *QUIETLY))
TESTS = Stage("tests", ("pytest", "-q", "--durations=15", *QUIETLY))
EXERCISES = Stage("exercises", ("effkit", "selftest"))
# One kernel after another, because notebooks time things; lax compares only the cells marked NBVAL_CHECK_OUTPUT.
NOTEBOOKS = Stage(
    "notebooks",
    ("pytest", "-q", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "--timeout=0", "notebooks"),
)
BENCHMARKS = Stage("benchmarks", ("pytest", "-q", "--benchmark-enable", "--benchmark-only"))

CHECK = (LINT, TYPES, FAST_TESTS)
BENCH = (BENCHMARKS,)


def everything() -> tuple[Stage, ...]:
    """The stages of `effkit test`, without those whose subject this checkout does not hold."""
    exercises = (EXERCISES,) if any(checkout().glob("effkit/exercises/[!_]*.py")) else ()
    notebooks = (NOTEBOOKS,) if any(checkout().glob("notebooks/*.ipynb")) else ()
    return (LINT, TYPES, TESTS, *exercises, *notebooks)


def run(stages: Iterable[Stage]) -> Iterator[Outcome]:
    """Runs stage after stage in the checkout, its output going where ours goes."""
    for stage in stages:
        start = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", *stage.command], cwd=checkout()).returncode
        yield Outcome(stage, code, time.perf_counter() - start)
