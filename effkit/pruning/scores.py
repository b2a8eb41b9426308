"""Scores from gradients: what the loss says about a weight.

Problem   The size of a weight says nothing about what the loss loses without it.
Idea      Expand the loss around the trained weights: dL = g dw + (1/2) H dw^2. At a minimum g = 0; without the weight
          dw = -w, so that costs (1/2) H w^2. The diagonal of H is approximated by the empirical Fisher information,
          F = (1/N) sum_n g_n^2, the mean of the squared gradients of single examples' losses.
Law       Where the model's probabilities are the true ones, F is the expected Hessian of the log-loss of one prediction.
          A window of n tokens is scored by its mean loss, whose F is n times smaller: ranks stay, sizes do not.
Cost      One backward pass an example: the squared mean gradient of a batch is another quantity, smaller and noisier.
Left out  What weights do to each other: the rest of H. So a channel's score is the sum of its weights' scores; the paper
          squares the gradient of the channel's own mask, which holds what its weights do to each other.
Source    LeCun et al. 1989, "Optimal brain damage", eq. 2; with Fisher Theis et al. 2018, arXiv:1801.05787.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.checks import require_int
from effkit.core.surgery import dense_weight, note
from effkit.core.task import Batch, Task
from effkit.core.technique import Paper, evaluating
from effkit.pruning.prune import Layers, Prune


def saliency(w: Float[Tensor, "..."], fisher: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What the loss gains when w becomes 0, to second order: (1/2) F w^2."""
    return 0.5 * fisher * w.square()


def diagonal_fisher(model: nn.Module, layers: Layers, task: Task, *, examples: int) -> dict[str, Tensor]:
    """F = (1/N) sum_n g_n^2 of each layer's weight, over the first N examples of task.calib; a layer that no loss
    reaches is left out of the result."""
    squares: dict[str, Tensor] = {}
    n = 0
    for n, batch in enumerate(singly(task, examples), start=1):  # noqa: B007 (their number is the divisor)
        for path, gradient in gradients(model, layers, task, batch).items():
            squares[path] = squares[path] + gradient.float().square() if path in squares else gradient.float().square()
    return {path: total / n for path, total in squares.items()}


def singly(task: Task, examples: int) -> Iterator[Batch]:
    """The first examples of task.calib, as batches of one."""
    return islice(((x[i : i + 1], y[i : i + 1]) for x, y in task.calib for i in range(len(x))), examples)  # type: ignore[union-attr]


def gradients(model: nn.Module, layers: Layers, task: Task, batch: Batch) -> dict[str, Tensor]:
    """d loss / d weight of each layer that the loss depends on, in evaluation mode, frozen weights included."""
    with evaluating(model), thawed(layers), torch.enable_grad(), parametrize.cached():
        # the very tensors of this pass, masks applied
        weights = {path: dense_weight(layer) for path, layer in layers.items()}
        loss = task.loss(model(batch[0]), batch)  # type: ignore[misc]
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {path: g for path, g in zip(weights, found, strict=True) if g is not None}


@contextmanager
def thawed(layers: Layers) -> Iterator[None]:
    """All parameters of these layers require gradients inside, and as before afterwards."""
    frozen = [p for layer in layers.values() for p in layer.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@dataclass(frozen=True)
class Fisher(Prune):
    """The weights go without which the loss rises least, by the diagonal of the empirical Fisher information.

    examples   of task.calib, each with a backward pass of its own"""

    examples: int = 128

    paper = Paper("Theis et al.", 2018, "Faster gaze prediction with dense networks and Fisher pruning",
                  "arXiv:1801.05787", "Fisher pruning")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        require_int("examples", self.examples, 1)

    def score(self, model: nn.Module, layers: Layers, task: Task) -> dict[str, Tensor]:
        task.require("calib", "loss", by=self)
        fisher = diagonal_fisher(model, layers, task, examples=self.examples)
        for path in layers.keys() - fisher.keys():
            note(model, path, "scored 0", "no example of task.calib reaches it")
        weights = {path: dense_weight(layer).detach().float() for path, layer in layers.items()}
        return {path: saliency(w, fisher.get(path, torch.zeros_like(w))) for path, w in weights.items()}
