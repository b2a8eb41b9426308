"""Memory: the bytes a model holds, and the most that are alive at once while it works.

Problem   What the operating system reports (resident set size) keeps counting what was freed but not handed back, so
          a second run seems to need nothing, and a first run pays for everybody's libraries.
Idea      Held bytes are counted on the tensors themselves. The peak is the highest point of the running sum of
          allocations and releases that torch's own allocator reports, scratch space inside operators included.
Cost      The peak takes one run under the profiler, several times slower than a bare one.
Left out  What code outside torch allocates: native kernels, memory-mapped files, the interpreter.
"""

import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from effkit.core.report import Reading


def resident(model: nn.Module) -> Reading:
    """Bytes of all parameters and buffers, each storage once and as a whole: tied tensors share one, and a slice of a
    large tensor keeps all of it alive."""
    return Reading(held_bytes([*model.parameters(), *model.buffers()]), "B", "counted", better="lower")


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    storages = [part.untyped_storage() for tensor in tensors for part in _parts(tensor)]
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())


def peak(function: Callable[[], object]) -> Reading:
    """The most bytes of tensors alive at once during one call, beyond those that were alive before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr whenever it starts
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    value = _highest(function) + (torch.cuda.max_memory_allocated() - before if on_gpu else 0)
    gc.collect()  # a hundred thousand records, in cycles
    if platform.libc_ver()[0] == "glibc":  # which would keep their pages for itself
        ctypes.CDLL(None).malloc_trim(0)
    return Reading(value, "B", "measured", better="lower", note="beyond what was alive before")


def _highest(function: Callable[[], object]) -> int:
    """The highest point of the running sum of allocations (positive) and releases (negative), in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.device_type() == DeviceType.CPU)
    return max(accumulate((step for _, step in steps), initial=0))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: a sparse one has indices, a subclass has what it wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        yield tensor
