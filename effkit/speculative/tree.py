"""A tree of drafts: several guesses for a place, and several behind each.

Problem   Behind a wrong guess the rest of a line is lost, and a line's later tokens are hardly ever reached.
Idea      Let the draft propose a tree, so many tokens behind each node of a level. The target judges all of it in one pass,
          in which a token sees those on its own way from the root only. The first branch is the line as it was: whatever
          else hangs there can only add to what is accepted.
Exact     Children are drawn from q without replacement, and tried in turn (verify.py). Greedily they are the likeliest.
Cost      One pass of the draft a level, over all nodes above it: a pass can branch from what the cache held before, but
          not inside of it, so that a level is fed what is above it anew. The target is fed every node.
Limit     Where the target's time grows with the tokens of a pass, a wide tree costs more than it gains: with its distilled
          draft gpt-target writes 3.2 tokens a pass of 4 proposals in a line and 3.4 of a tree, which is 1.2 and .7 times
          as fast as plainly (`effkit study decoding`, greedily).
Left out  Trees that grow where q is sure (Li et al. 2024, arXiv:2406.16858); several drafts that vote (SpecInfer).
Source    Miao et al. 2023, arXiv:2305.09781, sections 3 and 4; without replacement: Jeon et al. 2024, arXiv:2402.14160,
          section 3.2.2 (RSD-S).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.generation import Sampler
from effkit.core.task import Task
from effkit.core.technique import Paper
from effkit.speculative.draft import check_draft, vocabulary
from effkit.speculative.eagle import several
from effkit.speculative.heads import certain, check_branching, check_ranks
from effkit.speculative.speculate import Drafted, Proposer, SpeculativeDecoding, look
from effkit.speculative.verify import Proposal


def choose(
    logits: Float[Tensor, "n vocab"], width: int, sampler: Sampler, rng: torch.Generator | None
) -> tuple[Int[Tensor, " n*width"], list[Float[Tensor, "n vocab"]]]:
    """So many tokens behind each node, and what they were drawn from; greedily, the likeliest."""
    if sampler.temperature == 0:
        return logits.topk(width).indices.flatten(), []
    q = sampler.probabilities(logits)
    return several(q, width, rng).flatten(), [q]


class TreeDraft(Proposer):
    """Proposes a tree of what a cheap decoder may write.

    branching   how many tokens follow each node, level by level
    """

    def __init__(self, draft: nn.Module, branching: tuple[int, ...], *, capacity: int):
        self.draft, self.branching = draft, branching
        self.cache, self.read = draft.new_cache(capacity=capacity), 0  # type: ignore[operator]

    def __call__(self, ids, most, sampler, rng):
        tokens, parents, last, chances = ids[0, :0], ids[0, :0], ids.new_tensor([-1]), []
        for width in self.branching[:most]:
            logits = self.behind(ids, certain(tokens, parents))[-len(last) :]
            chosen, q = choose(logits, width, sampler, rng)
            chances += q
            tokens, parents = torch.cat((tokens, chosen)), torch.cat((parents, last.repeat_interleave(width)))
            last = torch.arange(len(tokens) - len(chosen), len(tokens), device=ids.device)
        if not chances:
            return certain(tokens, parents)
        return Proposal(tokens, F.pad(torch.cat(chances), (0, 0, 0, len(last))), parents)  # behind leaves, nothing was drawn

    def behind(self, ids: Int[Tensor, "1 n"], tree: Proposal) -> Float[Tensor, "g+1 vocab"]:
        """The draft's logits behind the text and every node. Each level reads the last token of the text once more; what stands
        before it is read alone at first, for there are caches that cannot give back a part of their prompt (SnapKV)."""
        if not self.read and ids.shape[1] > 1:
            look(self.draft, ids[:, :-1], Proposal(ids[0, :0]), self.cache)
        else:
            self.cache.truncate(self.read)
        logits, self.read = look(self.draft, ids, tree, self.cache)[1], ids.shape[1] - 1
        return logits


@stored
class TreeDecoding(SpeculativeDecoding):
    """With a draft, which it holds, and which branches."""

    def __init__(self, branching: tuple[int, ...]):
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

    branching: tuple[int, ...] = (3, 2, 1)

    paper = Paper("Miao et al.", 2023, "SpecInfer: accelerating large language model serving with tree-based speculative inference and verification",
                  "arXiv:2305.09781", "algorithm 2")  # fmt: skip

    def __post_init__(self):
        check_branching(self.branching, max(1, len(self.branching)))
        super().__post_init__()

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        check_ranks(self.branching, vocabulary(model))
        return self.drafting(model, task, TreeDecoding(self.branching), f"a tree of {self.branching}")
