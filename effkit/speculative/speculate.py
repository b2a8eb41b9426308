"""Speculative decoding: a cheap draft proposes, the target verifies, and the text is the target's own.

Problem   A decoder reads all its weights to write one token, and verifying several costs hardly more than writing one.
Idea      Let something cheap propose gamma tokens; run the target over all of them at once. It gives p at every place,
          and verify.py says which of them stay; if all do, the target's last distribution gives one token more.
Exact     For every draft the text has the target's distribution: the proof stands in verify.py.
Cost      gamma passes of the draft for each of the target, and a draft's memory, less what it shares with the target.
          Where a pass over gamma + 1 tokens is not nearly as cheap as over one, it loses: law.py.
Left out  Several texts in one pass: here rows run one by one, and batch.py runs them together.
Source    Leviathan et al. 2022, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318, algorithm 2.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_float, require_int
from effkit.core.generation import Autoregressive, Cache, Sampler, check_prompt, read_prompt, sample, stop_tensor
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER, UNANSWERED
from effkit.speculative.draft import check_draft, share, tensor_bytes
from effkit.speculative.law import Adaptive, Pass, linear
from effkit.speculative.self_draft import EarlyExit
from effkit.speculative.verify import Proposal, judge

PLAIN = Sampler()
GUESSES = frozenset({DECODER, UNANSWERED})  # what a decoder must be that shall guess


@dataclass(frozen=True)
class Seen:
    """What a pass of the target saw, for those who propose: it was fed the end of the text, then the proposal.

    ids        the text after the pass
    start      the position of the first token that was fed
    kept       places, among those that were fed, of the tokens that are now part of the text
    logits     behind the last token of the text as it was, and behind each proposed one
    features   the target's state at each token that was fed; None where it has none to offer
    """

    ids: Int[Tensor, "1 n"]
    start: int
    kept: Int[Tensor, " k"]
    logits: Float[Tensor, "g+1 vocab"]
    features: Float[Tensor, "f d"] | None


class Proposer:
    """Whatever proposes: called once a pass with the text so far and how many tokens are wanted at most."""

    def __call__(self, ids: Int[Tensor, "1 n"], most: int, sampler: Sampler, rng: torch.Generator | None) -> Proposal:
        raise NotImplementedError

    def observe(self, seen: Seen) -> None:
        """Told what each pass of the target saw, that over the prompt among them."""


@torch.no_grad()
def speculate(
    target: nn.Module, propose: Proposer, ids: Int[Tensor, "1 n"], max_new_tokens: int, *, gamma: "int | Adaptive" = 4,
    sampler: Sampler = PLAIN, stop: int | Collection[int] | None = None, rng: torch.Generator | None = None,
) -> Iterator[Pass]:  # fmt: skip
    """The passes by which the text grows, one after another, whatever it is that proposes."""
    stops, end = stop_tensor(stop, ids.device), ids.shape[1] + max_new_tokens
    cache = target.new_cache(capacity=end)  # type: ignore[operator]
    if (features := read_prompt(target, ids, cache)) is not None:
        propose.observe(Seen(ids, 0, torch.arange(ids.shape[1] - 1), features.new_empty(0, 0), features[0]))
    while ids.shape[1] < end:
        most = gamma.choose() if isinstance(gamma, Adaptive) else gamma
        proposal = propose(ids, min(most, end - ids.shape[1] - 1), sampler, rng)
        start = cache.length
        features, logits = look(target, ids, proposal, cache)
        branch, new = judge(proposal, logits, sampler, rng)
        kept = forget(cache, ids.shape[1] - start, branch, proposal)
        step = Pass(len(proposal.tokens), len(branch), upto_stop(new, stops), proposal.goes_on(branch))
        ids = torch.cat((ids, step.tokens[None]), dim=1)
        propose.observe(Seen(ids, start, kept, logits, features))
        if isinstance(gamma, Adaptive):
            gamma.observe(step)
        yield step
        if len(stops) and torch.isin(ids[0, -1], stops):
            return


def look(
    target: nn.Module, ids: Int[Tensor, "1 n"], proposal: Proposal, cache: Cache
) -> tuple[Float[Tensor, "f d"] | None, Float[Tensor, "g+1 vocab"]]:
    """One pass of the target over what it has not read of the text, and the proposal."""
    fed, places = torch.cat((ids, proposal.tokens[None]), dim=1)[:, cache.length :], len(proposal.tokens) + 1
    tree: tuple[Tensor, ...] = ()
    if proposal.parents is not None:  # the text is the trunk
        trunk = fed.shape[1] - places + 1
        tree = (torch.cat((torch.arange(trunk, device=ids.device) - 1, proposal.parents + trunk)),)
    if not hasattr(target, "features"):
        return None, target(fed, cache, *tree)[0, -places:]
    features = target.features(fed, cache, *tree)  # type: ignore[operator]
    return features[0], target.logits(features[:, -places:])[0]  # type: ignore[operator]


def forget(cache: Cache, trunk: int, branch: list[int], proposal: Proposal) -> Int[Tensor, " k"]:
    """Takes back what was rejected; returns the places of what stays."""
    kept = torch.tensor([*range(trunk), *(trunk + place for place in branch)], device=proposal.tokens.device)
    if proposal.parents is None:
        cache.truncate(max(0, cache.length - len(proposal.tokens) + len(branch)))  # a cache that keeps nothing has length 0
    else:
        cache.keep(kept)
    return kept


def upto_stop(tokens: Int[Tensor, " m"], stops: Int[Tensor, " s"]) -> Int[Tensor, " k"]:
    """The tokens up to the first stop token, with it; a block may run beyond the end of a text."""
    found = torch.isin(tokens, stops) if len(stops) else stops
    return tokens[: int(found.int().argmax()) + 1] if found.any() else tokens


class DraftModel(Proposer):
    """Proposes what a cheap decoder writes, drawn by the same sampler as the target's tokens."""

    def __init__(self, draft: nn.Module, *, capacity: int):
        self.draft, self.cache = draft, draft.new_cache(capacity=capacity)  # type: ignore[operator]

    def __call__(self, ids, most, sampler, rng):
        self.cache.truncate(ids.shape[1] - 1)
        after = lambda new: self.draft(torch.cat((ids, new), dim=1)[:, self.cache.length :], self.cache)  # noqa: E731
        new, chances = drawn(after, ids[:, :0], most, sampler, rng)
        return Proposal(new[0], None if chances is None else chances[0])

    def observe(self, seen):
        """Takes back what was rejected at once: in the next pass another may propose, and the text be longer than the cache."""
        self.cache.truncate(seen.ids.shape[1] - 1)


