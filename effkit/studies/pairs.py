"""Do the losses of two techniques add? Six ordered pairs on gpt-small, recorded: `python -m effkit.studies.pairs`.

Each cell of the study is one recipe: the unchanged model, three techniques alone, six ordered pairs. A cell holds the
cross-entropy on held-out windows, window by window, the bytes of the file, and the latency of a forward pass beside the unchanged model's,
timed in turns; or why the order is refused. Results are written after each cell to data/studies/pairs.json, and the same
command goes on where it was stopped. Delete the file to start over.
"""

import json
import platform
import subprocess
from dataclasses import replace
from datetime import date
from itertools import permutations
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from tqdm.auto import tqdm

from effkit import zoo
from effkit.combining.pairs import Pair, forbidden
from effkit.core.paths import checkout, data_dir, write_atomically
from effkit.core.recipe import to_json
from effkit.core.task import Task
from effkit.core.technique import Identity, Pipeline, Technique, evaluating
from effkit.factorization import SVD
from effkit.measure import Forward, disk_bytes, interleaved, processor
from effkit.pruning import Fisher
from effkit.quantization import RTN

COMMAND = "python -m effkit.studies.pairs"
WINDOWS = 64  # of the test split, 256 tokens each
#: each alone costs about 0.09 nats a token
PARTS: dict[str, Technique] = {
    "quantize": RTN(bits=3, group_size=-1),
    "prune": Fisher(sparsity=0.25, pattern="channels", layers="*.ff.*up", examples=64),
    "factorize": SVD(keep=0.8),
}


def recipes() -> dict[str, tuple[str, ...]]:
    """Cell's name -> its parts, in their order: none, one, or two."""
    chosen = [(), *((name,) for name in PARTS), *permutations(PARTS, 2)]
    return {", then ".join(parts) or "unchanged": parts for parts in chosen}


def cell(parts: tuple[str, ...], model: nn.Module, task: Task) -> dict:
    """The readings of one recipe, or why it is refused."""
    steps = tuple(PARTS[name] for name in parts)
    if len(steps) == 2 and (why := forbidden(*steps)):
        return {"refused": why}
    changed = Pipeline(steps or (Identity(),))(model, task)
    windows = losses(changed, task)
    with evaluating(model), evaluating(changed):
        named = {"latency": changed, "latency of the unchanged": model}
        runs = {name: Forward(8).prepare(m, task) for name, m in named.items()}
        readings = {"bytes on disk": disk_bytes(changed), **interleaved(runs, budget_s=2.0)}
    return {"loss": fmean(windows), "windows": windows, **{name: reading.to_json() for name, reading in readings.items()}}


@torch.no_grad()
def losses(model: nn.Module, task: Task) -> list[float]:
    """Cross-entropy of each held-out window, nats a token."""
    with evaluating(model):
        return [round(float(task.loss(model(x), (x, y))), 6) for x, y in replace(task.test, size=1)]  # type: ignore[misc, type-var, union-attr]


def run(path: Path | None = None) -> dict:
    """Computes what is not there yet, and returns the whole study."""
    path = path or data_dir() / "studies" / "pairs.json"
    study = header()
    if path.exists():
        study = resumed(json.loads(path.read_text()), study, path)
    model, task = zoo.load("gpt-small")
    task = replace(task, test=task.test.first(WINDOWS))  # type: ignore[union-attr]
    for name, parts in recipes().items():
        if name not in study["cells"]:
            study["cells"][name] = cell(parts, model, task)
            write_atomically(path, json.dumps(study, indent=1).encode())
            tqdm.write(f"{name}: {study['cells'][name]}")
    return study


def header() -> dict:
    """Where and how the study is made."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout(), capture_output=True, text=True)
    how = {"study": "pairs", "command": COMMAND, "commit": commit.stdout.strip() or "unknown"}
    when = {"date": date.today().isoformat(), "machine": str(processor()), "python": platform.python_version()}
    where = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    what = {"seed": 0, "model": "gpt-small", "windows": WINDOWS}
    return how | when | where | what | {"recipes": {name: to_json(part) for name, part in PARTS.items()}, "cells": {}}


def resumed(found: dict, new: dict, path: Path) -> dict:
    """The study that was begun. Raises ValueError where it was begun with other settings, or elsewhere."""
    for key in ("recipes", "windows", "model", "machine", "python", "torch", "threads"):
        if found.get(key) != new[key]:
            raise ValueError(f"{path} was begun with {key} {found.get(key)}, not {new[key]}; delete it to start over")
    return found


def read(path: Path | None = None) -> dict:
    """The recorded study."""
    path = path or data_dir() / "studies" / "pairs.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: make it with {COMMAND}")
    return json.loads(path.read_text())


def pairs(study: dict) -> dict[tuple[str, str], Pair | str]:
    """(first, second) -> the pair's losses, or why it is refused."""
    cells = study["cells"]
    found: dict[tuple[str, str], Pair | str] = {}
    for first, second in permutations(PARTS, 2):
        both = cells[f"{first}, then {second}"]
        before, a, b = (cells[name]["loss"] for name in ("unchanged", first, second))
        found[first, second] = both.get("refused") or Pair(first, second, before, a, b, both["loss"])
    return found


if __name__ == "__main__":
    run()
