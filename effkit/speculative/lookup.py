"""Prompt lookup: a draft that is no model at all.

Problem   Even a small draft takes time, and small models are bound by dispatch, so that a draft of a tenth of the size
          is by no means ten times as fast.
Idea      Texts repeat themselves: names, phrases, code that is being edited. Find where the last n tokens occurred
          before, and propose what followed them. The proposal is certain, q = 1 at it, so it is accepted with
          probability p(x), and after a rejection the residual is p without x.
Cost      A few entries of a dictionary. Where nothing repeats, nothing is proposed, and decoding is plain.
Otherwise Or another draft proposes there. Each does what it is good at: a long match is mostly right and costs nothing, and
          where only one token matches, a draft that knows the language guesses better.
Left out  Other texts to copy from, as documents that were retrieved: Yang et al. copy whole stretches of these, however long.
Source    Saxena 2023, Prompt lookup decoding (published as code): n-grams of the text itself, the longest first; of several
          places it takes the first, here it is the latest. Yang et al. 2023, arXiv:2304.04487, section 3: copying, verified.
          Hu et al. 2024, arXiv:2411.10666: by the length of the match, this or another draft.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.generation import Autoregressive
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.speculative.speculate import GUESSES, Proposer, Proposing, Seen
from effkit.speculative.verify import Proposal

MOST = 64  # tokens of a match: each token of a text is held with as many n-grams


class Lookup(Proposer):
    """Proposes what followed an earlier occurrence of the text's last tokens, the longest match first. Of several places it
    takes the latest with enough tokens behind it, else the first.

    ngram, shortest   the longest and the shortest match that count
    ends              of each n-gram that a token follows, the places behind it, so that a pass looks only at new tokens
    """

    def __init__(self, ngram: int, shortest: int = 1):
        self.ngram, self.shortest, self.text = ngram, shortest, list[int]()
        self.ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def __call__(self, ids, most, sampler, rng):
        for token in ids[0, len(self.text) :].tolist():
            for n in range(self.shortest, min(self.ngram, len(self.text)) + 1):
                self.ends[tuple(self.text[-n:])].append(len(self.text))
            self.text.append(token)
        start = self.start(most)
        return Proposal(ids[0, start : start + most])

    def start(self, most: int) -> int:
        """Where the tokens stand that are proposed; behind the text where there are none."""
        for n in range(min(self.ngram, len(self.text)), self.shortest - 1, -1):
            if ends := self.ends.get(tuple(self.text[-n:])):
                return ends[max(0, bisect_right(ends, len(self.text) - most) - 1)]
        return len(self.text)


class InTurn(Proposer):
    """Asks one after another, each for as many tokens as it proposes at most, until there is a proposal."""

    def __init__(self, ways: Sequence[tuple[Proposer, int]]):
        self.ways = ways

    def __call__(self, ids, most, sampler, rng):
        for way, gamma in self.ways:
            if len((proposal := way(ids, min(most, gamma), sampler, rng)).tokens):
                break
        return proposal

    def observe(self, seen: Seen) -> None:
        for way, _ in self.ways:
            way.observe(seen)


@stored
class LookupDecoding(Proposing):
    """With what the text itself said before; where it said nothing, with what `otherwise` proposes."""

    def __init__(self, gamma: int, ngram: int, shortest: int = 1):
        super().__init__(gamma)
        self.ngram, self.shortest = ngram, shortest
        self.otherwise: nn.Module = nn.Identity()

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        own, other = Lookup(self.ngram, self.shortest), self.otherwise
        if not isinstance(other, Proposing):
            return own
        return InTurn([(own, self.gamma), (other.proposer(model, capacity), getattr(other, "most", other.gamma))])

    @property
    def most(self) -> int:
        """How many tokens either of them proposes at most."""
        return max(self.gamma, getattr(self.otherwise, "most", getattr(self.otherwise, "gamma", 0)))

    def passes(self, model, ids, max_new_tokens, **settings):
        return super().passes(model, ids, max_new_tokens, **{"gamma": self.most} | settings)


@dataclass(frozen=True)
class PromptLookup(Technique):
    """The decoder proposes continuations that stand in the text already, and verifies them.

    gamma             tokens that are proposed at a time
    ngram, shortest   the longest and the shortest match that count
    otherwise         who proposes where nothing matches, such as Speculative(Use("gpt-draft"), gamma=2) or Eagle(); None: nobody
    """

    gamma: int = 4
    ngram: int = 3
    shortest: int = 1
    otherwise: Technique | None = None

    needs = property(lambda self: GUESSES | (self.otherwise.needs if self.otherwise else frozenset()))
    breaks = property(lambda self: self.otherwise.breaks if self.otherwise else frozenset())
    paper = Paper("Yang et al.", 2023, "Inference with reference: lossless acceleration of large language models",
                  "arXiv:2304.04487", "section 3")  # fmt: skip

    def __post_init__(self):
        require_int("gamma", self.gamma, 1, hint="it is how many tokens are proposed at a time")
        require_int("ngram", self.ngram, 1, MOST, hint="longer matches are found as well by their last tokens")
        require_int("shortest", self.shortest, 1, self.ngram, hint="it is the shortest match that counts, and ngram the longest")
        if not isinstance(self.otherwise, Technique | None):
            raise ValueError(f"otherwise must be a technique that proposes, such as Eagle(), got {self.otherwise!r}")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        decoding = LookupDecoding(self.gamma, self.ngram, self.shortest)
        if self.otherwise is not None:
            model.decoding = Autoregressive()  # what the model did before is not what `otherwise` brings
            other = decoding.otherwise = self.otherwise.rewrite_(model, task).decoding  # type: ignore[assignment]
            if not isinstance(other, Proposing) or other.alone or other.cost is not None:
                how = "take one that proposes a fixed number of tokens and does not live on its own proposals, such as Speculative or Eagle"
                raise ValueError(f"otherwise={self.otherwise!r} cannot take turns with lookup: {how}")
        model.decoding = decoding.train(model.training)
        what = f"proposes {self.gamma} tokens that followed the last {self.ngram} before" + f", else by {self.otherwise!r}" * (self.otherwise is not None)
        note(model, "decoding", what, "PromptLookup")
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The most tokens that one pass can give."""
        most = model.decoding.most + 1  # type: ignore[union-attr, operator]
        return Reading(most, "tokens a pass at most", "counted", better="higher")  # type: ignore[arg-type]
