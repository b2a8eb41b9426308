"""Prune: a score, a pattern and a schedule.

Problem   Networks have far more weights than their function needs. Which can go, in what shape, and when?
Idea      Three answers, three parts. The score says what a weight is worth: that is all that a criterion has to define.
          The pattern says what goes together: single weights, masked, or whole channels, removed. The schedule says
          when: at once, or in steps while training.
Theory    To second order, taking out a weight w costs (1/2) H w^2 at a minimum of the loss (LeCun et al. 1989, eq. 2):
          magnitude takes H for constant, Fisher for the mean squared gradient.
Source    Hoefler et al. 2021, arXiv:2102.00554, for the three questions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.core.checks import require_choice, require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import dense_weight, find, note
from effkit.core.task import Task
from effkit.core.technique import Technique
from effkit.core.training import Schedule, fit
from effkit.core.traits import FLOAT_WEIGHTS, UNMASKED
from effkit.pruning.masks import choose, mask_, mask_of, masked_share
from effkit.pruning.schedules import cubic, cutting_steps
from effkit.pruning.structured import channel_totals, removable, shrink_

PRUNABLE = (nn.Linear, nn.modules.conv._ConvNd)
Layers = dict[str, nn.Module]


@dataclass(frozen=True)
class Prune(Technique, ABC):
    """Base of all pruning: a subclass defines `score`.

    sparsity   the share that goes, from 0 to below 1; of channels at least one of each group stays
    pattern    "weights": single weights, masked;  "channels": channels, neurons and heads, removed
    scope      "layer": the same share everywhere;  "global": the lowest scores of the whole model
    schedule   "one-shot": at once, then train;  "cubic": gradually while training (Zhu & Gupta)
    epochs     passes over task.train
    layers     glob over paths; a group of channels goes by any layer whose outputs they are
    """

    sparsity: float = 0.5
    pattern: Literal["weights", "channels"] = "weights"
    scope: Literal["layer", "global"] = "layer"
    schedule: Literal["one-shot", "cubic"] = "one-shot"
    epochs: int = 0
    lr: float = 1e-3
    layers: str = "*"

    def __post_init__(self):
        require_float("sparsity", self.sparsity, 0.0, 1.0, open_high=True, hint="0.9 takes out nine of ten")
        require_choice("pattern", self.pattern, ("weights", "channels"))
        require_choice("scope", self.scope, ("layer", "global"))
        require_choice("schedule", self.schedule, ("one-shot", "cubic"))
        require_int("epochs", self.epochs, 0)
        require_float("lr", self.lr, 0.0, open_low=True)
        if self.schedule == "cubic" and (self.epochs == 0 or self.pattern == "channels"):
            got = f"epochs={self.epochs}, pattern={self.pattern!r}"
            needed = "epochs must be 1 or more and pattern 'weights'"
            raise ValueError(f"schedule 'cubic' masks weights while training: {needed}, got {got}; or use 'one-shot'")

    needs = property(lambda self: frozenset({FLOAT_WEIGHTS}) | ({UNMASKED} if self.pattern == "channels" else set()))
    breaks = property(lambda self: frozenset() if self.pattern == "channels" else frozenset({UNMASKED}))

    @abstractmethod
    def score(self, model: nn.Module, layers: Layers, task: Task) -> dict[str, Tensor]:
        """What each weight of each layer is worth, in the shape of the weight; the smallest go first."""

    def pooled(self, total: Float[Tensor, " channels"], weights: int) -> Float[Tensor, " channels"]:
        """What a channel is worth, from the sum of its weights' scores and their number."""
        return total

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        if self.epochs:
            task.require("train", "loss", by=self)
        if self.pattern == "channels":
            self._remove(model, task)
        elif self.schedule == "one-shot":
            self._mask(model, self._find(model), task, self.sparsity)
        else:
            return self._mask_while_training(model, self._find(model), task)
        if self.epochs:
            fit(model, task, Schedule(self.epochs * len(task.train), self.lr), label=type(self).__name__)  # type: ignore[arg-type]
        return model

    def claim(self, model: nn.Module) -> Reading:
        """The share of weights that masks hold at zero; for channels the parameters that are left."""
        if self.pattern == "channels":
            return super().claim(model)
        return Reading(masked_share(model.modules()), "sparsity", "counted", better="higher")

    def _find(self, model: nn.Module) -> Layers:
        layers = dict(find(model, PRUNABLE, layers=self.layers, by=type(self).__name__))
        for path in layers:
            note(model, path, "masked", type(self).__name__)
        return layers

    def _scores(self, model: nn.Module, layers: Layers, task: Task) -> dict[str, Tensor]:
        scores = self.score(model, layers, task)
        for path, score in scores.items():
            if torch.isnan(score).any() or (score == torch.inf).any():
                where = path or "(the model)"
                raise ValueError(f"{where} has scores that are NaN or infinite: scale task.calib down, or set `layers`")
        return scores

    def _keep(self, scores: dict[str, Tensor], sparsity: float, least: int = 0) -> dict[str, Tensor]:
        return choose(scores, sparsity=sparsity, scope=self.scope, least=least)

    def _mask(self, model: nn.Module, layers: Layers, task: Task, sparsity: float) -> None:
        scores = self._scores(model, layers, task)
        for path, layer in layers.items():
            if (mask := mask_of(layer)) is not None:  # what is gone goes first
                scores[path] = torch.where(mask.keep, scores[path], -torch.inf)
        together = [list(scores)] if self.scope == "global" else [[path] for path in scores]
        for paths in together:  # scores are let go layer by layer, for they are as large as the model
            for path, keep in self._keep({path: scores.pop(path) for path in paths}, sparsity).items():
                mask_(layers[path], keep)

    def _mask_while_training(self, model: nn.Module, layers: Layers, task: Task) -> nn.Module:
        total = self.epochs * len(task.train)  # type: ignore[arg-type]
        ramp, cuts = cutting_steps(total)
        for layer in layers.values():
            # fit must see the masked model's parameters
            mask_(layer, torch.ones_like(dense_weight(layer), dtype=torch.bool))
        start = min(masked_share(layers.values()), self.sparsity)

        def cut(step: int) -> None:
            if step in cuts:
                self._mask(model, layers, task, cubic(step, steps=ramp, final=self.sparsity, initial=start))

        fit(model, task, Schedule(total, self.lr), after_step=cut, label=type(self).__name__)
        return model

    def _remove(self, model: nn.Module, task: Task) -> None:
        task.require("example", by=self)
        by = type(self).__name__
        found = removable(model, task.example, layers=self.layers, by=by)  # type: ignore[arg-type]
        scores = self._scores(model, {path: m for path, m in model.named_modules() if isinstance(m, PRUNABLE)}, task)
        worth = {str(i): self.pooled(*channel_totals(group, scores)) for i, group in enumerate(found)}
        keep = list(self._keep(worth, self.sparsity, least=1).values())
        shrink_(model, list(zip(found, keep, strict=True)), task.example)  # type: ignore[arg-type]
        for group, stays in zip(found, keep, strict=True):
            note(model, group.layers[0], f"{int(stays.sum())} left of {group}", by)
