"""Masks: which weights stay, and where that is written so that training cannot undo it.

Problem   Zeros that are merely written into a weight are gone after the first step of the optimizer.
Idea      The layer keeps its weight and a mask, and applies W where the mask is true, 0 elsewhere: a parametrization.
          A masked weight gets no gradient, and whatever the optimizer does to it is never seen.
Choice    P = {w : score(w) < tau}, with tau the score below which the wanted share lies; ties go in order of index, so
          that the sparsity is exactly what was asked for.
Cost      The file holds all weights, zeros too, and one byte of mask for each: nothing is smaller or faster yet.
Source    Han et al. 2015, arXiv:1506.02626, sec. 3.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.checkpoint import stored
from effkit.core.surgery import dense_weight


def threshold(score: Float[Tensor, "..."], *, sparsity: float) -> float:
    """tau: the smallest score that stays when the share `sparsity` goes, rounded to whole weights."""
    n = round(sparsity * score.numel())
    return score.flatten().float().kthvalue(min(n + 1, score.numel())).values.item()


def keep_largest(score: Float[Tensor, "..."], *, sparsity: float) -> Bool[Tensor, "..."]:
    """True stays: all but the `sparsity` smallest, exactly as many, whatever the ties."""
    return without_smallest(score, round(sparsity * score.numel()))


def without_smallest(score: Float[Tensor, "..."], n: int) -> Bool[Tensor, "..."]:
    """All but the n smallest; of equal ones the first go."""
    flat = score.flatten().float()
    if n == 0:
        return torch.ones_like(score, dtype=torch.bool)
    last = flat.kthvalue(n).values  # the largest score that goes
    keep, ties = flat >= last, (flat == last).nonzero().squeeze(1)
    keep[ties[: n - int((~keep).sum())]] = False
    return keep.reshape(score.shape)


def choose(scores: dict[str, Tensor], *, sparsity: float, scope: str, least: int = 0) -> dict[str, Tensor]:
    """What stays of each tensor: the same share of every one ("layer"), or the best of all together ("global").

    least   so many of every tensor stay at any rate"""
    if scope == "layer":
        count = {name: min(round(sparsity * s.numel()), max(0, s.numel() - least)) for name, s in scores.items()}
        return {name: without_smallest(s, count[name]) for name, s in scores.items()}
    spared = [_spare(s.flatten().float(), least) for s in scores.values()]
    everything, sizes = torch.cat(spared), [s.numel() for s in spared]
    n = min(round(sparsity * sum(sizes)), int((everything < torch.inf).sum()))
    parts = without_smallest(everything, n).split(sizes)
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def _spare(score: Float[Tensor, " n"], least: int) -> Float[Tensor, " n"]:
    """The best `least` beyond any comparison."""
    return score.index_fill(0, score.topk(min(least, len(score))).indices, torch.inf)


@stored
class Mask(nn.Module):
    """W -> W where `keep`, 0 elsewhere; registered as a parametrization of a layer's weight."""

    keep: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("keep", torch.ones(self.shape, dtype=torch.bool))

    def forward(self, w: Tensor) -> Tensor:
        return torch.where(self.keep, w, 0.0)


def mask_of(layer: nn.Module) -> Mask | None:
    """The mask on a layer's weight, or None."""
    held: Any = getattr(layer, "parametrizations", {})
    return next((p for p in held["weight"] if isinstance(p, Mask)), None) if "weight" in held else None


def mask_(layer: nn.Module, keep: Bool[Tensor, "..."]) -> None:
    """Masks a layer's weight; what is masked already stays so. The stored numbers beneath become zero too."""
    mask = mask_of(layer)
    if mask is None:
        weight = dense_weight(layer)
        mask = Mask(tuple(weight.shape)).to(weight.device)
        parametrize.register_parametrization(layer, "weight", mask)
    mask.keep &= keep
    held: Any = layer.parametrizations["weight"]  # type: ignore[index]
    if len(held) == 1:
        held.original.data = mask(held.original.data)  # a new tensor: the old one may be expanded


def masked_share(layers: Iterable[nn.Module]) -> float:
    """The share of weights that their masks hold at zero."""
    masks = [(mask.keep, dense_weight(layer)) for layer in layers if (mask := mask_of(layer)) is not None]
    return sum(int((~keep & (w == 0)).sum()) for keep, w in masks) / max(1, sum(w.numel() for _, w in masks))
