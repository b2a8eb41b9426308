"""Readings in arithmetic: the weakest provenance wins, spreads travel to first order, and so does what is better."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit.core import report
from effkit.core.report import PROVENANCES, Reading, Report, Table

sizes = st.floats(0.1, 100.0)


def time(value, spread=None, provenance="measured"):
    return Reading(value, "s", provenance, spread, "lower")


@given(st.sampled_from(PROVENANCES), st.sampled_from(PROVENANCES))
def test_the_weakest_provenance_wins(a, b):
    first, second = time(2.0, provenance=a), time(3.0, provenance=b)
    weakest = min(a, b, key=PROVENANCES.index)
    assert {r.provenance for r in (first / second, first * second, first - second, first + second)} == {weakest}


@given(sizes, sizes, sizes, sizes)
def test_relative_spreads_add_in_quadrature_for_products_and_ratios(a, b, s, t):
    expected = math.hypot(s / a, t / b)
    for result in (time(a, s) / time(b, t), time(a, s) * time(b, t)):
        assert result.spread / result.value == pytest.approx(expected)


@given(sizes, sizes, sizes, sizes)
def test_absolute_spreads_add_in_quadrature_for_sums(a, b, s, t):
    assert (time(a, s) - time(b, t)).spread == (time(a, s) + time(b, t)).spread == pytest.approx(math.hypot(s, t))


def test_a_value_of_zero_keeps_its_spread():
    assert (time(0.0, 2.0) * time(3.0)).spread == 6.0
    assert (time(0.0, 2.0) / time(4.0)).spread == 0.5


def test_plain_numbers_scale_and_shift():
    assert (time(4.0, 1.0) / -2).spread == 0.5
    assert (time(4.0, 1.0) - 1) == Reading(3.0, "s", "measured", 1.0, "lower")


def test_what_is_better_survives_where_like_meets_like():
    a, b, plain = time(2.0), time(4.0), Reading(4.0, "s", "measured")
    assert {r.better for r in (a - b, a + b, a / b, a / plain, a * 3)} == {"lower"}
    assert {r.better for r in (a * b, plain / a, a / Reading(2.0, "J", "measured", better="lower"))} == {""}
    assert (a - Reading(1.0, "s", "measured", better="higher")).better == ""


def test_units_are_kept_apart():
    assert (time(2.0) / time(4.0)).unit == "x"
    assert (Reading(6.0, "J", "counted") / time(2.0)).unit == "J/s"
    with pytest.raises(ValueError, match="cannot add s and J"):
        time(1.0) + Reading(1.0, "J", "counted")
    with pytest.raises(ValueError, match="provenance must be one of"):
        Reading(1.0, "s", "guessed")


def test_dropping_a_spread_is_caught(monkeypatch):
    monkeypatch.setattr(report, "math", SimpleNamespace(hypot=lambda first, *rest: first))
    with pytest.raises(AssertionError):
        test_absolute_spreads_add_in_quadrature_for_sums.hypothesis.inner_test(1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        (time(0.0021, 0.0001), "2.1 ±0.1 ms"),
        (Reading(2**21, "B", "counted"), "2 MiB"),
        (Reading(53_000_000, "macs", "counted"), "53 M macs"),
        (Reading(7.5, "J", "estimated"), "~7.5 J"),
        (time(1.0, 0.2), "(!)"),
    ],
)
def test_a_reading_in_words(reading, text):
    assert text in str(reading)


def test_a_table_keeps_its_rows_and_says_what_its_marks_mean():
    table = Table(
        [Report("a", {"latency": time(1.0, 0.5)}, "a pass"), Report("b", {"energy": Reading(1.0, "J", "estimated")})]
    )
    assert table.columns == ["latency", "energy"] and len(table) == 2
    assert table.cells()[1] == ["a", "1 ±0.5 s (!)", "-"]
    assert all(part in table.footnote() for part in ("a pass", "~ estimated", "± half the interquartile range", "busy"))
    with pytest.raises(KeyError, match="there are a, b"):
        table["c"]


def test_every_figure_of_a_table_says_where_it_comes_from():
    """By its column's line under the table; by itself where it is not like the others of its column."""
    macs = Reading(5.0, "macs", "counted")
    rows = [Report(name, {"latency": time(1.0), "macs": macs, "energy": Reading(1.0, "J", "estimated")}) for name in "ab"]
    old = Report("old", {"latency": time(3.0, provenance="recorded"), "macs": replace(macs, provenance="estimated")})
    table = Table([*rows, old])
    for shown in (str(table), table._repr_html_()):
        assert all(part in shown for part in ("measured: latency;", "counted: macs;", "~ estimated"))
        assert "3 s (recorded)" in shown and "1 s (" not in shown and "~5 macs" in shown and "~5 macs (" not in shown
    assert "counted: macs" in str(Report("one", {"macs": macs})) and "measured" not in str(Report("one", {"macs": macs}))


def test_a_column_without_its_provenance_is_caught(monkeypatch):
    monkeypatch.setattr(Table, "provenances", lambda self: dict.fromkeys(self.columns, "measured"))
    with pytest.raises(AssertionError):
        test_every_figure_of_a_table_says_where_it_comes_from()
