"""Feature caching: what hardly changes from one step of a diffusion model to the next is not computed each time.

Problem   A diffusion model draws an image in some fifty passes, each over the whole network, and from one to the next
          its deep features, what the image shows, change little; its shallow ones, the strokes, change more.
Idea      A U-Net has two ways from input to output: down through all levels, and straight across at the top. Take the
          long way every `interval` steps, and in between use what it last said: DeepCache.
Cost      Not exact: the deep features are up to interval - 1 steps old. The image changes; how much is to be measured.
Limit     Nothing is gained where the top level is most of the work, or where each step moves the shallow features so far that it
          counts as another drawing's (FAR).
Left out  Full passes that are not evenly spaced (the paper also crowds them where features change most), and the choice of
          the branch that is kept: here it is always the one below the top level.
Source    Ma et al. 2023, arXiv:2312.00858, section 3.2 and eq. 9 (one full pass in N, evenly spaced).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique

#: an input so far from the last one, over that one's length, is another drawing's. On the shipped U-Net a step of one drawing
#: was at most .43 (3 to 50 steps), and from one drawing to another it was .64 or more (14 drawings of 20 steps)
FAR = 0.5


@stored
class Kept(nn.Module):
    """A part whose last output serves again while a drawing goes on: the same images, each nearer to its end.

    Anything else is computed afresh: another number or size of images, a time that did not go down, an input that is
    far from the last one, as where two drawings take turns, gradients."""

    def __init__(self, interval: int):
        super().__init__()
        self.interval, self.part = interval, nn.Identity()
        self.last: tuple[Tensor, Tensor, Tensor] | None = None  # input and time of the last pass; what the part said last
        self.age = 0  # passes since then

    def forward(self, x: Float[Tensor, "b c h w"], time: Float[Tensor, " b"]) -> Float[Tensor, "b d h w"]:
        self.age = self.age + 1 if self._serves(x, time) else 0
        said = self.last[2] if self.age and self.last else self.part(x, time)
        self.last = None if torch.is_grad_enabled() else (x, time, said)
        return said

    def _serves(self, x: Tensor, time: Tensor) -> bool:
        if self.last is None or torch.is_grad_enabled() or self.age + 1 >= self.interval:
            return False
        like, before, _ = self.last
        alike = (like.shape, like.dtype, like.device) == (x.shape, x.dtype, x.device)
        return alike and bool((time < before).all() and (length(x - like) < FAR * length(like)).all())


def length(x: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Of each image."""
    return x.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class DeepCache(Technique):
    """The U-Net's depths run once in `interval` steps of a drawing.

    interval   1 runs them always
    """

    interval: int = 3

    paper = Paper("Ma et al.", 2023, "DeepCache: accelerating diffusion models for free", "arXiv:2312.00858", "section 3.2")

    def __post_init__(self):
        require_int("interval", self.interval, 1, hint="1 keeps nothing")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        depths = getattr(model, "depths", None)
        if not isinstance(depths, nn.Module):
            raise ValueError(f"DeepCache needs a U-Net with `depths`, as zoo.UNet has; {type(model).__name__} has none")
        kept = Kept(self.interval)
        kept.part = depths.part if isinstance(depths, Kept) else depths  # type: ignore[assignment]
        model.depths = kept.train(model.training)
        note(model, "depths", f"run once in {self.interval} steps of a drawing", "DeepCache")
        return model

    def claim(self, model: nn.Module) -> Reading:
        return Reading(1 / model.depths.interval, "of the passes run the depths", "counted", better="lower")  # type: ignore
