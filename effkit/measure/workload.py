"""Workloads: what a model is asked to do while it is measured.

Problem   "4 ms" says nothing: of what, for how many at once? A model that wins at one token may lose at a batch.
Idea      A workload is a value: it says in words what it is, makes a closure that does one unit of it, and knows how
          many tokens or examples that unit is, so that throughput follows from latency.
Modes     `prepare` leaves the model's modes alone; `measure` and `compare` set evaluation mode around it.
Left out  Requests that arrive over time; one unit after another is what can be repeated exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effkit.core.checks import require_int
from effkit.core.generation import Autoregressive, Sampler
from effkit.core.task import Task
from effkit.core.technique import clone

GREEDY = Sampler(temperature=0.0)


class Work(Protocol):
    """What every workload offers; `str` of it is the sentence a table prints."""

    copies: ClassVar[bool]  # the prepared closure works on a copy of the model, weights included

    def prepare(self, model: nn.Module, task: Task) -> Callable[[], object]:
        """A closure that does one unit of work; raises ValueError where the task lacks what the work reads."""

    def items(self, task: Task) -> tuple[int, str]:
        """How many of what one unit processes: (128, "tokens")."""


@dataclass(frozen=True)
class Forward:
    """One forward pass without gradients; the task's example, repeated or cut to the batch."""

    batch: int = 1
    copies: ClassVar[bool] = False

    def __post_init__(self):
        require_int("batch", self.batch, 1)

    def __str__(self) -> str:
        return f"a forward pass, batch of {self.batch}"

    def prepare(self, model: nn.Module, task: Task) -> Callable[[], object]:
        task.require("example", by=self)
        inputs = resized(task.example, self.batch, device_of(model))  # type: ignore[arg-type]

        @torch.no_grad()
        def run() -> object:
            return model(*inputs)

        return run

    def items(self, task: Task) -> tuple[int, str]:
        task.require("example", by=self)
        return _amount(task.example[0], self.batch)  # type: ignore[index]


@dataclass(frozen=True)
class Decode:
    """Greedy generation of `new` tokens after `prompt` tokens, one text at a time, the way this model decodes."""

    prompt: int = 64
    new: int = 128
    copies: ClassVar[bool] = False

    def __post_init__(self):
        require_int("prompt", self.prompt, 1)
        require_int("new", self.new, 1)

    def __str__(self) -> str:
        return f"decoding {self.new} tokens greedily after a prompt of {self.prompt}"

    def prepare(self, model: nn.Module, task: Task) -> Callable[[], object]:
        ids = self._prompt(task).to(device_of(model))
        decoding = getattr(model, "decoding", None) or Autoregressive()  # speculation replaces `decoding`
        return lambda: decoding(model, ids, self.new, sampler=GREEDY)

    def items(self, task: Task) -> tuple[int, str]:
        return self.new, "tokens"

    def _prompt(self, task: Task) -> Int[Tensor, "1 prompt"]:
        """The beginning of held-out text, or of the example; repeated where it is too short."""
        if task.val is None:
            task.require("example", by=self)
        text = task.example[0] if task.val is None else task.val.at(0)[0]  # type: ignore[index]
        if text.is_floating_point():
            raise ValueError(f"Decode needs token ids, but this task's inputs are {text.dtype}; use Forward for it")
        (row,) = resized((text.flatten(),), self.prompt)
        return row[None]


@dataclass(frozen=True)
class TrainStep:
    """Forward, loss, backward and an AdamW step on a copy of the model; the learning rate is 0, so that all steps are
    the same work on the same numbers."""

    batch: int = 32
    copies: ClassVar[bool] = True

    def __post_init__(self):
        require_int("batch", self.batch, 1)

    def __str__(self) -> str:
        return f"a training step (AdamW), batch of {self.batch}"

    def prepare(self, model: nn.Module, task: Task) -> Callable[[], object]:
        task.require("train", "loss", by=self)
        student = clone(model).train()
        trained = [p for p in student.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter requires gradients: unfreeze some with requires_grad_(True), or use Forward")
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # the moments are there from the first unit on, as in every later step of a training
        batch = resized(task.train.at(0), self.batch, device_of(model))  # type: ignore[union-attr]

        @torch.enable_grad()
        def run() -> object:
            loss = task.loss(student(batch[0]), batch)  # type: ignore[misc, arg-type]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run

    def items(self, task: Task) -> tuple[int, str]:
        task.require("train", by=self)
        return _amount(task.train.at(0)[0], self.batch)  # type: ignore[union-attr]


def resized(tensors: tuple[Tensor, ...], n: int, device: torch.device | None = None) -> tuple[Tensor, ...]:
    """The first n rows of each tensor, beginning anew where there are fewer; a scalar stays as it is."""
    if any(t.dim() and not len(t) for t in tensors):
        raise ValueError(f"the task's tensors have shapes {[tuple(t.shape) for t in tensors]}: one example is needed")
    return tuple((t[torch.arange(n) % len(t)] if t.dim() else t).to(device or t.device) for t in tensors)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives; the processor, where it has none."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _amount(inputs: Tensor, batch: int) -> tuple[int, str]:
    """Rows of ids are counted in tokens, everything else in examples."""
    if inputs.dim() == 2 and inputs.dtype in (torch.int32, torch.int64):
        return batch * inputs.shape[1], "tokens"
    return batch, "examples"
