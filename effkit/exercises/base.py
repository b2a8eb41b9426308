"""Exercises: a question is data, a session about it an object, a grade a value.

Problem   A grader that looks up the learner's globals grades what happens to lie there, and one that raises stops the
          notebook for whoever has not solved the exercise yet.
Idea      The function is handed over. Checks try it on cases drawn afresh, one after another, and the first refusal
          ends the grading: one thing to mend at a time. Whatever the function does becomes a Result.
Left out  a time limit: stopping a function safely takes a process of its own. Interrupt the kernel instead.
"""

import ast
import copy
import dis
import html
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch

from effkit.core.technique import kept_random_state
from effkit.exercises.journal import record, records, standing
from effkit.exercises.values import gap, legible, own_traceback
from effkit.notebook import Note

ATTEMPTS = 3  # after so many the solution opens without a pass
_EMPTY = {"RESUME", "NOP", "CACHE", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}


class Unattempted(Exception):
    """The function is still a stub."""


@dataclass(frozen=True)
class Case:
    """The arguments of one call; `copy` them for each call, since a learner's function may write into them."""

    args: tuple
    settings: dict

    def copy(self) -> "Case":
        return copy.deepcopy(self)


def call(function: Callable, case: Case) -> object:
    """The function's answer. Raises Unattempted where it is still `...`, alone or in a tuple."""
    answer = function(*case.args, **case.settings)
    if answer is ... or (isinstance(answer, tuple) and any(part is ... for part in answer)):
        raise Unattempted
    return answer


#: what a check saw, and what it wanted instead
Refusal = tuple[str, str]


@dataclass(frozen=True)
class Check:
    """A named law. `look(function, reference, rng)` returns None or a Refusal; cases come from the generator."""

    name: str
    look: Callable[[Callable, Callable, torch.Generator], Refusal | None]


@dataclass(frozen=True)
class Finding:
    """How one check ended; true where it had nothing to refuse."""

    check: str
    seen: str = ""
    wanted: str = ""

    def __bool__(self) -> bool:
        return not (self.seen or self.wanted)

    def __str__(self) -> str:
        why = "" if self else f"\n     saw     {self.seen}\n     wanted  {self.wanted}"
        return f"  {'ok' if self else 'NO'} {self.check}{why}"


@dataclass(frozen=True)
class Exercise:
    """A question, its answer, and what proves an answer right or wrong.

    name        chapter.what, such as "quantization.absmax"
    prompt      Markdown: what to write; every symbol defined
    reference   a correct answer of 3 to 15 lines, self-contained; its name, arguments and docstring make the stub
    checks      tried in this order until one refuses
    hints       three: the concept, where to look, a piece of code
    after       one sentence, shown after a pass: what this was good for
    wrong       plausible mistakes, one hard-coded answer among them: pairs of a function and the name of the check
                that must refuse it, or a fragment of the reason
    """

    name: str
    prompt: str
    reference: Callable
    checks: tuple[Check, ...]
    hints: tuple[str, str, str]
    after: str
    wrong: tuple[tuple[Callable, str], ...]

    def __post_init__(self):
        if not re.fullmatch(r"[a-z_]+\.[a-z0-9_]+", self.name):
            raise ValueError(f"an exercise's name must be chapter.what in lower case, got {self.name!r}")
        if not self.checks or len(self.hints) != 3 or len(self.wrong) < 3:
            counts = f"{len(self.checks)} checks, {len(self.hints)} hints, {len(self.wrong)} wrong answers"
            raise ValueError(f"{self.name} has {counts}; an exercise has 1 or more, exactly 3, and 3 or more")

    @property
    def stub(self) -> str:
        """Source of the unsolved function: the reference up to the end of its docstring."""
        source = textwrap.dedent(inspect.getsource(self.reference))
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        end = body[0].end_lineno if self.reference.__doc__ else body[0].lineno - 1
        return "\n".join([*source.splitlines()[:end], "    raise NotImplementedError\n"])


@dataclass(frozen=True, repr=False)
class Result:
    """A grade: status pass, fail, error or unattempted, and what each check that was tried saw and wanted."""

    exercise: str
    status: str
    checks: tuple[Finding, ...] = ()
    message: str = ""

    def __bool__(self) -> bool:
        return self.status == "pass"

    def __repr__(self) -> str:
        return "\n".join([f"{self.exercise}: {self.status}", *map(str, self.checks), self.message]).rstrip()

    def _repr_html_(self) -> str:
        head, _, rest = repr(self).partition("\n")
        colour = {"pass": "#009E73", "unattempted": "#999999"}.get(self.status, "#D55E00")
        body = f"<pre style='background:none'>{html.escape(rest)}</pre>" if rest else ""
        return f"<div style='border-left:4px solid {colour};padding-left:.8em'><b>{html.escape(head)}</b>{body}</div>"


