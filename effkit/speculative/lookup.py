"""Prompt lookup: a draft that is no model at all.

Problem   Even a small draft takes time, and small models are bound by dispatch, so that a draft of a tenth of the size
          is by no means ten times as fast.
Idea      Texts repeat themselves: names, phrases, code that is being edited. Find where the last n tokens occurred
          before, and propose what followed them. The proposal is certain, q = 1 at it, so it is accepted with
          probability p(x), and after a rejection the residual is p without x.
Cost      A comparison of integers. Where nothing repeats, nothing is proposed, and decoding is plain.
Source    Yang et al. 2023, arXiv:2304.04487.
"""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER
from effkit.speculative.speculate import Proposer, Proposing
from effkit.speculative.verify import Proposal


def lookup(text: Int[Tensor, " n"], most: int, *, ngram: int) -> Int[Tensor, " k"]:
    """Up to `most` tokens that followed an earlier occurrence of the text's last tokens, the longest match first.

    Of several places the latest with enough tokens behind it is taken, else the first."""
    for n in range(min(ngram, len(text) - 1), 0, -1):
        ends = (text.unfold(0, n, 1)[:-1] == text[-n:]).all(dim=1).nonzero()[:, 0] + n
        if len(ends):
            full = ends[ends + most <= len(text)]
            start = int(full[-1] if len(full) else ends[0])
            return text[start : start + most]
    return text[:0]


@dataclass
class Lookup(Proposer):
    """Proposes what followed the last tokens before."""

    ngram: int

    def __call__(self, ids, most, sampler, rng):
        return Proposal(lookup(ids[0], most, ngram=self.ngram))


@stored
class LookupDecoding(Proposing):
    """With what the text itself said before."""

    def __init__(self, gamma: int, ngram: int):
        super().__init__(gamma)
        self.ngram = ngram

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        return Lookup(self.ngram)


@dataclass(frozen=True)
class PromptLookup(Technique):
    """The decoder proposes continuations that stand in the text already, and verifies them.

    gamma   tokens that are proposed at a time;  ngram   the longest match that is looked for
    """

    gamma: int = 4
    ngram: int = 3

    needs = frozenset({DECODER})
    paper = Paper("Yang et al.", 2023, "Inference with reference: lossless acceleration of large language models",
                  "arXiv:2304.04487")  # fmt: skip

    def __post_init__(self):
        require_int("gamma", self.gamma, 1, hint="it is how many tokens are proposed at a time")
        require_int("ngram", self.ngram, 1)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        model.decoding = LookupDecoding(self.gamma, self.ngram).train(model.training)
        what = f"proposes {self.gamma} tokens that followed the last {self.ngram} before"
        note(model, "decoding", what, "PromptLookup")
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The most tokens that one pass can give."""
        most = model.decoding.gamma + 1  # type: ignore[union-attr, operator]
        return Reading(most, "tokens a pass at most", "counted", better="higher")  # type: ignore[arg-type]
