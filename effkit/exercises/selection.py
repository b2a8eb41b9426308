"""Exercises of theme 11: which choices are worth a look, and how good a set of choices is."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def frontier(points: Tensor) -> Tensor:
    """True for each row of points, (n, coordinates), that no other row beats: all are costs, less is better."""
    nowhere_worse = (points[:, None] <= points[None]).all(-1)  # [i, j]: i is nowhere worse than j
    somewhere_better = (points[:, None] < points[None]).any(-1)
    return ~(nowhere_worse & somewhere_better).any(0)


def clouds(rng: torch.Generator):
    """First by hand, with two equal points and a tie; then points on a coarse grid, which makes more of them."""
    yield case(torch.tensor([[1.0, 4.0], [2.0, 2.0], [2.0, 2.0], [3.0, 2.0], [4.0, 1.0], [4.0, 4.0]]))
    yield case(torch.tensor([[3.0, 3.0]]))
    for n, d in ((8, 2), (12, 2), (12, 3)):
        yield case(torch.randint(0, 5, (n, d), generator=rng).float())


def equals_beat_each_other(points):
    better = (points[:, None] <= points[None]).all(-1) & ~torch.eye(len(points), dtype=torch.bool)
    return ~better.any(0)


def better_everywhere(points):
    return ~(points[:, None] < points[None]).all(-1).any(0)


def best_of_each_axis(points):
    return (points == points.min(0).values).any(1)


def beats_instead_of_beaten(points):
    nowhere_worse = (points[:, None] <= points[None]).all(-1)
    return ~(nowhere_worse & (points[:, None] < points[None]).any(-1)).any(1)


def frontier_by_heart(points):
    return torch.tensor([True, True, True, False, True, False])


FRONTIER = Exercise(
    name="selection.frontier",
    prompt="""**What is worth a look?** Each row of `points`, a tensor of shape (n, coordinates), is one model: its bytes,
its loss, perhaps its latency. All are costs: less is better. Write `frontier(points)`, which returns a boolean tensor of
shape (n,): True where no other row *beats* this one. A row beats another if it is nowhere worse and somewhere better,
so two equal rows do not beat each other.""",
    reference=frontier,
    checks=(
        checks.not_the_librarys_own("pareto", "front"),
        checks.same_shape_and_dtype(clouds),
        checks.equals_reference(clouds),
        checks.input_unchanged(clouds),
    ),
    hints=(
        "Compare every row with every other; a row stays if no comparison goes against it.",
        "`points[:, None] <= points[None]` compares all pairs, of shape (n, n, coordinates).",
        "`beats = (a <= b).all(-1) & (a < b).any(-1)` with a = points[:, None], b = points[None]; then look by column.",
    ),
    after="Whatever is not on the frontier is a mistake, whatever your taste; which point of it you take is your taste.",
    wrong=(
        (equals_beat_each_other, "the right numbers"),
        (better_everywhere, "the right numbers"),
        (best_of_each_axis, "the right numbers"),
        (beats_instead_of_beaten, "the right numbers"),
        (frontier_by_heart, "shape and dtype"),
    ),
)


def area(points: Tensor, reference: Tensor) -> float:
    """The area that the rows of points, (n, 2), beat, as far as the corner `reference`, of shape (2,)."""
    total, ceiling = 0.0, reference[1].item()
    for x, y in sorted(points.tolist()):
        if x < reference[0] and y < ceiling:
            total += (reference[0].item() - x) * (ceiling - y)
            ceiling = y
    return total


def fronts(rng: torch.Generator):
    """First by hand; then points some of which are beaten, and some beyond the reference."""
    yield case(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([3.0, 3.0]))
    yield case(torch.tensor([[1.0, 1.0], [2.0, 2.0], [5.0, 0.0]]), torch.tensor([3.0, 3.0]))
    for n in (3, 6, 10):
        yield case(torch.randint(0, 9, (n, 2), generator=rng).float(), torch.tensor([7.0, 8.0]))


def counts_overlaps_twice(points, reference):
    return (reference - points).clamp(min=0).prod(1).sum().item()


def forgets_the_reference(points, reference):
    total, ceiling = 0.0, reference[1].item()
    for x, y in sorted(points.tolist()):
        if y < ceiling:
            total += (reference[0].item() - x) * (ceiling - y)
            ceiling = y
    return total


def only_the_best_point(points, reference):
    return (reference - points).clamp(min=0).prod(1).max().item()


def area_by_heart(points, reference):
    return 3.0


AREA = Exercise(
    name="selection.area",
    prompt="""**How good is a set of choices?** `points` of shape (n, 2) are costs, less is better, and `reference` of shape
(2,) is a corner that is worse than anything you would accept. Write `area(points, reference)`: the area of all (x, y) that
some point is nowhere worse than, as far as the corner; a number. Points beyond the corner in either direction add nothing,
and what two points cover both counts once.""",
    reference=area,
    checks=(
        checks.not_the_librarys_own("hypervolume"),
        checks.same_shape_and_dtype(fronts),
        checks.equals_reference(fronts),
        checks.input_unchanged(fronts),
    ),
    hints=(
        "A staircase: go from left to right, and add a strip wherever a point lies lower than all before it.",
        "The strip of a point reaches from its x to the corner, and from its y up to the lowest y so far.",
        "`for x, y in sorted(points.tolist()): if y < ceiling: total += (corner_x - x) * (ceiling - y); ceiling = y`",
    ),
    after="One number for a whole frontier: it grows with every good point, and never by a point that another one beats.",
    wrong=(
        (counts_overlaps_twice, "the right numbers"),
        (forgets_the_reference, "the right numbers"),
        (only_the_best_point, "the right numbers"),
        (area_by_heart, "the right numbers"),
    ),
)

EXERCISES = (FRONTIER, AREA)