def drawn(
    after: Callable[[Int[Tensor, "b g"]], Tensor], new: Int[Tensor, "b 0"], most: int, sampler: Sampler, rng: torch.Generator | None
) -> tuple[Int[Tensor, "b most"], Float[Tensor, "b most vocab"] | None]:
    """What a draft writes, whose logits after what is new `after` gives, and what it was drawn from; None: it was the likeliest."""
    chances = []
    for _ in range(most):
        logits = after(new)[:, -1]
        if sampler.temperature == 0:
            token = logits.argmax(-1)
        else:
            chances.append(sampler.probabilities(logits))
            token = sample(chances[-1], rng)
        new = torch.cat((new, token[:, None]), dim=1)
    return new, torch.stack(chances, dim=1) if chances else None


def speculative_generate(
    target: nn.Module, draft: nn.Module, ids: Int[Tensor, "1 n"], max_new_tokens: int, *, gamma: int | Adaptive = 4,
    sampler: Sampler = PLAIN, stop: int | Collection[int] | None = None, rng: torch.Generator | None = None,
) -> Int[Tensor, "1 m"]:  # fmt: skip
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


def check_speculation(target: nn.Module, ids: Tensor, max_new_tokens: int, gamma: int | Adaptive) -> None:
    check_prompt(target, ids, max_new_tokens)
    if not isinstance(gamma, Adaptive):
        require_int("gamma", gamma, 1, hint="it is how many tokens are proposed at a time; for none, decode plainly")
    if len(ids) != 1:
        how = "rows accept different numbers of tokens: use speculative_batch, or model.generate, which takes one row after another"
        raise ValueError(f"speculation follows one text at a time, got {len(ids)} rows: {how}")


def each_row(ids: Int[Tensor, "b n"], continued: Callable[[Tensor], Tensor]) -> Int[Tensor, "b m"]:
    """Rows continued one after another; one that stopped early goes on repeating its last token, as in `generate`."""
    rows = [continued(row[None])[0] for row in ids]
    longest = max(map(len, rows))
    return torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])


