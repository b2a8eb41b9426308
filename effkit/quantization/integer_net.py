"""IntegerNet: a network whose every operator reads and writes int8 codes.

Problem   W8A8 multiplies in integers and goes back to float after each product. The smallest processors have no float.
Idea      With real = s (q - Z) on both sides, y = W x + b becomes q_y = Z_y + M (sum q_w q_x - Z_x sum q_w + q_b), with
          M = s_w s_x / s_y and q_b in steps of s_w s_x (eq. 4, 7, 11; weights are symmetric, so Z_w = 0). All but M is
          an integer, and M ~ M0 2^-shift with M0 an int32 (eq. 6, shift = 31 + n). A ReLU is the least code let through
          (sec. 2.4), a sum rescales both sides (app. A.2), a mean has its division in M.
Codes     Activations -128 ... 127, affine per tensor; weights -127 ... 127, symmetric, a scale for each output. Images
          are padded with Z_x, the code of the real 0.
Rounding  M0 (...) / 2^shift to the nearest integer, once, halves away from zero, in int64. Only where float is rounded,
          that is the input, weights and biases, halves go to even.
Law       An operator is off by at most s_y / 2 (1 + 2^-22) from its float twin on the same dequantized numbers; a sum
          of n inputs by at most s_y / 2 + n 2^-23 of the largest input scale.
Overflow  |q_x - Z_x| <= 255, |q_w| <= 127, |q_b| <= 2^30 (a channel whose bias asks for more gets a wider s_w). So with
          n <= 2^30 / (255 * 127) = 33,155 inputs an output the bracket stays below 2^31, and so does each part of it:
          the products below 128 * 127 n < 2^29 + 2^21, and q_b - Z_x sum q_w below that much more than 2^30. Larger
          layers are refused. Times M0 < 2^31 it is below 2^62, which leaves int64 room for the half that rounds. A mean
          sums |q_x - Z_x| of k <= 8,421,504 pixels; more are refused. A sum holds 255 * 2^31 for each of its inputs.
Cost      int8 between operators; inside each, sums pass through memory in int64: made to be exact, not fast.
Peers     ONNX Runtime multiplies by a float M and rounds halves to even; the paper's ARM code rounds twice, after M0
          and after the shift (app. B). Codes at a tie differ by one.
Source    Jacob et al. 2017, arXiv:1712.05877, sec. 2.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Float64, Int8, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.quantization.integer import integer_matmul

LOW, HIGH = -128, 127
MOST_BIAS, MOST_INPUTS, MOST_PIXELS = 2**30, 2**30 // (255 * 127), (2**31 - 1) // 255


def fixed_point(m: Float64[Tensor, " n"]) -> tuple[Int32[Tensor, " n"], Int8[Tensor, " n"]]:
    """M0 and shift, so that M0 2^-shift is M to a relative 2^-31; M0 in [2^30, 2^31), shift in 1 ... 62.

    From 2^29 on any int32 but 0 saturates, and below 2^-32 all become 0: there M counts as 2^29, and as 0."""
    mantissa, exponent = torch.frexp(m.clamp(max=2.0**29))  # m = mantissa 2^exponent, mantissa in [1/2, 1)
    m0 = (mantissa * 2**31).round()
    full = m0 == 2**31
    shift = 31 - exponent - full.int()
    return torch.where(shift > 62, 0, torch.where(full, 2**30, m0)).int(), shift.clamp(max=62).to(torch.int8)


def round_shift(p: Int64[Tensor, "*b"], shift: Int64[Tensor, " d"] | int) -> Int64[Tensor, "*b"]:
    """p / 2^shift to the nearest integer, halves away from zero: halves upward would add up to a bias (app. B).

    A shift rounds down; half a unit more makes that the nearest, and p >> 63, which is -1 where p is negative, takes
    the halves down there."""
    return (p + (1 << (shift - 1)) + (p >> 63)) >> shift


def requantize(
    p: Int64[Tensor, "*b"], shift: Int64[Tensor, " d"] | int, zero_point: int, relu: bool
) -> Int8[Tensor, "*b"]:
    """The code nearest to p 2^-shift on the next grid; a ReLU lets no code below that of 0 through."""
    return (round_shift(p, shift) + zero_point).clamp(zero_point if relu else LOW, HIGH).to(torch.int8)


def windows(
    x: Int8[Tensor, "b c h w"], kernel: tuple, stride: tuple, dilation: tuple, pads: tuple, fill: int
) -> Int8[Tensor, "b c i j k l"]:
    """What a kernel of k x l sees at each of its i x j places: a view of the padded image."""
    x = F.pad(x, pads, value=fill)
    for dim in (0, 1):
        x = x.unfold(2 + dim, dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])
    return x[..., :: dilation[0], :: dilation[1]]


def quantize_layer(
    w: Float64[Tensor, "out n"], b: Float64[Tensor, " out"], s_x: float
) -> tuple[Int8[Tensor, "out n"], Int64[Tensor, " out"], Float64[Tensor, " out"]]:
    """q_w, q_b and s_w: as fine as the weights allow, as wide as the bias demands; 1 where both are 0."""
    s_w = torch.maximum(w.abs().amax(1) / 127, b.abs() / (s_x * MOST_BIAS))
    s_w = torch.where(s_w > 0, s_w, 1.0)
    return (w / s_w[:, None]).round().to(torch.int8), (b / (s_x * s_w)).round().long(), s_w


def cross_term(q_w: Int8[Tensor, "out n"], z_x: int) -> Int64[Tensor, " out"]:
    """Z_x sum q_w: what the products hold too much because the code of 0 is Z_x (eq. 7)."""
    return z_x * q_w.sum(1, dtype=torch.int64)


@dataclass(eq=False, repr=False)
class Step(nn.Module):
    """An integer operator: the names of what it reads, and the grid of what it writes, scale * (code - zero_point).

    The scale is there for readers: what runs is multipliers, which have taken it in. relu: one belongs to the step."""

    name: str
    inputs: tuple[str, ...]
    scale: float
    zero_point: int
    relu: bool

    def __post_init__(self):
        super().__init__()

    def __repr__(self) -> str:
        kind, grid = type(self).__name__.removeprefix("Integer").lower(), f"{self.scale:.4g} (q {-self.zero_point:+d})"
        kernel = "x".join(map(str, getattr(self, "kernel_size", ())))
        what = " ".join(filter(None, (kind, self.extra_repr(), kernel.removeprefix("1x1"))))
        return f"{self.name:<20} {what:<24} {'relu' * self.relu:<4} {grid:<20} <- {', '.join(self.inputs)}"


@stored
@dataclass(eq=False, repr=False)
class IntegerConv2d(Step):
    """Convolution: windows times codes, group after group. pads: left, right, top, bottom.

    A row of codes holds a kernel with its channels innermost, as a layer leaves its pixels: windows copy in runs."""

    in_channels: int
    out_channels: int
    z_x: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    groups: int = 1
    codes: Tensor = field(init=False)
    offset: Tensor = field(init=False)  # q_b - Z_x sum q_w
    multiplier: Tensor = field(init=False)
    shift: Tensor = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        n, out = self.in_channels // self.groups * prod(self.kernel_size), self.out_channels
        self.register_buffer("codes", torch.zeros(out, n, dtype=torch.int8))
        for name, dtype in (("offset", torch.int32), ("multiplier", torch.int32), ("shift", torch.int8)):
            self.register_buffer(name, torch.zeros(out, dtype=dtype))

    def set_(self, w: Float64[Tensor, "out n"], b: Float64[Tensor, " out"], s_x: float) -> "IntegerConv2d":
        """Takes real weights and biases in, for inputs of scale s_x."""
        self.codes, q_b, s_w = quantize_layer(w, b, s_x)
        self.offset = (q_b - cross_term(self.codes, self.z_x)).int()
        self.multiplier, self.shift = fixed_point(s_x * s_w / self.scale)
        return self

    def forward(self, x: Int8[Tensor, "b c h w"]) -> Int8[Tensor, "b d i j"]:
        seen = windows(x, self.kernel_size, self.stride, self.dilation, self.pads, self.z_x)
        b, _, i, j, _, _ = seen.shape
        per_group = seen.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 4, 5, 6, 2).flatten(4).flatten(1, 3)
        products = list(map(integer_matmul, per_group, self.codes.unflatten(0, (self.groups, -1))))
        total = (torch.cat(products, 1).long() + self.offset) * self.multiplier
        q = requantize(total, self.shift.long(), self.zero_point, self.relu)
        return q.reshape(b, i, j, self.out_channels).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.in_channels} -> {self.out_channels}"


@stored
@dataclass(eq=False, repr=False)
class IntegerLinear(IntegerConv2d):
    """A convolution whose image is one pixel."""

    def forward(self, x: Int8[Tensor, "*b n"]) -> Int8[Tensor, "*b out"]:
        pixels = x.reshape(x[..., 0].numel(), x.shape[-1], 1, 1)
        return super().forward(pixels).reshape(*x.shape[:-1], self.out_channels)


@stored
@dataclass(eq=False, repr=False)
class IntegerSum(Step):
    """Inputs brought to one grid, then added, or set side by side along `dim` where that is not 0."""

    zero_points: tuple[int, ...]
    multipliers: tuple[int, ...]
    shift: int
    dim: int = 0

    def forward(self, *xs: Int8[Tensor, "..."]) -> Int8[Tensor, "..."]:
        parts = [(x.long() - z) * m for x, z, m in zip(xs, self.zero_points, self.multipliers, strict=True)]
        total = torch.cat(parts, self.dim) if self.dim else sum(parts[1:], parts[0])
        return requantize(total, self.shift, self.zero_point, self.relu)


@stored
@dataclass(eq=False, repr=False)
class IntegerMax(Step):
    """Max pooling: codes are ordered as the numbers are, and what pads an image is the least."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, ...]

    def forward(self, x: Int8[Tensor, "b c h w"]) -> Int8[Tensor, "b c i j"]:
        return windows(x, self.kernel_size, self.stride, self.dilation, self.pads, LOW).amax((-2, -1))


