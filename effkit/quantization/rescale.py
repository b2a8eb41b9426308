"""Rescaling: what is large on one side of a product and small on the other can change sides.

Problem   A layer's inputs differ: a few channels are far larger than the rest. Small steps matter most for the weights that
          meet them, and rounded activations are all as coarse as the largest wants it.
Idea      W x = (W diag(s)) (x / s) for any s > 0, and rounding sees only the factors.
          AWQ gives weights that meet large inputs finer steps: s = s_X^alpha with s_X the size of each input, and alpha the
          one of a grid that costs the layer's output least; then each group's range is cut as far as that pays. Theirs is
          the mean of |x|; the root of the mean of x^2 stands in X X^T already, and alpha, searched, makes up for it.
          SmoothQuant moves what is hard to round from activations to weights: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).
Law       AWQ is never worse than RTN in the layer's error on its calibration inputs: alpha = 0 uncut is RTN.
Cost      A number an input (16 bits for AWQ, 32 for SmoothQuant), and with SmoothQuant a division an activation.
Left out  The authors fold s into the layer before, a norm mostly: nothing is held and nothing divided, but it takes a
          reading of the graph, and layers with one input must share their s. AWQ's authors measure a whole block's output,
          and their code cuts no ranges of queries and keys, whose product no layer's own error speaks of. SmoothQuant's
          have one scale a weight matrix; here each output has its own.
Source    Lin et al. 2023, arXiv:2306.00978, eq. 4 and 5; Xiao et al. 2022, arXiv:2211.10438, eq. 3 and 4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.calibration import Statistics, layer_error
from effkit.core.checks import require_float, require_int
from effkit.core.task import Task
from effkit.core.technique import Paper, clone
from effkit.quantization.affine import SCALE_DTYPE, dequantize, grid, grouped, quantize, ungrouped
from effkit.quantization.integer import W8A8, int8_step, to_int8
from effkit.quantization.layers import look
from effkit.quantization.observers import Grid
from effkit.quantization.packed import RTN, PackedWeight
from effkit.zoo.gpt import Block

ALPHAS = [i / 20 for i in range(21)]
CUTS = [1 - i / 20 for i in range(11)]  # parts of a group's range, down to half of it


def column_scale(sizes: Float[Tensor, " n"], alpha: float) -> Float[Tensor, " n"]:
    """1 / s with s = (s_X / its maximum)^alpha, as bfloat16 holds it. A channel that was never used counts as 1e-4."""
    relative = sizes.float() / sizes.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (relative.clamp(min=1e-4) ** -alpha).to(SCALE_DTYPE).float()


def group_errors(off: Float[Tensor, "rows n"], gram: Float[Tensor, "n n"], group_size: int) -> Float[Tensor, "rows groups 1"]:
    """Each group's own part of the layer's error, as if all others were exact: a block on X X^T's diagonal says it."""
    if group_size == 0:
        return layer_error(off, torch.zeros_like(off), gram).float().reshape(1, 1, 1)
    groups = grouped(off, group_size).transpose(0, 1)
    count, _, size = groups.shape
    filled = F.pad(gram, (0, count * size - len(gram)) * 2).unflatten(0, (count, size)).unflatten(2, (count, size))
    blocks = filled.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return ((groups @ blocks) * groups).sum(-1).t()[..., None]


