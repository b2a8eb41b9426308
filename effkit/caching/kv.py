"""The key-value cache, and its absence.

Problem   Without a cache, every token costs a pass over the whole text; with one that grows by concatenation, every
          token copies all that was kept, only to add one row.
Idea      Reserve room for the whole text at once and write each new row in place. Where the text outgrows the room,
          double it: n tokens then cost less than 2n copied rows, instead of n^2 / 2.
Cost      Memory for the whole capacity from the first token on, used or not.
Left out  Throwing keys away (evict.py); fewer bits (quantized.py); pages instead of one piece (paged.py), which large servers
          need because they cannot know the capacity in advance.
Source    Shazeer 2019, arXiv:1911.02150, section 2.4.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.generation import Cache, NoCache, Rope, attention
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique, evaluating
from effkit.core.traits import DECODER


class PreallocatedCache(Cache):
    """One buffer a layer, keys (rotated) and values side by side, written in place.

    capacity   tokens there is room for at first; the buffers take shape, dtype and device from the first keys
    """

    def __init__(self, rope: Rope, capacity: int):
        super().__init__(rope)
        require_int("capacity", capacity, 1, hint="as many tokens as the text will have; it grows where they are more")
        self.capacity = capacity
        self.buffers: list[Float[Tensor, "2 b g capacity d"]] = []
        self.turns: tuple[Tensor, Tensor] | None = None

    def angles(self, dtype):
        """Those of all positions that there is room for are computed once."""
        ends = self.length + self.positions.shape[-1]
        if self.turns is None or len(self.turns[0]) < ends or self.turns[0].dtype != dtype:
            every = torch.arange(max(self.capacity, ends), device=self.positions.device)
            self.turns = self.rope.tables(every, dtype)
        return self.turns[0][self.positions], self.turns[1][self.positions]

    def attend(
        self, layer: int, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"]
    ) -> Float[Tensor, "b h n d"]:
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        buffer = self._room(layer, k)
        keys, values = buffer[0], buffer[1]
        if self.lengths is None:
            keys[:, :, self.length - self.fed : self.length] = k
            values[:, :, self.length - self.fed : self.length] = v
        else:  # each row at its own end
            slots = self.positions[:, None, :, None].expand_as(k)
            keys.scatter_(2, slots, k)
            values.scatter_(2, slots, v)
        return attention(q, keys[:, :, : self.length], values[:, :, : self.length], self.mask)

    def texts(self):
        return self.buffers[0].shape[1] if self.buffers else None

    def move(self, start: int, index: Int[Tensor, " k"]) -> None:
        for buffer in self.buffers:
            buffer[:, :, :, start : start + len(index)] = buffer[:, :, :, start + index]

    def nbytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers)

    def _room(self, layer: int, k: Float[Tensor, "b g n d"]) -> Float[Tensor, "2 b g capacity d"]:
        """The layer's buffer, made at its first token, doubled where it is full."""
        while self.capacity < self.length:
            self.capacity *= 2
        if layer == len(self.buffers):
            self.buffers.append(_buffer(k, self.capacity))
        buffer = self.buffers[layer]
        if buffer.shape[1] != len(k):
            rows = buffer.shape[1]
            raise ValueError(f"this cache holds {rows} rows and got {len(k)}: make a new one for another batch")
        if buffer.shape[3] < self.capacity:
            self.buffers[layer] = _buffer(k, self.capacity)
            self.buffers[layer][:, :, :, : buffer.shape[3]] = buffer
        return self.buffers[layer]


def _buffer(like: Float[Tensor, "b g n d"], capacity: int) -> Float[Tensor, "2 b g capacity d"]:
    rows, groups, _, size = like.shape
    return like.new_zeros(2, rows, groups, capacity, size)  # zeros: what a mask hides must not be NaN


@stored
class Preallocating(nn.Module):
    """As a decoder's `kv`: its caches reserve what they will need."""

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        return PreallocatedCache(model.rope, max(1, capacity))  # type: ignore[arg-type]


@stored
class Recomputing(nn.Module):
    """As a decoder's `kv`: it keeps nothing."""

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        return NoCache(model.rope)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Preallocated(Technique):
    """The decoder keeps keys and values in buffers that are reserved once and written in place."""

    needs = frozenset({DECODER})
    paper = Paper("Shazeer", 2019, "Fast transformer decoding: one write-head is all you need",
                  "arXiv:1911.02150", "section 2.4")  # fmt: skip

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return set_kv(model, Preallocating(), by="Preallocated")

    def claim(self, model: nn.Module) -> Reading:
        return held_per_token(model)


@dataclass(frozen=True)
class Recompute(Technique):
    """The decoder keeps nothing and passes over the whole text for every token: the baseline that caching is for."""

    needs = frozenset({DECODER})
    paper = Paper("Vaswani et al.", 2017, "Attention is all you need", "arXiv:1706.03762", "section 3.1")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return set_kv(model, Recomputing(), by="Recompute")

    def claim(self, model: nn.Module) -> Reading:
        return held_per_token(model)


def set_kv(model: nn.Module, kv: nn.Module, *, by: str) -> nn.Module:
    """Lets the decoder make its caches by `kv` from now on; no weight changes."""
    note(model, "kv", f"{type(model.kv).__name__} -> {type(kv).__name__}", by)
    model.kv = kv.train(model.training)
    return model


def held_per_token(model: nn.Module, tokens: int = 4) -> Reading:
    """Bytes that the decoder's own cache holds for each token of a text, counted on one that was filled."""
    cache = model.new_cache(capacity=tokens)  # type: ignore[operator]
    with evaluating(model), torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device), cache)
    return Reading(cache.nbytes() / tokens, "B per token", "counted", better="lower")
