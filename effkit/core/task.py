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
        held = ("example", "train", "calib", "val", "test")
        return replace(self, **{name: _moved(getattr(self, name), device, f"task.{name}") for name in held})

    def require(self, *fields: str, by: object) -> None:
        """Raises ValueError naming the technique and each field it reads that is missing or empty."""
        missing = [name for name in fields if getattr(self, name) is None or _empty(getattr(self, name))]
        who = _name(by)
        if missing:
            raise ValueError(f"{who} reads task.{', '.join(missing)}, which this task lacks; pass Task({missing[0]}=...)")
        if "train" in fields and not hasattr(self.train, "at"):
            raise ValueError(f"{who} reads task.train by batch number, which a {type(self.train).__name__} does not offer; pass Batches(inputs, targets)")

    def few(self, examples: int, *, by: object) -> "Task":
        """The task with its first calibration examples alone; raises ValueError where nothing says which these are."""
        self.require("calib", by=by)
        if not hasattr(self.calib, "first"):
            kind = type(self.calib).__name__
            raise ValueError(f"{_name(by)} reads the first examples of task.calib, which a {kind} does not offer; pass Batches(inputs, targets)")
        return replace(self, calib=self.calib.first(examples))  # type: ignore[union-attr]


def _name(by: object) -> str:
    return getattr(by, "__name__", type(by).__name__)  # functions and classes have a name, techniques a class


def _moved(data: Any, device: torch.device | str, where: str) -> Any:
    """Data on a device: of a list, as of a tuple, each part; else what can move itself."""
    if isinstance(data, list | tuple):
        parts = [_moved(part, device, where) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)  # a namedtuple takes them one by one
    if data is None or hasattr(data, "to"):
        return data if data is None else data.to(device)
    raise ValueError(f"{where} holds a {type(data).__name__}, which cannot be moved to {device}: give Batches(inputs, targets), or a list of such pairs")


def _empty(value: object) -> bool:
    """Batches, windows of a text, or a list of batches, of which there is none."""
    return (hasattr(value, "at") or isinstance(value, list)) and len(value) == 0  # type: ignore[arg-type]
