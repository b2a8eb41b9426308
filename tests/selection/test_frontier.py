"""Pareto frontier and hypervolume: laws that geometry promises, Optuna's own numbers, planted bugs."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit.selection import dominates, frontier, hypervolume, pareto


def clouds(dimensions=(1, 2, 3), most=7):
    """A reference at 1 in every direction, and points around the box below it; a coarse grid makes ties."""
    return st.sampled_from(dimensions).flatmap(
        lambda d: st.tuples(
            st.lists(st.tuples(*[st.integers(-6, 7).map(lambda i: i / 6) for _ in range(d)]), max_size=most),
            st.just((1.0,) * d),
        )
    )


@given(clouds())
def test_the_frontier_is_what_nothing_dominates_and_all_else_is_dominated_by_it(cloud):
    points, _ = cloud
    kept = pareto(points)
    assert not any(dominates(points[i], points[j]) for i, j in ((a, b) for a in kept for b in kept))
    for i in set(range(len(points))) - set(kept):
        assert any(dominates(points[j], points[i]) for j in kept)


@given(clouds(), st.randoms(use_true_random=False))
def test_the_frontier_does_not_depend_on_the_order_and_is_its_own_frontier(cloud, rng):
    points, _ = cloud
    best = sorted(points[i] for i in pareto(points))
    mixed = rng.sample(points, len(points))
    assert sorted(mixed[i] for i in pareto(mixed)) == best
    assert [best[i] for i in pareto(best)] == best


@given(clouds())
def test_hypervolume_is_that_of_the_frontier_and_no_point_lowers_it(cloud):
    points, reference = cloud
    whole = hypervolume(points, reference)
    assert hypervolume([points[i] for i in pareto(points)], reference) == pytest.approx(whole)
    assert all(hypervolume(points[:n], reference) <= whole + 1e-12 for n in range(len(points)))


def inclusion_exclusion(points, reference) -> float:
    """Boxes that overlap, counted by the textbook."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            volume = 1.0
            for axis, end in enumerate(reference):
                volume *= max(0.0, end - max(p[axis] for p in chosen))
            total -= (-1) ** size * volume
    return total


@settings(max_examples=60)
@given(clouds(dimensions=(1, 2, 3, 4), most=5))
def test_hypervolume_equals_inclusion_and_exclusion(cloud):
    points, reference = cloud
    assert hypervolume(points, reference) == pytest.approx(inclusion_exclusion(points, reference), abs=1e-9)


def test_hypervolume_equals_optunas():
    _hypervolume = pytest.importorskip("optuna._hypervolume")
    import numpy as np

    rng = random.Random(0)
    for d in (2, 3):
        points = [tuple(0.9 * rng.random() for _ in range(d)) for _ in range(30)]
        theirs = _hypervolume.compute_hypervolume(np.array(points), np.full(d, 0.9))
        assert hypervolume(points, (0.9,) * d) == pytest.approx(theirs)


def test_by_hand():
    """Two boxes, 2 x 1 and 1 x 2, that share a square."""
    points = [(1.0, 2.0), (2.0, 1.0), (2.5, 2.5)]
    assert pareto(points) == [0, 1]
    assert hypervolume(points, (3.0, 3.0)) == 2 + 2 - 1
    assert hypervolume([], (3.0, 3.0)) == hypervolume([(3.0, 0.0)], (3.0, 3.0)) == 0


def test_equal_points_stay_together():
    assert pareto([(1.0, 1.0), (1.0, 1.0), (1.0, 2.0)]) == [0, 1]


@pytest.mark.parametrize("points", [[(1.0,), (1.0, 2.0)], [(float("nan"), 1.0)]])
def test_what_cannot_be_compared_is_refused(points):
    with pytest.raises(ValueError, match="coordinate"):
        pareto(points)


def test_a_weak_inequality_everywhere_is_caught(monkeypatch):
    """If equal points dominated each other, both would vanish."""
    monkeypatch.setattr(frontier, "dominates", lambda a, b: a != b and all(x <= y for x, y in zip(a, b, strict=True)))
    test_equal_points_stay_together()  # different points: no bug
    monkeypatch.setattr(frontier, "dominates", lambda a, b: all(x <= y for x, y in zip(a, b, strict=True)))
    with pytest.raises(AssertionError):
        test_equal_points_stay_together()


def test_forgetting_where_slices_begin_is_caught(monkeypatch):
    monkeypatch.setattr(frontier, "pairwise", lambda cuts: [(min(cuts), max(cuts))])
    with pytest.raises(AssertionError):
        test_by_hand()
