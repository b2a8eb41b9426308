"""Quality: how good a model is at its task, how sure that is, and whether two models really differ.

Problem   91.2 % against 90.8 % on 1,000 examples may be luck: either has a standard error of 0.9 points.
Idea      A score is a mean over examples, so its standard error comes for nothing. Two models see the same examples,
          and the differences example by example vary far less than the scores do.
Left out  Examples that depend on each other (windows of one text): then the errors given here are too small.
Source    McNemar 1947, doi:10.1007/BF02295996; Dietterich 1998, doi:10.1162/089976698300017197, section 3.1.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.core.checks import require_choice, require_float
from effkit.core.report import Reading
from effkit.core.task import Task
from effkit.core.technique import evaluating


def quality(model: nn.Module, task: Task, split: str = "test") -> Reading:
    """The task's score on a split, its standard error as spread."""
    return summary_of(scores(model, task, split), task)


def scores(model: nn.Module, task: Task, split: str = "test") -> Float[Tensor, " n"]:
    """One value an example, in float64; each module's mode is as before afterwards."""
    require_choice("split", split, ("train", "calib", "val", "test"))
    task.require("per_example", split, by=task)
    with evaluating(model), torch.no_grad():
        values = task.per_example(model, getattr(task, split))  # type: ignore[misc]
    if values.dim() != 1 or not len(values):
        raise ValueError(f"per_example must return one value an example, a 1-d tensor, got shape {tuple(values.shape)}")
    return values.double().cpu()


@dataclass(frozen=True)
class Paired:
    """Model minus baseline on the same examples. `interval` is for the difference; `p` is McNemar's exact two-sided
    p-value where every value is 0 or 1, else None."""

    difference: Reading
    interval: tuple[float, float]
    p: float | None
    examples: int

    def __str__(self) -> str:
        low, high = self.interval
        tail = "" if self.p is None else f", p = {self.p:.3g}"
        return f"{self.difference} (from {low:.3g} to {high:.3g}{tail}; {self.examples} examples)"


def paired(
    baseline: nn.Module, model: nn.Module, task: Task, split: str = "test", *, confidence: float = 0.95
) -> Paired:
    """Whether the model differs from the baseline: the mean difference with its normal interval, and a test."""
    return contrast(scores(baseline, task, split), scores(model, task, split), task, confidence=confidence)


def contrast(
    before: Float[Tensor, " n"], after: Float[Tensor, " n"], task: Task, *, confidence: float = 0.95
) -> Paired:
    """`paired`, from scores at hand. Where not one of n answers changed, the normal interval would be a point; but had
    they changed at a rate r, none would have with probability (1 - r)^n: a rate up to -ln(1 - confidence) / n is
    compatible with that (at 95 % the rule of three: Hanley & Lippman-Hand 1983, doi:10.1001/jama.1983.03330370053031)."""
    require_float("confidence", confidence, 0.0, 1.0, open_low=True, open_high=True)
    difference = summary_of(after - before, task)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * (difference.spread or 0.0)
    right_or_wrong = bool(((before == 0) | (before == 1)).all() and ((after == 0) | (after == 1)).all())
    if right_or_wrong and torch.equal(before, after):
        half = -math.log(1 - confidence) / len(before)
    p = mcnemar(int((before > after).sum()), int((after > before).sum())) if right_or_wrong else None
    return Paired(difference, (difference.value - half, difference.value + half), p, len(before))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of "both err equally often", from the examples that only one of two models gets right.

    Under it each such example is a fair coin, so the smaller count is Binomial(n, 1/2): p = 2 P(B <= smaller).
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def summary_of(values: Float[Tensor, " n"], task: Task) -> Reading:
    """The mean of scores, its standard error as spread."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Reading(float(values.mean()), task.score.unit, "measured", error, task.score.better, f"n = {len(values)}")
