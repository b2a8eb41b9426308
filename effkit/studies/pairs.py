"""Do the losses of two techniques add? Six ordered pairs on gpt-small, recorded: `python -m effkit study pairs`.

Each cell of the study is one recipe: the unchanged model, three techniques alone, six ordered pairs. A cell holds the
cross-entropy on held-out windows, window by window, the bytes of the file, and the latency of a forward pass beside the unchanged model's,
timed in turns; or why the order is refused.
"""

from dataclasses import replace
from functools import partial
from itertools import permutations
from statistics import fmean

import torch
from torch import nn

from effkit import zoo
from effkit.combining.pairs import Pair, forbidden
from effkit.core.recipe import to_json
from effkit.core.task import Task
from effkit.core.technique import Identity, Pipeline, Technique, evaluating
from effkit.factorization import SVD
from effkit.measure import Forward, disk_bytes, interleaved
from effkit.pruning import Fisher
from effkit.quantization import RTN
from effkit.studies.study import Cells, Study

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


def settings() -> dict:
    recipes = {name: to_json(part) for name, part in PARTS.items()}
    return {"seed": 0, "model": "gpt-small", "windows": WINDOWS, "recipes": recipes}


def cells() -> Cells:
    model, task = zoo.load("gpt-small")
    task = replace(task, test=task.test.first(WINDOWS))  # type: ignore[union-attr]
    return {name: partial(cell, parts, model, task) for name, parts in recipes().items()}


STUDY = Study("pairs", settings, cells)


def pairs(study: dict) -> dict[tuple[str, str], Pair | str]:
    """(first, second) -> the pair's losses, or why it is refused."""
    cells = study["cells"]
    found: dict[tuple[str, str], Pair | str] = {}
    for first, second in permutations(PARTS, 2):
        both = cells[f"{first}, then {second}"]
        before, a, b = (cells[name]["loss"] for name in ("unchanged", first, second))
        found[first, second] = both.get("refused") or Pair(first, second, before, a, b, both["loss"])
    return found

