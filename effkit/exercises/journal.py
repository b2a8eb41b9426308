"""What the learner did, one JSON object a line in work/progress.jsonl: appended, never rewritten.

A line that a crash tore, or a hand edit spoiled, costs that line alone. Unsolved stubs are not recorded: running a
notebook from top to bottom is no attempt. A folder that can't be written is said once and stops nothing.
"""

import functools
import html
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from effkit.core.paths import work_dir


def progress_file() -> Path:
    """In EFFKIT_WORK, or ./work where there is one, or the checkout's work/."""
    here = Path("work")
    folder = here if here.is_dir() and not os.environ.get("EFFKIT_WORK") else work_dir()
    return folder / "progress.jsonl"


def record(exercise: str, event: str, status: str = "") -> None:
    """Appends one line; starts a new one first where the last was torn."""
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "exercise": exercise, "event": event}
    line = json.dumps(entry | {"status": status}) + "\n"
    try:
        path = progress_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell() and not _ends_a_line(file):
                line = "\n" + line
            file.write(line.encode())
    except OSError as error:
        _say_once(f"progress is not kept ({error}); to keep it, set EFFKIT_WORK to a folder you can write to")


def _ends_a_line(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def records() -> list[dict]:
    """All lines that are whole; empty where nothing was kept."""
    try:
        lines = progress_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    entries = [entry for entry in map(_parsed, lines) if isinstance(entry, dict)]
    return [
        entry for entry in entries if all(isinstance(entry.get(key), str) for key in ("exercise", "event", "status"))
    ]


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


@dataclass(frozen=True)
class Standing:
    """Where the learner stands with one exercise."""

    exercise: str
    passed: bool
    attempts: int
    hints: int

    def cells(self) -> tuple[str, ...]:
        status = "passed" if self.passed else "tried" if self.attempts else "open"
        return self.exercise, status, str(self.attempts), str(self.hints)


def standing(exercise: str, entries: Sequence[dict]) -> Standing:
    """Counts what the file says of one exercise."""
    mine = [entry for entry in entries if entry["exercise"] == exercise]
    checks = [entry["status"] for entry in mine if entry["event"] == "check"]
    return Standing(exercise, "pass" in checks, len(checks), sum(entry["event"] == "hint" for entry in mine))


@dataclass(frozen=True, repr=False)
class Progress:
    """A small table of all exercises: text in a terminal, HTML in a notebook."""

    rows: tuple[Standing, ...]

    def cells(self) -> list[tuple[str, ...]]:
        return [("exercise", "status", "attempts", "hints"), *(row.cells() for row in self.rows)]

    def summary(self) -> str:
        return f"{sum(row.passed for row in self.rows)} of {len(self.rows)} exercises passed"

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.cells(), strict=True)]
        rows = (map(str.ljust, row, widths) for row in self.cells())
        return "\n".join([*("  ".join(row).rstrip() for row in rows), self.summary()])

    def _repr_html_(self) -> str:
        head, *rows = ([html.escape(cell) for cell in row] for row in self.cells())
        top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
        body = "".join(f"<tr><th scope='row'>{name}</th><td>{'</td><td>'.join(rest)}</td></tr>" for name, *rest in rows)
        return f"<table><caption>{self.summary()}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
