"""Inputs on a grid: what a layer sees, rounded too.

Problem   Packed weights save bytes, but multiply floats. Products of small integers need both factors on a grid.
Idea      One scale and one zero point a layer, fixed beforehand: x ~ s_x (q_x - z). With weights s_w q_w on a symmetric
          grid of one scale a row, and c = q_x - h, h = 2^(bits - 1), which fits an int8 at every width up to 8,
              y = s_x s_w (c q_w^T + (h - z) sum(q_w)).
Runs      Linear layers with such weights in int8, accumulated in int32. Convolutions, and weights in groups or off
          centre, in floats: their factors are rounded, their products are not products of integers.
Limit     |sum| of both parts, which is |sum (q_x - z) q_w| <= 255 * 128 * n, must fit an int32; above 65,793 inputs a layer
          runs in floats. What was NaN has no code: a token that holds one yields NaN, as in floats.
Left out  Inputs that stay float at the beginning of training, until their ranges have settled (sec. 3.1); here they are known
          from calibration.
Source    Jacob et al. 2017, arXiv:1712.05877, eq. 1 and 7 (the zero point's part taken out of the product), sec. 3.1.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.technique import evaluating
from effkit.quantization.affine import grid, quantize, unpack
from effkit.quantization.integer import integer_matmul
from effkit.quantization.layers import QuantizedConv2d, QuantizedLinear
from effkit.quantization.observers import Grid
from effkit.quantization.packed import PackedWeight

_MOST_INPUTS = (2**31 - 1) // (255 * 128)


def round_through(
    x: Float[Tensor, "*g n"], scale: Float[Tensor, "*#g 1"], zero_point: Float[Tensor, "*#g 1"], *, bits: int
) -> Float[Tensor, "*g n"]:
    """`dequantize(quantize(x))`, differentiated as if rounding, but not clipping, were the identity: x has gradient 1
    inside the grid's range and 0 from its ends on; a scale that asks for its gradient gets one by the same rule."""
    v, low, high = x.float() / scale, -zero_point, 2**bits - 1 - zero_point
    v = torch.where((low < v) & (v < high), v, v.detach().clamp(low, high))
    return ((v + (v.round() - v).detach()) * scale).to(x.dtype)


def centred(codes: UInt8[Tensor, "*g n"], bits: int) -> Int8[Tensor, "*g n"]:
    """Codes 0 ... 2^bits - 1, moved by half of their range to where an int8 holds them."""
    return (codes.short() - 2 ** (bits - 1)).to(torch.int8)


@stored
class InputGrid(nn.Module):
    """Rounds what comes in to the nearest of 2^bits points."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.uint8))

    @classmethod
    def from_grid(cls, bits: int, grid: Grid) -> "InputGrid":
        new = cls(bits)
        new.scale, new.zero_point = grid[0].detach().clone(), grid[1].to(torch.uint8)
        return new

    def codes(self, x: Float[Tensor, "*b n"]) -> UInt8[Tensor, "*b n"]:
        return quantize(x, self.scale.float(), self.zero_point.float(), bits=self.bits)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return round_through(x, self.scale.float(), self.zero_point.float(), bits=self.bits)


@stored
class RoundedLinear(QuantizedLinear):
    """y = x_hat W_hat^T + b, both factors on their grids; `input_grid` is put in by whoever knows it."""

    input_grid: InputGrid

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        if not self.runs_in_integers() or torch.is_grad_enabled() and x.requires_grad:
            return super().forward(self.input_grid(x))  # the simulated twin, which has gradients
        y = self.integer_product(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def integer_product(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """The equation above; both products are exact, only the scales round."""
        seen, store = self.input_grid, self.weight_store
        q_w = centred(unpack(store.codes, store.bits, self.in_features), store.bits)
        off_centre = 2 ** (seen.bits - 1) - seen.zero_point.int()
        y = integer_matmul(centred(seen.codes(x), seen.bits), q_w) + off_centre * q_w.sum(1, dtype=torch.int32)
        y = y * (seen.scale.float() * store.scale.float().t())
        return y.masked_fill(x.isnan().any(-1, keepdim=True), torch.nan)

    def runs_in_integers(self) -> bool:
        """Whether the weights' scales can be taken out of the product."""
        store, fits = self.weight_store, self.in_features <= _MOST_INPUTS
        plain = isinstance(store, PackedWeight) and store.symmetric and store.column_scale is None
        return plain and fits and store.scale.shape[1] == 1


@stored
class RoundedConv2d(QuantizedConv2d):
    """A convolution of rounded inputs with rounded filters, in floats."""

    input_grid: InputGrid

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return super().forward(self.input_grid(x))


class Seen:
    """What came into one layer: the extremes, the mean magnitude, and how many numbers one output is made from."""

    def __init__(self) -> None:
        self.low = self.high = self.total = torch.zeros(())
        self.count = self.features = 0

    def add(self, x: Float[Tensor, "*b n"], features: int) -> None:
        self.low = torch.minimum(x.amin(), self.low.to(x.device))
        self.high = torch.maximum(x.amax(), self.high.to(x.device))
        self.total = self.total.to(x.device) + x.abs().sum()
        self.count, self.features = self.count + x.numel(), features

    @property
    def magnitude(self) -> Float[Tensor, ""]:
        return self.total / self.count


@torch.no_grad()
def watch(model: nn.Module, batches: Iterable, layers: dict[nn.Module, str]) -> dict[nn.Module, Seen]:
    """What each of the layers sees when the batches run through the model, in the order in which they first ran.

    layers   layer -> its path. Raises ValueError naming it where it sees NaN, infinity, or so much that sums overflow."""
    seen: dict[nn.Module, Seen] = {}

    def look(layer: nn.Module, args: tuple) -> None:
        if args[0].numel():
            features = math.prod(args[0].shape[-1 if isinstance(layer, nn.Linear) else -3 :])
            seen.setdefault(layer, Seen()).add(args[0].detach().float(), features)

    with evaluating(model), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        for inputs, _ in batches:
            model(inputs)
    for layer, inputs in seen.items():
        if not torch.isfinite(inputs.total):
            raise ValueError(
                f"layer {layers[layer] or '(the model)'} sees inputs whose sum is not finite: look for NaN and infinity in data and weights"
            )
    return seen


class RunningRange(nn.Module):
    """Min-max for inputs: the extremes of the batches, averaged over time while training, as in Jacob et al.

    share   of the newest batch in the average"""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, low: Float[Tensor, ""], high: Float[Tensor, ""], share: float = 0.01):
        super().__init__()
        self.bits, self.share = bits, share
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def grid(self) -> Grid:
        return grid(self.low, self.high, bits=self.bits, symmetric=False)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        if self.training and x.numel():
            self.low.lerp_(x.detach().amin().float(), self.share)
            self.high.lerp_(x.detach().amax().float(), self.share)
        return round_through(x, *self.grid(), bits=self.bits)
