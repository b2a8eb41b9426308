"""Fused decoding: a few tokens, and some prompts, pass through all blocks in one call.

Problem   With a cache, writing a token is a few million macs, and hundreds of operators are called for it: a small model
          waits for its own Python. And a library's matrix product, made for many rows, reads weights slowly for one.
Idea      One kernel from the residual stream to queries, keys and values, one for attention over the cache, one from
          there back to the residual stream (decoder.c). A row of weights is read once and meets all tokens.
Exact     A number is summed in the same order however many tokens pass, so that a block of tokens gives bit for bit what
          one by one gives, and each of several rows, also of unequal length, what it gives alone. Greedy speculation is
          identical in bfloat16, too, where every pass goes this way, that over the prompt included. Up to the last norm, the
          stream is float32.
Limit     At most 64 tokens: longer passes go by a library's products, which are made for many rows. In bfloat16, where the
          processor does not multiply in it, those are slow, and up to 1,024 tokens pass here (docs/decisions.md). Layers that are
          neither a plain nn.Linear nor offer `lines` of few bits, some of each, hooks, those who count operators, gradients, a GPU,
          no C compiler: the blocks run in order, as before.
Source    Dao et al. 2022, arXiv:2205.14135, section 3.1 (attention as one kernel); Thinking Machines Lab 2025, "Defeating
          nondeterminism in LLM inference" (kernels that do not depend on the batch).
"""

import ctypes
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

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

FEW, MANY = 64, 1024  # tokens, over all rows, where a library multiplies fast and where it does not
_SOURCE = Path(__file__).with_name("decoder.c")
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "project": [_P, _P, _F, _P, _P, _P, *[_L] * 4, _I, _I, _I, _P, _P],
    "blocks": [_L, *[_P] * 9, _P, _I, *[_L] * 5, _I, _I, _I],
    "last_norm": [_P, _P, _I, _F, _L, _L],
    "product": [_P, _P, *[_L] * 3, _I, _I, _P],
    "finish": [_P, _P, _P, _L, _P, _F, _P, _P, _P, *[_L] * 3, _I, _I, _I, _P],
}


def kernels() -> ctypes.CDLL | None:
    """The compiled source with its argument types, which save ctypes a guess a call; None without a compiler."""
    library = native.library(_SOURCE)
    if library is not None and library.project.argtypes is None:
        for name, types in _ARGUMENTS.items():
            getattr(library, name).argtypes = types
    return library


