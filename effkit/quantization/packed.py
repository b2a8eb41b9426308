"""Round to nearest (RTN), stored packed: weights of 2 to 8 bits that really take 2 to 8 bits.

Problem   Reading weights, not arithmetic, limits decoding: fewer bits, fewer bytes to read.
Idea      Round every weight to the nearest point of its group's grid; keep codes packed, scales in bfloat16.
Cost      bits + (16 + 8) / group_size bits a weight, 8 less without zero points; no data and no training needed.
Kernel    A few tokens through 4-bit groups of 32 run in C (packed.c): inputs are off by at most 2^-23 of the largest of their
          group, and the product is about as precise as one of float32. Anything else unpacks and multiplies in floats.
Left out  What the inputs look like, and how errors may cancel.
Source    Jacob et al. 2017, arXiv:1712.05877, eq. 1; groups as in Dettmers & Zettlemoyer 2022, arXiv:2212.09720.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from effkit.core import native
from effkit.core.calibration import Statistics
from effkit.core.checkpoint import stored
from effkit.core.checks import require_choice, require_int
from effkit.core.technique import Paper
from effkit.quantization.affine import SCALE_DTYPE, dequantize, grouped, pack, quantize, ungrouped, unpack
from effkit.quantization.layers import WeightOnly, WeightStore
from effkit.quantization.lines import has_lines, lines
from effkit.quantization.observers import OBSERVERS, REAL_ZERO, Grid

_SOURCE = Path(__file__).with_name("packed.c")
_NARROW = (torch.float32, torch.bfloat16, torch.float16)  # the kernel's 24 bits hold them; float64 asks for more
FEW = 32  # tokens for which the kernel is faster than unpacking: 2.3 ms against 5.6 at 1024 x 1024, 15 against 102 at 4096 x 4096 (Zen 4, 2 cores)


@stored
class PackedWeight(WeightStore):
    """A matrix as packed codes, scales, and zero points (none where the grid is symmetric).

    shape         rows and columns of the matrix;  group_size as in `grouped`
    column_scale  whether each column is multiplied by a number of its own, after the codes were made floats
    real_zero     whether zero points are real numbers, in bfloat16, and not codes
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    column_scale: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], bits: int, group_size: int, symmetric: bool, column_scale: bool = False,
        real_zero: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.shape, self.bits, self.group_size, self.symmetric = tuple(shape), bits, group_size, symmetric
        self.real_zero = real_zero
        rows, columns = self.shape
        groups = grouped(torch.empty(self.shape, device="meta"), group_size).shape[:2]
        zeros = torch.zeros(groups, dtype=SCALE_DTYPE if real_zero else torch.uint8)
        self.register_buffer("codes", torch.zeros(rows, -(-columns // 8) * bits, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(groups, dtype=SCALE_DTYPE))
        self.register_buffer("zero_point", None if symmetric else zeros)
        self.register_buffer("column_scale", torch.ones(columns, dtype=SCALE_DTYPE) if column_scale else None)

    @classmethod
    def from_float(
        cls, weight: Float[Tensor, "rows n"], *, bits: int, group_size: int, symmetric: bool, search: str
    ) -> "PackedWeight":
        """Every weight rounded to the nearest point of the grid that `search` finds for its group."""
        groups = grouped(weight.detach().float(), group_size)
        grid = OBSERVERS[search](groups, bits=bits, symmetric=symmetric)
        codes = ungrouped(quantize(groups, *grid, bits=bits), tuple(weight.shape))
        real = search in REAL_ZERO
        return cls.from_codes(codes, grid, bits=bits, group_size=group_size, symmetric=symmetric, real_zero=real)

    @classmethod
    def from_codes(
        cls, codes: UInt8[Tensor, "rows n"], grid: Grid, *, bits: int, group_size: int, symmetric: bool, real_zero: bool = False
    ) -> "PackedWeight":
        new = cls(tuple(codes.shape), bits, group_size, symmetric, real_zero=real_zero).to(codes.device)
        scale, zero_point = (part.squeeze(-1).contiguous() for part in grid)  # the kernel reads them in a row
        new.codes, new.scale = pack(codes, bits), scale.to(SCALE_DTYPE)
        if new.zero_point is not None:
            new.zero_point = zero_point.to(new.zero_point.dtype)
        return new

    def forward(self) -> Float[Tensor, "rows n"]:
        """The matrix in float32."""
        q = grouped(unpack(self.codes, self.bits, self.shape[1]), self.group_size)
        scale = self.scale.float()
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.zero_point is None else self.zero_point.float()
        w = ungrouped(dequantize(q, scale[..., None], zero[..., None]), self.shape)
        return w if self.column_scale is None else w * self.column_scale.float()

    has_lines = property(has_lines)

    def lines(self) -> UInt8[Tensor, "rows bytes"]:
        return lines(self)

    def matvec(self, x: Float[Tensor, "*few n"]) -> Float[Tensor, "*few rows"] | None:
        """By the native kernel; None where it does not apply: other bits, groups or floats, many tokens, no C compiler."""
        rows, columns = self.shape
        fits = self.bits == 4 and self.group_size == 32 and columns % 32 == 0 and not self.real_zero
        fits = fits and self.scale.dtype == SCALE_DTYPE  # model.float() widens them
        fits = fits and type(x) in (Tensor, nn.Parameter) and not torch.jit.is_tracing()  # who traces sees no kernel's work
        few = fits and x.shape[-1:] == (columns,) and x.dtype in _NARROW and 0 < x.numel() <= FEW * columns
        few = few and x.device.type == self.codes.device.type == "cpu"
        if not few or (product := _product()) is None:
            return None
        x32 = x.detach().float()
        x32 = (x32 if self.column_scale is None else x32 * self.column_scale.float()).contiguous()
        y, room = x32.new_empty(*x.shape[:-1], rows), x32.new_empty(x32.numel() // 32, 33)
        pointers = [t if t is None else t.data_ptr() for t in (self.codes, self.scale, self.zero_point, x32, y, room)]
        product(*pointers, rows, columns, x32.numel() // columns, torch.get_num_threads())
        return y.to(x.dtype)


def _product():
    """The compiled function with its argument types, which save ctypes a guess a call."""
    if (library := native.library(_SOURCE)) is None:
        return None
    if library.matvec_int4.argtypes is None:
        library.matvec_int4.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 3 + [ctypes.c_int]
    return library.matvec_int4


@dataclass(frozen=True)
class RTN(WeightOnly):
    """Round every weight of linear and convolution layers to the nearest point of its group's grid.

    bits        2 to 8
    group_size  weights of a row that share a scale; -1 a whole row, 0 the whole tensor
    search      how the range is found (observers.py): "min-max" is quick, "least-squares" never worse in squared error
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    search: Literal["min-max", "percentile", "least-squares", "kl", "real-zero", "hqq"] = "min-max"
    layers: str = "*"

    paper = Paper("Jacob et al.", 2017,
                  "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
                  "arXiv:1712.05877", "eq. 1")  # fmt: skip

    def __post_init__(self):
        require_int("bits", self.bits, 2, 8, hint="codes are packed into bytes; more than 8 bits gain nothing over bfloat16")
        require_int("group_size", self.group_size, -1, hint="-1 is a whole row, 0 the whole tensor")
        require_choice("search", self.search, tuple(OBSERVERS))

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> PackedWeight:
        """The weight, packed."""
        return PackedWeight.from_float(weight, search=self.search, **self.format())

    def format(self) -> dict:
        return dict(bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
