"""Grouped queries: fewer key-value heads, in a model that was trained with more.

Problem   Bytes of a token in the cache are those of its keys and values: 2 * layers * kv_heads * head_dim numbers. Many
          query heads would do with the same ones, but models are trained already.
Idea      Let several heads share the mean of their projections, and train for a short while. A single head left is
          multi-query attention (Shazeer 2019).
Cost      The mean of heads that are not alike is like none of them: before training, the model is broken.
What came Bits a token more than gpt-small with its 4 heads (`effkit study caching`): two heads 2.63, after 100 steps .38; one
          head 4.57, and 1.01.
Left out  Choosing which heads go together: neighbours do, since a query head knows its key-value head by its place. Other
          starts than the mean, such as one of the heads, which Ainslie et al. found worse; here none was measured.
Source    Ainslie et al. 2023, arXiv:2305.13245, section 2.1.
"""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from effkit.caching.kv import held_per_token
from effkit.core.checks import require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import dense_weight, inherit, note, replace_modules
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.training import Schedule, fit
from effkit.core.traits import DECODER, FLOAT_WEIGHTS, UNMASKED
from effkit.zoo.gpt import GPT


def pooled(heads: Float[Tensor, "gd n"], *, head_dim: int, kv_heads: int) -> Float[Tensor, "hd n"]:
    """The rows of neighbouring heads averaged, so that kv_heads of them are left."""
    return heads.unflatten(0, (kv_heads, -1, head_dim)).mean(1).flatten(0, 1)


@dataclass(frozen=True)
class GroupHeads(Technique):
    """Key and value heads of a trained decoder averaged in groups, then all of it trained on task.train.

    kv_heads  how many are left in each layer; a divisor of how many there are
    steps     of training; None: one pass over task.train; 0 leaves the model as averaging left it
    """

    kv_heads: int = 1
    steps: int | None = None
    lr: float = 1e-3

    needs = frozenset({DECODER, FLOAT_WEIGHTS, UNMASKED})
    paper = Paper("Ainslie et al.", 2023, "GQA: training generalized multi-query transformer models from multi-head checkpoints",
                  "arXiv:2305.13245", "section 2.1")  # fmt: skip

    def __post_init__(self):
        require_int("kv_heads", self.kv_heads, 1, hint="1 is multi-query attention")
        if self.steps is not None:
            require_int("steps", self.steps, 0, hint="0 averages and trains nothing")
        require_float("lr", self.lr, 0.0, open_low=True)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        if not isinstance(model, GPT):
            raise ValueError(f"GroupHeads needs a decoder whose blocks have key and value layers, as GPT has; {type(model).__name__} has none")
        head_dim, blocks = model.rope.head_dim, list(model.blocks)
        layers: set[Any] = {layer for block in blocks for layer in (block.attention.k, block.attention.v)}  # type: ignore[union-attr]
        heads = sorted({len(dense_weight(layer)) // head_dim for layer in layers})
        if any(n % self.kv_heads for n in heads):
            few = ", ".join(str(n) for n in range(1, heads[0]) if not any(h % n for h in heads))
            raise ValueError(f"kv_heads must divide the model's {heads}, got {self.kv_heads}: take {few or 1}")
        if heads == [self.kv_heads]:
            return model
        if self.steps != 0:
            task.require("train", "loss", by=self)
        # not by swap, which leaves alone what a draft inside the model shares; the draft keeps its own
        model = replace_modules(model, {id(layer): inherit(self.grouped(layer, head_dim), layer) for layer in layers})
        note(model, "blocks", f"{heads[-1]} -> {self.kv_heads} key-value heads", "GroupHeads")
        model.config = replace(model.config, kv_heads=self.kv_heads)  # type: ignore[type-var]
        if self.steps != 0:
            steps = len(task.train) if self.steps is None else self.steps  # type: ignore[arg-type]
            fit(model, task, Schedule(steps, self.lr), label="GroupHeads")
            model.zero_grad(set_to_none=True)
        return model

    def grouped(self, layer: Any, head_dim: int) -> nn.Linear:
        """The layer with fewer heads, its weights plain."""
        weight = pooled(dense_weight(layer).detach(), head_dim=head_dim, kv_heads=self.kv_heads)
        new = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), bias=False)
        new.weight = nn.Parameter(weight)
        return new

    def claim(self, model: nn.Module) -> Reading:
        return held_per_token(model)