@stored
@dataclass(eq=False, repr=False)
class IntegerMean(Step):
    """Average pooling, the global one too: flat drops the two dimensions of size 1 that are left of the image."""

    z_x: int
    multiplier: int
    shift: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, ...]
    flat: bool

    def forward(self, x: Int8[Tensor, "b c h w"]) -> Int8[Tensor, "b c ..."]:
        seen = windows(x, self.kernel_size, self.stride, (1, 1), self.pads, self.z_x)
        total = (seen.sum((-2, -1), dtype=torch.int64) - self.z_x * prod(self.kernel_size)) * self.multiplier
        if self.flat and total.shape[2:] != (1, 1):
            raise ValueError(f"{self.name} is the mean of {self.kernel_size} pixels, got an image of {tuple(x.shape[2:])}: calibrate on images of that size")
        return requantize(total.flatten(1) if self.flat else total, self.shift, self.zero_point, self.relu)


@stored
@dataclass(eq=False, repr=False)
class IntegerReshape(Step):
    """The same codes in another shape, example by example."""

    shape: tuple[int, ...]

    def forward(self, x: Int8[Tensor, "b ..."]) -> Int8[Tensor, "b ..."]:
        return x.reshape(len(x), *self.shape)


@stored
class IntegerNet(nn.Module):
    """Integer operators in order, between an entry and an exit that speak float. Print it: it is the program."""

    def __init__(self, scale: float, zero_point: int):
        super().__init__()
        self.scale, self.zero_point = scale, zero_point
        self.steps: Any = nn.ModuleList()

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        return self.leave(self.run(self.enter(x))[self.steps[-1].name]).to(x.dtype)

    def enter(self, x: Float[Tensor, "b ..."]) -> Int8[Tensor, "b ..."]:
        """The input's codes. Raises ValueError for NaN, which has none."""
        if x.isnan().any():
            raise ValueError("the input holds NaN, which has no code; allowed are numbers and infinity: clean it with torch.nan_to_num")
        return ((x.float() / self.scale).round() + self.zero_point).clamp(LOW, HIGH).to(torch.int8)

    def run(self, q: Int8[Tensor, "b ..."]) -> dict[str, Int8[Tensor, "b ..."]]:
        """The codes that each operator writes, by name; the input's are "x". Nothing but integers."""
        codes = {"x": q}
        for step in self.steps:
            codes[step.name] = step(*(codes[name] for name in step.inputs))
        return codes

    def leave(self, q: Int8[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The numbers that the last codes stand for."""
        return self.steps[-1].scale * (q.float() - self.steps[-1].zero_point)

    def __repr__(self) -> str:
        lines = [f"IntegerNet of int8 codes; x is {self.scale:.4g} (q {-self.zero_point:+d})", *map(repr, self.steps)]
        return "\n".join(lines)
