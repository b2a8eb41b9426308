"""Fused decoding: a few tokens pass through a block in three calls.

Problem   With a cache, writing a token is a few million macs, and hundreds of operators are called for it: a small model
          waits for its own Python. And a library's matrix product, made for many rows, reads weights slowly for one.
Idea      One kernel from the residual stream to queries, keys and values, one for attention over the cache, one from
          there back to the residual stream (decoder.c). A row of weights is read once and meets all tokens.
Exact     A number is summed in the same order however many tokens pass, so that a block of tokens gives bit for bit what
          one by one gives: greedy speculation is identical in bfloat16, too. Between blocks, the stream is float32.
Limit     Few tokens: from some 32 on, a library's products are better. Layers that are no plain nn.Linear, hooks,
          gradients, a GPU, no C compiler: the blocks run in order, as before.
Source    Dao et al. 2022, arXiv:2205.14135, section 3.1 (attention as one kernel); Thinking Machines Lab 2025, "Defeating
          nondeterminism in LLM inference" (kernels that do not depend on the batch).
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.caching.kv import PreallocatedCache, held_per_token, set_kv
from effkit.core import native
from effkit.core.checkpoint import stored
from effkit.core.generation import Cache
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER
from effkit.zoo.gpt import Attention, Block, FeedForward, InOrder, split

FEW = 32  # tokens, over all rows
_SOURCE = Path(__file__).with_name("decoder.c")
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "project": [_P, _P, _F, _P, _P, _P, *[_L] * 4, _I, _I, _P, _P],
    "attend": [*[_P] * 8, *[_L] * 7, _I, _I],
    "product": [_P, _P, *[_L] * 3, _I, _I, _P],
    "finish": [_P, _P, _P, _L, _P, _F, _P, _P, _P, *[_L] * 3, _I, _I, _P],
}


def kernels() -> ctypes.CDLL | None:
    """The compiled source with its argument types, which save ctypes a guess a call; None without a compiler."""
    library = native.library(_SOURCE)
    if library is not None and library.project.argtypes is None:
        for name, types in _ARGUMENTS.items():
            getattr(library, name).argtypes = types
    return library


class FusedCache(PreallocatedCache):
    """A preallocated cache that the fused blocks read and write by one call."""

    def attend_few(
        self, library: ctypes.CDLL, layer: int, qkv: Float[Tensor, "b n hd"], heads: int, dtype: torch.dtype
    ) -> Float[Tensor, "b n hd"]:
        """Attention of n new tokens from rows of queries, keys and values, all float32; what is kept has the dtype."""
        (rows, n, width), d = qkv.shape, self.rope.head_dim
        groups = (width // d - heads) // 2
        keys, values = self._room(layer, qkv.new_empty(rows, groups, 0, d, dtype=dtype))
        cosine, sine = (t.float() for t in self.tables)
        mask = None if self.mask is None else self.mask.contiguous()
        out, scratch = qkv.new_empty(rows, n, heads * d), qkv.new_empty(rows * heads * (self.length + 2 * d))
        library.attend(
            *pointers(qkv, cosine, sine, keys, values, mask, scratch, out), rows, heads, groups, n, self.length - n,
            keys.shape[2], d, dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        return out


def pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def weights(block: nn.Module, dtype: torch.dtype) -> list[Tensor] | None:
    """The nine weights of a block in the order of its work; None where it does anything that the kernels do not."""
    if type(block) is not Block or type(block.attention) is not Attention or type(block.ff) is not FeedForward:
        return None
    a, f = block.attention, block.ff
    layers = (block.attention_norm, a.q, a.k, a.v, a.o, block.ff_norm, f.gate, f.up, f.down)
    for module in (block, a, f, *layers):
        if module._forward_hooks or module._forward_pre_hooks:
            return None
    for layer in layers:
        linear = type(layer) is nn.Linear and layer.bias is None
        if not (linear or (type(layer) is nn.RMSNorm and layer.eps is not None)):
            return None
        if layer.weight.dtype != dtype or not layer.weight.is_contiguous():
            return None
    return [layer.weight for layer in layers]


def few(x: Float[Tensor, "b n d"]) -> bool:
    """Whether the kernels take this input."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and type(x) is Tensor
    quiet = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    return plain and quiet and 0 < x.shape[0] * x.shape[1] <= FEW


