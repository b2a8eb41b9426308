"""Breeding walks: a child takes, at each fork, the choice of one of two good parents.

Problem   NSGA-II crosses vectors that all have the same entries. Walks through a space of sequences don't: what is to
          be chosen depends on what was chosen. Optuna's own NSGA-II finds next to nothing in common to cross there, and
          what it proposes is random search.
Idea      Cross the walks themselves: the child follows parent a, and at a share of the forks that b knows, b. What
          neither decides, and now and then a choice that mutates, is drawn at random.
Fitness   As in NSGA-II, missed limits first, then domination: here by how many others a candidate is beaten.
Source    Deb et al. 2002, doi:10.1109/4235.996017, definition 1 (constrained domination); Fonseca & Fleming 1993 (rank
          by the number of dominators).
"""

import random
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from effkit.selection.frontier import dominates

POPULATION = 10


def child(trials: Sequence[FrozenTrial], rng: random.Random) -> dict[str, object]:
    """Choices by fork, to be completed at random; none as long as there are fewer trials than a population."""
    if len(trials) < POPULATION:
        return {}
    best = sorted(trials, key=lambda trial: fitness(trial, trials))[:POPULATION]
    a, b = rng.sample(best, 2)
    crossed = {**a.params, **{fork: choice for fork, choice in b.params.items() if rng.random() < 0.5}}
    return {fork: choice for fork, choice in crossed.items() if rng.random() > 1 / len(crossed)}


def fitness(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> tuple[float, int]:
    """How far its limits are missed, and how many others beat it; less is better."""
    missed = sum(max(0.0, miss) for miss in trial.user_attrs.get("misses", ()))
    return missed, sum(dominates(other.values, trial.values) for other in trials)
