"""The memory ledger of training: what must be held, byte for byte, before the first activation is.

Problem   A model that fits for running may not fit for training, and it is rarely the weights that don't.
Idea      AdamW holds four numbers for each one it trains: the weight, its gradient, and two moments. Of what is frozen
          only the weight is held, in whatever form. So memory follows the trained share; arithmetic does not: the
          gradient still travels through every frozen layer on its way to the adapters below.
Left out  Activations, which grow with the batch and hardly shrink when weights are frozen: `measure.peak` has them.
Source    Rajbhandari et al. 2019, arXiv:1910.02054, sec. 3.1 (model states).
"""

from collections.abc import Iterable

from torch import Tensor, nn

from effkit.core.report import Reading
from effkit.measure import resident

MOMENTS = 2  # of AdamW: running means of the gradient and of its square


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients, each once."""
    return [p for p in model.parameters() if p.requires_grad]


def trained_share(model: nn.Module) -> Reading:
    """Trained numbers over all that are held; packed codes count as what the file holds of them, not as weights."""
    every = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    return Reading(sum(p.numel() for p in trained(model)) / every, "of the numbers are trained", "counted", better="lower")


def memory_ledger(model: nn.Module) -> dict[str, Reading]:
    """Bytes of weights (trained and frozen), gradients and optimizer state (AdamW), and their sum."""
    held, moving = resident(model), _bytes(trained(model))
    lines = {"weights": held.value, "gradients": moving, "optimizer": MOMENTS * moving}
    lines["in all"] = sum(lines.values())
    return {name: Reading(value, "B", "counted", better="lower") for name, value in lines.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
