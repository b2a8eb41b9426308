"""Task: what the model is for.

A technique needs more than weights: inputs to calibrate on, a loss to train with, a score to keep. A Task holds
these in one place, every field optional; a technique names the fields it reads, and a missing one is an error
that says so before anything was changed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # inputs and targets


@dataclass(frozen=True)
class Batches:
    """Re-iterable batches over aligned tensors. Batch number `step` is a function of (seed, step) alone, so that a
    training run that was interrupted goes on with the very batches it would have seen."""

    inputs: Tensor
    targets: Tensor
    size: int = 64
    shuffle: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        return (self.at(step) for step in range(len(self)))

    def at(self, step: int) -> Batch:
        """Batch number `step` of an endless run: epochs follow one another, each with its own order."""
        epoch, i = divmod(step, len(self))
        index = self._order(epoch)[i * self.size : (i + 1) * self.size]
        return self.inputs[index], self.targets[index]

    def first(self, n: int) -> "Batches":
        """The first n examples."""
        return replace(self, inputs=self.inputs[:n], targets=self.targets[:n])

    def to(self, device: torch.device | str) -> "Batches":
        """The same examples on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.inputs))
        return torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))


@dataclass(frozen=True)
class Score:
    """The name, unit and direction of the number that says how good a model is."""

    name: str = "score"
    unit: str = ""
    better: str = "higher"


@dataclass(frozen=True)
class Task:
    """Everything a technique may ask about the model's purpose.

    example      positional arguments of one forward pass, a tuple of tensors
    train, calib, val, test   batches of (inputs, targets); selection searches `val` and reports `test`
    loss         (outputs, batch) -> scalar, so that distillation shares the forward pass
    per_example  (model, batches) -> 1-d tensor whose mean is the score
    score        name, unit and direction of that mean
    """

    name: str = ""
    example: tuple[Tensor, ...] | None = None
    train: Batches | None = None
    calib: Batches | None = None
    val: Batches | None = None
    test: Batches | None = None
    loss: Callable[[Any, Batch], Float[Tensor, ""]] | None = None
    per_example: Callable[[nn.Module, Batches], Float[Tensor, " n"]] | None = None
    score: Score = Score()

    def to(self, device: torch.device | str) -> "Task":
        """The task with its data where the model is, as in `model.to(device), task.to(device)`."""
        splits = {name: split.to(device) for name in ("train", "calib", "val", "test") if (split := getattr(self, name)) is not None}
        return replace(self, example=self.example and tuple(x.to(device) for x in self.example), **splits)

    def require(self, *fields: str, by: object) -> None:
        """Raises ValueError naming the technique and each field it reads that is missing or empty."""
        missing = [name for name in fields if getattr(self, name) is None or _empty(getattr(self, name))]
        if missing:
            which, one = ", ".join(missing), missing[0]
            who = getattr(by, "__name__", type(by).__name__)  # functions and classes have a name, techniques a class
            raise ValueError(f"{who} reads task.{which}, which this task lacks; pass Task({one}=...)")


def _empty(value: object) -> bool:
    """Batches, or windows of a text, of which there is none."""
    return hasattr(value, "at") and len(value) == 0  # type: ignore[arg-type]
