"""The exercises, one file a chapter: whatever module here defines `EXERCISES` is found. Duplicate names are an error.

`exercise("quantization.affine")` opens a session with one; `progress()` says how far the learner got; `selftest()`
proves that every reference passes, that every stub raises nothing, and that every planted mistake is caught.
"""

import functools
import importlib
import pkgutil
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from effkit.core.checks import require_choice
from effkit.exercises.base import Exercise, Question, Result, grade
from effkit.exercises.journal import Progress, records, standing

ROUNDS = 5  # seeds that the selftest draws cases from; the same ones everywhere


@functools.cache
def catalogue() -> dict[str, Exercise]:
    """Every exercise by its name, in the order of their files. Raises ValueError where two have one name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return collect(one for module in modules for one in getattr(module, "EXERCISES", ()))


def collect(exercises: Iterable[Exercise]) -> dict[str, Exercise]:
    """By name; raises ValueError where two have the same."""
    found: dict[str, Exercise] = {}
    for one in exercises:
        if one.name in found:
            raise ValueError(f"two exercises are called {one.name!r}; rename one of them in effkit/exercises/")
        found[one.name] = one
    return found


def exercise(name: str) -> Question:
    """A session with the exercise of this name. Raises ValueError, listing all names, where there is none."""
    require_choice("the exercise", name, catalogue())
    return Question(catalogue()[name])


def progress() -> Progress:
    """All exercises and how far the learner got, from work/progress.jsonl."""
    entries = records()
    return Progress(tuple(standing(name, entries) for name in catalogue()))


@dataclass(frozen=True)
class Failure:
    """An exercise that doesn't do what it must: which function of it, and what came instead."""

    exercise: str
    function: str
    problem: str

    def __str__(self) -> str:
        return f"{self.exercise}, {self.function}: {self.problem}"


def selftest(exercises: Iterable[Exercise] | None = None) -> list[Failure]:
    """Empty where every reference passes, every stub is unattempted, every wrong answer is refused for its reason."""
    chosen = catalogue().values() if exercises is None else exercises
    return [failure for one in chosen for failure in _failures(one)]


def _failures(one: Exercise) -> Iterator[Failure]:
    trials: list[tuple[str, Callable, Callable[[Result], str]]]
    trials = [("reference", _copy(one.reference), _passes), ("stub", _compiled(one), _unattempted)]
    trials += [(f"wrong answer {f.__name__}", f, functools.partial(_refused, why=why)) for f, why in one.wrong]
    for name, function, problem_of in trials:
        problems = (problem_of(grade(one, function, seed=seed)) for seed in range(ROUNDS))
        problem = next(filter(None, problems), "")
        if problem:
            yield Failure(one.name, name, problem)


def _passes(result: Result) -> str:
    return "" if result else f"must pass, but\n{result}"


def _unattempted(result: Result) -> str:
    return "" if result.status == "unattempted" else f"must be unattempted, but\n{result}"


def _refused(result: Result, why: str) -> str:
    """A pass and an error alike are no refusal; so is one without a word about what was seen and what was wanted."""
    if result.status != "fail":
        return f"must be refused by “{why}”, but\n{result}"
    finding = result.checks[-1]
    if why not in str(finding):
        return f"must be refused by “{why}”, not by\n{finding}"
    return "" if finding.seen and finding.wanted else f"“{finding.check}” says nothing of what it saw and wanted"


def _copy(function) -> types.FunctionType:
    """The same code in another object, since the reference itself is refused as the library's own."""
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _compiled(one: Exercise) -> types.FunctionType:
    """The stub as a learner would have it in a cell."""
    names = dict(one.reference.__globals__)
    exec(one.stub, names)
    return names[one.reference.__name__]