def cut_ranges(
    w: Float[Tensor, "rows n"], gram: Float[Tensor, "n n"], *, bits: int, group_size: int, symmetric: bool
) -> Grid:
    """Each group's grid over that part of its range that costs the layer's output least."""
    groups = grouped(w, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best, least = grid(low, high, bits=bits, symmetric=symmetric), torch.full_like(low, torch.inf)
    for part in CUTS:
        made = grid(low * part, high * part, bits=bits, symmetric=symmetric)
        off = groups - dequantize(quantize(groups, *made, bits=bits), *made)
        error = group_errors(ungrouped(off, tuple(w.shape)), gram, group_size)
        wins = error < least
        best = torch.where(wins, made[0], best[0]), torch.where(wins, made[1], best[1])
        least = torch.where(wins, error, least)
    return best


@dataclass(frozen=True)
class AWQ(RTN):
    """RTN of columns that were rescaled by what they meet; settings as RTN's. Convolutions, and layers that no input
    reaches, are rounded to nearest.

    clip      cut the groups' ranges where that pays
    examples  how many of task.calib are looked at
    """

    clip: bool = True
    examples: int = 256

    paper = Paper("Lin et al.", 2023, "AWQ: activation-aware weight quantization for LLM compression and acceleration",
                  "arXiv:2306.00978", "eq. 4 and 5")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        require_int("examples", self.examples, 1)

    def statistics(self, model: nn.Module, task: Task) -> Mapping[str, Statistics]:
        return look(self, model, task, otherwise="rounded to nearest")

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> PackedWeight:
        if seen is None:
            return super().store(weight, None)
        weight, gram, sizes = weight.float(), seen.gram.double(), seen.mean_square.sqrt()
        error = lambda store: layer_error(weight, store(), gram).item()  # noqa: E731
        tried = (column_scale(sizes, alpha) for alpha in ALPHAS)
        scale = min(tried, key=lambda scale: error(self.rescaled(weight, scale)))
        best = self.rescaled(weight, scale)
        return min(best, self.cut(weight, gram, scale), key=error) if self.clip else best

    def rescaled(self, weight: Float[Tensor, "rows n"], scale: Float[Tensor, " n"]) -> PackedWeight:
        """Rounded to nearest after a division by the column scale, which the store multiplies with again."""
        made = super().store(weight / scale, None)
        made.column_scale = scale.to(SCALE_DTYPE)
        return made

    def cut(self, weight: Float[Tensor, "rows n"], gram: Float[Tensor, "n n"], scale: Float[Tensor, " n"]) -> PackedWeight:
        weight, gram = weight / scale, (gram * scale * scale[:, None]).float()
        ranges = cut_ranges(weight, gram, **self.format())
        codes = ungrouped(quantize(grouped(weight, self.group_size), *ranges, bits=self.bits), tuple(weight.shape))
        made = PackedWeight.from_codes(codes, ranges, **self.format())
        made.column_scale = scale.to(SCALE_DTYPE)
        return made


def smoothing(largest_x: Float[Tensor, " in"], weight: Float[Tensor, "out in"], alpha: float) -> Float[Tensor, " in"]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); 1 where either is zero: nothing is to be gained there."""
    x, w = largest_x.double(), weight.double().abs().amax(0)
    s = x**alpha / w ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), s, 1.0).clamp(2.0**-60, 2.0**60).float()


def expected_error(weight: Float[Tensor, "out in"], seen: Statistics, s: Float[Tensor, " in"]) -> float:
    """What int8 loses of the layer's output when all tokens share a scale. The weights' part is exact, by X X^T. The
    activations' part is step^2 / 12 a value, as anywhere inside a step is as likely; where most values round to zero it is
    their own square."""
    scaled = weight.double() * s
    codes, scale = to_int8(scaled)
    step = int8_step((seen.absmax / s).max()).double()
    noise = torch.minimum(step**2 / 12, seen.mean_square / s.double() ** 2)
    return (layer_error(weight, codes * scale / s, seen.gram) + seen.tokens * (noise * scaled.square().sum(0)).sum()).item()


@dataclass(frozen=True)
class SmoothQuant(W8A8):
    """W8A8 of inputs that were divided, channel by channel, and weights that were multiplied by the same; settings as
    W8A8's. Layers that no input reaches are not smoothed.

    alpha   how much of the inputs' range moves into the weights: 0 none, 1 all; "search": for each layer what should lose
            least. That takes one scale for all tokens: X X^T does not say which ones each would find for itself
    """

    alpha: float | Literal["search"] = 0.5

    paper = Paper("Xiao et al.", 2022, "SmoothQuant: accurate and efficient post-training quantization for large language models",
                  "arXiv:2211.10438", "eq. 3 and 4")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.alpha != "search":
            require_float("alpha", self.alpha, 0.0, 1.0, hint='or "search"')
        elif self.activations != "tensor":
            raise ValueError(f'alpha "search" takes activations="tensor", got {self.activations!r}: it foresees one scale for all tokens; give a number')

    def statistics(self, model: nn.Module, task: Task) -> Mapping[str, Statistics]:
        return look(self, model, task, otherwise="not smoothed", kinds=(nn.Linear,))

    def divisor(self, weight: Float[Tensor, "out in"], seen: Statistics) -> Float[Tensor, " in"]:
        if self.alpha != "search":
            return smoothing(seen.absmax, weight, self.alpha)
        tried = [smoothing(seen.absmax, weight, alpha) for alpha in ALPHAS]
        return min(tried, key=lambda s: expected_error(weight, seen, s))


@torch.no_grad()
def outliers_put_in(model: nn.Module, *, channels: int = 4, factor: float = 64.0, rng: torch.Generator) -> nn.Module:
    """A construction: the same decoder, computing the same function, with outlier channels as large models grow them.

    The norms' weights of a few channels, the same in all blocks, are multiplied by `factor`, and what reads them is divided
    by it. Undoing that is as good as any method: what repairs this model may still fail on one that was trained to have
    outliers. A power of two changes no bit of the outputs.
    """
    model = clone(model)
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    if not blocks:
        raise ValueError(f"outliers_put_in takes a decoder built of effkit's blocks (zoo.GPT), got a {type(model).__name__} without any")
    require_int("channels", channels, 0, width := len(blocks[0].attention_norm.weight))
    require_float("factor", factor, 0.0, open_low=True)
    chosen = torch.randperm(width, generator=rng)[:channels]
    for block in blocks:
        attention, ff = block.attention, block.ff
        for norm, readers in ((block.attention_norm, (attention.q, attention.k, attention.v)), (block.ff_norm, (ff.gate, ff.up))):
            norm.weight[chosen] *= factor
            for layer in readers:
                layer.weight[:, chosen] /= factor
    return model
