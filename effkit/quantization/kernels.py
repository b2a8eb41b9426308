"""The native matrix-vector product over packed 4-bit weights, and when it applies."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effkit.core import native

_SOURCE = Path(__file__).with_name("packed.c")


def matvec(x: Tensor, store: Any) -> Tensor | None:
    """x (one token, any leading dimensions of size 1) times the packed matrix, or None where the kernel does not apply:
    other bits or groups, several tokens, gradients wanted, no C compiler."""
    rows, columns = store.shape
    if store.bits != 4 or store.group_size != 32 or columns % 32 or x.numel() != columns or x.device.type != "cpu":
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    product = _product()
    if product is None:
        return None
    x32 = x.detach().float().contiguous()
    y = torch.empty(*x.shape[:-1], rows)
    zero = store.zero_point.data_ptr() if store.zero_point is not None else None
    product(
        store.codes.data_ptr(), store.scale.data_ptr(), zero, x32.data_ptr(), y.data_ptr(),
        rows, columns, torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def _product():
    """The compiled function with its argument types, which save ctypes a guess a call."""
    library = native.library(_SOURCE)
    if library is None:
        return None
    if library.matvec_int4.argtypes is None:
        library.matvec_int4.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long, ctypes.c_long, ctypes.c_int]
    return library.matvec_int4