class Plan:
    """The weights of a decoder's blocks as the kernels want them. It holds them, so that its pointers stay good.

    layers   nine of each block, in the order of its work
    norm     the last one's weight, or None where that has to be called
    """

    def __init__(self, parts: list[Any], layers: list[list[Any]], norm: Tensor | None, eps: list[float]):
        self.parts, self.eps = parts, eps
        weights = [[layer.lines() if few_bits(layer) else layer.weight for layer in block] for block in layers]
        self.packed = any(few_bits(layer) for block in layers for layer in block)
        self.codes = [t for block in layers for layer in block if few_bits(layer) for t in layer.buffers() if not t.is_inference()]
        self.writes = sum(t._version for t in self.codes)  # lines are copies: whoever writes to the codes leaves them as they were
        self.source = [t for block in (*weights, [] if norm is None else [norm]) for t in block]
        self.at, self.norm = pointers(*self.source), None if norm is None else norm.detach()
        self.weights = [[t.detach() for t in block] for block in weights]  # their storage; a cast gives a parameter another
        self.sizes = [(len(w[1]), len(w[2]), len(w[6])) for w in weights]  # queries, keys, hidden
        self.arrays = ((_P * len(self.at))(*self.at), (_L * (3 * len(weights)))(*(n for size in self.sizes for n in size)),
                       (_F * len(eps))(*eps))  # fmt: skip
        self.held: list[Tensor] = []  # the cache's buffers, once it has them, and where they lie
        self.kept: Any = None

    def kinds(self, dtype: torch.dtype) -> tuple[int, int]:
        """How norms, keys and values are held, and how matrices are; as decoder.c counts."""
        half = int(dtype == torch.bfloat16)
        return half, 2 if self.packed else half

    def good(self, model: nn.Module) -> bool:
        """Whether these are the model's parts, and their weights still lie where they lay."""
        now = parts(model)
        same = len(now) == len(self.parts) and all(map(operator.is_, now, self.parts))
        return same and pointers(*self.source) == self.at and sum(t._version for t in self.codes) == self.writes

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype, width: int, d: int) -> "Plan | None":
        """None where a block does anything that the kernels do not; width: of the stream, d: of a head."""
        blocks: list[Any] = list(model.blocks)  # type: ignore[arg-type]
        held = [layers(block, dtype, width, d) for block in blocks]
        if not all(held) or len({few_bits(matrix) for block in held for matrix in block if type(matrix) is not nn.RMSNorm}) > 1:  # type: ignore[union-attr]
            return None
        last: Any = model.norm
        fits = type(last) is nn.RMSNorm and shape(last, dtype) == (width,) and not hooked(last)
        norms = [norm for block in blocks for norm in (block.attention_norm, block.ff_norm)] + [last] * fits
        return cls(parts(model), held, last.weight if fits else None, [norm.eps for norm in norms])  # type: ignore[arg-type]

    def room(self, texts: int, n: int, width: int, length: int, d: int) -> int:
        """Floats that a pass needs beside its stream."""
        tokens = texts * n
        return max(
            2 * tokens * (queries + keys) + max(scratch(tokens, width, hidden), texts * (queries // d) * 4 * (length + d))
            for queries, keys, hidden in self.sizes
        )


def parts(model: Any) -> list[Any]:
    """What makes a plan that of this model: its blocks, its last norm and that one's weight."""
    return [*model.blocks, model.norm, getattr(model.norm, "weight", None)]


class FusedCache(PreallocatedCache):
    """A preallocated cache that the fused blocks read and write in one call."""

    def run(self, library: ctypes.CDLL, plan: Plan, stream: Float[Tensor, "b n width"], dtype: torch.dtype) -> None:
        """All blocks, in place on the residual stream; what is kept has the dtype."""
        (texts, n, width), d = stream.shape, self.rope.head_dim
        self.find(plan, stream, dtype)
        cosine, sine = (t.float() for t in self.tables)
        ragged, starts = self.lengths is not None, [self.length - n] * texts if self.lengths is None else (self.lengths - n).tolist()
        mask = None if ragged or self.mask is None else self.mask.contiguous()  # of rows of unequal length each looks back on its own
        room = stream.new_empty(plan.room(texts, n, width, self.length, d))
        library.blocks(
            len(plan.sizes), *plan.arrays, plan.kept, *pointers(cosine, sine, mask, stream, room), (_L * texts)(*starts), ragged, texts, n,
            plan.held[0].shape[3], d, width, *plan.kinds(dtype), torch.get_num_threads(),
        )  # fmt: skip

    def find(self, plan: Plan, stream: Float[Tensor, "b n width"], dtype: torch.dtype) -> None:
        """Tells the plan where the buffers lie; they are made where they must be, and mostly they are those of the last pass."""
        texts, d = len(stream), self.rope.head_dim
        same = len(plan.held) == len(self.buffers) and all(map(operator.is_, plan.held, self.buffers))
        if same and plan.held and plan.held[0].shape[1] == texts and self.length <= plan.held[0].shape[3]:
            return
        if self.buffers and self.buffers[0].dtype != dtype:
            n = stream.shape[1]  # the pass has not happened
            self.length, self.lengths = self.length - n, None if self.lengths is None else self.lengths - n
            raise ValueError(f"this cache holds {self.buffers[0].dtype} and the model is {dtype} now: make a new one with new_cache")
        plan.held = []  # so that what is outgrown goes as soon as it is copied
        held = [self._room(i, stream.new_empty(texts, keys // d, 0, d, dtype=dtype)) for i, (_, keys, _) in enumerate(plan.sizes)]
        plan.held, plan.kept = held, (_P * (2 * len(held)))(*(place for buffer in held for place in pointers(buffer[0], buffer[1])))


def scratch(tokens: int, width: int, hidden: int) -> int:
    """Floats that the parts of a block use: a norm for each thread, and two of the hidden states."""
    return tokens * (torch.get_num_threads() * width + 2 * hidden)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def layers(block: nn.Module, dtype: torch.dtype, width: int, d: int) -> list[Any] | None:
    """The nine layers of a block in the order of its work; None where it does anything that the kernels do not."""
    if type(block) is not Block or type(block.attention) is not Attention or type(block.ff) is not FeedForward:
        return None
    a, f = block.attention, block.ff
    found: list[Any] = [block.attention_norm, a.q, a.k, a.v, a.o, block.ff_norm, f.gate, f.up, f.down]
    shapes = [shape(layer, dtype) for layer in found]
    if hooked(block, a, f, *(part for layer in found for part in layer.modules())) or None in shapes:
        return None
    queries, keys, hidden = (shapes[i][0] for i in (1, 2, 6))  # type: ignore[index]
    inward, outward = (width, queries), (width, hidden)
    wanted = [(width,), (queries, width), *[(keys, width)] * 2, inward, (width,), *[(hidden, width)] * 2, outward]
    heads = keys > 0 and queries % keys == keys % d == d % 2 == 0
    return found if heads and shapes == wanted else None


def few_bits(layer: Any) -> bool:
    """Whether it offers its matrix in lines of few bits, and nothing else."""
    return getattr(layer, "has_lines", False)


def shape(layer: Any, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Of a weight that the kernels can read; None where they cannot."""
    if few_bits(layer):
        return layer.out_features, layer.in_features
    plain = type(layer) is nn.RMSNorm and layer.eps is not None or type(layer) in (nn.Linear, nn.Embedding) and getattr(layer, "bias", None) is None
    return tuple(layer.weight.shape) if plain and readable(layer.weight) and layer.weight.dtype == dtype else None


def hooked(*modules: Any) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def readable(weight: Tensor | None) -> bool:
    """Whether its numbers lie one behind another where its pointer says."""
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()


def few(x: Float[Tensor, "b n d"]) -> bool:
    """Whether the kernels take this input."""
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and type(x) is Tensor
    quiet = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or listened())
    slow = x.dtype == torch.bfloat16 and not native.has_bfloat16()
    return plain and quiet and 0 < x.shape[0] * x.shape[1] <= (MANY if slow else FEW)


def listened() -> bool:
    """Whether somebody traces, counts operators or hooks all modules: kernels would do their work unheard."""
    hooked = torch.nn.modules.module._has_any_global_hook()
    return hooked or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


@stored
class Fusing(InOrder):
    """As a decoder's `running`: few tokens by the kernels, many in order."""

    def forward(self, model: nn.Module, x: Float[Tensor, "b n d"], cache: Cache) -> Float[Tensor, "b n d"]:
        library = kernels() if few(x) else None
        plan = planned(model, x, cache) if library else None
        if library is None or plan is None:
            return super().forward(model, x, cache)
        stream = x.to(torch.float32, copy=True).contiguous()
        through(library, plan, stream, x.dtype, cache)
        if plan.norm is None:
            return model.norm(stream.to(x.dtype))  # type: ignore[operator]
        library.last_norm(*pointers(stream, plan.norm), x.dtype == torch.bfloat16, plan.eps[-1], x.shape[2], x.shape[0] * x.shape[1])
        return stream.to(x.dtype)

    def logits(self, model: nn.Module, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n vocab"]:
        layer: Any = model.embedding if model.head is None else model.head
        size = shape(layer, features.dtype) if few(features) and not hooked(layer) else None
        library = kernels() if size and size[1:] == features.shape[2:] else None
        if library is None:
            return super().logits(model, features)
        x, weight = features.float().contiguous(), layer.lines() if few_bits(layer) else layer.weight
        y, kind = x.new_empty(*x.shape[:2], len(weight)), 2 if few_bits(layer) else int(features.dtype == torch.bfloat16)
        library.product(*pointers(x, weight), len(weight), x.shape[2], x.shape[0] * x.shape[1], kind, torch.get_num_threads(), *pointers(y))
        return y.to(features.dtype)


_plans: WeakKeyDictionary[Cache, dict[tuple[torch.dtype, int], Plan | None]] = WeakKeyDictionary()  # a copied cache begins anew


def planned(model: nn.Module, x: Float[Tensor, "b n d"], cache: Cache) -> Plan | None:
    """The model's plan, made at the first pass with this cache: looking at every layer again would take longer than the
    kernels. Whoever hangs a hook into a model, or replaces its last norm or a layer of a block, in the middle of a text begins it anew."""
    known, kind = _plans.setdefault(cache, {}), (x.dtype, x.shape[-1])
    plan = known.get(kind)
    if kind not in known or (plan and not plan.good(model)):
        plan = known[kind] = Plan.of(model, *kind, cache.rope.head_dim)
    return plan


def through(library: ctypes.CDLL, plan: Plan, stream: Float[Tensor, "b n d"], dtype: torch.dtype, cache: Cache) -> None:
    """All blocks, in place on the residual stream: by one call, or around the attention of a cache of another kind."""
    if isinstance(cache, FusedCache):
        return cache.run(library, plan, stream, dtype)
    (rows, n, width), d = stream.shape, cache.rope.head_dim
    tokens, how = rows * n, (*plan.kinds(dtype), torch.get_num_threads())
    for layer, ((first, q, k, v, o, second, gate, up, down), (queries, keys, hidden)) in enumerate(zip(plan.weights, plan.sizes, strict=True)):
        qkv, room = stream.new_empty(rows, n, queries + 2 * keys), stream.new_empty(scratch(tokens, width, hidden))
        library.project(*pointers(stream, first), plan.eps[2 * layer], *pointers(q, k, v), queries, keys, width, tokens,
                        *how, *pointers(room, qkv))  # fmt: skip
        parts = qkv.to(dtype).split([queries, keys, keys], dim=-1)
        seen = cache.attend(layer, *(split(part, d) for part in parts)).transpose(1, 2).float().contiguous()
        library.finish(*pointers(stream, seen, o), queries, *pointers(second), plan.eps[2 * layer + 1], *pointers(gate, up, down),
                       hidden, width, tokens, *how, *pointers(room))  # fmt: skip


@stored
class FusedRoom(nn.Module):
    """As a decoder's `kv`: its caches reserve what they will need, for the fused blocks."""

    def new(self, model: nn.Module, *, capacity: int) -> Cache:
        return FusedCache(model.rope, max(1, capacity))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fused(Technique):
    """The decoder runs all its blocks in one call while tokens are few, and its cache is written in place."""

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
