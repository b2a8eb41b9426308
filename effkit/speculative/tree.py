"""A tree of drafts: several guesses for a place, and several behind each.

Problem   Behind a wrong guess the rest of a line is lost, and a line's later tokens are hardly ever reached.
Idea      Let the draft propose a tree, so many tokens behind each node of a level. The target judges all of it in one pass,
          in which a token sees those on its own way from the root only. The first branch is the line as it was: whatever
          else hangs there can only add to what is accepted.
Exact     Children are drawn from q without replacement, and tried in turn (verify.py). Greedily they are the likeliest.
Cost      One pass of the draft a level, over all nodes above it: a pass can branch from what the cache held before, but
          not inside of it, so that a level is fed what is above it anew. The target is fed every node.
Limit     Where the target's time grows with the tokens of a pass, a wide tree costs more than it gains: with its distilled
          draft gpt-target writes 2.8 tokens a pass of 4 proposals in a line, which is 1.2 times as fast as plainly, and 3.0
          of a tree of 3 levels and 15 proposals: .8 times (`effkit study decoding`, greedily).
Left out  Trees that grow where q is sure (Li et al. 2024, arXiv:2406.16858); several drafts that vote (SpecInfer).
Source    Miao et al. 2023, arXiv:2305.09781, sections 3 and 4; without replacement: Jeon et al. 2024, arXiv:2402.14160,
          section 3.2.2 (RSD-S).
"""

from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.generation import Sampler, sample
from effkit.core.task import Task
from effkit.core.technique import Paper
from effkit.speculative.draft import check_draft, vocabulary
from effkit.speculative.speculate import Drafted, Proposer, SpeculativeDecoding, look
from effkit.speculative.verify import Proposal, without

MOST_NODES = 512
Branching = tuple[int, ...]  # how many tokens follow each node, level by level


def certain(tokens: Int[Tensor, " g"], parents: Int[Tensor, " g"]) -> Proposal:
    """A tree of tokens; one that does not branch is a line, which every cache takes."""
    line = torch.equal(parents, torch.arange(len(parents), device=parents.device) - 1)
    return Proposal(tokens, parents=None if line else parents.to(tokens.device))


def several(q: Float[Tensor, "n vocab"], width: int, rng: torch.Generator | None) -> Int[Tensor, "n width"]:
    """From each distribution so many tokens, one after another without putting back."""
    drawn = [sample(q, rng)]
    for _ in range(width - 1):
        q = torch.stack([without(row, int(x)) for row, x in zip(q, drawn[-1], strict=True)])
        drawn.append(sample(q, rng))
    return torch.stack(drawn, dim=1)


class Growing(Proposer):
    """Proposes a tree that grows level by level.

    branching   how many tokens follow each node, level by level; None: a line, as where each is 1
    """

    def __init__(self, branching: Branching | None):
        self.branching = branching if branching and max(branching) > 1 else None

    def __call__(self, ids, most, sampler, rng):
        tokens, parents, last, chances = ids[0, :0], ids[0, :0], ids.new_tensor([-1]), []
        for width in self.branching[:most] if self.branching else (1,) * most:
            chosen, drawn = self.choose(self.behind(ids, tokens, parents, len(last)), width, sampler, rng)
            chances += drawn
            tokens, parents = torch.cat((tokens, chosen)), torch.cat((parents, last.repeat_interleave(width)))
            last = torch.arange(len(tokens) - len(chosen), len(tokens), device=ids.device)
        q = torch.cat(chances) if chances else None
        if self.branching is None or q is None:
            return Proposal(tokens, q) if self.branching is None else certain(tokens, parents)
        return Proposal(tokens, F.pad(q, (0, 0, 0, len(last))), parents)  # behind leaves, nothing was drawn

    def behind(
        self, ids: Int[Tensor, "1 n"], tokens: Int[Tensor, " g"], parents: Int[Tensor, " g"], last: int
    ) -> Float[Tensor, "last vocab"]:
        """The logits behind the last nodes of the tree so far; behind the text where it has none."""
        raise NotImplementedError

    def choose(
        self, logits: Float[Tensor, "n vocab"], width: int, sampler: Sampler, rng: torch.Generator | None
    ) -> tuple[Int[Tensor, " n*width"], list[Float[Tensor, "n vocab"]]]:
        """So many tokens behind each node, and what they were drawn from; greedily, the likeliest."""
        if sampler.temperature == 0:
            return logits.topk(width).indices.flatten(), []
        q = sampler.probabilities(logits)
        return several(q, width, rng).flatten(), [q]


class TreeDraft(Growing):
    """Proposes a tree of what a cheap decoder may write."""

    def __init__(self, draft: nn.Module, branching: Branching, *, capacity: int):
        super().__init__(branching)
        self.draft = draft
        self.cache, self.read = draft.new_cache(capacity=capacity), 0  # type: ignore[operator]

    def behind(self, ids, tokens, parents, last):
        """Each level reads the last token of the text once more; what stands before it is read alone at first, for there are
        caches that cannot give back a part of their prompt (SnapKV)."""
        self.cache.truncate(self.read)
        if not self.read and ids.shape[1] > 1:
            look(self.draft, ids[:, :-1], Proposal(ids[0, :0]), self.cache)
        logits, self.read = look(self.draft, ids, certain(tokens, parents), self.cache)[1], ids.shape[1] - 1
        return logits[-last:]


@stored
class TreeDecoding(SpeculativeDecoding):
    """With a draft, which it holds, and which branches."""

    def __init__(self, branching: Branching):
        super().__init__(len(branching))
        self.branching = tuple(branching)

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        check_draft(model, self.draft, capacity)
        return TreeDraft(self.draft, self.branching, capacity=capacity)


@dataclass(frozen=True)
class SpeculativeTree(Drafted):
    """The decoder generates with a draft that proposes several tokens for each place.

    branching   how many tokens follow each node, level by level
    """

    branching: Branching = (3, 2, 1)

    paper = Paper("Miao et al.", 2023, "SpecInfer: accelerating large language model serving with tree-based speculative inference and verification",
                  "arXiv:2305.09781", "algorithm 2")  # fmt: skip

    def __post_init__(self):
        check_branching(self.branching, max(1, len(self.branching)))
        super().__post_init__()

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        check_ranks(self.branching, vocabulary(model))
        return self.drafting(model, task, TreeDecoding(self.branching), f"a tree of {self.branching}")


def check_branching(branching: object, levels: int) -> None:
    """Raises ValueError unless there is a number of children for each level, and the tree they make is no forest."""
    fits = isinstance(branching, tuple) and len(branching) == levels
    if not (fits and all(type(n) is int and n > 0 for n in branching)):  # type: ignore[attr-defined]
        raise ValueError(f"branching must be {levels} whole numbers, at least 1, got {branching!r}: write branching={(2,) * levels}, for example")
    if (nodes := sum(prod(branching[:i]) for i in range(1, levels + 1))) > MOST_NODES:  # type: ignore[index, misc]
        raise ValueError(f"branching {branching!r} makes {nodes} proposals a pass, at most {MOST_NODES} are allowed: take smaller numbers")


def check_ranks(branching: Branching, tokens: int) -> None:
    if max(branching) > tokens:
        raise ValueError(f"branching {branching} asks for {max(branching)} guesses at a place, and there are {tokens} tokens to choose from: ask for fewer")
