"""Throwing tokens away: a cache that stops growing.

Problem   Of a long text most tokens are hardly looked at, and yet all are kept, and read for every token.
Idea      Keep those that will be looked at. Which are they?
          Window   the newest, and the first few of the text, the attention sinks: a head that has nothing to say looks
                   at the first token, and without it the probabilities have to go where they do harm
          H2O      heavy hitters: those that got most attention so far, beside the newest
          SnapKV   of a prompt, what its last tokens look at: they are the question
Places    Keys keep the places they had in the text. In Window a sink is never farther from a query than sinks + window - 1,
          as if the tokens between had not been: the query is rotated twice, for the sinks at that place.
Heads     Query heads that share a key-value head throw away together: their attention is added up.
What came Bits a token more where each sees 64 of up to 1,023 tokens, itself among them, and with H2O 64 and itself (`effkit
          study caching`). SmolLM2-135M: sliding window 1.79, with one sink .43, H2O .65, by the mean .28. gpt-small, which
          has no sinks: sliding .48, H2O .73, by the mean .54. SnapKV behind a prompt of 768 of which 64 stay: .25 on either,
          without smoothing .23 on SmolLM2-135M and .29 on gpt-small.
Limit     H2O goes token by token once its budget is full. SnapKV takes the first pass for the prompt, so a prompt that is cut
          in two is compressed otherwise, and so is one of a single token behind which more is proposed than the budget.
          Whatever is taken back of that pass, the rest is no prompt any more and stays whole.
Left out  Budgets that differ between layers or heads (PyramidKV, Ada-KV); merging instead of throwing away. SnapKV's voters
          are the last tokens of the first pass, and `generate` reads a prompt without its last token: that one never votes.
          Every layer holds the whole prompt until the next pass; Li et al. compress one layer after another.
Source    Xiao et al. 2023, arXiv:2309.17453, section 3.2; Zhang et al. 2023, arXiv:2306.14048, algorithm 1; Li et al.
          2024, arXiv:2404.14469, section 4.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.caching.lossy import BACK, LossyCache, LossyKV, mixed, scored, weights
from effkit.core.checks import require_choice, require_int
from effkit.core.generation import Rope, attention
from effkit.core.report import Reading
from effkit.core.technique import Paper


class WindowCache(LossyCache):
    """The newest `window` tokens as seen from each query, itself among them, and the first `sinks` of the text."""

    def __init__(self, rope: Rope, window: int, sinks: int):
        super().__init__(rope)
        self.window, self.sinks = window, sinks
        self.at: Int[Tensor, " m"] = torch.arange(0)  # positions of what is held
        self.low = 0  # all from here on are held

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        positions = super().advance(n, parents, device=device, dtype=dtype)
        self.low = max(self.low, self.length - n - self.window - BACK + 1)
        stay = (self.at < self.sinks) | (self.at >= self.low)
        if not stay.all():
            self._map(lambda t: t[:, :, stay])
        among = self.among(n)
        held, self.at = self.at[stay].to(device), torch.cat((self.at[stay].to(device), positions))
        self.first = (self.at < self.sinks).nonzero()[:, 0]  # columns of the sinks
        inside = (self.at < self.sinks) | (self.at > positions[:, None] - self.window)
        self.mask = inside & torch.cat((among.new_ones(n, len(held)), among), dim=1)
        self.near = self.rope.tables(positions.clamp(max=self.sinks + self.window - 1), dtype)
        return positions

    def attend(self, layer, q, k, v):
        keys, values = self.grow(layer, self.rope(k, self.tables), v)
        scores = scored(self.rope(q, self.tables), keys)
        scores[..., self.first] = scored(self.rope(q, self.near), keys[:, :, self.first])
        return mixed(weights(scores, self.mask), values)  # type: ignore[arg-type]

    def least(self) -> int:
        return self.low + self.window - 1 if self.low > self.sinks else 0

    def cut(self, gone):
        super().cut(gone)
        self.at = self.at[: len(self.at) - gone] if self.length else self.at[:0]
        self.low = self.low if self.length else 0

    def move(self, start, index):
        super().move(start, index)
        held = len(self.at) - self.fed
        self.at = torch.cat((self.at[:held], self.at[held + index]))


def of_heads(t: Float[Tensor, "b g m d"], index: Int[Tensor, "b g k"]) -> Float[Tensor, "b g k d"]:
    """Of each head other tokens."""
    return t.gather(2, index[..., None].expand(*index.shape, t.shape[3]))


@dataclass
class Attention:
    """What the tokens held in one layer got, and from when to when they lived.

    mass    from all queries so far but those in `given`;  given   from each of the last BACK
    born    their positions;  died   the position of the first query that saw it no more
    """

    mass: Float[Tensor, "b g m"]
    given: Float[Tensor, "b g back m"]
    born: Int[Tensor, "b g m"]
    died: Int[Tensor, "b g m"]


NEVER = 2**62


def victim(mass: Float[Tensor, "b g m"]) -> Int[Tensor, "b g 1"]:
    """Who got least."""
    return mass.argmin(-1, keepdim=True)


class H2OCache(LossyCache):
    """Behind each token `budget` of those before it stay for each head: the newest `recent`, and of the others those that
    got most attention, in sum or as the mean over the queries since they came. A query sees them and itself."""

    def __init__(self, rope: Rope, budget: int, recent: int, score: str = "sum"):
        super().__init__(rope)
        self.budget, self.recent, self.score = budget, recent, score
        self.got: dict[int, Attention] = {}  # by layer
        self.folded = 0  # queries that are counted in `mass` alone

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        if parents is not None:
            raise ValueError("H2O cannot follow the branches of a token tree: generate with proposals in one line, or another cache")
        for layer, got in self.got.items():
            self.bury(layer, got)
        positions = super().advance(n, device=device, dtype=dtype)
        self.folded = max(self.folded, self.length - BACK)
        return positions

    def attend(self, layer, q, k, v):
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        keys, values = self.grow(layer, k, v)
        n, m, start = k.shape[2], keys.shape[2], self.length - k.shape[2]
        got = self.got.setdefault(layer, _nothing(k))
        mass, died, given = F.pad(got.mass, (0, n)), F.pad(got.died, (0, n), value=NEVER), [F.pad(got.given, (0, n))]
        born = torch.cat((got.born, self.positions.expand(*k.shape[:2], n)), dim=2)
        total, slots, outputs, at = mass + given[0].sum(2), torch.arange(m, device=k.device), [], 0
        while at < n:
            before = m - n + at  # columns of tokens before the query
            if start + at > self.budget:
                share = total if self.score == "sum" else total / (start + at - born)
                free = share.masked_fill(died < NEVER, torch.inf)[..., : before - self.recent]
                died = died.scatter(2, victim(free), start + at)
            end = max(at + 1, min(n, self.budget + 1 - start))  # nobody has to go before
            seen = (died == NEVER)[:, :, None, None] & (slots <= slots[before : m - n + end, None])
            p = weights(scored(q[:, :, at:end], keys), seen)
            given.append(p.sum(2))
            outputs.append(mixed(p, values))
            total, at = total + given[-1].sum(2), end
        each = torch.cat(given, dim=2)
        self.got[layer] = Attention(mass + each[:, :, :-BACK].sum(2), each[:, :, -BACK:].clone(), born, died)
        return torch.cat(outputs, dim=2)

    def bury(self, layer: int, got: Attention) -> None:
        """Gives up those that went so long ago that nobody can take it back, as many for each head."""
        index = (got.died >= self.folded).nonzero()[:, 2].view(*got.died.shape[:2], -1)
        got.mass, got.born, got.died = (t.gather(2, index) for t in (got.mass, got.born, got.died))
        got.given = of_heads(got.given.transpose(2, 3), index).transpose(2, 3)
        self.keys[layer], self.values[layer] = of_heads(self.keys[layer], index), of_heads(self.values[layer], index)

    def least(self) -> int:
        return self.folded

    def move(self, start, index):
        self.truncate(start + len(index))  # no tree, so the first of a line stay

    def cut(self, gone):
        super().cut(gone)
        if not self.length:
            self.got, self.folded = {}, 0
        for got in self.got.values():
            m, rows = got.mass.shape[2] - gone, got.given.shape[2] - gone
            got.given = got.given[:, :, :rows, :m]
            got.mass, got.born, died = (t[..., :m] for t in (got.mass, got.born, got.died))
            got.died = died.masked_fill(died >= self.length, NEVER)

    def nbytes(self) -> int:
        return super().nbytes() + sum(t.nbytes for got in self.got.values() for t in vars(got).values())


def _nothing(k: Float[Tensor, "b g n d"]) -> Attention:
    mass = k[:, :, :0, 0].to(torch.promote_types(k.dtype, torch.float32))
    return Attention(mass, mass.unsqueeze(2)[:, :, :0], mass.long(), mass.long())


def votes(q: Float[Tensor, "b h w d"], k: Float[Tensor, "b g n d"], *, kernel: int) -> Float[Tensor, "b g rest"]:
    """The attention that each token but the last w gets from these, the last w of n: summed over queries and over heads
    that share a key, and smoothed over `kernel` neighbours, so that not a word is kept without its phrase."""
    n, w = k.shape[2], q.shape[2]
    seen = torch.ones(w, n, dtype=torch.bool, device=k.device).tril(n - w)
    got = weights(scored(q, k), seen).sum((2, 3))[..., : n - w]
    return F.avg_pool1d(got, kernel, stride=1, padding=kernel // 2)


class SnapKVCache(LossyCache):
    """Of the first pass `budget` tokens for each head, the last `window` among them, and all that follows."""

    def __init__(self, rope: Rope, budget: int, window: int, kernel: int):
        super().__init__(rope)
        self.budget, self.window, self.kernel = budget, window, kernel
        self.chosen: list[Int[Tensor, "b g k"]] = []  # of each layer, until they alone are held
        self.prompt = 0  # tokens of it, once some of them have gone

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        positions = super().advance(n, parents, device=device, dtype=dtype)
        self.prompt = self.length - n if self.chosen else self.prompt
        for layer, index in enumerate(self.chosen):
            self.keys[layer], self.values[layer] = of_heads(self.keys[layer], index), of_heads(self.values[layer], index)
        self.chosen = []
        return positions

    def attend(self, layer, q, k, v):
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        keys, values = self.grow(layer, k, v)
        if self.length == self.fed > self.budget and self.mask is None:
            best = votes(q[:, :, -self.window :], k, kernel=self.kernel).topk(self.budget - self.window).indices.sort().values
            newest = torch.arange(self.length - self.window, self.length, device=k.device)
            self.chosen.append(torch.cat((best, newest.expand(*best.shape[:2], -1)), dim=2))
        mask = None if self.mask is None else self.mask[:, -keys.shape[2] :]
        return attention(q, keys, values, mask)

    def least(self) -> int:
        return self.prompt

    def cut(self, gone):
        super().cut(gone)
        self.chosen, self.prompt = [] if gone else self.chosen, self.prompt if self.length else 0

    def move(self, start, index):
        super().move(start, index)
        self.chosen = self.chosen if len(index) == self.fed else []


@dataclass(frozen=True)
class Window(LossyKV):
    """The decoder sees the newest tokens and the first few.

    window   how many of the newest, the one that is written among them
    sinks    how many of the first; 0 is a plain sliding window
    """

    window: int = 256
    sinks: int = 4

    kind = WindowCache
    paper = Paper("Xiao et al.", 2023, "Efficient streaming language models with attention sinks", "arXiv:2309.17453", "section 3.2")

    def __post_init__(self):
        require_int("window", self.window, 1, hint="a token sees itself at least")
        require_int("sinks", self.sinks, 0, hint="0 is a plain sliding window")

    def claim(self, model: nn.Module) -> Reading:
        return Reading(self.window + self.sinks, "tokens seen at most", "counted", better="lower")


@dataclass(frozen=True)
class H2O(LossyKV):
    """The decoder keeps the tokens that got most attention.

    budget   tokens that stay behind each new one;  recent   how many of them are the newest, whatever they got
    score    "sum", the paper's, by which those win who came first; "mean": over the queries since each came
    """

    budget: int = 256
    recent: int = 128
    score: Literal["sum", "mean"] = "sum"

    kind = H2OCache
    paper = Paper("Zhang et al.", 2023, "H2O: heavy-hitter oracle for efficient generative inference of large language models",
                  "arXiv:2306.14048", "algorithm 1")  # fmt: skip

    def __post_init__(self):
        require_int("budget", self.budget, 1, hint="it is how many tokens stay for each head")
        require_int("recent", self.recent, 0, self.budget, hint="the newest are a part of the budget; all of it is a sliding window")
        require_choice("score", self.score, ("sum", "mean"))

    def claim(self, model: nn.Module) -> Reading:
        """What a query sees besides itself. The cache holds BACK + 1 tokens more, which may be taken back, and its last pass."""
        return Reading(self.budget, "past tokens seen at most", "counted", better="lower")


@dataclass(frozen=True)
class SnapKV(LossyKV):
    """The decoder keeps of its prompt what the prompt's last tokens look at.

    budget   tokens of the prompt that stay;  window   how many of the last stay and choose the others
    kernel   neighbours over which attention is smoothed, an odd number; 1 for none
    """

    budget: int = 256
    window: int = 32
    kernel: int = 7

    kind = SnapKVCache
    paper = Paper("Li et al.", 2024, "SnapKV: LLM knows what you are looking for before generation", "arXiv:2404.14469", "section 4")

    def __post_init__(self):
        require_int("budget", self.budget, 2, hint="it is how many tokens of the prompt stay for each head")
        require_int("window", self.window, 1, self.budget - 1, hint="the last tokens stay and choose the rest of the budget")
        require_int("kernel", self.kernel, 1, hint="1 smooths nothing")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}: as many neighbours on either side; take {self.kernel + 1}")

    def claim(self, model: nn.Module) -> Reading:
        return Reading(self.budget, "tokens of a prompt at most", "counted", better="lower")
