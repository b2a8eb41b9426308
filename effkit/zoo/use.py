"""A named checkpoint as a technique: module in, the named model out. So a recipe can speak of a second model, a draft
or a student, and no chapter has to know the zoo."""

from dataclasses import dataclass

import torch
from torch import nn

from effkit.core.checks import require_choice
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique, evaluating


@dataclass(frozen=True)
class Use(Technique):
    """The model that `zoo.load(name)` gives, on the device and in the dtype of the one that came in."""

    name: str = "gpt-small"

    paper = Paper("effkit", 2026, "a checkpoint by its name", "", "")

    def __post_init__(self):
        from effkit import zoo  # which imports this file

        require_choice("name", self.name, zoo.names())

    @classmethod
    def example(cls) -> "Use":
        return cls("mlp")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        from effkit import zoo

        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        named = zoo.load(self.name, like.dtype)[0].to(like.device).train(model.training)
        if task.example is not None:
            seen, wanted = outputs_shape(named, task.example), outputs_shape(model, task.example)
            if seen != wanted:
                what = f"{self.name} gives {seen} where the one at hand gives {wanted}"
                how = "take a model of the same vocabulary or classes"
                raise ValueError(f"Use needs a model for the same inputs and outputs: {what}; {how}")
        return named


@torch.no_grad()
def outputs_shape(model: nn.Module, example: tuple[torch.Tensor, ...]) -> str:
    """The shape of what a model makes of the example; what it says where it can't take it."""
    with evaluating(model):
        try:
            return str(tuple(model(*example).shape))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
