"""Round to nearest (RTN), stored packed: weights of 2 to 8 bits that really take 2 to 8 bits.

Problem   Reading weights, not arithmetic, limits decoding: fewer bits, fewer bytes to read.
Idea      Round every weight to the nearest point of its group's grid; keep codes packed, scales in bfloat16.
Cost      bits + (16 + 8) / group_size bits a weight, 8 less without zero points; no data and no training needed.
Kernel    One token through 4-bit groups of 32 runs in C (packed.c); anything else unpacks and multiplies in float.
Left out  What the inputs look like, and how errors may cancel.
Source    Jacob et al. 2017, arXiv:1712.05877, eq. 1; groups as in Dettmers & Zettlemoyer 2022, arXiv:2212.09720.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core import native
from effkit.core.calibration import Statistics
from effkit.core.checkpoint import numbers, stored
from effkit.core.checks import require_choice, require_int
from effkit.core.report import Reading
from effkit.core.surgery import bake, swap
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization.affine import SCALE_DTYPE, dequantize, grouped, pack, quantize, ungrouped, unpack
from effkit.quantization.observers import OBSERVERS, Grid

_SOURCE = Path(__file__).with_name("packed.c")


@stored
class PackedWeight(nn.Module):
    """A matrix as packed codes, scales, and zero points (none where the grid is symmetric).

    shape   rows and columns of the matrix;  group_size as in `grouped`
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool):
        super().__init__()
        self.shape, self.bits, self.group_size, self.symmetric = tuple(shape), bits, group_size, symmetric
        rows, columns = self.shape
        groups = grouped(torch.empty(self.shape, device="meta"), group_size).shape[:2]
        self.register_buffer("codes", torch.zeros(rows, -(-columns // 8) * bits, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(groups, dtype=SCALE_DTYPE))
        self.register_buffer("zero_point", None if symmetric else torch.zeros(groups, dtype=torch.uint8))

    @classmethod
    def from_float(
        cls, weight: Float[Tensor, "rows n"], *, bits: int, group_size: int, symmetric: bool, search: str
    ) -> "PackedWeight":
        """Every weight rounded to the nearest point of the grid that `search` finds for its group."""
        groups = grouped(weight.detach().float(), group_size)
        grid = OBSERVERS[search](groups, bits=bits, symmetric=symmetric)
        codes = ungrouped(quantize(groups, *grid, bits=bits), tuple(weight.shape))
        return cls.from_codes(codes, grid, bits=bits, group_size=group_size, symmetric=symmetric)

    @classmethod
    def from_codes(
        cls, codes: UInt8[Tensor, "rows n"], grid: Grid, *, bits: int, group_size: int, symmetric: bool
    ) -> "PackedWeight":
        new = cls(tuple(codes.shape), bits, group_size, symmetric).to(codes.device)
        scale, zero_point = grid
        new.codes, new.scale = pack(codes, bits), scale.squeeze(-1).to(SCALE_DTYPE)
        if not symmetric:
            new.zero_point = zero_point.squeeze(-1).to(torch.uint8)
        return new

    def forward(self) -> Float[Tensor, "rows n"]:
        """The matrix in float32."""
        q = grouped(unpack(self.codes, self.bits, self.shape[1]), self.group_size)
        scale = self.scale.float()
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.zero_point is None else self.zero_point.float()
        return ungrouped(dequantize(q, scale[..., None], zero[..., None]), self.shape)

    def bits_per_weight(self) -> float:
        """Codes, scales and zero points, over the number of weights."""
        held = sum(b.numel() * b.element_size() for b in self.buffers())
        return 8 * held / (self.shape[0] * self.shape[1])


def matvec(x: Tensor, store: Any) -> Tensor | None:
    """x (one token, any leading dimensions of size 1) times the packed matrix, by the native kernel; None where it does
    not apply: other bits or groups, several tokens, gradients wanted, no C compiler."""
    rows, columns = store.shape
    if store.bits != 4 or store.group_size != 32 or columns % 32 or x.numel() != columns or x.device.type != "cpu":
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    if (product := _product()) is None:
        return None
    x32 = x.detach().float().contiguous()
    y = torch.empty(*x.shape[:-1], rows)
    pointers = [t if t is None else t.data_ptr() for t in (store.codes, store.scale, store.zero_point, x32, y)]
    product(*pointers, rows, columns, torch.get_num_threads())
    return y.to(x.dtype)


def _product():
    """The compiled function with its argument types, which save ctypes a guess a call."""
    if (library := native.library(_SOURCE)) is None:
        return None
    if library.matvec_int4.argtypes is None:
        library.matvec_int4.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long, ctypes.c_long, ctypes.c_int]
    return library.matvec_int4


@stored
class QuantizedLinear(nn.Module):
    """y = x W^T + b with W packed; the bias stays in float."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_store: nn.Module = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_float(cls, layer: Any, store: PackedWeight) -> "QuantizedLinear":
        new = cls(layer.in_features, layer.out_features, layer.bias is not None)
        new.weight_store, new.bias = store, layer.bias
        return new

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return self.weight_store()

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        y = matvec(x, self.weight_store)
        if y is None and torch.is_grad_enabled() and x.requires_grad:
            y = Unpacked.apply(x, self.weight_store)
        if y is None:
            return F.linear(x, self.weight_store().to(x.dtype), self.bias)
        return y if self.bias is None else y + self.bias


class Unpacked(torch.autograd.Function):
    """x W^T that unpacks W once more on the way back; autograd would keep the floats of every layer until then, and
    training adapters over 4 bits would need as much memory as over floats (as QLoRA does: Dettmers et al. 2023,
    arXiv:2305.14314, eq. 5)."""

    @staticmethod
    def forward(ctx, x, store):
        ctx.store = store
        return F.linear(x, store().to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.store().to(gradient.dtype), None


@stored
class QuantizedConv2d(nn.Module):
    """A convolution with packed filters; one row of the packed matrix is one filter."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride, padding, dilation, groups: int, bias: bool):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight_store: nn.Module = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    @classmethod
    def from_float(cls, layer: Any, store: PackedWeight) -> "QuantizedConv2d":
        new = cls(**{name: value for name, value in numbers(layer).items() if name != "padding_mode"})
        new.weight_store, new.bias = store, layer.bias
        return new

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        weight = self.weight_store().reshape(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return F.conv2d(x, weight.to(x.dtype), self.bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class RTN(Technique):
    """Round every weight of linear and convolution layers to the nearest point of its group's grid.

    bits        2 to 8
    group_size  weights of a row that share a scale; -1 a whole row, 0 the whole tensor
    search      how the range is found: "min-max", or "least-squares", slower and never worse in squared error
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    search: Literal["min-max", "least-squares"] = "min-max"
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("Jacob et al.", 2017,
                  "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
                  "arXiv:1712.05877", "eq. 1")  # fmt: skip

    def __post_init__(self):
        require_int("bits", self.bits, 2, 8, hint="codes are packed into bytes; more than 8 bits gain nothing over bfloat16")
        require_int("group_size", self.group_size, -1, hint="-1 is a whole row, 0 the whole tensor")
        require_choice("search", self.search, tuple(OBSERVERS))

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        seen, paths = self.statistics(model, task), {id(m): path for path, m in model.named_modules()}
        by, kinds = type(self).__name__, (nn.Linear, nn.Conv2d)
        return swap(model, kinds, lambda m: self.replacement(m, seen.get(paths[id(m)])), layers=self.layers, by=by)

    def statistics(self, model: nn.Module, task: Task) -> Mapping[str, Statistics]:
        """What each layer's inputs look like, by path: a question for subclasses, rounding to nearest is blind."""
        return {}

    def replacement(self, layer: Any, seen: Statistics | None = None) -> nn.Module | None:
        """The packed twin; None for a convolution that pads with anything but zeros."""
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            return None
        kind: Any = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        return kind.from_float(layer, self.store(bake(layer).get_parameter("weight").detach().flatten(1), seen))

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> PackedWeight:
        """The weight, packed."""
        return PackedWeight.from_float(weight, search=self.search, **self.format())

    def format(self) -> dict:
        return dict(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)

    def claim(self, model: nn.Module) -> Reading:
        """Bits per weight of the quantized layers, scales and zero points included."""
        stores = [m for m in model.modules() if isinstance(m, PackedWeight)]
        weights = sum(s.shape[0] * s.shape[1] for s in stores)
        held = sum(s.bits_per_weight() * s.shape[0] * s.shape[1] for s in stores)
        return Reading(held / weights, "bits per weight", "counted", better="lower")
