"""Fresh: a newly initialized model, as a technique: a student that is smaller than its teacher from the start.

Problem   A compressed teacher keeps its depth, its widths and its habits; a student may be of another build altogether.
Idea      A model's class and the numbers of its constructor say everything about it but its weights. Take the class and
          numbers of the model at hand, change some, and draw new weights from a seed.
Cost      All that was learned: what comes out is untrained, so this is a part of a pipeline or of Distill.
Source    Each class says how its weights are drawn; torch's layers follow He et al. 2015, arXiv:1502.01852, eq. 15 with
          a = sqrt(5): uniform, of variance 1 / (3 fan_in).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from effkit.core import checkpoint
from effkit.core.checks import require_choice, require_seed
from effkit.core.surgery import bake, note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique, kept_random_state
from effkit.core.traits import FLOAT_WEIGHTS, UNMASKED

Numbers = tuple[tuple[str, object], ...]


def build(kind: str, numbers: Numbers, *, seed: int) -> nn.Module:
    """A model of a class that files may hold, with weights from the seed; the global random state is kept."""
    with kept_random_state():
        torch.manual_seed(seed)
        try:
            return checkpoint.KINDS[kind](**dict(numbers))
        except TypeError as error:  # an argument too few, too many, or of a strange kind
            raise ValueError(f"no {kind} can be built from {dict(numbers)}: {error}") from error


def reset_(model: nn.Module, *, seed: int) -> nn.Module:
    """New weights for a model whose class is not ours: each of its layers draws its own again."""
    with kept_random_state():
        torch.manual_seed(seed)
        for module in list(model.modules()):
            bake(module)
        for path, module in model.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif next(module.parameters(recurse=False), None) is not None:
                what = f"{path or 'the model'} ({type(module).__name__})"
                raise ValueError(f"Fresh needs reset_parameters to draw weights anew, which {what} lacks; name a kind")
    return model


@dataclass(frozen=True)
class Fresh(Technique):
    """An untrained model in place of the one at hand.

    kind      the class, such as "MLP" or "GPT"; empty: the class of the model at hand, with that model's numbers
    numbers   constructor arguments by name, as in (("widths", (784, 30, 10)),); of the same class: those that change
    seed      of the weights
    """

    kind: str = ""
    numbers: Numbers = ()
    seed: int = 0

    gives = frozenset({FLOAT_WEIGHTS, UNMASKED})
    paper = Paper("He et al.", 2015, "Delving deep into rectifiers", "arXiv:1502.01852", "eq. 15")

    def __post_init__(self):
        require_choice("kind", self.kind, ("", *sorted(checkpoint.KINDS)), hint="empty: the class of the model at hand")
        require_seed(self.seed)
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in self.numbers):
            raise ValueError(f"numbers must be pairs of name and value, as in (('layers', 2),), got {self.numbers!r}")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        new = self.successor(model)
        if not FLOAT_WEIGHTS.holds(new):
            raise ValueError("Fresh: this model's layers hold packed weights, which cannot be drawn anew; name a kind")
        note(new, "", f"{type(model).__name__} -> {type(new).__name__}, untrained", f"Fresh, seed {self.seed}")
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return new.to(like.device, like.dtype).train(model.training)

    def successor(self, model: nn.Module) -> nn.Module:
        own = parametrize.type_before_parametrizations(model)
        kind = self.kind or own.__name__
        if checkpoint.KINDS.get(kind) is own:
            return build(kind, (*checkpoint.numbers(model).items(), *self.numbers), seed=self.seed)
        if self.kind:
            return build(kind, self.numbers, seed=self.seed)
        if self.numbers:
            raise ValueError(f"Fresh: a {kind} cannot be built from numbers; name a kind, or leave the numbers out")
        return reset_(model, seed=self.seed)
