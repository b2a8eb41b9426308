"""Matrices of few bits, as the fused kernels read them.

Problem   Blocks run in one call where their weights are floats. Packed, every layer is called by itself, and a model that reads a
          quarter of the bytes takes longer to write a token: as a draft of its own original it can only lose.
Idea      Of each group of 32 weights first its scale and its offset, then its codes: in the order in which a kernel wants them.
          w = scale code + offset, and float32 holds that exactly, so that the matrix is the one that was stored.
Cost      6 bits a weight beside the packed ones, which stay: they are what is saved, and what long passes unpack.
Limit     Up to 4 bits, in groups of a multiple of 32; zero points that are codes; no scales of columns.
Source    Groups that lie with their scales are those of GGML (Q4_1), with numbers of 32 bits in place of 16.
"""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from effkit.quantization.affine import pack, unpack
from effkit.quantization.packed import PackedWeight

GROUP = 32  # as in decoder.c


def nibbles(store: PackedWeight) -> UInt8[Tensor, "rows bytes"]:
    """Of each group of a row 24 bytes: scale and offset in float32, and 32 codes."""
    codes = pack(unpack(store.codes, store.bits, store.shape[1]).reshape(-1, GROUP), 4)
    scale = store.scale.float()
    zero = torch.full_like(scale, 2 ** (store.bits - 1)) if store.zero_point is None else store.zero_point.float()
    line = torch.stack((scale, -zero * scale), dim=-1).repeat_interleave(store.shape[1] // scale.shape[1] // GROUP, dim=1)
    return torch.cat((line.reshape(-1, 2).view(torch.uint8), codes), dim=1).reshape(len(store.codes), -1).contiguous()


def readable(store: nn.Module) -> bool:
    """Whether the kernels can read such a matrix at all."""
    if type(store) is not PackedWeight:
        return False
    columns, group = store.shape[1], store.group_size if store.group_size > 0 else store.shape[1]
    whole = group % GROUP == 0 == columns % group and store.group_size != 0
    plain = not store.real_zero and store.column_scale is None and store.codes.device.type == "cpu"
    return store.bits <= 4 and whole and plain


_made: WeakKeyDictionary[PackedWeight, tuple[list, Tensor]] = WeakKeyDictionary()


def made(store: PackedWeight) -> UInt8[Tensor, "rows bytes"]:
    """The same, kept until the store's tensors are others or have been written to."""
    state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in store.buffers()]
    if store not in _made or _made[store][0] != state:
        _made[store] = (state, nibbles(store))
    return _made[store][1]
