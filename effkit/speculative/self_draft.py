"""Drafts made from the target itself.

Problem   A draft must speak the target's vocabulary and guess as it does. Where is one to be had?
Idea      The target's own first layers, followed at once by its last norm and output layer, are a decoder already, and
          none of its tensors is new, so that it costs no memory (draft.py).
Cost      An early exit that was never trained guesses badly: the layers that are left out did something.
Left out  Training for the early exit; using the target's first layers' cache for both.
Source    Zhang et al. 2023, arXiv:2309.08168 (self-speculation); Elhoushi et al. 2024, arXiv:2404.16710 (early exit).
"""

from dataclasses import dataclass, is_dataclass, replace

from torch import nn

from effkit.core.checks import require_float
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER


@dataclass(frozen=True)
class EarlyExit(Technique):
    """The decoder without its last blocks.

    depth   share of the blocks that stay, at least one
    """

    depth: float = 0.5

    needs = frozenset({DECODER})
    paper = Paper("Elhoushi et al.", 2024, "LayerSkip: enabling early exit inference and self-speculative decoding",
                  "arXiv:2404.16710", "section 4")  # fmt: skip

    def __post_init__(self):
        require_float("depth", self.depth, 0.0, 1.0, open_low=True, hint="1 keeps every block")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        blocks, config = getattr(model, "blocks", None), getattr(model, "config", None)
        if not (isinstance(blocks, nn.ModuleList) and is_dataclass(config) and hasattr(config, "layers")):
            kind = type(model).__name__
            raise ValueError(f"EarlyExit needs a decoder with `blocks` and `config.layers`, as GPT has; {kind} has none")
        kept = max(1, round(self.depth * len(blocks)))
        note(model, "blocks", f"{len(blocks)} -> {kept}", "EarlyExit")
        model.blocks, model.config = blocks[:kept], replace(config, layers=kept)  # type: ignore[type-var, assignment]
        return model

    def claim(self, model: nn.Module) -> Reading:
        return Reading(len(model.blocks), "blocks", "counted", better="lower")  # type: ignore[arg-type]
