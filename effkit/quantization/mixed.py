"""Mixed precision: more bits where they matter, under one budget.

Problem   Layers differ: some bear 2 bits, others suffer at 4, and one width for all pays for both.
Idea      Measure what each width of each layer costs, that layer alone rounded: its sensitivity. Then choose one width a
          layer with the least sum of costs whose bytes fit. That is a multiple-choice knapsack.
Greedy    From the narrowest widths, always the widening that gains most a byte, as long as it fits. Exact where each layer
          gains less and less a byte, up to the last step, which may not fit; `exact` finds the least sum in any case.
Cost      One pass over the calibration examples for each layer and width.
Left out  That costs don't quite add up: two rounded layers may lose more, or less, than the sum of each alone.
Source    Dong et al. 2019, arXiv:1911.03852, sec. 3 (choice by sensitivity, theirs from the Hessian's trace);
          Sinha & Zoltners 1979, doi:10.1287/opre.27.3.503 (the knapsack, and choices that are dominated).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from effkit.core.calibration import Statistics
from effkit.core.checks import require_choice, require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import find, swap
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique, evaluating
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization.packed import RTN

Costs = list[list[float]]  # layer -> cost of each of its choices
Sizes = list[list[int]]  # layer -> size of each of its choices
Choice = list[int]  # layer -> which choice
Twins = dict[nn.Module, list[Any]]  # layer -> itself rounded, one a width


def greedy(costs: Costs, sizes: Sizes, budget: int) -> Choice:
    """From every layer's smallest choice, one widening after another: of those that still fit, the one that takes most
    cost away per byte, until none is left that takes any."""
    chosen = [min(range(len(size)), key=lambda i: (size[i], cost[i])) for cost, size in zip(costs, sizes, strict=True)]
    left = budget - sum(size[i] for size, i in zip(sizes, chosen, strict=True))
    while True:
        steps = [
            ((costs[layer][now] - costs[layer][then]) / max(extra, 1e-9), layer, then, extra)
            for layer, now in enumerate(chosen)
            for then in range(len(costs[layer]))
            if (extra := sizes[layer][then] - sizes[layer][now]) <= left and costs[layer][then] < costs[layer][now]
        ]
        if not steps:
            return chosen
        _, layer, then, extra = max(steps)
        chosen[layer], left = then, left - extra


def exact(costs: Costs, sizes: Sizes, budget: int) -> Choice:
    """The choice with the least sum of costs whose sizes fit, by dynamic programming over what is not dominated: a sum of
    choices survives a layer where nothing as small costs as little."""
    spare = budget - sum(min(size) for size in sizes)  # what all layers together may take beyond their smallest
    size, cost, trails = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for price, weight in zip(costs, sizes, strict=True):
        sums = (size[:, None] + weight - min(weight)).ravel(), (cost[:, None] + price).ravel()
        order = np.lexsort(sums[::-1])  # by size, among equals by cost
        order = order[sums[0][order] <= spare]
        size, cost = sums[0][order], sums[1][order]
        undominated = cost < np.concatenate(([np.inf], np.minimum.accumulate(cost)[:-1]))
        size, cost = size[undominated], cost[undominated]
        trails.append(np.stack(np.divmod(order[undominated], len(weight))))  # the sum before, and the choice made
    chosen, at = [], len(size) - 1  # the last survivor is the largest, and so the cheapest
    for before, choice in reversed(trails):
        chosen.append(int(choice[at]))
        at = before[at]
    return chosen[::-1]


def slots(twin: Any) -> int:
    """How many codes a packed layer stores, those that fill up its rows included."""
    store = twin.weight_store
    return store.codes.numel() * 8 // store.bits


def bits_held(twin: Any) -> int:
    """Codes, scales and zero points of a packed layer."""
    return 8 * sum(b.numel() * b.element_size() for b in twin.weight_store.buffers())


def sensitivity(model: nn.Module, twins: Twins, task: Task) -> Costs:
    """What each layer's each twin costs: the loss on task.calib with that layer rounded alone, above the loss with none."""
    bar = tqdm(total=sum(map(len, twins.values())), desc="sensitivity", leave=False, delay=2)
    with evaluating(model), torch.no_grad(), bar:
        base = mean_loss(model, task)
        costs: Costs = []
        for layer, choices in twins.items():
            costs.append([])
            for twin in choices:
                with rounded(layer, twin):
                    costs[-1].append(mean_loss(model, task) - base)
                bar.update()
    return costs