@stored
class Fusing(InOrder):
    """As a decoder's `running`: few tokens by the kernels, many in order."""

    def forward(self, model: nn.Module, x: Float[Tensor, "b n d"], cache: Cache) -> Float[Tensor, "b n d"]:
        library = kernels() if few(x) else None
        held = [weights(block, x.dtype) for block in model.blocks] if library else [None]  # type: ignore[union-attr]
        if None in held:
            return super().forward(model, x, cache)
        stream = x.to(torch.float32, copy=True)
        for layer, block in enumerate(model.blocks):  # type: ignore[arg-type]
            pass_block(library, layer, block, held[layer], stream, x.dtype, cache)  # type: ignore[arg-type]
        return stream.to(x.dtype)

    def logits(self, model: nn.Module, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n vocab"]:
        layer: Any = model.embedding if model.head is None else model.head
        library = kernels() if few(features) and untouched(layer) else None
        if library is None or layer.weight.dtype != features.dtype:
            return super().logits(model, features)
        x, weight = features.float().contiguous(), layer.weight
        y = x.new_empty(*x.shape[:2], len(weight))
        library.product(*pointers(x, weight), len(weight), x.shape[2], x.shape[0] * x.shape[1],
                        features.dtype == torch.bfloat16, torch.get_num_threads(), *pointers(y))  # fmt: skip
        return y.to(features.dtype)


def untouched(layer: Any) -> bool:
    """Whether a call of the layer is its weights' product and nothing else."""
    kind = type(layer) in (nn.Linear, nn.Embedding) and getattr(layer, "bias", None) is None
    return kind and layer.weight.is_contiguous() and not (layer._forward_hooks or layer._forward_pre_hooks)


def pass_block(
    library: ctypes.CDLL, layer: int, block: Block, held: list[Tensor], stream: Float[Tensor, "b n d"],
    dtype: torch.dtype, cache: Cache,
) -> None:  # fmt: skip
    """One block, in place on the residual stream."""
    first, q, k, v, o, second, gate, up, down = held
    (rows, n, width), tokens, hidden = stream.shape, stream.shape[0] * stream.shape[1], len(gate)
    how = (dtype == torch.bfloat16, torch.get_num_threads())
    qkv, scratch = stream.new_empty(rows, n, len(q) + 2 * len(k)), stream.new_empty(2 * tokens * (width + hidden))
    library.project(*pointers(stream, first), block.attention_norm.eps, *pointers(q, k, v), len(q), len(k), width, tokens,
                    *how, *pointers(scratch, qkv))  # fmt: skip
    if isinstance(cache, FusedCache) and cache.lengths is None:
        seen = cache.attend_few(library, layer, qkv, len(q) // cache.rope.head_dim, dtype)
    else:
        parts = qkv.to(dtype).split([len(q), len(k), len(k)], dim=-1)
        seen = cache.attend(layer, *(split(part, cache.rope.head_dim) for part in parts))
        seen = seen.transpose(1, 2).float().contiguous()
    library.finish(*pointers(stream, seen, o), len(q), *pointers(second), block.ff_norm.eps, *pointers(gate, up, down),
                   hidden, width, tokens, *how, *pointers(scratch))  # fmt: skip


@stored
class FusedRoom(nn.Module):
    """As a decoder's `kv`: its caches reserve what they will need, for the fused blocks."""

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        return FusedCache(model.rope, max(1, capacity))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fused(Technique):
    """The decoder runs its blocks by three calls each while tokens are few, and its cache is written in place."""

    needs = frozenset({DECODER})
    paper = Paper("Dao et al.", 2022, "FlashAttention: fast and memory-efficient exact attention with IO-awareness",
                  "arXiv:2205.14135", "section 3.1")  # fmt: skip

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        if not hasattr(model, "running"):
            raise ValueError(f"Fused needs a decoder that lets its blocks be run, as GPT does; {type(model).__name__} does not")
        model.running = Fusing().train(model.training)
        if why := native.why_not(_SOURCE):
            note(model, "running", "blocks run in order", why)
        return set_kv(model, FusedRoom(), by="Fused")

    def claim(self, model: nn.Module) -> Reading:
        return held_per_token(model)
