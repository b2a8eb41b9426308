"""Ways to know the distribution of a random program: run it once for every outcome of its draws, or very often."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from effkit.core.generation import Sampler
from effkit.speculative import speculate, verify
from effkit.speculative.speculate import speculative_generate


class Table(nn.Module):
    """A decoder without weights to speak of: the next token's logits depend on the last token alone. Quick."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, ids, cache):
        cache.length += ids.shape[1]
        return self.logits[ids]

    def new_cache(self, *, capacity):
        return Position()


class Position:
    """A cache that only counts."""

    length = 0

    def truncate(self, n):
        self.length = min(self.length, n)


def table(seed: int, vocab: int = 3, spread: float = 2.5) -> Table:
    rng = torch.Generator().manual_seed(seed)
    return Table(spread * torch.randn(vocab, vocab, dtype=torch.float64, generator=rng))


class Outcome:
    """One run of the program along a script of outcomes; where the script ends, the first possible one, and the others
    are noted as branches."""

    def __init__(self, script: tuple[int, ...]):
        self.script, self.taken, self.weight = script, (), 1.0
        self.branches: list[tuple[int, ...]] = []

    def choose(self, chances) -> int:
        possible = [i for i, chance in enumerate(chances) if chance > 0]
        here = len(self.taken)
        if here < len(self.script):
            outcome = self.script[here]
        else:
            outcome = possible[0]
            self.branches += [(*self.taken, other) for other in possible[1:]]
        self.taken += (outcome,)
        self.weight *= float(chances[outcome])
        return outcome


def enumerated(program: Callable[[], object]) -> dict[object, float]:
    """The exact distribution of what the program returns; every draw of speculate.py is made to take each outcome."""
    found: dict[object, float] = defaultdict(float)
    pending: list[tuple[int, ...]] = [()]
    while pending:
        run = Outcome(pending.pop())

        def heads_in_a_row(chances, rng, run=run):
            chances = [min(1.0, float(c)) for c in chances]
            ends = [math.prod(chances[:n]) for n in range(len(chances) + 1)]
            return run.choose([end * (1 - c) for end, c in zip(ends, chances, strict=False)] + [ends[-1]])

        def row_by_row(p, rng, run=run):
            return torch.tensor([run.choose(row) for row in p.reshape(-1, p.shape[-1])]).view(p.shape[:-1])

        with pytest.MonkeyPatch.context() as patch:
            for module in (speculate, verify):
                patch.setattr(module, "sample", row_by_row)
            patch.setattr(verify, "accepted", heads_in_a_row)
            found[program()] += run.weight
        pending += run.branches
    return dict(found)


@torch.no_grad()
def joint(
    target: nn.Module, ids: torch.Tensor, new: int, sampler: Sampler, stop: int | None = None
) -> dict[tuple, float]:
    """The target's own distribution over whole continuations, by the chain rule."""
    cache = target.new_cache(capacity=ids.shape[1] + new)
    p = sampler.probabilities(target(ids, cache)[0, -1])
    found: dict[tuple, float] = {}
    for token in range(len(p)):
        if p[token] > 0:
            rest = {(): 1.0}
            if new > 1 and token != stop:
                rest = joint(target, torch.cat((ids, torch.tensor([[token]])), 1), new - 1, sampler, stop)
            found |= {(token, *tail): float(p[token]) * chance for tail, chance in rest.items()}
    return found


def largest_gap(a: dict, b: dict) -> float:
    return max(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys())


def fit(
    target: nn.Module,
    draft: nn.Module,
    ids: torch.Tensor,
    new: int,
    gamma: int,
    sampler: Sampler,
    n: int,
    seed: int = 0,
) -> float:
    """The p-value of "the texts are the target's": chi-square over whole texts, rare ones together in one cell."""
    wanted, rng = joint(target, ids, new, sampler), torch.Generator().manual_seed(seed)
    settings = dict(gamma=gamma, sampler=sampler, rng=rng)
    made = Counter(
        tuple(speculative_generate(target, draft, ids, new, **settings)[0, ids.shape[1] :].tolist()) for _ in range(n)
    )
    return goodness(made, wanted, n)


def goodness(made: Counter, wanted: dict[tuple, float], n: int) -> float:
    if made.keys() - wanted.keys():
        return 0.0  # a text that the target never writes
    cells = {key for key, chance in wanted.items() if n * chance >= 5}
    seen, expected = [made[key] for key in cells], [n * wanted[key] for key in cells]
    rest = n - sum(expected)
    if rest > 5:
        seen.append(n - sum(seen))
        expected.append(rest)
    scale = sum(seen) / sum(expected)
    return float(chisquare(seen, [scale * e for e in expected]).pvalue)
