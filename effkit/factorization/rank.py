"""Choosing ranks: by energy, or by one budget for all layers.

Problem   Two factors of rank r hold r (m + n) numbers instead of m n: they save nothing unless r < m n / (m + n), which
          for a square matrix is half of its rank. And layers differ: one lives in 20 directions, another needs them all.
Idea      By Eckart and Young, what rank r loses is the sum of the squared singular values beyond r. So each singular
          value has a gain, its square, and a price, m + n parameters: buy the best gain per price until the money is
          spent. A layer whose next direction would take it beyond m n is bought whole and stays as it is.
Limit     Gains are squared distances in the weights, or in the layer's outputs where the weights were whitened
          (weighted_svd.py); what a layer's error does to the loss is not in them.
Source    Eckart & Young 1936, doi:10.1007/BF02288367; the greedy order is Dantzig's for knapsacks (1957,
          doi:10.1287/opre.5.2.266).
"""

import heapq
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from effkit.core.checks import require_float, require_int


def break_even(rows: int, columns: int) -> float:
    """The rank from which two factors hold as many numbers as the matrix."""
    return rows * columns / (rows + columns)


def largest_useful(rows: int, columns: int) -> int:
    """The largest rank below the break-even; 0 for a single row or column, which no factors can shorten."""
    return (rows * columns - 1) // (rows + columns)


def require_one(technique: object, *ways: str) -> None:
    """Raises ValueError where several of these fields say how thin, or one badly: a rank from 1 on, or a share."""
    given = {name: value for name in ways if (value := getattr(technique, name)) is not None}
    if len(given) > 1:
        names = f"{', '.join(ways[:-1])} and {ways[-1]}"
        raise ValueError(f"give one of {names}, got {given}: each alone decides every rank")
    for name, value in given.items():
        if name == "rank":
            require_int(name, value, 1, hint="one number for every layer; for less loss without a number, give a share instead")
        else:
            require_float(name, value, 0.0, 1.0, open_low=True, hint="a share; 1 changes nothing")


def by_energy(singular: Float[Tensor, " k"], energy: float) -> int:
    """The smallest rank whose singular values hold this share of the sum of all squares; at least 1."""
    lost = singular.double().square().flip(0).cumsum(0)  # of the last 1, 2, ...: summed from the small end, to the bit
    return max(1, len(singular) - int((lost <= (1 - energy) * lost[-1]).sum()))


def by_budget(spectra: Sequence[Float[Tensor, " k"]], shapes: Sequence[tuple[int, int]], budget: int) -> list[int | None]:
    """A rank for each layer, None where it stays whole, so that all together hold at most `budget` numbers.

    spectra   singular values of each layer, largest first;  shapes   (rows, columns) of each

    Raises ValueError where even rank 1 everywhere exceeds the budget.
    """
    offers = [_offers(s, *shape) for s, shape in zip(spectra, shapes, strict=True)]
    bought = [1] * len(offers)
    left = budget - sum(own[0][1] for own in offers)
    if left < 0:
        raise ValueError(f"a budget of {budget} parameters is too small: rank 1 everywhere takes {budget - left}")
    heap = [(-own[1][0] / own[1][1], i) for i, own in enumerate(offers) if len(own) > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        price = offers[i][bought[i]][1]
        if price > left:  # too dear now; another layer's step may still fit
            continue
        left, bought[i] = left - price, bought[i] + 1
        if bought[i] < len(offers[i]):
            gain, price = offers[i][bought[i]]
            heapq.heappush(heap, (-gain / price, i))
    return [None if n == len(own) else n for n, own in zip(bought, offers, strict=True)]


def _offers(singular: Float[Tensor, " k"], rows: int, columns: int) -> list[tuple[float, int]]:
    """(gain, price) of rank 1, 2, ... below the break-even, and last of the whole matrix."""
    gains = singular.double().square().tolist()
    steps = min(largest_useful(rows, columns), len(gains))
    rest = rows * columns - steps * (rows + columns)
    return [(gain, rows + columns) for gain in gains[:steps]] + [(sum(gains[steps:]), rest)]
