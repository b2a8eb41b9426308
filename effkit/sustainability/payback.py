"""Payback: after how many inferences a compression has saved what it cost.

Problem   Calibrating, searching and fine-tuning burn energy now, to save some at each inference later. A model that is
          asked a hundred times had better been left alone.
Idea      N = cost / (before - after), where before and after are the energy of one inference. If nothing is saved, never.
Interval  Each reading is known as value +- spread; N then lies between its most and its least favourable corner. Where
          the intervals of before and after overlap, the upper end is infinite: nothing was shown yet.
Units     Without an energy counter all three energies are seconds times the same assumed power, which cancels. N is then
          found from seconds, and is a measurement although no joule was: how many watts it took doesn't matter to it.
Left out  The energy to train the model in the first place, which is spent either way; storage and shipping.
Source    Elementary; the question is that of Patterson et al. 2021, arXiv:2104.10350, section 2 (training against
          inference), and of any energy payback time in life-cycle assessment (ISO 14040).
"""

import math
from dataclasses import dataclass

from torch import nn

from effkit.core.report import Reading
from effkit.core.task import Task
from effkit.core.technique import Technique, evaluating
from effkit.measure import FORWARD, Work, energy, interleaved, once


def inferences(cost: float, before: float, after: float) -> float:
    """The N at which cost + N * after = N * before; infinite where after is not below before and there is a cost."""
    if cost <= 0:
        return 0.0
    return cost / (before - after) if before > after else math.inf


def corners(reading: Reading) -> tuple[float, float]:
    """value - spread, but not below zero, and value + spread."""
    spread = reading.spread or 0.0
    return max(0.0, reading.value - spread), reading.value + spread


@dataclass(frozen=True)
class Payback:
    """cost of compressing once; before and after: of one inference; all in one unit, J or s."""

    cost: Reading
    before: Reading
    after: Reading

    def __post_init__(self):
        units = {self.cost.unit, self.before.unit, self.after.unit}
        if len(units) > 1:
            raise ValueError(f"cost, before and after must share one unit, got {', '.join(sorted(units))}")

    inferences = property(lambda self: inferences(self.cost.value, self.before.value, self.after.value))

    @property
    def interval(self) -> tuple[float, float]:
        """From the luckiest corner to the unluckiest; the upper end may be infinite."""
        (c, C), (b, B), (a, A) = map(corners, (self.cost, self.before, self.after))
        return inferences(c, B, a), inferences(C, b, A)

    def saved(self, n: float) -> Reading:
        """What n inferences have saved, the cost subtracted; negative before the payback."""
        return (self.before - self.after) * n - self.cost

    def __str__(self) -> str:
        low, high = self.interval
        spent = f"costs {self.cost} once, an inference {self.before} before and {self.after} after"
        if math.isinf(self.inferences):
            return f"never pays back: it {spent}"
        return f"pays back after {self.inferences:,.0f} inferences ({low:,.0f} to {high:,.0f}): it {spent}"


def payback(
    technique: Technique, model: nn.Module, task: Task, work: Work = FORWARD, *, budget_s: float = 1.0
) -> Payback:
    """Compresses once with the meters running, then times both models in turns.

    In joules where a counter moves, else in seconds, whose ratio is the same.
    """
    small, seconds, joules = once(lambda: technique(model, task))
    with evaluating(model), evaluating(small):
        runs = {"before": work.prepare(model, task), "after": work.prepare(small, task)}
        times = interleaved(runs, budget_s=budget_s)
        if joules.provenance != "measured":
            return Payback(seconds, times["before"], times["after"])
        used = {name: energy(run, seconds=times[name], budget_s=budget_s) for name, run in runs.items()}
        return Payback(joules, used["before"], used["after"])
