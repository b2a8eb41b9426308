"""A named checkpoint as a technique: module in, the named model out. So a recipe can speak of a second model, a draft
or a student, and no chapter has to know the zoo."""

from dataclasses import dataclass

import torch
from torch import nn

from effkit.core.checks import require_choice
from effkit.core.report import Reading
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique


@dataclass(frozen=True)
class Use(Technique):
    """The model that `zoo.load(name)` gives, on the device and in the dtype of the one that came in."""

    name: str = "gpt-small"

    paper = Paper("effkit", 2026, "a checkpoint by its name", "", "")

    def __post_init__(self):
        from effkit import zoo  # which imports this file

        require_choice("name", self.name, zoo.names())

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        from effkit import zoo

        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        return zoo.load(self.name, like.dtype)[0].to(like.device).train(model.training)

    def claim(self, model: nn.Module) -> Reading:
        return Reading(sum(p.numel() for p in model.parameters()), "params", "counted")