def mean_loss(model: nn.Module, task: Task) -> float:
    """Mean over the examples of task.calib."""
    losses = [(float(task.loss(model(batch[0]), batch)), len(batch[0])) for batch in task.calib]  # type: ignore[misc, union-attr]
    if not math.isfinite(mean := sum(loss * n for loss, n in losses) / sum(n for _, n in losses)):
        raise ValueError(f"the loss on task.calib is {mean}: look for NaN and infinity in data and weights")
    return mean


@contextmanager
def rounded(layer: Any, twin: Any) -> Iterator[None]:
    """The layer computes with its twin's weight inside, and with its own afterwards."""
    weight: Tensor = layer.weight
    own = weight.detach().clone()
    weight.data.copy_(twin.weight_store().reshape(own.shape))
    try:
        yield
    finally:
        weight.data.copy_(own)


METHODS = {"exact": exact, "greedy": greedy}


@dataclass(frozen=True)
class MixedPrecision(Technique):
    """One width a layer, chosen by what the loss on calibration examples says of each, under a budget.

    bits      the budget: what RTN(bits) would take, were fractions of a bit allowed; scales and zero points come on top
    widths    the bits to choose from, 2 to 8 each
    method    "exact", the knapsack's optimum, or "greedy"
    rounding  how a layer is rounded, at whatever width: RTN, or one of its kind, such as GPTQ
    examples  how many of task.calib say what a width costs
    """

    bits: float = 4.0
    widths: tuple[int, ...] = (2, 3, 4, 6, 8)
    method: Literal["exact", "greedy"] = "exact"
    rounding: RTN = field(default_factory=RTN)
    examples: int = 8
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("Dong et al.", 2019, "HAWQ-V2: Hessian aware trace-weighted quantization of neural networks",
                  "arXiv:1911.03852", "sec. 3")  # fmt: skip

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths:
            raise ValueError("widths is empty: give at least one, such as (2, 3, 4, 8)")
        for width in self.widths:
            require_int("each of widths", width, 2, 8)
        require_float("bits", self.bits, min(self.widths), 8, hint="allow narrower widths for a smaller budget")
        require_choice("method", self.method, tuple(METHODS))
        require_int("examples", self.examples, 1)
        if not isinstance(self.rounding, RTN):
            raise ValueError(f"rounding must be RTN or one of its kind, got {self.rounding!r}: its bits are what is chosen")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        task.require("calib", "loss", by=self)
        found = find(model, (nn.Linear, nn.Conv2d), layers=self.layers, by="MixedPrecision")
        twins = self.twins(found, self.rounding_at(max(self.widths)).statistics(model, task))
        sizes = [[bits_held(twin) for twin in choices] for choices in twins.values()]
        budget = int(sum(slots(choices[0]) for choices in twins.values()) * (self.bits - self.widths[0]))
        budget += sum(size[0] for size in sizes)  # sizes are linear in the width
        few = task.few(self.examples, by=self)
        chosen = METHODS[self.method](sensitivity(model, twins, few), sizes, budget)
        best = {id(layer): twins[layer][i] for layer, i in zip(twins, chosen, strict=True)}
        return swap(model, (nn.Linear, nn.Conv2d), lambda layer: best.get(id(layer)), layers=self.layers, by="MixedPrecision")

    def rounding_at(self, width: int) -> RTN:
        return replace(self.rounding, bits=width, layers=self.layers)

    def twins(self, found: list[tuple[str, nn.Module]], seen: Mapping[str, Statistics]) -> Twins:
        """Each layer's packed twins, one a width; layers that have none are left out."""
        made = {layer: [self.rounding_at(w).replacement(layer, seen.get(path)) for w in self.widths] for path, layer in found}
        return {layer: choices for layer, choices in made.items() if None not in choices}

    def claim(self, model: nn.Module) -> Reading:
        return self.rounding.claim(model)
