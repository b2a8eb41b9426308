"""Jacobi and lookahead decoding: the target is its own draft.

Problem   Training a draft takes time, and what a text repeats (lookup.py) is little. Can a target guess for itself?
Idea      Greedy text is the solution of a system of equations, x_i = argmax p(. | x_<i), one a place. Jacobi's method
          guesses all x_i and puts every guess into every equation at once: one pass. At least the first place is right
          after one pass, the second after two, and what is right stays so; now and then several come right at once.
Lookahead A guess that is wrong by one place is no use to Jacobi, but the words it is made of will come. So keep the last
          N - 1 guesses of W places beside each other, as levels, and read n-grams off them: a token of each level, and
          the one that the pass makes of these. Those that begin with the text's last token are proposed.
Tree      Both run in one pass. Level 0 is a line, whose column 0 is the text's last token; the token of level l > 0 in
          column j follows that of level l - 1 in the same column, and so stands j + l places on. What n-grams and
          columns have in common is fed once, and all of it may be accepted, of the window's guesses too.
Exact     What is proposed follows from the text and from earlier passes, so that it is certain, q = 1 (verify.py).
Cost      A wider pass: W - 1 + W (N - 2) + G (N - 1) tokens for G n-grams. Where a pass is bound by arithmetic it loses.
Choice    As in the paper the window moves on by a column a pass, however many tokens came, so that its places drift
          behind; one that moves with the text has to begin its last columns anew, and gave fewer tokens a pass.
Numbers   Tokens a pass of gpt-target, greedily, on the eight held-out texts of 64 tokens of `effkit study decoding`: Jacobi 1.04,
          lookahead 2.0, prompt lookup 2.5; the writing .6, .7 and 1.9 times as fast as plainly. A target that was not
          trained to guess ahead hardly does.
Left out  Its code begins with random tokens and proposes nothing until all levels are filled; it can fill its pool from
          the prompt, too (lookup.py does that).
Source    Santilli et al. 2023, arXiv:2305.10427, section 3.2, whose block is refined until nothing changes; here it moves
          on as soon as a token is sure. Fu et al. 2024, arXiv:2402.02057, sections 3.1 and 3.2, algorithm 2.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.speculative.speculate import GUESSES, Proposer, Proposing, Seen
from effkit.speculative.tree import certain
from effkit.speculative.verify import Proposal


class Refined(Proposer):
    """Proposes what the target chose at these places in the last pass, and the text's last token where it chose nothing."""

    def __init__(self) -> None:
        self.choices: Int[Tensor, " g"] | None = None

    def __call__(self, ids, most, sampler, rng):
        guess = ids[0, :0] if self.choices is None else self.choices[:most]
        self.end = ids.shape[1]
        return Proposal(torch.cat((guess, ids[0, -1:].expand(most - len(guess)))))

    def observe(self, seen: Seen) -> None:
        if len(seen.logits):  # none of the prompt
            self.choices = seen.logits[seen.ids.shape[1] - self.end :].argmax(-1)


class Tree:
    """Token paths, parents first; what paths have in common is one."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}  # (parent, token), in order

    def add(self, parent: int, token: int) -> int:
        """The place of this token behind that place; -1 is the text's end."""
        return self.places.setdefault((parent, token), len(self.places))

    def proposal(self, like: Tensor) -> Proposal:
        nodes = like.new_tensor(list(self.places)).view(-1, 2)
        return certain(nodes[:, 1], nodes[:, 0])


