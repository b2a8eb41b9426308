"""Quantization-aware pruning: a mask and a grid, trained together.

Problem   Prune, then quantize, and the weights that have just learned to do without the others are moved again. As a
          pipeline of two trainings the second forgets the first: QAT makes a masked weight plain before it trains it,
          and the zeros grow back.
Idea      Both at once: the forward pass sees round(keep * w), the gradient passes through the rounding as if it were
          the identity, and reaches only what the mask keeps. Zero is a point of every grid, so zeros stay exactly zero.
Cost      A training run; the result is packed like any RTN model, zeros included: sparse and small are two claims,
          and only an entropy coder or a sparse kernel turns the first into the second.
Left out  A mask that changes while training.
Source    Hawks et al. 2021, arXiv:2102.11289.
"""

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from effkit.core.checks import require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import bake, find
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.training import Schedule, fit
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.pruning.masks import keep_largest, mask_, mask_of
from effkit.quantization.packed import RTN, PackedWeight
from effkit.quantization.qat import FakeQuantize

Layer = nn.Linear | nn.Conv2d


def masked_and_rounded(layer: Layer, *, sparsity: float, bits: int, group_size: int, symmetric: bool) -> Layer:
    """The layer with its smallest weights masked and the others rounded in the forward pass; both can be trained."""
    bake(layer)
    mask_(layer, keep_largest(layer.weight.detach().abs(), sparsity=sparsity))
    parametrize.register_parametrization(layer, "weight", FakeQuantize(bits, group_size, symmetric))
    return layer


def masked(layer: Layer) -> Layer:
    """The layer after training: the mask written into its weight, which is not rounded yet."""
    mask, held = mask_of(layer), layer.parametrizations["weight"]  # type: ignore[index]
    weight = mask(held.original.detach())  # type: ignore[misc, union-attr]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    layer.weight.data = weight
    return layer


@dataclass(frozen=True)
class QAP(Technique):
    """Mask the smallest weights of each layer, train with the others rounded, then pack: `epochs` over task.train."""

    sparsity: float = 0.5
    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    epochs: int = 1
    lr: float = 1e-3
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper(
        "Hawks et al.", 2021,
        "Ps and Qs: quantization-aware pruning for efficient low latency neural network inference", "arXiv:2102.11289",
    )  # fmt: skip

    def __post_init__(self):
        self.rounding()
        require_float("sparsity", self.sparsity, 0.0, 1.0, open_high=True)
        require_int("epochs", self.epochs, 1)
        require_float("lr", self.lr, 0.0, open_low=True)

    def rounding(self) -> RTN:
        """What packs the trained weights, on the very grid that they were trained on."""
        return RTN(self.bits, self.group_size, self.symmetric, layers=self.layers)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        task.require("train", "loss", by=self)
        settings = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        layers = [layer for _, layer in find(model, (nn.Linear, nn.Conv2d), layers=self.layers, by="QAP")]
        for layer in layers:
            masked_and_rounded(layer, sparsity=self.sparsity, **settings)  # type: ignore[arg-type]
        fit(model, task, Schedule(self.epochs * len(task.train), self.lr), label="QAP")  # type: ignore[arg-type]
        for layer in layers:
            masked(layer)  # type: ignore[arg-type]
        return self.rounding().rewrite_(model, task)

    def claim(self, model: nn.Module) -> Reading:
        """The share of the packed weights that are zero, counted on what they stand for."""
        stores = [m for m in model.modules() if isinstance(m, PackedWeight)]
        zeros = sum(int((store() == 0).sum()) for store in stores)
        return Reading(zeros / sum(s.shape[0] * s.shape[1] for s in stores), "sparsity", "counted", better="higher")
