"""LSQ: the step is learned.

Problem   Min-max keeps the largest weight and input exact, whatever that costs all the others; at 2 bits it costs most of
          them. Which step serves the loss best, only the loss can tell.
Idea      Make the step s a parameter. With v_hat = s round(clip(v / s, -Q_N, Q_P)) and rounding passed straight through,
              d v_hat / d s = round(v / s) - v / s    inside,  -Q_N or Q_P  where v is clipped,
          so a step grows where clipped values ask for room, and shrinks where the others would lie nearer to the grid.
Scale     One step gathers the gradients of N numbers, so it would run away from the weights: its gradient is multiplied
          by g = 1 / sqrt(N Q_P). That decides under SGD, the paper's optimizer. AdamW, which `fit` uses, divides each
          gradient by its own size and moves every parameter by about the learning rate: 0.001 would be a fifth of a
          large layer's 8-bit step, and next to nothing of an input's. So what is learned is s over its first value, and
          all steps move by the same share of themselves.
Grids     Weights: Q_N = 2^(b-1), Q_P = 2^(b-1) - 1. Inputs that were never negative in task.calib (behind a ReLU, or
          pixels): Q_N = 0, Q_P = 2^b - 1; other inputs as weights. Zero is a point of either.
Stored    The step as PackedWeight keeps it, in bfloat16; training sees that value, so what is packed was trained.
Left out  Offsets for inputs that are a little negative (LSQ+: Bhalgat et al. 2020, arXiv:2004.09576). The first step of inputs
          comes from all of task.calib, the paper's from one batch; and there is no weight decay, which the paper lowers with the bits.
Source    Esser et al. 2019, arXiv:1902.08153, eq. 1 to 5, sec. 2.1 (first step), 2.2 (g).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.checks import require_int
from effkit.core.surgery import bake
from effkit.core.technique import Paper
from effkit.quantization.affine import grouped, quantize, storable, ungrouped
from effkit.quantization.inputs import Seen, round_through
from effkit.quantization.observers import Grid
from effkit.quantization.packed import PackedWeight
from effkit.quantization.qat import TrainRounded


def first_step(magnitude: Float[Tensor, "*g 1"], most: int) -> Float[Tensor, "*g 1"]:
    """2 mean|v| / sqrt(Q_P); 1 where there is nothing but zeros."""
    return torch.where(magnitude > 0, 2 * magnitude / most**0.5, 1.0)


class StoredStep(torch.autograd.Function):
    """The step as it will be stored. Its gradient passes as if that were the step itself, multiplied by g."""

    @staticmethod
    def forward(ctx, step, g):
        ctx.g = g
        return storable(step)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.g, None


class LearnedStep(nn.Module):
    """Rounds inputs to s * (-Q_N ... Q_P), s a parameter: `share` of the `first` step, by magnitude.

    magnitude   mean |v| of the values that have this step;  count   how many they are, N in the paper
    """

    first: Tensor

    def __init__(self, magnitude: Float[Tensor, "*g 1"], count: int, *, bits: int, signed: bool):
        super().__init__()
        self.bits, self.least = bits, 2 ** (bits - 1) if signed else 0
        most = 2**bits - 1 - self.least
        self.g = (count * most) ** -0.5
        self.register_buffer("first", first_step(magnitude, most))
        self.share = nn.Parameter(torch.ones_like(self.first))

    def grid(self) -> Grid:
        step = StoredStep.apply(self.share.abs() * self.first, self.g)
        return step, torch.full_like(step, self.least)

    def forward(self, x: Tensor) -> Tensor:
        return round_through(x, *self.grid(), bits=self.bits)


class LearnedWeightStep(LearnedStep):
    """The same as a parametrization of a weight of any shape, with a step for each group of a row's weights."""

    def __init__(self, w: Tensor, *, bits: int, group_size: int):
        groups = grouped(w.detach().flatten(1).float(), group_size)
        super().__init__(groups.abs().mean(-1, keepdim=True), groups.shape[-1], bits=bits, signed=True)
        self.group_size = group_size

    def forward(self, w: Tensor) -> Tensor:
        rows = w.flatten(1)
        return ungrouped(super().forward(grouped(rows, self.group_size)), tuple(rows.shape)).reshape(w.shape)

    @torch.no_grad()
    def pack(self, w: Tensor) -> PackedWeight:
        rows, grid = w.detach().flatten(1), self.grid()
        codes = quantize(grouped(rows, self.group_size), *grid, bits=self.bits)
        form: dict[str, Any] = dict(bits=self.bits, group_size=self.group_size, symmetric=True)
        return PackedWeight.from_codes(ungrouped(codes, tuple(rows.shape)), grid, **form)


@dataclass(frozen=True)
class LSQ(TrainRounded):
    """Train weights, and the steps of their grids and of the inputs' grids, together; `epochs` passes over task.train.

    activation_bits  of the inputs of the layers; None: they stay float
    group_size       weights that share a step: 0 all of a layer, as in the paper, -1 a row; with either, linear layers
                     multiply integers
    ends             bits of the first and the last layer that run, their inputs included: 8 in the paper; None: as the others
    """

    bits: int = 4
    activation_bits: int | None = 4
    group_size: int = 0
    epochs: int = 1
    lr: float = 1e-3
    layers: str = "*"
    ends: int | None = None

    paper = Paper("Esser et al.", 2019, "Learned step size quantization", "arXiv:1902.08153", "eq. 1-5")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("group_size", self.group_size, -1, hint="-1 is a whole row, 0 the whole tensor")

    def begin(self, layer: nn.Module) -> None:
        weight = bake(layer).get_parameter("weight")
        rounded = LearnedWeightStep(weight, bits=self.bits, group_size=self.group_size)
        parametrize.register_parametrization(layer, "weight", rounded)

    def input_rounding(self, seen: Seen) -> nn.Module:
        bits: Any = self.activation_bits
        return LearnedStep(seen.magnitude, seen.features, bits=bits, signed=bool(seen.low < 0))

    def pack(self, layer: Any) -> PackedWeight:
        held = layer.parametrizations["weight"]
        return held[0].pack(held.original)
