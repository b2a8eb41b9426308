"""Speculative decoding: a cheap draft proposes, the target verifies, and the text is the target's own.

Problem   A decoder reads all its weights to write one token, and verifying several costs hardly more than writing one.
Idea      Let something cheap propose gamma tokens; run the target over all of them at once. It gives p at every place.
          Accept the proposed x, drawn from q, with probability min(1, p(x) / q(x)); at the first rejection draw from
          what is left of p, the residual max(p - q, 0), renormalized, and drop the rest; if all are accepted, the
          target's last distribution gives one token more.
Exact     x comes out with probability q(x) min(1, p(x) / q(x)) = min(p(x), q(x)) by acceptance. A rejection happens
          with probability 1 - sum min(p, q), which is just the mass of max(p - q, 0), so that the residual adds
          max(p(x) - q(x), 0). The sum of both is p(x), for every q: a bad draft costs time, never quality.
Cost      gamma passes of the draft for each of the target, and a draft's memory, less what it shares with the target.
          Where a pass over gamma + 1 tokens is not nearly as cheap as over one, it loses: law.py.
Left out  Trees of proposals (Miao et al. 2023, arXiv:2305.09781); several texts in one pass: rows run one by one.
Source    Leviathan et al. 2022, arXiv:2211.17192, algorithm 1 and appendix A.1; Chen et al. 2023, arXiv:2302.01318,
          algorithm 2.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.generation import Autoregressive, Sampler, check_prompt, sample, stop_tensor
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER
from effkit.speculative.draft import check_draft, share, tensor_bytes
from effkit.speculative.law import Pass
from effkit.speculative.self_draft import EarlyExit

#: (ids, how many at most, sampler, rng) -> the proposed tokens, and the distributions they were drawn from, None where
#: nothing was left to chance
Proposer = Callable[[Tensor, int, Sampler, torch.Generator | None], tuple[Tensor, Tensor | None]]


PLAIN = Sampler()


def overlap(p: Float[Tensor, "... vocab"], q: Float[Tensor, "... vocab"]) -> Float[Tensor, "..."]:
    """sum min(p, q) = 1 - total variation: the chance that a proposal drawn from q is accepted."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """What p has beyond q, as a distribution; p itself where rounding leaves nothing."""
    left = (p - q).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else p


def accepted(chances: Float[Tensor, " g"], rng: torch.Generator | None) -> int:
    """How many coins in a row come up heads; a chance of 1 or more is certain, one of 0 impossible."""
    tails = torch.rand(chances.shape, generator=rng, device=chances.device, dtype=chances.dtype) >= chances
    return int(torch.cat((tails, tails.new_ones(1))).int().argmax())


def verify(
    proposal: Int[Tensor, " g"], p: Float[Tensor, "g+1 vocab"], q: Float[Tensor, "g vocab"], rng: torch.Generator | None
) -> Int[Tensor, " m"]:
    """The tokens of one pass, 1 to g + 1: those that are accepted, and one from the target's hand."""
    places = torch.arange(len(proposal), device=proposal.device)
    n = accepted(p[places, proposal] / q[places, proposal], rng)
    last = p[n] if n == len(proposal) else residual(p[n], q[n])
    return torch.cat((proposal[:n], sample(last, rng)[None]))


@torch.no_grad()
def speculate(
    target: nn.Module,
    propose: Proposer,
    ids: Int[Tensor, "1 n"],
    max_new_tokens: int,
    *,
    gamma: int = 4,
    sampler: Sampler = PLAIN,
    stop: int | Collection[int] | None = None,
    rng: torch.Generator | None = None,
) -> Iterator[Pass]:
    """The passes by which the text grows, one after another, whatever it is that proposes."""
    stops, end = stop_tensor(stop, ids.device), ids.shape[1] + max_new_tokens
    cache = target.new_cache(capacity=end)  # type: ignore[operator]
    if sampler.temperature == 0:  # nothing is left to chance, so the caller's random state stays as it is
        rng = torch.Generator(ids.device).manual_seed(0)
    while ids.shape[1] < end:
        proposal, q = propose(ids, min(gamma, end - ids.shape[1] - 1), sampler, rng)
        cache.truncate(ids.shape[1] - 1)  # takes back what was rejected, and the last token, which is yet to be fed
        logits = target(torch.cat((ids, proposal[None]), dim=1)[:, cache.length :], cache)
        p = sampler.probabilities(logits[0, -len(proposal) - 1 :])
        q = F.one_hot(proposal, p.shape[-1]).to(p.dtype) if q is None else q
        new = verify(proposal, p, q, rng)
        step = Pass(len(proposal), len(new) - 1, upto_stop(new, stops))
        ids = torch.cat((ids, step.tokens[None]), dim=1)
        yield step
        if torch.isin(ids[0, -1], stops):
            return


def upto_stop(tokens: Int[Tensor, " m"], stops: Int[Tensor, " s"]) -> Int[Tensor, " k"]:
    """The tokens up to the first stop token, with it; a block may run beyond the end of a text."""
    found = torch.isin(tokens, stops).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


