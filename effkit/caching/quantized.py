"""Keys and values in few bits.

Problem   Weights of 4 bits are read once a token, and so is a cache of 16 bits, which for long texts is the larger one.
Idea      The affine map of chapter 01. Keys have channels that are large at every token: one grid a channel, over a block
          of `group` tokens, so that a wide channel spoils no other. Values have no such channels and are weighted token by
          token: one grid a token. A block is packed once all its tokens are at least `residual` old, for the newest
          tokens are looked at most.
Cost      bits + 16 / group bits a number, 8 / group more below 8 bits, where grids have zero points; every pass unpacks
          everything. Kernels multiply with the codes instead.
Places    Keys are rounded after rotation, so that reading need not rotate. Before it, channels are steadier.
What came More bits a token, every one predicted through the cache (`effkit study caching`, residual 32). gpt-small: int8 .01 %,
          int4 .19 %, int2 3.2 %, and with keys by token .00, .03 and 4.1; SmolLM2-135M: .00, .32, 7.8; by token .00, .32 and
          19. Of bfloat16's bytes, int8 with residual 1 takes .546 at 1,024 tokens, int4 .34, int2 .22 with residual 32.
Left out  Zero points that are real numbers: a quarter of a bit more, and with them, rounding before rotation does pay
          (as in KVQuant: Hooper et al. 2024, arXiv:2401.18079). KIVI reads a prompt in full precision and rounds it behind
          it, and lets values leave its residual token by token; here every query sees old blocks rounded, a prompt's too,
          and values leave in blocks, as keys do.
Source    Liu et al. 2024, arXiv:2402.02750, section 3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.caching.lossy import BACK, LossyCache, LossyKV
from effkit.core.checks import require_choice, require_int
from effkit.core.generation import Rope, attention
from effkit.core.report import Reading
from effkit.core.technique import Paper
from effkit.quantization.affine import SCALE_DTYPE, dequantize, grid, pack, quantize, unpack

Packed = list[Tensor]  # codes, scales and, below 8 bits, zero points: (b g blocks n) each


@dataclass(frozen=True)
class Format:
    """How blocks of `group` tokens are written: by "channel", a grid for each channel of a block; by "token", for each
    token's `group` channels, or for all of them where they are fewer or no multiple."""

    bits: int
    group: int
    by: str

    def size(self, d: int) -> int:
        """Numbers that share a grid."""
        return self.group if self.by == "channel" or d % self.group == 0 else d

    def bits_per_number(self, d: int) -> float:
        """With the group's scale, and below 8 bits its zero point."""
        return self.bits + (16 if self.bits == 8 else 24) / self.size(d)

    def pack(self, x: Float[Tensor, "b g n d"]) -> Packed:
        """n is a multiple of `group`."""
        blocks = x.unflatten(2, (-1, self.group))
        blocks = blocks.transpose(3, 4) if self.by == "channel" else blocks
        groups = blocks.flatten(3).unflatten(3, (-1, self.size(x.shape[3]))).float()
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale, zero = grid(low, high, bits=self.bits, symmetric=self.bits == 8)
        codes = quantize(groups, scale, zero, bits=self.bits).flatten(3)
        packed = pack(codes.flatten(0, 2), self.bits).unflatten(0, codes.shape[:3])
        return [packed, scale[..., 0].to(SCALE_DTYPE), zero[..., 0].to(torch.uint8)][: 2 if self.bits == 8 else 3]

    def unpack(self, packed: Packed, d: int) -> Float[Tensor, "b g n d"]:
        """What `pack` was given, rounded, in float32."""
        codes = unpack(packed[0].flatten(0, 2), self.bits, self.group * d).unflatten(0, packed[0].shape[:3])
        scale = packed[1].float()
        zero = packed[2].float() if len(packed) == 3 else torch.full_like(scale, 2 ** (self.bits - 1))
        x = dequantize(codes.unflatten(3, (-1, self.size(d))), scale[..., None], zero[..., None]).flatten(3)
        sizes = (d, self.group) if self.by == "channel" else (self.group, d)
        blocks = x.unflatten(3, sizes)
        return (blocks.transpose(3, 4) if self.by == "channel" else blocks).flatten(2, 3)


