"""select(): the techniques, their order and settings, for this model and these limits.

Problem   "4 bits or half the weights?" has no answer without the model, the machine and what it may cost.
Idea      Search the space of sequences under the limits; of the candidates that keep them all, take the best; apply it
          afresh, measure again, and only recommend what keeps its limits again. Score on test what was chosen on val.
Caution   The best of many scores on val is partly luck: on test it is usually a little worse. That is why test exists.
          The more candidates, and the fewer examples in val, the more of it is luck.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from effkit.core.checkpoint import fingerprint
from effkit.core.checks import require_choice, require_float, require_int
from effkit.core.report import Report, Table
from effkit.core.task import Score, Task
from effkit.core.technique import Technique
from effkit.core.traits import DECODER
from effkit.measure import Decode, Forward, Work, compare
from effkit.selection.candidates import Candidate, Evaluate, costs, label
from effkit.selection.constraints import LATENCY, Constraints
from effkit.selection.frontier import pareto
from effkit.selection.search import SAMPLERS, Search
from effkit.selection.space import Space, default_space

NO_LIMITS = Constraints()
PREFERENCES = ("score", "bytes", "latency")


@dataclass(frozen=True)
class Selection:
    """What a search found.

    candidates   all that were tried, in order
    recommended  the best that keeps its limits, its readings measured again; None where none does
    table        the unchanged model and the recommended one, on test; empty where none is recommended
    unfit        techniques that were left out, and why
    """

    constraints: Constraints
    score: Score
    candidates: Sequence[Candidate]
    recommended: Candidate | None = None
    table: Table = field(default_factory=Table)
    unfit: Mapping[str, str] = field(default_factory=dict)

    @property
    def technique(self) -> Technique:
        """The recommended technique. Raises ValueError, with what came nearest, where there is none."""
        if self.recommended is None:
            raise ValueError(self.advice())
        return self.recommended.technique

    @property
    def measured(self) -> list[Candidate]:
        """The candidates that could be applied and were scored on all of val."""
        return [c for c in self.candidates if c.readings and not c.screened]

    @property
    def frontier(self) -> list[Candidate]:
        """The candidates that no other beats, smallest file first."""
        points = [costs(c.readings, self.score) for c in self.measured]
        return [self.measured[i] for i in sorted(pareto(points), key=lambda i: points[i])]

    def frontier_table(self) -> Table:
        """One row a candidate of the frontier; "(kept)" after the name of one that keeps all limits."""
        rows = [Report(self._row(c), dict(c.readings)) for c in self.frontier]
        return Table(rows, f"frontier of {len(self.candidates)} candidates, on val; limits: {self._limits()}")

    def advice(self) -> str:
        """What is recommended; or else which limit is nearest to being met, by what, and what would do."""
        if self.recommended is not None:
            return f"recommended, of {len(self.candidates)} candidates: {self.recommended}"
        tried = [c for c in self.candidates if c.readings]
        if not tried:
            return f"none of {len(self.candidates)} candidates could be applied; the last: {self.candidates[-1]}"
        nearest = min(tried, key=self._worst)
        missed = ", ".join(f"{name} by {miss:.1%}" for name, miss in self._misses(nearest).items() if miss > 0)
        head = f"no candidate of {len(self.candidates)} keeps all limits ({self._limits()})"
        said = "; or ".join(self._relaxed(tried)) or f"no limit alone is to blame: {self._least(tried)}"
        return f"{head}. The nearest misses {missed}: {nearest}. What would do: {said}."

    def _relaxed(self, tried: Sequence[Candidate]) -> list[str]:
        """Which limit, the nearest to being met first, could give way alone, how far, and in whose favour."""
        found = []
        for limit in self._misses(tried[0]):
            others = [c for c in tried if all(miss <= 0 for name, miss in self._misses(c).items() if name != limit)]
            if others:
                best = min(others, key=lambda c: self._misses(c)[limit])
                hand = f" (and {self.constraints.margin:.0%} in hand)" if limit == LATENCY else ""
                text = f"allow {limit} {best.readings[limit]}{hand}, which {label(best.technique)} reaches"
                found.append((self._misses(best)[limit], text))
        return [text for _, text in sorted(found)]

    def _least(self, tried: Sequence[Candidate]) -> str:
        """Of each limit by itself, the least that it is missed by, the nearest to being met first."""
        least = {name: min((self._misses(c)[name], label(c.technique)) for c in tried) for name in self._misses(tried[0])}
        ranked = sorted(least.items(), key=lambda item: item[1])
        how = {name: f"missed by {miss:.1%}" if miss > 0 else "kept" for name, (miss, _) in ranked}
        return ", ".join(f"{name} is {how[name]} at best, by {who}" for name, (_, who) in ranked)

    def _misses(self, candidate: Candidate) -> dict[str, float]:
        return self.constraints.misses(candidate.readings, self.score)

    def _worst(self, candidate: Candidate) -> float:
        return max(self._misses(candidate).values(), default=0.0)

    def _row(self, candidate: Candidate) -> str:
        kept = bool(self.constraints.count) and self._worst(candidate) <= 0
        return label(candidate.technique) + (" (kept)" if kept else "")

    def _limits(self) -> str:
        return self.constraints.describe(self.score)

    def __str__(self) -> str:
        parts = [str(self.frontier_table()) if self.measured else "", self.advice()]
        return "\n\n".join(filter(None, [*parts, str(self.table) if len(self.table) else ""]))


def select(
    model: nn.Module,
    task: Task,
    constraints: Constraints = NO_LIMITS,
    *,
    space: Space | Mapping[str, Mapping[str, Sequence]] | None = None,
    trials: int = 40,
    seed: int = 0,
    sampler: str = "tpe",
    prefer: str | None = None,
    work: Work | None = None,
    storage: str | Path | None = None,
    study: str = "selection",
    screen: float = 0.25,
) -> Selection:
    """Searches the space for the technique that keeps the limits and is best at what `prefer` names.

    space    sequences and settings; {"RTN": {"bits": (3, 4)}} for short; what the catalogue offers, where it is None
    trials   different candidates that are measured; those in `storage`, a file from an earlier call, count
    sampler  "tpe", "evolution" or "random"
    prefer   "score", "bytes" or "latency"; None: the score, or bytes where the score alone has a limit
    work     what is timed, where there is a limit on latency or latency is preferred; Decode for decoders, else Forward
    screen   the share of val that is scored first, see Evaluate
    """
    task.require("val", "per_example", by=Selection)
    only_score = constraints.min_score is not None and constraints.count == 1
    prefer = prefer or ("bytes" if only_score else "score")  # given a budget, quality; given a quality, the budget
    require_choice("prefer", prefer, PREFERENCES)
    require_choice("sampler", sampler, SAMPLERS)
    require_int("trials", trials, 1)
    require_float("screen", screen, 0.0, 1.0, open_low=True)
    timed = constraints.max_latency is not None or prefer == "latency"
    work = work or (Decode(prompt=32, new=32) if DECODER.holds(model) else Forward())
    evaluate = Evaluate(model, task, work, constraints, timed, screen)
    bound, unfit = fitting(space if isinstance(space, Space) else Space(space) if space else default_space(), evaluate)
    path = Path(storage) if storage else None
    search = Search(bound, evaluate, task.score, constraints, timed, sampler, seed, path, study, fingerprint([model]))
    found = Selection(constraints, task.score, search.run(trials), unfit=unfit)
    return confirmed(found, evaluate, prefer)


def confirmed(found: Selection, evaluate: Evaluate, prefer: str) -> Selection:
    """The selection with its recommendation: the best candidate that keeps all limits when it is measured again."""
    kept = [c for c in found.measured if found._worst(c) <= 0]
    for candidate in sorted(kept, key=lambda c: _rank(c, found.score, prefer)):
        again = replace(evaluate, screen=1.0, budget_s=2 * evaluate.budget_s)(candidate.technique)
        if again.readings and found._worst(again) <= 0:
            return replace(found, recommended=again, table=_on_test(again.technique, evaluate))
    return found


def fitting(space: Space, evaluate: Evaluate) -> tuple[Space, dict[str, str]]:
    """The space without the techniques that this model refuses, and their reasons: each is tried, on a bit of data."""
    model, task = evaluate.model, evaluate.task
    small = {name: getattr(task, name) for name in ("train", "calib", "val")}
    tiny = replace(task, test=None, **{name: data.first(4) for name, data in small.items() if data is not None})
    bound, unfit = space.on(model), {}
    for name in bound.after(()):
        try:
            bound.plain(name)(model, tiny)
        except (ValueError, RuntimeError) as error:
            unfit[name] = str(error)
    rest = {name: settings for name, settings in bound.techniques.items() if name not in unfit}
    if not rest:
        reasons = "; ".join(f"{name}: {why}" for name, why in unfit.items())
        raise ValueError(f"no technique of the space can be applied to this model ({reasons}); name others in `space`")
    return replace(bound, techniques=rest), unfit


def _on_test(technique: Technique, evaluate: Evaluate) -> Table:
    task, scored = evaluate.task, evaluate.task.test is not None
    models = {"unchanged": evaluate.model, label(technique): technique(evaluate.model, replace(task, test=None))}
    return compare(models, task, evaluate.work, quality=scored, budget_s=evaluate.budget_s, title="measured again, on test")


def _rank(candidate: Candidate, score: Score, prefer: str) -> tuple[float, ...]:
    size, quality, *latency = costs(candidate.readings, score)
    return {"score": (quality, size), "bytes": (size, quality), "latency": (*latency, quality)}[prefer]