class Question:
    """A session with one exercise. Attempts and passes of earlier sessions count, as far as they were kept."""

    def __init__(self, exercise: Exercise):
        kept = standing(exercise.name, records())
        self.exercise = exercise
        self.guess: object = None
        self.attempts, self.passed, self._hinted = kept.attempts, kept.passed, 0

    @property
    def name(self) -> str:
        """What the learner calls it: notebooks hold several, and are told `third.hint()` by the third."""
        mine = (name for name, value in vars(sys.modules["__main__"]).items() if value is self)
        return next((name for name in mine if not name.startswith("_")), "q")  # _ and _12 are what cells returned

    def __repr__(self) -> str:
        return f"{self.exercise.prompt}\n\n```python\n{self.exercise.stub}```"

    def _repr_markdown_(self) -> str:
        return repr(self)

    def predict(self, value: object) -> Note:
        """Keeps a guess, to be compared by `observe` and drawn by plots.guess; None is no guess yet."""
        self.guess = value
        if value is None:
            return Note(f"No guess yet: `{self.name}.predict(your number)`, then run the cells below.")
        record(self.exercise.name, "predict")
        return Note(f"Your guess, {legible(value)}, is kept.")

    def observe(self, actual: object) -> Note:
        """Puts what came beside the guess."""
        if self.guess is None:
            return Note(f"It came out as {legible(actual)}; you had made no guess.")
        record(self.exercise.name, "observe")
        return Note(f"You guessed {legible(self.guess)}; it came out as {legible(actual)}{gap(self.guess, actual)}.")

    def check(self, function: Callable, *, seed: int | None = None) -> Result:
        """Grades the learner's own function and raises nothing. Cases are drawn afresh unless a seed is given."""
        result = grade(self.exercise, function, seed=seed, called=self.name)
        if result.status != "unattempted":
            self.attempts, self.passed = self.attempts + 1, self.passed or bool(result)
            record(self.exercise.name, "check", result.status)
        return result

    def hint(self) -> Note:
        """The next of three: the concept, where to look, a piece of code. The last one stays."""
        level = min(self._hinted, len(self.exercise.hints) - 1)
        self._hinted += 1
        record(self.exercise.name, "hint", str(level + 1))
        return Note(f"Hint {level + 1} of {len(self.exercise.hints)}: {self.exercise.hints[level]}")

    def solution(self, *, reveal: bool = False) -> Note:
        """A correct answer, after a pass or three attempts, or with reveal=True."""
        if not (self.passed or self.attempts >= ATTEMPTS or reveal):
            left = ATTEMPTS - self.attempts
            return Note(f"Locked until you pass, or try {left} more times; `{self.name}.solution(reveal=True)` opens it now.")
        record(self.exercise.name, "solution")
        source = inspect.getsource(self.exercise.reference)
        return Note(f"```python\n{textwrap.dedent(source)}```\n\n{self.exercise.after}")


def grade(exercise: Exercise, function: Callable, *, seed: int | None = None, called: str = "q") -> Result:
    """Tries the checks in order until one refuses; the global random state stays as it was.

    called   what the learner calls the question
    """
    if not callable(function):
        how = f"pass the function itself, as in {called}.check({exercise.reference.__name__}), not what it returns"
        return Result(exercise.name, "error", message=f"{legible(function)} is no function: {how}")
    seed = torch.Generator().seed() if seed is None else seed
    findings: list[Finding] = []
    if _is_empty(function):
        return _unattempted(exercise, called)
    with kept_random_state():
        for check in exercise.checks:
            try:
                refusal = check.look(function, exercise.reference, torch.Generator().manual_seed(seed))
            except Exception as error:  # noqa: BLE001  (whatever the learner's code raises is his grade, not our crash)
                return _stopped(exercise, check, error, findings, called)
            findings.append(Finding(check.name, *(refusal or ())))
            if refusal:
                return Result(exercise.name, "fail", tuple(findings), f"{called}.hint() helps, one level a call.")
    return Result(exercise.name, "pass", tuple(findings), exercise.after)


def _stopped(exercise: Exercise, check: Check, error: Exception, findings: list[Finding], called: str) -> Result:
    if isinstance(error, Unattempted) or _raised_by_hand(error):
        return _unattempted(exercise, called)
    message = f"In the check “{check.name}”:\n{own_traceback(error, call)}"
    return Result(exercise.name, "error", tuple(findings), message)


def _unattempted(exercise: Exercise, called: str) -> Result:
    todo = f"fill in {exercise.reference.__name__}, run its cell and then this check; {called}.hint() helps."
    return Result(exercise.name, "unattempted", message=f"Not attempted yet: {todo}")


def _is_empty(function: Callable) -> bool:
    """Nothing but `...`, `pass` or a docstring in its body."""
    code = getattr(function, "__code__", None)
    steps = list(dis.get_instructions(code)) if code else []
    constants = [step.argval for step in steps if step.opname in ("LOAD_CONST", "RETURN_CONST")]
    return bool(steps) and {step.opname for step in steps} <= _EMPTY and constants in ([None], [...])


def _raised_by_hand(error: Exception) -> bool:
    """A stub's `raise NotImplementedError`: torch raises the same error, for a dtype it can't do, but from C++."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None or not isinstance(error, NotImplementedError):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
