"""Magnitude: small weights go.

Problem   Which weights does the function not need?
Idea      P = {w : |w| < tau}. With inputs of like size, a small weight moves the output little.
Cost      A look at the weights; no data.
Left out  The inputs: a small weight on a large input matters, a large one on a dead input does not.
Source    Han et al. 2015, arXiv:1506.02626, sec. 3; channels: Li et al. 2016, arXiv:1608.08710, sec. 3.1.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from effkit.core.checks import require_float
from effkit.core.surgery import dense_weight
from effkit.core.task import Task
from effkit.core.technique import Paper
from effkit.pruning.prune import Layers, Prune


def below(w: Float[Tensor, "..."], tau: float) -> Bool[Tensor, "..."]:
    """P = {w : |w| < tau}."""
    return w.abs() < tau


@dataclass(frozen=True)
class Magnitude(Prune):
    """The smallest weights go: a share `sparsity` of them, or, where tau is given, all below it.

    tau   the threshold itself, for the pattern "weights" at once; sparsity then follows from the weights"""

    tau: float | None = None

    paper = Paper("Han et al.", 2015, "Learning both weights and connections for efficient neural networks",
                  "arXiv:1506.02626", "sec. 3")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.tau is not None:
            require_float("tau", self.tau, 0.0)
            if (self.pattern, self.schedule) != ("weights", "one-shot"):
                way = f"pattern {self.pattern!r} and schedule {self.schedule!r}"
                raise ValueError(f"tau must be None for {way}, got {self.tau}: give a sparsity instead")

    def score(self, model: nn.Module, layers: Layers, task: Task) -> dict[str, Tensor]:
        return {path: dense_weight(layer).detach().abs().float() for path, layer in layers.items()}

    def pooled(self, total: Float[Tensor, " channels"], weights: int) -> Float[Tensor, " channels"]:
        """The mean of |w|: sums could not be compared between groups."""
        return total / max(1, weights)

    def _keep(self, scores: dict[str, Tensor], sparsity: float, least: int = 0) -> dict[str, Tensor]:
        if self.tau is None:
            return super()._keep(scores, sparsity, least)
        return {path: ~below(score, self.tau) for path, score in scores.items()}


@dataclass(frozen=True)
class Filters(Magnitude):
    """Channels with the smallest weights are removed: `Magnitude(pattern="channels")` by its own name."""

    pattern: Literal["weights", "channels"] = "channels"

    paper = Paper("Li et al.", 2016, "Pruning filters for efficient ConvNets", "arXiv:1608.08710", "sec. 3.1")
