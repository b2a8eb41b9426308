"""LoRA: learn the change of a matrix as a product of two thin ones, over a base that stays as it is.

Problem   Fine-tuning all weights holds a gradient and two moments for each, and leaves a whole model per domain.
Idea      y = x W_0^T + scale * (x A^T) B^T, A of r x n and B of m x r. W_0 is frozen; only A and B learn, r (m + n)
          numbers. B starts at 0, so training starts from the base itself; A starts at random, for with both at 0 no
          gradient would reach either.
Scale     alpha / r, or alpha / sqrt(r), with which the update keeps its size as r grows (rsLoRA).
Base      Any layer that is linear in its input, packed ones too: LoRA over 4 bits is QLoRA. It must pass gradients.
Merge     W_0 + scale * B A is one matrix again: no cost when running, but a 4-bit base has no room for it.
Left out  Dropout on the adapters' inputs; adapters on embeddings and convolutions.
Source    Hu et al. 2021, arXiv:2106.09685, eq. 3; QLoRA: Dettmers et al. 2023, arXiv:2305.14314, eq. 5;
          rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, eq. 6.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.checks import require_choice, require_float, require_int, require_seed
from effkit.core.report import Reading
from effkit.core.surgery import dense_weight, find, inherit, is_linear_like, note, replace_modules
from effkit.core.task import Batch, Task
from effkit.core.technique import Paper, Technique, Trait
from effkit.core.training import Schedule, fit

SCALES = {"alpha/r": lambda alpha, rank: alpha / rank, "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank)}


@stored
class Adapter(nn.Module):
    """The change of one matrix: delta() = scale * B A."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float, scaling: str = "alpha/r"):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.alpha, self.scaling = alpha, scaling
        self.A = nn.Parameter(torch.zeros(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    @torch.no_grad()
    def reset(self, rng: torch.Generator) -> None:
        """B = 0 and A Kaiming-uniform, each entry within 1 / sqrt(n): together they change nothing yet."""
        bound = 1 / math.sqrt(self.in_features)
        draws = torch.rand(self.A.shape, generator=rng)
        self.A.copy_((2 * draws - 1) * bound)
        self.B.zero_()

    scale = property(lambda self: SCALES[self.scaling](self.alpha, self.rank))

    def delta(self) -> Float[Tensor, "out in"]:
        return self.scale * self.B @ self.A

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        """Thin first: r (m + n) multiplications a token, never m n."""
        return F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * self.scale


@stored
class LoRALinear(nn.Module):
    """base(x) + adapter(x); once merged, the base holds the sum and runs alone."""

    def __init__(self, merged: bool = False):
        super().__init__()
        self.merged = merged
        self.base: nn.Module = nn.Identity()
        self.adapter: Adapter = nn.Identity()  # type: ignore[assignment]  # both come from `over`, or from a file

    @classmethod
    def over(cls, base: nn.Module, adapter: Adapter) -> "LoRALinear":
        """The layer with an adapter; its hooks move to the pair, its weights become frozen."""
        new = cls()
        new.base, new.adapter = base, adapter
        inherit(new, base)
        base.requires_grad_(False)
        return new

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        w = dense_weight(self.base)
        return w if self.merged else w + self.adapter.delta().to(w.dtype)

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        y = self.base(x)
        return y if self.merged else y + self.adapter(x).to(y.dtype)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> layer, of all that carry an adapter."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def insert(model: nn.Module, layers: list[tuple[str, nn.Module]], adapters: list[Adapter], *, by: str = "") -> nn.Module:
    """The model with everything frozen but these adapters, one over each layer."""
    model.requires_grad_(False)
    built: dict[int, nn.Module] = {}
    for (path, layer), adapter in zip(layers, adapters, strict=True):
        built[id(layer)] = LoRALinear.over(layer, adapter)
        note(model, path, f"an adapter of rank {adapter.rank} over {type(layer).__name__}", by)
    return replace_modules(model, built)


UNADAPTED = Trait("a model without adapters", lambda model: not adapted(model))


@dataclass(frozen=True)
class LoRA(Technique):
    """Adapters over every linear layer, trained on task.train; everything else is frozen and stays bit by bit.

    rank     columns of B and rows of A; a layer with fewer inputs or outputs gets as many as these
    scaling  "alpha/r", or "alpha/sqrt(r)" (rsLoRA)
    epochs   passes over task.train; 0 inserts the adapters and leaves them untrained
    steps    a number of training steps, instead of whole epochs
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    layers: str = "*"
    epochs: int = 1
    steps: int | None = None
    lr: float = 5e-3
    seed: int = 0

    needs = frozenset({UNADAPTED})
    breaks = frozenset({UNADAPTED})
    paper = Paper("Hu et al.", 2021, "LoRA: low-rank adaptation of large language models", "arXiv:2106.09685", "eq. 3")

    def __post_init__(self):
        require_int("rank", self.rank, 1, hint="8 is usual; for no adapters, leave LoRA out")
        require_float("alpha", self.alpha, 0.0, open_low=True, hint="it scales the update; 2 * rank is usual")
        require_choice("scaling", self.scaling, tuple(SCALES))
        require_int("epochs", self.epochs, 0, hint="0 only inserts the adapters")
        if self.steps is not None:
            require_int("steps", self.steps, 0, hint="0 only inserts the adapters")
        require_float("lr", self.lr, 0.0, open_low=True)
        require_seed(self.seed)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a model that carries adapters already, and says where; and for a compiled one."""
        if not UNADAPTED.holds(model):
            raise ValueError(f"LoRA needs {UNADAPTED}: this one has them at {next(iter(adapted(model)))}; strip(merge(model)) first")
        super().check(model)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        steps = self.length(task)
        layers = find(model, _outermost(model), layers=self.layers, by="LoRA")
        self._check(layers)
        rng = torch.Generator().manual_seed(self.seed)
        model = insert(model, layers, [self.adapter(layer, rng) for _, layer in layers], by="LoRA")
        if steps:
            fit(model, task, Schedule(steps, self.lr), loss=_loss_of(task, model), label="LoRA")
        return model

    def length(self, task: Task) -> int:
        """How many training steps; 0 asks nothing of the task."""
        if self.steps == 0 or (self.steps is None and self.epochs == 0):
            return 0
        task.require("train", "loss", by=self)
        return self.epochs * len(task.train) if self.steps is None else self.steps  # type: ignore[arg-type]

    def adapter(self, layer: nn.Module, rng: torch.Generator) -> Adapter:
        """A fresh adapter for one layer, in float32 at least."""
        sizes: tuple[int, int] = (layer.in_features, layer.out_features)  # type: ignore[assignment]
        made, weight = Adapter(*sizes, min(self.rank, *sizes), self.alpha, self.scaling), dense_weight(layer)
        made.reset(rng)
        return made.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def claim(self, model: nn.Module) -> Reading:
        """What the adapters hold, as a share of the matrices that they change."""
        layers = adapted(model).values()
        held = sum(m.adapter.A.numel() + m.adapter.B.numel() for m in layers)
        return Reading(held / sum(m.in_features * m.out_features for m in layers), "of the adapted weights", "counted", better="lower")

    def _check(self, layers: list[tuple[str, nn.Module]]) -> None:
        most: int = max(max(layer.in_features, layer.out_features) for _, layer in layers)  # type: ignore
        if self.rank > most:
            raise ValueError(f"rank must be at most {most} here, got {self.rank}: no layer has so many inputs or outputs")
        for path, layer in layers:
            if type(layer) is not nn.Linear and not _passes_gradients(layer):
                where = f"{type(layer).__name__} at {path or '(the model)'}"
                how = "put LoRA before that technique, or leave the layer out with `layers`"
                raise ValueError(f"LoRA cannot train over {where}: its rounding stops the gradient; {how}")


def _outermost(model: nn.Module):
    """Matches linear layers, a layer made of layers as one: two factors get one adapter, on their product."""
    inside = {id(m) for outer in model.modules() if is_linear_like(outer) for m in outer.modules() if m is not outer}
    return lambda module: is_linear_like(module) and id(module) not in inside


def _passes_gradients(layer: nn.Module) -> bool:
    """Whether d(sum of y)/dx is W^T 1, as it is for a layer that is linear in x."""
    weight = dense_weight(layer).detach()
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device).repeat(2, 1).requires_grad_()
    with torch.enable_grad():
        y = layer(x)
        found = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)
    wanted = weight.sum(0).expand_as(found)
    return bool((found - wanted).norm() <= 0.05 * wanted.norm() + 1e-6)


def _loss_of(task: Task, model: nn.Module):
    """The task's loss, with the statistics of batch norms left as they are: they belong to the base."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        for norm in norms:
            norm.eval()
        return task.loss(model(batch[0]), batch)  # type: ignore[misc]

    return loss
