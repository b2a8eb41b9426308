"""Integer arithmetic: W8A8 with scales found while running.

Problem   Packed weights save memory; the multiplications still run in float.
Idea      Round the activations too, each token with its own scale: y ~ (q_x q_w^T) s_x s_w, an int8 matrix product
          accumulated in int32 and scaled once at the end. Both grids are symmetric, so no cross terms arise.
Cost      Rounding and rescaling the activations: it pays from about the size of matrices where arithmetic dominates.
Limit     |sum| <= 127 * 127 * n must fit an int32, so n <= 133,144 inputs.
Source    Dettmers et al. 2022, arXiv:2208.07339, eq. 3 (vector-wise quantization).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.report import Reading
from effkit.core.surgery import bake, swap
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import FLOAT_WEIGHTS

_MOST_INPUTS = (2**31 - 1) // 127**2


def to_int8(x: Float[Tensor, "rows n"]) -> tuple[Int8[Tensor, "rows n"], Float[Tensor, "rows 1"]]:
    """Each row rounded to -127 ... 127 with its own scale; a row of zeros gets scale 1."""
    largest = x.abs().amax(dim=-1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / 127, 1.0).clamp(min=2.0**-100)
    return (x / scale).round().to(torch.int8), scale


def int8_product(
    x: Float[Tensor, "rows n"], q_w: Int8[Tensor, "out n"], s_w: Float[Tensor, "1 out"]
) -> Float[Tensor, "rows out"]:
    """y = (q_x q_w^T) s_x s_w."""
    q_x, s_x = to_int8(x)
    return integer_matmul(q_x, q_w).to(s_x.dtype).mul_(s_x).mul_(s_w)


def integer_matmul(a: Int8[Tensor, "rows n"], b: Int8[Tensor, "out n"]) -> Int32[Tensor, "rows out"]:
    """a b^T with int32 accumulators. torch 2.13's kernel returns garbage on a CPU for n = 1, so one column is made two."""
    if a.shape[1] == 1:
        a, b = F.pad(a, (0, 1)), F.pad(b, (0, 1))
    return torch._int_mm(a, b.t())


@stored
class Int8Linear(nn.Module):
    """Weights in int8, one scale an output; activations rounded token by token."""

    codes: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(1, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_float(cls, layer: Any) -> "Int8Linear":
        if layer.in_features > _MOST_INPUTS:
            raise ValueError(f"a layer of {layer.in_features} inputs could overflow int32; at most {_MOST_INPUTS} are allowed: leave it out with `layers`")
        new = cls(layer.in_features, layer.out_features, layer.bias is not None)
        codes, scale = to_int8(layer.weight.detach())
        new.codes, new.scale, new.bias = codes, scale.t().contiguous(), layer.bias
        return new

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return self.codes.float() * self.scale.t()

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        y = int8_product(x.reshape(-1, self.in_features), self.codes, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class W8A8(Technique):
    """Every linear layer in 8-bit integers, weights per output and activations per token."""

    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("Dettmers et al.", 2022, "LLM.int8(): 8-bit matrix multiplication for transformers at scale",
                  "arXiv:2208.07339", "eq. 3")  # fmt: skip

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return swap(model, nn.Linear, lambda layer: Int8Linear.from_float(bake(layer)), layers=self.layers, by="W8A8")

    def claim(self, model: nn.Module) -> Reading:
        """Bits per weight of the integer layers, scales included."""
        layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
        held = sum(m.codes.numel() * 8 + m.scale.numel() * 32 for m in layers)
        return Reading(held / sum(m.codes.numel() for m in layers), "bits per weight", "counted", better="lower")
