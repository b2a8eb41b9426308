"""Which range? Finding scale and zero point.

Problem   The extremes of a group fix its grid, and one far value makes all steps coarse.
Idea      Six answers, all from a group of numbers to its grid:
            min-max        covers everything
            percentile     gives up a fixed share of the numbers at each end
            least-squares  gives up far values when all others gain more
            kl             clips where the histogram, merged into as many bins as there are codes, tells most of the original
            real-zero      least squares with a zero point between the codes: w_hat = round((w - z) / s) s + z, z real
            hqq            a real zero point too, for the sum of |error|^0.7, which far values count less in
Law       Least squares is never worse than min-max in squared error, nor real-zero than least squares, nor hqq than
          min-max in its own measure: each starts there and takes only improvements.
Choice    A real zero point takes 16 bits instead of 8, and the number 0 is no longer exact.
Limit     `grouped` fills a last, shorter group with zeros, and they count here like weights.
Source    Percentile: Wu et al. 2020, arXiv:2004.09602, sec. 3.1. KL: Migacz 2017, "8-bit inference with TensorRT", GTC.
          HQQ: Badri & Shaji 2023, "Half-quadratic quantization of large machine learning models",
          mobiusml.github.io/hqq_blog. Least squares alternates as Lloyd 1982 (doi:10.1109/TIT.1982.1056489) does.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from effkit.core.checks import require_float
from effkit.quantization.affine import SCALE_DTYPE, dequantize, grid, quantize, storable

Grid = tuple[Tensor, Tensor]  # scale and zero point, both (*g, 1)


def min_max(x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False) -> Grid:
    """The smallest grid that covers every value."""
    return grid(x.amin(-1, keepdim=True).float(), x.amax(-1, keepdim=True).float(), bits=bits, symmetric=symmetric)


def percentile(x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False, percent: float = 99.9) -> Grid:
    """The grid that covers all but the outermost 100 - percent % at either end.

    Between two numbers it takes the point in proportion: of 32 numbers, 99.9 % give up 3 % of the outermost gaps."""
    require_float("percent", percent, 50, 100, open_low=True, hint="it counts from below, and 100 is min-max")
    ordered, place = x.float().sort(-1).values, percent / 100 * (x.shape[-1] - 1)
    below, above = int(place), min(int(place) + 1, x.shape[-1] - 1)
    low, high = (torch.lerp(o[..., [below]], o[..., [above]], place - below) for o in (ordered.flip(-1), ordered))
    return grid(low, high, bits=bits, symmetric=symmetric)


# Least squares


def least_squares(
    x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False, tries: int = 19, rounds: int = 2
) -> Grid:
    """The grid with the least sum of squared errors among scales from 1.4 to 0.3 of min-max's, then refitted.

    A coarser scale than min-max's wins in small groups of many codes, where a few numbers can all lie near grid points.

    tries   scales, each with the zero points that `zero_points` proposes
    rounds  alternations of codes given the scale, and scale given the codes
    """
    x = x.float()
    best = whole = min_max(x, bits=bits, symmetric=symmetric)
    least = squared_error(x, best, bits)
    for part in torch.linspace(1.4, 0.3, tries).tolist():
        scale = storable(whole[0] * part)
        for zero_point in [whole[1]] if symmetric else zero_points(x, scale, bits):
            best, least = better(best, least, (scale, zero_point), squared_error(x, (scale, zero_point), bits))
    for _ in range(rounds):
        candidate = refit(x, best, bits)
        best, least = better(best, least, candidate, squared_error(x, candidate, bits))
    return best


def zero_points(x: Float[Tensor, "*g n"], scale: Float[Tensor, "*g 1"], bits: int) -> list[Tensor]:
    """Where a grid that is too short for its numbers may be cut: above, below, or half and half."""
    top = 2**bits - 1
    above = (-x.amin(-1, keepdim=True) / scale).round().clamp(0, top)
    below = (top - (x.amax(-1, keepdim=True) / scale).round()).clamp(0, top)
    return [above, below, ((above + below) / 2).round()]


def refit(x: Float[Tensor, "*g n"], old: Grid, bits: int) -> Grid:
    """With the codes fixed, d/ds sum (x - s (q - z))^2 = 0 gives s = <x, q - z> / <q - z, q - z>."""
    scale, zero_point = old
    q = quantize(x, scale, zero_point, bits=bits).float() - zero_point
    fitted = (x * q).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True).clamp(min=1)
    return storable(torch.where(fitted > 0, fitted, scale)), zero_point


def squared_error(x: Float[Tensor, "*g n"], candidate: Grid, bits: int) -> Float[Tensor, "*g 1"]:
    return (x - dequantize(quantize(x, *candidate, bits=bits), *candidate)).square().sum(-1, keepdim=True)


def better(best: Grid, least: Tensor, candidate: Grid, error: Tensor) -> tuple[Grid, Tensor]:
    """Group by group, the candidate where it has less error."""
    wins = error < least
    chosen = torch.where(wins, candidate[0], best[0]), torch.where(wins, candidate[1], best[1])
    return chosen, torch.where(wins, error, least)


def error_surface(
    x: Float[Tensor, "*g n"], scales: Float[Tensor, "s"], zero_points: Float[Tensor, "z"], *, bits: int
) -> Float[Tensor, "*g s z"]:
    """The squared error of each group on every grid of these scales and zero points."""
    return squared_error(x[..., None, None, :], (scales[:, None, None], zero_points[:, None]), bits)[..., 0]


def optimum(x: Float[Tensor, "*g n"], *, bits: int) -> Grid:
    """The best grid there is, found by trying every scale that bfloat16 can hold, from far too fine to too coarse to
    hold anything, with every zero point. For small groups, and few of them."""
    largest = x.abs().amax().float()
    scales = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    scales = scales[(scales >= largest / 2 ** (bits + 6)) & (scales <= 2 * largest)] if largest > 0 else scales.new_ones(1)
    surface = error_surface(x.float(), scales, torch.arange(2.0**bits), bits=bits)
    which = surface.flatten(-2).argmin(-1, keepdim=True)
    return scales[which // 2**bits], (which % 2**bits).float()


# Kullback-Leibler


def kl(x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False, bins: int = 2048, tries: int = 64) -> Grid:
    """Clips magnitudes where the histogram of what is left, the clipped ones heaped at its end, has the least KL
    divergence to its own version in 2^(bits - 1) levels. Zeros don't count: they are exact on every grid. Counted, the half
    of a ReLU's outputs would be one bin that no level may share, and the limit falls until it doesn't: integer-only, the
    shipped ResNet is then right about 16 % of 200 test images, not 98.5.

    Levels are those of magnitudes with a sign, as in the source; numbers of one sign have twice as many codes, and are
    clipped as if they had not. The source tries each bin as the limit; here `tries` of them.

    A histogram of fewer numbers than bins tells nothing: such groups share one, of all of them, and those that reach
    beyond its limit are clipped. Of few numbers in all, none is: bins that hold one number each lose nothing as levels."""
    low, high = x.amin(-1, keepdim=True).float(), x.amax(-1, keepdim=True).float()
    size = x.float().abs().flatten(0, -2) if x.shape[-1] >= bins else x.float().abs().reshape(1, -1)
    largest = size.amax(-1, keepdim=True)
    place = (size / torch.where(largest > 0, largest, 1.0) * bins).long().clamp(max=bins - 1)
    place += torch.arange(len(size), device=x.device)[:, None] * bins
    counts = place[size > 0].bincount(minlength=len(size) * bins).view(-1, bins).float()
    kept = torch.full_like(largest, bins)
    least = divergence(counts, bins, 2 ** (bits - 1))
    for keep in torch.linspace(bins, 2 ** (bits - 1), tries).long().tolist()[1:]:
        found = divergence(counts, keep, 2 ** (bits - 1))
        kept, least = torch.where(found < least, float(keep), kept), torch.minimum(found, least)
    limit = (largest * kept / bins).view(low.shape if len(size) > 1 else (1,) * x.dim())
    return grid(torch.maximum(low, -limit), torch.minimum(high, limit), bits=bits, symmetric=symmetric)


def divergence(counts: Float[Tensor, "rows bins"], keep: int, levels: int) -> Float[Tensor, "rows 1"]:
    """KL of the first `keep` bins, to the last of which falls all that is clipped, from the same bins averaged within
    levels: of equal width, over the bins that hold anything. An empty level counts as 1/10,000 of a number."""
    p = clipped(counts, keep)
    level = torch.arange(keep, device=counts.device) * levels // keep
    levelled = counts.new_zeros(len(counts), levels)
    inside = levelled.index_add(1, level, counts[:, :keep])
    filled = levelled.index_add(1, level, (p > 0).float())
    q = torch.where(p > 0, (inside / filled.clamp(min=1))[:, level].clamp(min=1e-4), 0.0)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1, keepdim=True)


def clipped(counts: Float[Tensor, "rows bins"], keep: int) -> Float[Tensor, "rows keep"]:
    """The histogram of the clipped numbers: what lay beyond is now at the end."""
    return torch.cat((counts[:, : keep - 1], counts[:, keep - 1 :].sum(-1, keepdim=True)), -1)


# Real zero points


def real_zero(x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False, rounds: int = 6) -> Grid:
    """Least squares, then scale and zero point together: a regression of the numbers on their codes, codes found anew.

    It starts from the best grid with 0 on it, and from that of the numbers' own range, which may lie on one side of 0."""
    _refuse_symmetric("real-zero", symmetric)
    x = x.float()
    best = least_squares(x, bits=bits)
    least = squared_error(x, best, bits)
    for candidate in (best, own_range(x, bits)):
        for _ in range(rounds):
            q = quantize(x, *candidate, bits=bits).float()
            centred, mean = q - q.mean(-1, keepdim=True), q.mean(-1, keepdim=True)
            scale = (x * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp(min=0.5)
            scale = storable(torch.where(scale > 0, scale, candidate[0]))
            candidate = scale, short(mean - x.mean(-1, keepdim=True) / scale)
            best, least = better(best, least, candidate, squared_error(x, candidate, bits))
    return best


def half_quadratic(
    x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False, p: float = 0.7, beta: float = 10.0, rounds: int = 20
) -> Grid:
    """HQQ: the zero point with the least sum of |error|^p, the scale being that of min-max.

    The error e is split from a variable u that may differ from it at the price of beta / 2 (u - e)^2, beta growing by 1 %
    a round: u is then `shrink`, and the zero point a mean. Errors are in steps here, so that beta means the same for all
    groups; in the weights' own units, as the authors have it, an error of a thousandth is shrunk to 0 whatever it is, and
    what is left is a least-squares zero point."""
    _refuse_symmetric("hqq", symmetric)
    x = x.float()
    best, candidate = min_max(x, bits=bits), own_range(x, bits)
    measure = lambda grid: (x - dequantize(quantize(x, *grid, bits=bits), *grid)).abs().pow(p).sum(-1, keepdim=True)  # noqa: E731
    least, scale = measure(best), candidate[0]
    for step in range(rounds):
        best, least = better(best, least, candidate, measure(candidate))
        q = quantize(x, *candidate, bits=bits).float()
        error = x / scale - (q - candidate[1])
        candidate = scale, short((q - x / scale + shrink(error, beta * 1.01**step, p)).mean(-1, keepdim=True))
    return best


def own_range(x: Float[Tensor, "*g n"], bits: int) -> Grid:
    """From the smallest number to the largest, whether 0 lies between them or not."""
    low = x.amin(-1, keepdim=True)
    scale = storable((x.amax(-1, keepdim=True) - low) / (2**bits - 1))
    return scale, short(-low / scale)


def shrink(x: Float[Tensor, "*s"], beta: float, p: float) -> Float[Tensor, "*s"]:
    """argmin over u of |u|^p + beta / 2 (u - x)^2, nearly: sign(x) max(0, |x| - |x|^(p - 1) / beta)."""
    return x.sign() * (x.abs() - x.abs().pow(p - 1) / beta).clamp(min=0)


def short(zero_point: Float[Tensor, "*g 1"]) -> Float[Tensor, "*g 1"]:
    """As it will be stored, in bfloat16: eight digits, so that of 8-bit codes no fraction is left."""
    return zero_point.to(SCALE_DTYPE).float()


def _refuse_symmetric(name: str, symmetric: bool) -> None:
    if symmetric:
        raise ValueError(f"search={name!r} looks for a zero point, and a symmetric grid's is fixed: take symmetric=False, or 'least-squares'")


OBSERVERS = {"min-max": min_max, "percentile": percentile, "least-squares": least_squares, "kl": kl,
             "real-zero": real_zero, "hqq": half_quadratic}  # fmt: skip
#: observers whose zero points are real numbers
REAL_ZERO = frozenset({"real-zero", "hqq"})
