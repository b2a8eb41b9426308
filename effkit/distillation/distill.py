"""Distill: the teacher in, the student out.

Problem   A compressed model has lost something, and a small model never had it. Labels alone bring back part of it.
Idea      Train the student on the composite loss of losses.py, with the teacher's logits beside the labels.
Cost      A training run in which each step also runs the teacher forward. The student costs what it costs, once.
Left out  Keeping the teacher's logits between epochs (tokens x vocabulary numbers); hints from inner layers; logits
          whose classes are not the last dimension.
Source    Hinton et al. 2015, arXiv:1503.02531, sec. 2.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from effkit.core.checks import require_choice, require_float, require_int, require_seed
from effkit.core.report import Reading
from effkit.core.surgery import is_linear_like, note
from effkit.core.task import Batch, Task
from effkit.core.technique import Identity, Paper, Technique, kept_random_state
from effkit.core.training import Loss, Schedule, fit
from effkit.distillation.losses import DIVERGENCES, composite, soft_loss


def distillation_loss(teacher: nn.Module, task: Task, *, alpha: float, temperature: float, divergence: str) -> Loss:
    """(student, batch) -> the composite loss; what it does not weigh, it does not compute."""

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        outputs = student(batch[0])
        if alpha == 1:
            return task.loss(outputs, batch)  # type: ignore[misc]
        with torch.no_grad():
            wanted = teacher(batch[0])
        check_logits(outputs, wanted)
        soft = soft_loss(outputs, wanted, temperature=temperature, divergence=DIVERGENCES[divergence])
        return soft if alpha == 0 else composite(task.loss(outputs, batch), soft, alpha=alpha)  # type: ignore[misc]

    return loss


def check_logits(student: object, teacher: object) -> None:
    """Raises ValueError unless both are logits over the same classes."""
    for who, outputs in {"student": student, "teacher": teacher}.items():
        if not (isinstance(outputs, Tensor) and outputs.dim() and outputs.is_floating_point()):
            kind = type(outputs).__name__
            raise ValueError(f"Distill reads logits, a tensor (..., classes), but the {who} returns {kind}; wrap it")
    if student.shape != teacher.shape:  # type: ignore[attr-defined]
        seen, wanted = tuple(student.shape), tuple(teacher.shape)  # type: ignore[attr-defined]
        how = "give the student the teacher's classes, or vocabulary"
        raise ValueError(f"the student's logits have shape {seen} and the teacher's {wanted}: {how}")


def check_trainable(student: nn.Module, made_by: Technique) -> None:
    """Raises ValueError where no linear or convolution weight of the student can learn."""
    layers = [m for m in student.modules() if is_linear_like(m) or isinstance(m, nn.modules.conv._ConvNd)]
    if not any(p.requires_grad and p.dim() > 1 for layer in layers for p in layer.parameters()):
        how = "distil first and quantize the student, Pipeline((Distill(...), RTN(...))), or unfreeze the teacher"
        raise ValueError(f"Distill: student {made_by!r} cannot be trained, its weights are packed or frozen; {how}")


@dataclass(frozen=True)
class Distill(Technique):
    """A student, made from the teacher by a technique, trained on labels and on the teacher's softened logits.

    student      what makes it: a compression of the teacher (masks and factors stay), or Fresh for a new model
    alpha        weight of the labels' loss; 0 needs no labels, 1 is plain training
    temperature  softens both sides; the soft loss carries its square
    divergence   "forward": KL(teacher || student); "reverse": KL(student || teacher)
    seed         of dropout, and of the order of batches, added to the task's own
    """

    student: Technique = Identity()
    alpha: float = 0.1
    temperature: float = 4.0
    epochs: int = 1
    lr: float = 1e-3
    divergence: Literal["forward", "reverse"] = "forward"
    seed: int = 0

    paper = Paper("Hinton et al.", 2015, "Distilling the knowledge in a neural network", "arXiv:1503.02531", "sec. 2")

    def __post_init__(self):
        if not isinstance(self.student, Technique):
            raise ValueError(f"student must be a technique, such as Fresh(...) or Magnitude(0.7), got {self.student!r}")
        require_float("alpha", self.alpha, 0.0, 1.0, hint="the labels' share of the loss; 1 is plain training")
        require_float("temperature", self.temperature, 0.0, open_low=True, hint="1 leaves probabilities as they are")
        require_int("epochs", self.epochs, 1)
        require_float("lr", self.lr, 0.0, open_low=True)
        require_choice("divergence", self.divergence, tuple(DIVERGENCES))
        require_seed(self.seed)

    needs = property(lambda self: self.student.needs)
    breaks = property(lambda self: self.student.breaks)
    gives = property(lambda self: self.student.gives)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        task.require("train", *(("loss",) if self.alpha else ()), by=self)
        student, teacher = self.student(model, task), model.eval()
        check_trainable(student, self.student)
        batches = replace(task.train, seed=task.train.seed + self.seed)  # type: ignore[union-attr, type-var]
        settings = {"alpha": self.alpha, "temperature": self.temperature, "divergence": self.divergence}
        loss = distillation_loss(teacher, task, **settings)  # type: ignore[arg-type]
        with kept_random_state():
            torch.manual_seed(self.seed)
            schedule = Schedule(self.epochs * len(batches), self.lr)  # type: ignore[arg-type]
            fit(student, replace(task, train=batches), schedule, loss=loss, label="Distill")
        student.zero_grad(set_to_none=True)
        note(student, "", "trained on the teacher's logits", f"Distill, alpha {self.alpha}, T {self.temperature}")
        return student

    def claim(self, model: nn.Module) -> Reading:
        """What the student's technique claims: distillation improves it and leaves its size alone."""
        return self.student.claim(model)
