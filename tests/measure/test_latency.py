"""The median's interval covers as promised; races are run in turns; a reading says how it was taken."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from effkit.measure import interleaved, latency, median_interval, samples
from effkit.measure.latency import summary


def exact_coverage(n: int, k: int) -> float:
    """P(x_(k) <= m <= x_(n+1-k)) for samples of any continuous distribution."""
    return 1 - 2 * binom.cdf(k - 1, n, 0.5)


@given(n=st.integers(6, 400), confidence=st.sampled_from([0.5, 0.9, 0.95]))
def test_interval_is_the_tightest_that_covers(n, confidence):
    low, high = median_interval(list(range(1, n + 1)), confidence=confidence)
    assert low + high == n + 1  # symmetric ranks
    assert exact_coverage(n, int(low)) >= confidence - 1e-12
    assert low + 1 > n / 2 or exact_coverage(n, int(low) + 1) < confidence


@pytest.mark.parametrize("n", [6, 11, 30])
@pytest.mark.parametrize("draw", ["exponential", "lognormal", "standard_cauchy"])
def test_covers_the_true_median_at_the_stated_rate(n, draw, interval=median_interval):
    median = {"exponential": np.log(2), "lognormal": 1.0, "standard_cauchy": 0.0}[draw]
    rng = np.random.default_rng(0)
    intervals = [interval(row) for row in getattr(rng, draw)(size=(1500, n))]
    covered = np.mean([low <= median <= high for low, high in intervals])
    assert covered >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 1500)


def test_an_interval_one_rank_too_narrow_is_caught():
    def narrow(row):
        low, high = median_interval(row)
        ordered = sorted(row)
        return ordered[ordered.index(low) + 1], ordered[ordered.index(high) - 1]

    with pytest.raises(AssertionError):
        test_covers_the_true_median_at_the_stated_rate(11, "exponential", interval=narrow)


def test_five_samples_are_too_few():
    with pytest.raises(ValueError, match="5 samples .* at least 6"):
        median_interval([1.0, 2.0, 3.0, 4.0, 5.0])


def test_racers_take_turns():
    calls = []
    timed = samples({n: lambda n=n: calls.append(n) for n in "abc"}, min_repeats=4, budget_s=0.0, warmup=1)
    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns == ["a", "b", "c"] * 5  # one turn is the warm-up
    assert all(len(seconds) == 4 for seconds in timed.values())


def test_functions_run_one_after_the_other_are_caught(monkeypatch):
    import sys

    module = sys.modules["effkit.measure.latency"]
    one_by_one = module.samples
    alone = lambda functions, **kw: {n: one_by_one({n: f}, **kw)[n] for n, f in functions.items()}  # noqa: E731
    monkeypatch.setitem(globals(), "samples", alone)
    with pytest.raises(AssertionError):
        test_racers_take_turns()


def test_a_reading_says_what_it_is():
    reading = latency(lambda: time.sleep(0.002), min_repeats=3, budget_s=0.0)
    assert reading.value >= 0.002
    assert (reading.unit, reading.provenance, reading.better) == ("s", "measured", "lower")
    assert "n = 3" in reading.note and "thread" in reading.note


def test_the_spread_is_half_the_interquartile_range():
    reading = summary(torch.arange(1.0, 6.0), "s")
    assert (reading.value, reading.spread) == (3, (4 - 2) / 2)


@pytest.mark.slow
def test_a_slower_function_loses_the_race():
    race = interleaved({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.03)}, budget_s=0.0)
    assert race["long"].value > 2 * race["short"].value
    assert (race["long"] / race["short"]).provenance == "measured"


def test_a_short_function_is_timed_in_blocks():
    calls = []
    for _ in range(5):  # a call that is interrupted by other programs looks long
        samples({"it": lambda: calls.append(1)}, min_repeats=2, budget_s=0.0)
    assert len(calls) > 100  # a call takes less than a microsecond, a block a millisecond


@pytest.mark.parametrize("settings", [{"min_repeats": 0}, {"warmup": 0}, {"budget_s": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        latency(lambda: None, **settings)