class Window(Proposer):
    """Guesses W places at N - 1 levels, and proposes n-grams that earlier guesses were made of."""

    def __init__(self, window: int, ngram: int, guesses: int):
        self.window, self.guesses = window, guesses
        self.levels: list[list[int]] = [[] for _ in range(ngram - 1)]
        self.pool: dict[int, dict[tuple[int, ...], None]] = defaultdict(dict)  # of a first token, the rests; latest last

    def __call__(self, ids, most, sampler, rng):
        text, tree = ids[0].tolist(), Tree()
        self.fill(text, most)
        for gram in reversed(self.pool[text[-1]]):
            place = -1
            for token in gram[:most]:
                place = tree.add(place, token)
        self.columns = [-1]
        for token in self.levels[0][1:]:
            self.columns.append(tree.add(self.columns[-1], token))
        for level in self.levels[1:]:
            self.columns = [tree.add(place, token) for place, token in zip(self.columns, level, strict=False)]
        return tree.proposal(ids)

    def fill(self, text: list[int], most: int) -> None:
        """Where nothing was guessed yet stand the text's last tokens; what lies more than `most` places on is cut off."""
        self.levels[0][:1] = text[-1:]
        for depth, level in enumerate(self.levels):
            width = min(self.window, max(0, most - depth + 1))
            level[width:] = [text[-1 - column % len(text)] for column in range(len(level), width)]

    def observe(self, seen: Seen) -> None:
        if not len(seen.logits):  # none of the prompt
            return
        new = seen.logits[[place + 1 for place in self.columns]].argmax(-1).tolist()
        for first, *rest in zip(*self.levels, new, strict=False):
            self.learn(first, tuple(rest))
        self.levels = [*self.levels[1:], new]

    def learn(self, first: int, rest: tuple[int, ...]) -> None:
        """The pool keeps the latest G of each first token."""
        grams = self.pool[first]
        grams.pop(rest, None)
        grams[rest] = None
        if len(grams) > self.guesses:
            del grams[next(iter(grams))]


@stored
class JacobiDecoding(Proposing):
    """With the target's own choices of the last pass."""

    alone = True

    def __init__(self, gamma: int):
        super().__init__(gamma)

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        return Refined()


@stored
class LookaheadDecoding(Proposing):
    """With n-grams of the target's own guesses."""

    alone = True

    def __init__(self, window: int, ngram: int, guesses: int):
        super().__init__(max(window - 1, 1) + ngram - 2)  # places that the tree reaches ahead
        self.window, self.ngram, self.guesses = window, ngram, guesses

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        return Window(self.window, self.ngram, self.guesses)


@dataclass(frozen=True)
class Jacobi(Technique):
    """The decoder proposes what it chose for these places in the last pass.

    gamma   tokens that are guessed at a time
    """

    gamma: int = 8

    needs = GUESSES
    paper = Paper("Santilli et al.", 2023, "Accelerating transformer inference for translation via parallel decoding",
                  "arXiv:2305.10427", "section 3.2, eq. 3")  # fmt: skip

    def __post_init__(self):
        require_int("gamma", self.gamma, 1, hint="it is how many tokens are proposed at a time")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        model.decoding = JacobiDecoding(self.gamma).train(model.training)
        note(model, "decoding", f"refines its own guess of {self.gamma} tokens", "Jacobi")
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The most tokens that one pass can give."""
        return Reading(model.decoding.gamma + 1, "tokens a pass at most", "counted", better="higher")  # type: ignore[union-attr, operator, arg-type]


@dataclass(frozen=True)
class Lookahead(Technique):
    """The decoder proposes n-grams that it guessed before, and guesses new ones beside them.

    window   places that are guessed at a time, W;  ngram   tokens of an n-gram, N;  guesses   n-grams proposed at most, G
    """

    window: int = 5
    ngram: int = 4
    guesses: int = 5

    needs = GUESSES
    paper = Paper("Fu et al.", 2024, "Break the sequential dependency of LLM inference using lookahead decoding",
                  "arXiv:2402.02057", "algorithm 2")  # fmt: skip

    def __post_init__(self):
        require_int("window", self.window, 1, 64, hint="a pass is fed window * (ngram - 1) tokens more")
        require_int("ngram", self.ngram, 2, 16, hint="the first token is the text's own")
        require_int("guesses", self.guesses, 1, 64, hint="each feeds a pass ngram - 1 tokens more")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        model.decoding = LookaheadDecoding(self.window, self.ngram, self.guesses).train(model.training)
        note(model, "decoding", f"guesses {self.window} places, proposes {self.guesses} {self.ngram}-grams of them", "Lookahead")
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The most tokens that a pass is fed."""
        d = model.decoding
        fed = (d.window + d.guesses) * (d.ngram - 1)  # type: ignore[union-attr, operator]
        return Reading(fed, "tokens fed a pass at most", "counted", better="lower")  # type: ignore[arg-type]