class Proposing(nn.Module):
    """As a decoder's `decoding`: one row after another, with what a proposer of its kind proposes.

    gamma         tokens that are proposed at a time
    cost, extra   where a cost is given, gamma adapts, up to that (law.py)
    alone         its proposer reads what the target says of its own proposals, and takes no turns with another
    """

    alone = False

    def __init__(self, gamma: int, cost: float | None = None, extra: float = 0.0):
        super().__init__()
        self.gamma, self.cost, self.extra = gamma, cost, extra

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        """A fresh one, for a text of up to `capacity` tokens."""
        raise NotImplementedError

    def forward(self, model: nn.Module, ids: Int[Tensor, "b n"], max_new_tokens: int, **settings) -> Int[Tensor, "b m"]:
        check_prompt(model, ids, max_new_tokens)
        return each_row(ids, lambda row: joined(row, self.passes(model, row, max_new_tokens, **settings)))

    def passes(self, model: nn.Module, ids: Int[Tensor, "1 n"], max_new_tokens: int, **settings) -> Iterator[Pass]:
        """The same pass by pass, for `statistics`."""
        own = self.gamma if self.cost is None else Adaptive(self.gamma, self.cost, linear(self.extra))
        settings = {"gamma": own, **settings}
        check_speculation(model, ids, max_new_tokens, settings["gamma"])
        return speculate(model, self.proposer(model, ids.shape[1] + max_new_tokens), ids, max_new_tokens, **settings)


@stored
class SpeculativeDecoding(Proposing):
    """With a draft, which it holds."""

    def __init__(self, gamma: int, cost: float | None = None, extra: float = 0.0):
        super().__init__(gamma, cost, extra)
        self.draft: nn.Module = nn.Identity()

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        check_draft(model, self.draft, capacity)
        return DraftModel(self.draft, capacity=capacity)


@dataclass(frozen=True)
class Drafted(Technique):
    """What techniques have in common that bring a decoder as draft.

    draft   makes the draft from the target, such as RTN(bits=3), or brings one: Use("gpt-draft")
    """

    draft: Technique = EarlyExit(0.5)

    def __post_init__(self):
        if not isinstance(self.draft, Technique):
            how = "such as RTN(bits=3) or Use('gpt-small')"
            raise ValueError(f"draft must be a technique that makes it from the target, {how}, got {self.draft!r}")

    # the draft is a part of the model: where it is packed or masked, so is the model
    needs = property(lambda self: self.draft.needs | GUESSES)
    breaks = property(lambda self: self.draft.breaks - {DECODER})

    def drafting(self, model: nn.Module, task: Task, decoding: SpeculativeDecoding, how: str) -> nn.Module:
        """The decoder, generating with its draft from now on."""
        model.decoding = Autoregressive()  # an older draft is not made a part of the new one
        decoding.draft = self.draft(model, task)
        if not DECODER.holds(decoding.draft):
            kind = type(decoding.draft).__name__
            raise ValueError(f"{self.draft!r} gives a {kind}, which generates nothing: take one that gives a decoder")
        check_draft(model, decoding.draft, 0)
        share(decoding.draft, model)
        model.decoding = decoding.train(model.training)
        note(model, "decoding", f"drafts by {self.draft!r}, {how}", type(self).__name__)
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The draft's bytes over the target's: a proposal's cost where decoding does nothing but read weights."""
        draft = model.decoding.draft  # type: ignore[union-attr]
        share_of = tensor_bytes(draft) / tensor_bytes(model, without=draft)  # type: ignore[arg-type]
        return Reading(share_of, "of the target's bytes", "counted", better="lower")


@dataclass(frozen=True)
class Speculative(Drafted):
    """The decoder generates with a draft; its weights and what it writes stay the same.

    gamma   tokens that are proposed at a time
    cost    a pass of the draft, in passes of the target over one token: where it is given, gamma adapts to what is
            accepted, up to the gamma above
    extra   what each proposal adds to a pass of the target, in the same unit; with 0, more is proposed than pays on models
            that do not wait for memory alone
    """

    gamma: int = 4
    cost: float | None = None
    extra: float = 0.0

    paper = Paper("Leviathan et al.", 2022, "Fast inference from transformers via speculative decoding",
                  "arXiv:2211.17192", "algorithm 1")  # fmt: skip

    def __post_init__(self):
        require_int("gamma", self.gamma, 1, hint="it is how many tokens are proposed at a time")
        if self.cost is not None:
            require_float("cost", self.cost, 0.0, 1.0, open_low=True, open_high=True, hint="slower than 1 never pays; None keeps gamma")
        require_float("extra", self.extra, 0.0, 1.0, hint="1: as dear as a pass of its own")
        if self.extra and self.cost is None:
            raise ValueError(f"extra is for a gamma that adapts, got extra={self.extra} without a cost: give the cost of a pass of the draft, too")
        super().__post_init__()

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return self.drafting(model, task, SpeculativeDecoding(self.gamma, self.cost, self.extra), f"{self.gamma} at a time")
