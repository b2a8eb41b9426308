"""Matrices of few bits in lines, as kernels read them that run many layers in one call.

Problem   A decoder's blocks run in one call where their weights are floats. Packed, every layer is called by itself, and a model that
          reads a quarter of the bytes takes longer to write a token: as a draft of its own original it can only lose.
Idea      Of each 32 weights of a row first their scale and their offset, then their codes: in the order in which a kernel wants them.
          w = scale code + offset, and float32 holds that exactly, so that the matrix is the one that was stored.
Cost      6 bits a weight beside the packed ones, which stay: they are what is saved, and what long passes unpack.
Limit     Up to 4 bits, in groups of a multiple of 32; zero points that are codes; no scales of columns; on the processor.
Source    Groups that lie with their scales are those of GGML (Q4_1), with numbers of 32 bits in place of 16.
"""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from jaxtyping import UInt8
from torch import Tensor

from effkit.quantization.affine import pack, unpack

if TYPE_CHECKING:
    from effkit.quantization.packed import PackedWeight

GROUP = 32  # as in caching/decoder.c


def has_lines(store: "PackedWeight") -> bool:
    """Whether the matrix can be laid out so."""
    columns = store.shape[1]
    group = min(store.group_size, columns) if store.group_size > 0 else columns
    whole = group % GROUP == 0 == columns % group and store.group_size != 0
    return store.bits <= 4 and whole and not store.real_zero and store.column_scale is None and store.codes.device.type == "cpu"


def laid_out(store: "PackedWeight") -> UInt8[Tensor, "rows bytes"]:
    """Of each 32 weights of a row 24 bytes: scale and offset in float32, and the codes, the first in the lowest bits."""
    codes = pack(unpack(store.codes, store.bits, store.shape[1]).reshape(-1, GROUP), 4)
    scale = store.scale.float()
    zero = torch.full_like(scale, 2 ** (store.bits - 1)) if store.zero_point is None else store.zero_point.float()
    grid = torch.stack((scale, -zero * scale), dim=-1).repeat_interleave(store.shape[1] // scale.shape[1] // GROUP, dim=1)
    return torch.cat((grid.reshape(-1, 2).view(torch.uint8), codes), dim=1).reshape(len(store.codes), -1)


_known: WeakKeyDictionary["PackedWeight", tuple[list[Tensor], list[int], Tensor]] = WeakKeyDictionary()  # tensors are held: none moves in where one lay


def lines(store: "PackedWeight") -> UInt8[Tensor, "rows bytes"]:
    """The same, made anew when the store has other tensors, or they were written to (not by `.data`, which leaves no trace)."""
    now = list(store.buffers())
    versions = [0 if t.is_inference() else t._version for t in now]
    held = _known.get(store)
    if held is None or versions != held[1] or any(a is not b for a, b in zip(now, held[0], strict=True)):
        held = _known[store] = (now, versions, laid_out(store))
    return held[2]
