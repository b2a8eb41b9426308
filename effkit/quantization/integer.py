"""Integer arithmetic: W8A8, weights and activations both in int8.

Problem   Packed weights save memory; the multiplications still run in float.
Idea      Round the activations too: y ~ (q_x q_w^T) s_x s_w, an int8 matrix product accumulated in int32 and scaled once at
          the end. Both grids are symmetric, so no cross terms arise. Each token finds its own s_x while running, or one for
          all, from calibration, saves looking for the largest value.
Outliers  In language models a few inputs are a hundred times larger than the rest and make everybody's step coarse.
          LLM.int8 computes inputs that pass a threshold in float, y = (the others in int8) + x[:, O] W[:, O]^T. Which they
          are is seen while running, so any column of W may be asked for. Its authors keep O's columns in 16 bits; here
          int8 is all that is held, and O's columns are made floats again: the file grows by nothing, and x is exact there,
          but W stays rounded. On SmolLM2 (1.2 % of the columns) that costs 0.002 nats a token; where the weights of O are
          as small as its inputs are large, all of them round to 0, and nothing is won.
Cost      Rounding and rescaling the activations: it pays from about the size of matrices where arithmetic dominates.
Limit     |sum| <= 127 * 127 * n must fit an int32, so n <= 133,144 inputs. With outliers a token's output depends on the
          other tokens of its batch, since one far value takes the whole column out.
Source    Dettmers et al. 2022, arXiv:2208.07339, eq. 3 (vector-wise quantization), eq. 8 and sec. 3.2 (decomposition).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.calibration import Statistics
from effkit.core.checkpoint import stored
from effkit.core.checks import require_choice, require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import bake, swap
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization.affine import FLOOR
from effkit.quantization.layers import look

FixedScale = Float[Tensor, "1 1"] | None  # one for all rows, or each row finds its own
_MOST_INPUTS = (2**31 - 1) // 127**2


def int8_step(largest: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """The scale whose code 127 is the largest value; 1 where that is zero, NaN where it is NaN."""
    largest = largest.float()
    return torch.where(largest == 0, 1.0, largest / 127).clamp(min=FLOOR)


def to_int8(
    x: Float[Tensor, "rows n"], scale: FixedScale = None
) -> tuple[Int8[Tensor, "rows n"], Float[Tensor, "*rows"]]:
    """Each row rounded to -127 ... 127 with its own scale; or all with a given one, and what lies beyond is clipped."""
    if scale is not None:
        return (x / scale).round().clamp(-127, 127).to(torch.int8), scale
    scale = int8_step(x.abs().amax(dim=-1, keepdim=True))
    return (x / scale).round().to(torch.int8), scale


def int8_product(
    x: Float[Tensor, "rows n"], q_w: Int8[Tensor, "out n"], s_w: Float[Tensor, "1 out"], s_x: FixedScale = None
) -> Float[Tensor, "rows out"]:
    """y = (q_x q_w^T) s_x s_w. NaN has no code: where a token holds one its scale is NaN, and so is its y."""
    q_x, scale = to_int8(x, s_x)
    if s_x is not None:  # a token's own scale is NaN already
        scale = torch.where(x.isnan().any(-1, keepdim=True), torch.nan, scale)
    return integer_matmul(q_x, q_w).to(scale.dtype).mul_(scale).mul_(s_w)


def split_product(
    x: Float[Tensor, "rows n"], q_w: Int8[Tensor, "out n"], s_w: Float[Tensor, "1 out"], s_x: FixedScale, threshold: float
) -> Float[Tensor, "rows out"]:
    """Columns of x with a value beyond the threshold in float, the others in int8, where zeros stand for the former."""
    far = (x.abs() > threshold).any(0)
    in_float = x[:, far].float() @ (q_w[:, far] * s_w.t()).t()
    return int8_product(x.masked_fill(far, 0.0), q_w, s_w, s_x).add_(in_float)


def integer_matmul(a: Int8[Tensor, "rows n"], b: Int8[Tensor, "out n"]) -> Int32[Tensor, "rows out"]:
    """a b^T with int32 accumulators, filled up with zeros to what the kernels take. torch 2.13's returns garbage on a CPU for
    n = 1; cuBLAS wants more than 16 rows, and multiples of 8 of all else."""
    rows, out, n = len(a), len(b), a.shape[1]
    if a.is_cuda:
        a, b = F.pad(a, (0, -n % 8, 0, max(0, 17 - rows))), F.pad(b, (0, -n % 8, 0, -out % 8))
    elif n == 1:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
    return torch._int_mm(a, b.t())[:rows, :out]


@stored
class Int8Linear(nn.Module):
    """Weights in int8, one scale an output; activations in int8 too.

    input_scale  whether one scale, fixed beforehand, rounds all activations; else each token has its own
    divisor      whether each input is divided by a number of its own before it is rounded (the weights hold its multiple)
    outliers     columns of the inputs with a value beyond this are computed in float; None: all in int8
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    divisor: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, input_scale: bool = False, divisor: bool = False,
        outliers: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.outliers = in_features, out_features, outliers
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(1, out_features))
        self.register_buffer("input_scale", torch.ones(1, 1) if input_scale else None)
        self.register_buffer("divisor", torch.ones(in_features) if divisor else None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_float(
        cls, layer: Any, *, input_scale: FixedScale = None, divisor: Tensor | None = None, outliers: float | None = None
    ) -> "Int8Linear":
        if layer.in_features > _MOST_INPUTS:
            raise ValueError(f"a layer of {layer.in_features} inputs could overflow int32; at most {_MOST_INPUTS} are allowed: leave it out with `layers`")
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, outliers=outliers)
        weight = layer.weight.detach()
        codes, scale = to_int8(weight if divisor is None else weight.float() * divisor)
        new.codes, new.scale, new.bias = codes, scale.t().contiguous(), layer.bias
        new.input_scale, new.divisor = None if input_scale is None else input_scale.reshape(1, 1), divisor
        return new

    def dense_weight(self) -> Float[Tensor, "out in"]:
        weight = self.codes.float() * self.scale.t()
        return weight if self.divisor is None else weight / self.divisor

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        rows, held = x.reshape(-1, self.in_features), (self.codes, self.scale, self.input_scale)
        rows = rows if self.divisor is None else rows / self.divisor
        y = int8_product(rows, *held) if self.outliers is None else split_product(rows, *held, self.outliers)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class W8A8(Technique):
    """Every linear layer in 8-bit integers, weights with a scale an output.

    activations  "token": each token finds its scale while running; "tensor": one a layer, from calibration
    outliers     inputs with a value beyond this are computed in float (the paper's threshold is 6.0); None: all in int8
    examples     how many of task.calib are looked at
    """

    activations: Literal["token", "tensor"] = "token"
    outliers: float | None = None
    examples: int = 256
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("Dettmers et al.", 2022, "LLM.int8(): 8-bit matrix multiplication for transformers at scale",
                  "arXiv:2208.07339", "eq. 3")  # fmt: skip

    def __post_init__(self):
        require_choice("activations", self.activations, ("token", "tensor"))
        require_int("examples", self.examples, 1)
        if self.outliers is not None:
            require_float("outliers", self.outliers, 0.0, hint="None computes all inputs in int8")

    def statistics(self, model: nn.Module, task: Task) -> Mapping[str, Statistics]:
        """What calibration shows of each layer's inputs, by path; nothing where every token finds its own scale."""
        if self.activations == "token":
            return {}
        return look(self, model, task, otherwise="activations rounded token by token", kinds=(nn.Linear,))

    def divisor(self, weight: Float[Tensor, "out in"], seen: Statistics) -> Float[Tensor, " in"] | None:
        """What each input is divided by before it is rounded."""
        return None

    def replacement(self, layer: Any, seen: Statistics | None) -> Int8Linear:
        divisor = None if seen is None else self.divisor(layer.weight.detach(), seen)
        scale = None
        if self.activations == "tensor" and seen is not None:
            largest = (seen.absmax if divisor is None else seen.absmax / divisor).max()
            # what is larger than the threshold never comes to be rounded
            scale = int8_step(largest if self.outliers is None else largest.clamp(max=self.outliers))
        return Int8Linear.from_float(layer, input_scale=scale, divisor=divisor, outliers=self.outliers)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        seen, paths = self.statistics(model, task), {id(m): path for path, m in model.named_modules()}
        build = lambda layer: self.replacement(bake(layer), seen.get(paths[id(layer)]))  # noqa: E731
        return swap(model, nn.Linear, build, layers=self.layers, by=type(self).__name__)

    def claim(self, model: nn.Module) -> Reading:
        """Bits per weight of the integer layers, everything beside the codes included."""
        layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
        held = 8 * sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
        return Reading(held / sum(m.codes.numel() for m in layers), "bits per weight", "counted", better="lower")
