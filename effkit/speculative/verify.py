"""Verification: which of the proposed tokens stay, and what comes after them.

Problem   Somebody proposes; the text must come out as if the target had written it alone.
Idea      Accept a proposal x, drawn from q, with probability min(1, p(x) / q(x)); at a rejection draw from what is left
          of p, the residual max(p - q, 0), renormalized.
Exact     x comes out with probability q(x) min(1, p(x) / q(x)) = min(p(x), q(x)) by acceptance. A rejection happens
          with probability 1 - sum min(p, q), which is just the mass of max(p - q, 0), so that the residual adds
          max(p(x) - q(x), 0). The sum of both is p(x), for every q: a bad draft costs time, never quality.
Trees     Several proposals for one place are tried in turn. What a rejection leaves of p is the target of the next
          trial, and q loses the token that was tried, for children are drawn without replacement. Each trial is the
          same exact step, so that the place has the distribution p whatever the number of children.
Source    Leviathan et al. 2022, arXiv:2211.17192, algorithm 1 and appendix A.1; Chen et al. 2023, arXiv:2302.01318,
          algorithm 2; trees: Miao et al. 2023, arXiv:2305.09781, algorithm 2; without replacement: Jeon et al. 2024,
          arXiv:2402.14160, section 3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from effkit.core.generation import Sampler, checked, sample


@dataclass(frozen=True)
class Proposal:
    """What is proposed to follow a text.

    tokens    in a line, or the nodes of a tree, parents first
    q         the distributions they were drawn from: one a token in a line; in a tree the first is that of the first
              place, and the one behind each node follows it. None: nothing was left to chance
    parents   of each node of a tree its parent's place, -1 for those that follow the text at once; None: a line
    """

    tokens: Int[Tensor, " g"]
    q: Float[Tensor, "_ vocab"] | None = None
    parents: Int[Tensor, " g"] | None = None

    def goes_on(self, branch: list[int]) -> bool:
        """Whether something is proposed behind this branch."""
        if self.parents is None:
            return len(branch) < len(self.tokens)
        return bool((self.parents == (branch[-1] if branch else -1)).any())


def overlap(p: Float[Tensor, "... vocab"], q: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """sum min(p, q) = 1 - total variation: the chance that a proposal drawn from q is accepted."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """What p has beyond q, as a distribution; p itself where rounding leaves nothing."""
    left = (p - q).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else p


def accepted(chances: Float[Tensor, " g"], rng: torch.Generator | None) -> int:
    """How many coins in a row come up heads; a chance of 1 or more is certain, one of 0 impossible."""
    heads = torch.rand(chances.shape, generator=rng, device=chances.device, dtype=chances.dtype) < chances  # never NaN's
    return int(torch.cat((~heads, heads.new_ones(1))).int().argmax())


def verify(
    proposal: Int[Tensor, " g"], p: Float[Tensor, "g+1 vocab"], q: Float[Tensor, "g vocab"], rng: torch.Generator | None
) -> Int[Tensor, " m"]:
    """The tokens of one pass, 1 to g + 1: those that are accepted, and one from the target's hand."""
    places = torch.arange(len(proposal), device=proposal.device)
    n = accepted(p[places, proposal] / q[places, proposal], rng)
    last = p[n] if n == len(proposal) else residual(p[n], q[n])
    return torch.cat((proposal[:n], sample(last, rng)[None]))


def verify_tree(
    proposal: Proposal, p: Float[Tensor, "g+1 vocab"], rng: torch.Generator | None
) -> tuple[list[int], Int[Tensor, ""]]:
    """The nodes that are accepted, a branch from the root, and the token behind it. p[0] is the first place's
    distribution, p[i + 1] that behind node i."""
    tokens, below, branch = proposal.tokens.tolist(), children(proposal.parents), []  # type: ignore[arg-type]
    node = -1
    while True:
        left, q = p[node + 1], None if proposal.q is None else proposal.q[node + 1]
        for child in below[node + 1]:
            x = tokens[child]
            drawn = F.one_hot(proposal.tokens[child], len(left)).to(left.dtype) if q is None else q
            if accepted((left[x] / drawn[x])[None], rng):
                branch.append(child)
                break
            left, q = residual(left, drawn), None if q is None else without(q, x)
        else:
            return branch, sample(left, rng)
        node = child


def without(q: Float[Tensor, " vocab"], x: int) -> Float[Tensor, " vocab"]:
    """q among the other tokens; q itself where there are none."""
    rest = q.index_fill(0, torch.tensor(x, device=q.device), 0.0)
    return rest / rest.sum() if rest.sum() > 0 else q


def children(parents: Int[Tensor, " g"]) -> list[list[int]]:
    """Of the root, then of each node, the places of its children."""
    below: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for child, parent in enumerate(parents.tolist()):
        below[parent + 1].append(child)
    return below


def follow(proposal: Proposal, choices: Int[Tensor, " g+1"]) -> tuple[list[int], Int[Tensor, " m"]]:
    """For greedy decoding: the proposals that are the target's own choices, as far as they go, and as tokens these and one more."""
    tokens, wanted, branch = proposal.tokens.tolist(), choices.tolist(), [-1]
    if proposal.parents is None:
        n = next((i for i, token in enumerate(tokens) if token != wanted[i]), len(tokens))
        return list(range(n)), choices[: n + 1]
    below = children(proposal.parents)
    while right := [child for child in below[branch[-1] + 1] if tokens[child] == wanted[branch[-1] + 1]]:
        branch.append(right[0])
    return branch[1:], choices[[place + 1 for place in branch]]


def judge(
    proposal: Proposal, logits: Float[Tensor, "g+1 vocab"], sampler: Sampler, rng: torch.Generator | None
) -> tuple[list[int], Int[Tensor, " m"]]:
    """Which proposals stay, by their places, and the new tokens: these and one more."""
    if sampler.temperature == 0:
        return follow(proposal, checked(logits).argmax(-1))
    p = sampler.probabilities(logits)
    if proposal.parents is not None:
        branch, last = verify_tree(proposal, p, rng)
        return branch, torch.cat((proposal.tokens[branch], last[None]))
    q = F.one_hot(proposal.tokens, p.shape[-1]).to(p.dtype) if proposal.q is None else proposal.q
    new = verify(proposal.tokens, p, q, rng)
    return list(range(len(new) - 1)), new