class QuantizedCache(LossyCache):
    """A query sees whole blocks rounded that end `residual` tokens before it, and all behind them as they were.

    low      tokens that are held as codes; the columns of `keys` and `values` are those behind them
    packed   of each layer the codes of keys and of values
    """

    def __init__(self, rope: Rope, bits: int, keys: str, group: int, residual: int):
        super().__init__(rope)
        self.residual, self.group = residual, group
        self.formats = Format(bits, group, keys), Format(bits, group, "token")
        self.packed: list[list[Packed]] = []
        self.low = 0

    def rounded(self, position):
        """How many tokens the query there sees rounded."""
        return (position + 1 - self.residual) // self.group * self.group

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        if parents is not None and n > self.residual:
            how = f"proposals in one line, or QuantizedKV(residual={n})"
            raise ValueError(f"a tree of {n} tokens is larger than the {self.residual} that stay in full precision: take {how}")
        self.settle(self.rounded(self.length - BACK))
        positions = super().advance(n, parents, device=device, dtype=dtype)
        self.top = max(self.low, self.rounded(int(positions[-1] if parents is None else positions.max())))
        among, limit = self.among(n), self.rounded(positions)[:, None]
        old = torch.arange(self.length - n, device=device)
        tail = torch.cat((old[self.low :] >= limit, among & (positions >= limit)), dim=1)
        self.mask = torch.cat((torch.arange(self.top, device=device) < limit, tail), dim=1)
        return positions

    def attend(self, layer, q, k, v):
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        tails, seen = self.grow(layer, k, v), []
        for i, (tail, form) in enumerate(zip(tails, self.formats, strict=True)):
            packed = [self.packed[layer][i]] if self.low else []
            if self.top > self.low:
                packed.append(form.pack(tail[:, :, : self.top - self.low]))
            floats = [form.unpack(blocks, k.shape[3]).to(k.dtype) for blocks in packed]
            seen.append(torch.cat((*floats, tail), dim=2))
        return attention(q, seen[0], seen[1], self.mask)

    def settle(self, low: int) -> None:
        """Packs the blocks before `low`."""
        if (n := low - self.low) <= 0:
            return
        for layer, tails in enumerate(zip(self.keys, self.values, strict=True)):
            new = [form.pack(tail[:, :, :n]) for tail, form in zip(tails, self.formats, strict=True)]
            if self.low:
                pairs = zip(self.packed[layer], new, strict=True)
                new = [[torch.cat(both, dim=2) for both in zip(*pair, strict=True)] for pair in pairs]
            self.packed[layer : layer + 1] = [new]
        self._map(lambda t: t[:, :, n:].clone())
        self.low = low

    def least(self) -> int:
        return self.low + self.residual - 1 if self.low else 0

    def cut(self, gone):
        super().cut(gone)
        if not self.length:
            self.packed, self.low = [], 0

    def nbytes(self) -> int:
        return super().nbytes() + sum(t.nbytes for layer in self.packed for packed in layer for t in packed)


@dataclass(frozen=True)
class QuantizedKV(LossyKV):
    """The decoder holds keys and values as codes of a few bits, the newest in full precision.

    bits      2 to 8
    keys      "channel": a grid for each channel over a block of tokens; "token": for each token, as values have
    group     tokens in a block, and numbers of a token that share a grid; a multiple of 8
    residual  tokens at least, seen from each new one, itself among them, that are not rounded
    """

    bits: int = 8
    keys: Literal["channel", "token"] = "channel"
    group: int = 32
    residual: int = 32

    kind = QuantizedCache
    paper = Paper("Liu et al.", 2024, "KIVI: a tuning-free asymmetric 2bit quantization for KV cache", "arXiv:2402.02750", "section 3")

    def __post_init__(self):
        require_int("bits", self.bits, 2, 8, hint="codes are packed into bytes; more than 8 bits gain nothing over bfloat16")
        require_choice("keys", self.keys, ("channel", "token"))
        require_int("group", self.group, 8, 1024, hint="a block is packed when it is full")
        if self.group % 8:
            raise ValueError(f"group must be a multiple of 8, got {self.group}: codes of a block fill whole bytes; take {-(-self.group // 8) * 8}")
        require_int("residual", self.residual, 1, hint="a token sees itself as it is")

    def claim(self, model: nn.Module) -> Reading:
        """What a number takes once it is packed, scales and zero points included."""
        each = [Format(self.bits, self.group, by).bits_per_number(model.rope.head_dim) for by in (self.keys, "token")]  # type: ignore[union-attr, arg-type]
        return Reading(sum(each) / 2, "bits per number", "counted", better="lower")
