"""Which range? Finding scale and zero point.

Problem   The extremes of a group fix its grid, and one far value makes all steps coarse.
Idea      min-max covers everything; least squares gives up the far values when all others gain more.
Law       Least squares is never worse than min-max in squared error: it starts there and takes only improvements.
Source    Alternating minimization as in Lloyd 1982 (doi:10.1109/TIT.1982.1056489), here on a uniform grid.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from effkit.quantization.affine import dequantize, grid, quantize, storable

Grid = tuple[Tensor, Tensor]  # scale and zero point, both (*g, 1)


def min_max(x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False) -> Grid:
    """The smallest grid that covers every value."""
    return grid(x.amin(-1, keepdim=True).float(), x.amax(-1, keepdim=True).float(), bits=bits, symmetric=symmetric)


def least_squares(
    x: Float[Tensor, "*g n"], *, bits: int, symmetric: bool = False, shrinks: int = 12, rounds: int = 2
) -> Grid:
    """The grid with the least sum of squared errors among clipped ranges, each refined by the best scale for its codes.

    shrinks   clipped ranges tried, from the whole range down to 30 % of it
    rounds    alternations of codes given the scale, and scale given the codes
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    best = min_max(x, bits=bits, symmetric=symmetric)
    least = squared_error(x, best, bits)
    for part in torch.linspace(1.0, 0.3, shrinks).tolist():
        candidate = grid(low * part, high * part, bits=bits, symmetric=symmetric)
        for _ in range(rounds):
            best, least = better(x, best, least, candidate, bits)
            candidate = refit(x, candidate, bits)
        best, least = better(x, best, least, candidate, bits)
    return best


def refit(x: Float[Tensor, "*g n"], old: Grid, bits: int) -> Grid:
    """With the codes fixed, d/ds sum (x - s (q - z))^2 = 0 gives s = <x, q - z> / <q - z, q - z>."""
    scale, zero_point = old
    q = quantize(x, scale, zero_point, bits=bits).float() - zero_point
    fitted = (x * q).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True).clamp(min=1)
    return storable(torch.where(fitted > 0, fitted, scale)), zero_point


def squared_error(x: Float[Tensor, "*g n"], candidate: Grid, bits: int) -> Float[Tensor, "*g 1"]:
    return (x - dequantize(quantize(x, *candidate, bits=bits), *candidate)).square().sum(-1, keepdim=True)


def better(x: Tensor, best: Grid, least: Tensor, candidate: Grid, bits: int) -> tuple[Grid, Tensor]:
    """Group by group, the candidate where it has less error."""
    error = squared_error(x, candidate, bits)
    wins = error < least
    chosen = torch.where(wins, candidate[0], best[0]), torch.where(wins, candidate[1], best[1])
    return chosen, torch.where(wins, error, least)


OBSERVERS = {"min-max": min_max, "least-squares": least_squares}
#: observers whose zero points are real numbers
REAL_ZERO: frozenset[str] = frozenset()
