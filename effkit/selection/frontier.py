"""The Pareto frontier, and the one number that says how good a frontier is.

Problem   A small file and a good score pull in opposite directions: of two models neither need be the better one.
Idea      Drop every point that another one beats or equals everywhere: what stays is the frontier, and any other
          choice is a mistake. The hypervolume of a frontier is the volume of what it beats, up to a reference point.
Costs     All coordinates are costs, less is better; a score where more is better enters with its sign turned.
Left out  Fast algorithms: slices cost O(n^d), and our frontiers are short. WFG (While et al. 2012) serves long ones.
Source    Zitzler & Thiele 1999, doi:10.1109/4235.797969, sec. 3.4 (hypervolume as the size of the dominated space).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether a is nowhere worse than b, and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def pareto(points: Sequence[Point]) -> list[int]:
    """Which points no other point dominates, as indices in order; equal points stay together."""
    _check(points)
    return [i for i, p in enumerate(points) if not any(dominates(q, p) for q in points)]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume of {x : p <= x <= reference for some point p}, coordinate by coordinate.

    Cut along the last axis wherever a point begins: between two cuts the cross-section stays the same, the hypervolume
    of the points that have begun, one dimension lower. Points that are not below the reference everywhere add nothing.
    """
    _check([*points, reference])
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if len(reference) == 0 or not inside:
        return float(bool(inside))
    inside = [inside[i] for i in pareto(inside)]  # the rest adds nothing, and would cost slices
    cuts = [*sorted({p[-1] for p in inside}), reference[-1]]
    return sum(
        (high - low) * hypervolume([p[:-1] for p in inside if p[-1] <= low], reference[:-1])
        for low, high in pairwise(cuts)
    )


def _check(points: Sequence[Point]) -> None:
    if len({len(p) for p in points}) > 1:
        raise ValueError(f"points must have equally many coordinates, got {sorted({len(p) for p in points})}")
    if any(math.isnan(x) for p in points for x in p):
        raise ValueError("a coordinate is NaN, which is neither better nor worse than anything; leave that point out")
