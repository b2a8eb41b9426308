"""Two techniques on one model: what they cost together, and apart.

Problem   Each technique is tuned and published alone. Do their losses add, or does one pay for part of the other?
Idea      With d(X) the loss above the unchanged model after X, the interaction of A and then B is
          d(A, B) - d(A) - d(B). Zero: the losses add. Positive: what A left is more fragile than what it was given.
          Negative: B throws away what A had spoiled already. And the order matters: B then A is another number.
Refused   An order in which the second needs what the first takes away. That is no failure of a run, but of an idea, and
          the traits say so before any work.
"""

from dataclasses import dataclass

import torch
from torch import nn

from effkit.core.task import Task
from effkit.core.technique import Pipeline, Technique, evaluating


def forbidden(first: Technique, second: Technique) -> str:
    """Why the second cannot follow the first, in the words of the traits; empty where it can."""
    try:
        Pipeline((first, second))
    except ValueError as error:
        return str(error)
    return ""


def interaction(together: float, first: float, second: float) -> float:
    """d(A, B) - d(A) - d(B), each a loss above that of the unchanged model."""
    return together - first - second


def cross_entropy(model: nn.Module, task: Task, split: str = "test") -> float:
    """The mean of task.loss over a split, every example counting once; nats a token, or an image."""
    task.require("loss", split, by=task)
    total, examples = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in getattr(task, split):
            total += task.loss(model(batch[0]), batch).item() * len(batch[0])  # type: ignore[misc]
            examples += len(batch[0])
    return total / examples


@dataclass(frozen=True)
class Pair:
    """An ordered pair by the names of its techniques, and the four losses that its interaction is made of; nats."""

    first: str
    second: str
    unchanged: float
    after_first: float
    after_second: float
    after_both: float

    @property
    def deltas(self) -> tuple[float, float, float]:
        """d(A), d(B), d(A, B)."""
        return tuple(loss - self.unchanged for loss in (self.after_first, self.after_second, self.after_both))  # type: ignore[return-value]

    @property
    def interaction(self) -> float:
        first, second, both = self.deltas
        return interaction(both, first, second)
