"""The memory ledger of training: what must be held, byte for byte, before the first activation is.

Problem   A model that fits for running may not fit for training, and it is rarely the weights that don't.
Idea      AdamW holds four numbers for each one it trains: the weight, its gradient, and two moments. Of what is frozen
          only the weight is held, in whatever form. So memory follows the trained share; arithmetic does not: the
          gradient still travels through every frozen layer on its way to the adapters below.
Half      Training in half precision saves nothing here: beside 2 bytes and 2 of gradient stand a float32 copy, its
          gradient and its moments (Micikevicius et al. 2017, arXiv:1710.03740, sec. 3.1), 20 bytes against 16.
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
    """Bytes of weights (trained and frozen), gradients and optimizer state (AdamW), and their sum, as `fit` holds them:
    a weight of half precision is trained through a float32 copy, which has a gradient of its own and both moments."""
    held, moving = resident(model), _bytes(trained(model))
    copies = 4 * sum(p.numel() for p in trained(model) if p.element_size() < 4)
    stepped = copies + _bytes(p for p in trained(model) if p.element_size() >= 4)
    lines = {"weights": held.value, "gradients": moving + copies, "optimizer": copies + MOMENTS * stepped}
    lines["in all"] = sum(lines.values())
    return {name: Reading(value, "B", "counted", better="lower") for name, value in lines.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
