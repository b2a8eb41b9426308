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

from effkit.core.checks import require_float
from effkit.core.report import Reading
from effkit.core.surgery import bake
from effkit.core.technique import Paper
from effkit.pruning.masks import keep_largest, mask_, mask_of
from effkit.quantization.packed import PackedWeight
from effkit.quantization.qat import QAT, FakeQuantize

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
class QAP(QAT):
    """Mask the smallest weights of each layer, train with the others rounded, then pack; settings as QAT's.

    sparsity   the share of each layer's weights that goes"""

    sparsity: float = 0.5

    paper = Paper("Hawks et al.", 2021,
                  "Ps and Qs: quantization-aware pruning for efficient low latency neural network inference",
                  "arXiv:2102.11289")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        require_float("sparsity", self.sparsity, 0.0, 1.0, open_high=True, hint="0.9 takes out nine of ten")

    def begin(self, layer: nn.Module) -> None:
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        masked_and_rounded(layer, sparsity=self.sparsity, **grid)  # type: ignore[arg-type]

    def end(self, layer: nn.Module) -> None:
        masked(layer)  # type: ignore[arg-type]

    def claim(self, model: nn.Module) -> Reading:
        """The share of the packed weights that are zero, counted on what they stand for."""
        stores = [m for m in model.modules() if isinstance(m, PackedWeight)]
        zeros = sum(int((store() == 0).sum()) for store in stores)
        return Reading(zeros / sum(s.shape[0] * s.shape[1] for s in stores), "sparsity", "counted", better="higher")
