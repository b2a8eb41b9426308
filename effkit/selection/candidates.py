"""One evaluation for all candidates: apply the technique, write the file, score it on val, time it.

Problem   Rules of thumb rank techniques on other people's models. Only this model, measured, says what it gives.
Idea      A candidate is a technique and its readings. What is refused (a technique that finds no layer to rewrite) is a
          candidate too, with the reason. The test split is hidden from all of this.
Screening Scoring costs most. A share of val comes first; a candidate that misses its score there by more than three
          standard errors stops at that: the cheap first rung of successive halving (Jamieson & Talwalkar 2015,
          arXiv:1502.07943), with a test of significance in place of a quota.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from effkit.core import recipe
from effkit.core.report import Reading
from effkit.core.task import Score, Task
from effkit.core.technique import Identity, Pipeline, Technique, evaluating
from effkit.measure import Work, disk_bytes, latency, quality
from effkit.measure.macs import plain
from effkit.selection.constraints import BYTES, LATENCY, Constraints

SIGNIFICANT = 3.0  # standard errors


@dataclass(frozen=True)
class Candidate:
    """A technique and what was measured of its result.

    readings  bytes on disk, the score on val, and the latency where it counts; none where it was refused
    refused   why it could not be applied
    screened  its score is of the first share of val alone, which was bad enough
    """

    technique: Technique
    readings: Mapping[str, Reading] = field(default_factory=dict)
    refused: str = ""
    screened: bool = False

    @property
    def key(self) -> str:
        """The recipe, as text: two candidates of one key are the same."""
        return json.dumps(recipe.to_json(self.technique), sort_keys=True)

    def __str__(self) -> str:
        said = self.refused or ", ".join(f"{name} {reading}" for name, reading in self.readings.items())
        return f"{label(self.technique)}: {said}" + (" (screened out)" if self.screened else "")


def label(technique: Technique) -> str:
    """A short name: the settings that are not the defaults, steps joined by an arrow."""
    if isinstance(technique, Pipeline):
        return " > ".join(map(label, technique.steps)) or "unchanged"
    if isinstance(technique, Identity):
        return "unchanged"
    usual = {f.name: f.default for f in fields(technique)}  # type: ignore[arg-type]
    given = {name: getattr(technique, name) for name in usual if getattr(technique, name) != usual[name]}
    inner = (f"{k}={label(v) if isinstance(v, Technique) else v}" for k, v in given.items())
    return f"{type(technique).__name__}({', '.join(inner)})"


@dataclass(frozen=True)
class Evaluate:
    """technique -> Candidate, on this model.

    timed     whether the latency of the work is measured
    screen    the share of val that is scored first; 1 scores all of it at once
    budget_s  seconds for a latency
    """

    model: nn.Module
    task: Task
    work: Work
    limits: Constraints = Constraints()
    timed: bool = False
    screen: float = 0.25
    budget_s: float = 0.5

    def __call__(self, technique: Technique) -> Candidate:
        try:
            return self.measured(technique)
        except (ValueError, RuntimeError) as error:  # the next candidate may still be fine
            return Candidate(technique, refused=f"{type(error).__name__}: {error}")

    def measured(self, technique: Technique) -> Candidate:
        """Raises whatever the technique raises, or its result when it is run."""
        small = technique(self.model, replace(self.task, test=None))
        score, screened = self.score(small)
        readings = {BYTES: disk_bytes(plain(small)), self.task.score.name: score}
        if self.timed:
            readings[LATENCY] = self.latency(small)
        return Candidate(technique, readings, screened=screened)

    def score(self, model: nn.Module) -> tuple[Reading, bool]:
        """The score on val, and whether a share of it was enough to see that it is too bad."""
        if self.limits.min_score is not None and self.screen < 1:
            val: Any = self.task.val
            rows = getattr(val, "windows", None) or len(val.inputs)
            share = val.first(max(2, int(self.screen * rows)))
            first = quality(model, replace(self.task, val=share), "val")
            if self.hopeless(first):
                return replace(first, note=f"{first.note}, a first share of val"), True
        return quality(model, self.task, "val"), False

    def hopeless(self, score: Reading) -> bool:
        """Whether the score misses its limit beyond what chance explains."""
        short = self.limits.min_score - score.value  # type: ignore[operator]
        missed = short if self.task.score.better == "higher" else -short
        return missed > SIGNIFICANT * (score.spread or float("inf"))

    def latency(self, model: nn.Module) -> Reading:
        with evaluating(model):
            return latency(self.work.prepare(model, self.task), budget_s=self.budget_s)


def costs(readings: Mapping[str, Reading], score: Score) -> tuple[float, ...]:
    """The readings as a point whose coordinates are all better when smaller: bytes, score, latency if measured."""
    value = readings[score.name].value
    point = (readings[BYTES].value, -value if score.better == "higher" else value)
    return (*point, readings[LATENCY].value) if LATENCY in readings else point
