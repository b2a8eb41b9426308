"""Quantization-aware training: let the weights get used to the grid.

Problem   At 2 or 3 bits rounding moves weights further than the loss tolerates, whatever the range.
Idea      Round in the forward pass; in the backward pass pretend that rounding was the identity (straight-through),
          since its true derivative is zero almost everywhere.
Cost      A training run; the result is packed like any RTN model.
Source    Bengio et al. 2013, arXiv:1308.3432, sec. 4; Jacob et al. 2017, arXiv:1712.05877, sec. 3.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.checks import require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import bake, find
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.training import Schedule, fit
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization.affine import dequantize, grouped, quantize, ungrouped
from effkit.quantization.observers import min_max
from effkit.quantization.packed import RTN


def fake_quantize(
    w: Float[Tensor, "rows n"], *, bits: int, group_size: int, symmetric: bool
) -> Float[Tensor, "rows n"]:
    """The nearest grid point, with the gradient of the identity: w + stop_gradient(w_hat - w)."""
    groups = grouped(w.detach().float(), group_size)
    scale, zero_point = min_max(groups, bits=bits, symmetric=symmetric)
    rounded = ungrouped(dequantize(quantize(groups, scale, zero_point, bits=bits), scale, zero_point), tuple(w.shape))
    return w + (rounded.to(w.dtype) - w).detach()


class FakeQuantize(nn.Module):
    """`fake_quantize` as a parametrization of a weight of any shape; a row is one output."""

    def __init__(self, bits: int, group_size: int, symmetric: bool):
        super().__init__()
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    def forward(self, w: Tensor) -> Tensor:
        rounded = fake_quantize(w.flatten(1), bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        return rounded.reshape(w.shape)


@dataclass(frozen=True)
class QAT(Technique):
    """Train with rounded weights, then pack them: `epochs` passes over task.train."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    epochs: int = 1
    lr: float = 1e-3
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("Bengio et al.", 2013, "Estimating or propagating gradients through stochastic neurons",
                  "arXiv:1308.3432", "sec. 4")  # fmt: skip

    def __post_init__(self):
        self.rounding()
        require_int("epochs", self.epochs, 1)
        require_float("lr", self.lr, 0.0, open_low=True)

    def rounding(self) -> RTN:
        """The post-training twin, which packs the trained weights on the very grid they were trained on."""
        return RTN(self.bits, self.group_size, self.symmetric, layers=self.layers)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        task.require("train", "loss", by=self)
        name = type(self).__name__
        layers = [layer for _, layer in find(model, (nn.Linear, nn.Conv2d), layers=self.layers, by=name)]
        for layer in layers:
            self.begin(layer)
        fit(model, task, Schedule(self.epochs * len(task.train), self.lr), label=name)  # type: ignore[arg-type]
        for layer in layers:
            self.end(layer)
        return self.rounding().rewrite_(model, task)

    def begin(self, layer: nn.Module) -> None:
        """Lets the layer round its weight in the forward pass."""
        rounded = FakeQuantize(self.bits, self.group_size, self.symmetric)
        parametrize.register_parametrization(bake(layer), "weight", rounded)

    def end(self, layer: nn.Module) -> None:
        """Makes the weight plain again, as it was trained: not rounded yet."""
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    def claim(self, model: nn.Module) -> Reading:
        return self.rounding().claim(model)
