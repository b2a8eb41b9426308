"""What lossy caches share: less is held than was read.

Problem   A cache grows with its text, and beyond some length it is larger than the model.
Idea      Hold fewer tokens (evict.py), or fewer bits a number (quantized.py).
Exact     What a token sees of the past depends on its place in the text, never on how the text was cut into passes. So
          things go between passes only, a pass masks for each of its queries what would be gone by then, and greedy
          speculation over a lossy cache writes what plain decoding over it writes.
Cost      A draft is taken back by as many tokens as it proposed, so BACK tokens more are held than queries see.
Left out  Rows of unequal length. In place of concatenation, which copies what is held once a pass: a ring.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effkit.caching.kv import set_kv
from effkit.core.checkpoint import stored
from effkit.core.checks import require_choice
from effkit.core.generation import Cache, ConcatCache
from effkit.core.task import Task
from effkit.core.technique import Technique
from effkit.core.traits import DECODER

BACK = 16


def scored(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g m d"]) -> Float[Tensor, "b g r n m"]:
    """Scores of h = g r heads of queries against keys, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    return rows @ k.to(wide)[:, :, None].transpose(-1, -2)


def weights(scores: Float[Tensor, "b g r n m"], seen: Bool[Tensor, "*b n m"]) -> Float[Tensor, "b g r n m"]:
    """How each query divides its attention among the keys that it sees."""
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def mixed(p: Float[Tensor, "b g r n m"], v: Float[Tensor, "b g m d"]) -> Float[Tensor, "b h n d"]:
    """The values in these parts."""
    return (p.to(v.dtype) @ v[:, :, None]).flatten(1, 2)


class LossyCache(ConcatCache):
    """Keys and values of tokens of which some, or some of whose digits, have gone; the last columns are the newest."""

    kinds: ClassVar[dict[str, type["LossyCache"]]] = {}  # by name, as files say it

    def __init_subclass__(cls):
        if LossyCache.kinds.setdefault(cls.__name__, cls).__module__ != cls.__module__:
            raise ValueError(f"there is a {cls.__name__} already, and files know caches by their names: take another name")
        LossyCache.kinds[cls.__name__] = cls

    def least(self) -> int:
        """The shortest text, besides none at all, that it can be taken back to."""
        return 0

    def grow(self, layer: int, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"]) -> tuple[Tensor, Tensor]:
        """Puts the pass's keys and values behind those of the layer; returns all."""
        if layer == len(self.keys):
            self.keys.append(k[:, :, :0])
            self.values.append(v[:, :, :0])
        if (rows := len(self.keys[layer])) != len(k):
            raise ValueError(f"this cache holds {rows} rows and got {len(k)}: make a new one for another batch")
        self.keys[layer] = torch.cat((self.keys[layer], k), dim=2)
        self.values[layer] = torch.cat((self.values[layer], v), dim=2)
        return self.keys[layer], self.values[layer]

    def among(self, n: int) -> Bool[Tensor, "n n"]:
        """Which of the pass's tokens each of them sees, in a line or in a tree."""
        return self.positions.new_ones(n, n).tril().bool() if self.mask is None else self.mask[:, -n:]

    def truncate(self, n: int | Int[Tensor, " b"]) -> None:
        name = type(self).__name__
        if isinstance(n, Tensor):
            rows = n.clamp(max=self.length)
            if (rows != rows[0]).any():
                how = "generate row by row, or over a cache that keeps everything"
                raise ValueError(f"the rows of a {name} have one length, got {rows.tolist()}: {how}")
            n = int(rows[0])
        if 0 < n < min(self.least(), self.length):
            how = f"feed the text to a new one; a draft of up to {BACK} tokens can always be taken back"
            raise ValueError(f"this {name} can be taken back to {self.least()} tokens and not to {n}, what they saw is gone: {how}")
        before = self.length
        Cache.truncate(self, n)
        self.cut(before - self.length)

    def cut(self, gone: int) -> None:
        """The newest so many tokens have been taken back."""
        self._map(lambda t: t[:, :, : t.shape[2] - gone] if self.length else t[:, :, :0])

    def move(self, start: int, index: Int[Tensor, " k"]) -> None:
        super().move(self.keys[0].shape[2] - self.fed, index)


class Through(nn.Module):
    """A decoder that reads texts through its own cache, for scoring what a cache costs: `quality(Through(model), task)`.

    first   tokens of the first pass, a prompt; the rest follow in a second. None: all in one
    """

    def __init__(self, model: nn.Module, first: int | None = None):
        super().__init__()
        self.model, self.first = model, first

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n vocab"]:
        cache = self.model.new_cache(capacity=ids.shape[1])  # type: ignore[operator]
        passes = (ids,) if self.first is None else (ids[:, : self.first], ids[:, self.first :])
        return torch.cat([self.model(part, cache) for part in passes if part.shape[1]], dim=1)


@stored
class Keeping(nn.Module):
    """As a decoder's `kv`: makes lossy caches of a kind, with its settings."""

    def __init__(self, kind: str, settings: dict):
        super().__init__()
        self.kind, self.settings = kind, settings

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        require_choice("kind", self.kind, LossyCache.kinds, hint="import the module that defines it before its cache is made")
        return LossyCache.kinds[self.kind](model.rope, **self.settings)  # type: ignore[arg-type]


class LossyKV(Technique, ABC):
    """Base of the techniques whose settings are those of a lossy cache; no weight changes."""

    needs = frozenset({DECODER})

    @property
    @abstractmethod
    def kind(self) -> type[LossyCache]:
        """What the decoder then makes for itself."""

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return set_kv(model, Keeping(self.kind.__name__, asdict(self)), by=type(self).__name__)  # type: ignore[call-overload]
