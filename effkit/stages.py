"""What `effkit test`, `check` and `bench` run: each stage its own process, all of them whatever the earlier ones said.

The list is the whole definition; make and continuous integration only call it.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

from effkit.core.paths import checkout

#: stage -> a module with its arguments, as after `python -m`
STAGES = {
    "lint": "ruff check .",
    "types": "mypy",
    # races are run by `effkit bench` alone; they compile for minutes and prove nothing on a busy machine
    "fast tests": "pytest -q -m 'not slow' -n 2 --dist loadfile --hypothesis-profile=quick --ignore=tests/benchmarks",
    "tests": "pytest -q -n 2 --dist loadfile --durations=15 --ignore=tests/benchmarks",
    "exercises": "effkit selftest",
    # one kernel after another, because notebooks time things; lax compares only the cells marked NBVAL_CHECK_OUTPUT
    "notebooks": "pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout=120 --timeout=0 notebooks",
    "benchmarks": "pytest -q --benchmark-enable --benchmark-only",
}


def run(*names: str) -> Iterator[tuple[str, int, float]]:
    """Runs stage after stage in the checkout: name, exit code, seconds."""
    for name in names:
        start = time.perf_counter()
        command = [sys.executable, "-m", *shlex.split(STAGES[name])]
        yield name, subprocess.run(command, cwd=checkout(), env=offline()).returncode, time.perf_counter() - start


def offline() -> dict[str, str]:
    """The environment of processes that need no network and must not use one: tests/offline holds them to it."""
    path = os.pathsep.join(filter(None, (str(checkout() / "tests" / "offline"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