class DraftModel:
    """Proposes what a cheap decoder writes, drawn by the same sampler as the target's tokens."""

    def __init__(self, draft: nn.Module, *, capacity: int):
        self.draft, self.cache = draft, draft.new_cache(capacity=capacity)  # type: ignore[operator]

    def __call__(
        self, ids: Int[Tensor, "1 n"], most: int, sampler: Sampler, rng: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        self.cache.truncate(ids.shape[1] - 1)
        before, chances = ids.shape[1], []
        for _ in range(most):
            logits = self.draft(ids[:, self.cache.length :], self.cache)[:, -1]
            chances.append(sampler.probabilities(logits))
            ids = torch.cat((ids, sample(chances[-1], rng)[None]), dim=1)
        return ids[0, before:], torch.cat(chances) if chances else None


def speculative_generate(
    target: nn.Module,
    draft: nn.Module,
    ids: Int[Tensor, "1 n"],
    max_new_tokens: int,
    *,
    gamma: int = 4,
    sampler: Sampler = PLAIN,
    stop: int | Collection[int] | None = None,
    rng: torch.Generator | None = None,
) -> Int[Tensor, "1 m"]:
    """Prompt and continuation, distributed exactly as `generate(target, ...)`; with temperature 0, the same tokens.

    Raises ValueError for gamma < 1, several rows, a draft of another vocabulary or of too short a context.
    """
    check_speculation(target, ids, max_new_tokens, gamma)
    check_draft(target, draft, ids.shape[1] + max_new_tokens)
    propose = DraftModel(draft, capacity=ids.shape[1] + max_new_tokens)
    passes = speculate(target, propose, ids, max_new_tokens, gamma=gamma, sampler=sampler, stop=stop, rng=rng)
    return joined(ids, passes)


def joined(ids: Int[Tensor, "1 n"], passes: Iterable[Pass]) -> Int[Tensor, "1 m"]:
    return torch.cat([ids, *(p.tokens[None] for p in passes)], dim=1)


def check_speculation(target: nn.Module, ids: Tensor, max_new_tokens: int, gamma: int) -> None:
    check_prompt(target, ids, max_new_tokens)
    require_int("gamma", gamma, 1, hint="it is how many tokens are proposed at a time; for none, decode plainly")
    if len(ids) != 1:
        how = "rows accept different numbers of tokens, so call it once a row, or use model.generate, which does"
        raise ValueError(f"speculation follows one text at a time, got {len(ids)} rows: {how}")


def each_row(ids: Int[Tensor, "b n"], continued: Callable[[Tensor], Tensor]) -> Int[Tensor, "b m"]:
    """Rows continued one after another; one that stopped early goes on repeating its last token, as in `generate`."""
    rows = [continued(row[None])[0] for row in ids]
    longest = max(map(len, rows))
    return torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])


@stored
class SpeculativeDecoding(nn.Module):
    """As a decoder's `decoding`: holds the draft, and follows one row after another."""

    def __init__(self, gamma: int):
        super().__init__()
        self.gamma = gamma
        self.draft: nn.Module = nn.Identity()

    def forward(self, model: nn.Module, ids: Int[Tensor, "b n"], max_new_tokens: int, **settings) -> Int[Tensor, "b m"]:
        check_prompt(model, ids, max_new_tokens)
        settings = {"gamma": self.gamma, **settings}
        return each_row(ids, lambda row: speculative_generate(model, self.draft, row, max_new_tokens, **settings))

    def passes(self, model: nn.Module, ids: Int[Tensor, "1 n"], max_new_tokens: int, **settings) -> Iterator[Pass]:
        """The same pass by pass, for `statistics`."""
        propose = DraftModel(self.draft, capacity=ids.shape[1] + max_new_tokens)
        return speculate(model, propose, ids, max_new_tokens, gamma=self.gamma, **settings)


@dataclass(frozen=True)
class Speculative(Technique):
    """The decoder generates with a draft; its weights and what it writes stay the same.

    draft   makes the draft from the target, such as RTN(bits=3), or brings one: Use("gpt-draft")
    gamma   tokens that are proposed at a time
    """

    draft: Technique = EarlyExit(0.5)
    gamma: int = 4

    paper = Paper("Leviathan et al.", 2022, "Fast inference from transformers via speculative decoding",
                  "arXiv:2211.17192", "algorithm 1")  # fmt: skip

    def __post_init__(self):
        if not isinstance(self.draft, Technique):
            how = "such as RTN(bits=3) or Use('gpt-small')"
            raise ValueError(f"draft must be a technique that makes it from the target, {how}, got {self.draft!r}")
        require_int("gamma", self.gamma, 1, hint="it is how many tokens are proposed at a time")

    # the draft is a part of the model: where it is packed or masked, so is the model
    needs = property(lambda self: self.draft.needs | {DECODER})
    breaks = property(lambda self: self.draft.breaks - {DECODER})

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        model.decoding = Autoregressive()  # an older draft is not made a part of the new one
        decoding = SpeculativeDecoding(self.gamma)
        decoding.draft = self.draft(model, task)
        if not DECODER.holds(decoding.draft):
            kind = type(decoding.draft).__name__
            raise ValueError(f"{self.draft!r} gives a {kind}, which generates nothing: take one that gives a decoder")
        check_draft(model, decoding.draft, 0)
        share(decoding.draft, model)
        model.decoding = decoding.train(model.training)
        note(model, "decoding", f"drafts by {self.draft!r}, {self.gamma} at a time", "Speculative")
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The draft's bytes over the target's: a proposal's cost where decoding does nothing but read weights."""
        draft = model.decoding.draft  # type: ignore[union-attr]
        share_of = tensor_bytes(draft) / tensor_bytes(model, without=draft)  # type: ignore[arg-type]
        return Reading(share_of, "of the target's bytes", "counted", better="lower")
