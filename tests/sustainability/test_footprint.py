"""Shares add up to the whole, a cleaner grid leaves the machine's part, and the peer's table ranks places alike."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit.core.report import Reading
from effkit.measure import carbon, places
from effkit.sustainability import Machine, electricity, embodied, footprint, operational, per_correct, per_token
from effkit.sustainability import footprint as module_function

some = st.floats(0.1, 1000.0)
part = st.floats(0.05, 1.0)
JOULES = Reading(3.6e6, "J", "measured", 3.6e5, "lower")
HOUR = Reading(3600.0, "s", "measured", 36.0, "lower")
SERVER = Machine(kg=2500.0, years=6.0, utilization=0.85)


@given(some, st.floats(0.5, 20.0), part, st.lists(some, min_size=1, max_size=5))
def test_the_shares_of_all_that_ever_runs_add_up_to_the_machine(total, years, utilization, jobs):
    life = years * 8760 * utilization
    hours = [life * job / sum(jobs) for job in jobs]  # jobs that fill its busy life
    shares = [embodied(total, hours=h, years=years, utilization=utilization) for h in hours]
    assert sum(shares) == pytest.approx(total)


def test_an_idle_machine_makes_each_hour_dearer():
    settings = dict(hours=1.0, years=4.0)
    assert embodied(100.0, utilization=0.1, **settings) == pytest.approx(
        5 * embodied(100.0, utilization=0.5, **settings)
    )


def test_forgetting_utilization_is_caught(monkeypatch):
    naive = lambda total, *, hours, years, utilization: total * hours / (years * 8760)  # noqa: E731
    monkeypatch.setitem(globals(), "embodied", naive)
    with pytest.raises(AssertionError):
        test_the_shares_of_all_that_ever_runs_add_up_to_the_machine.hypothesis.inner_test(10.0, 4.0, 0.5, [1.0, 2.0])


def test_electricity_and_grams_by_hand():
    assert electricity(10.0, watts=300.0, devices=8, pue=1.2) == pytest.approx(28.8)  # 10 h * 2.4 kW * 1.2
    assert operational(28.8, intensity=50.0) == pytest.approx(1440.0)


def test_a_footprint_by_hand():
    one = footprint(JOULES, HOUR, SERVER, place="France", pue=1.1)
    assert one.operational.value == pytest.approx(44 * 1.1)  # 1 kWh
    assert one.embodied.value == pytest.approx(2.5e6 / (6 * 8760 * 0.85))  # grams of one busy hour, 56 of them
    assert one.total.value == pytest.approx(one.operational.value + one.embodied.value)
    assert one.embodied_share == pytest.approx(one.embodied.value / one.total.value)
    assert one.total.unit == "gCO2e" and one.total.provenance == "estimated"
    assert "embodied" in str(one)


def test_the_cleaner_the_grid_the_more_the_machine_weighs():
    by_place = {place: footprint(JOULES, HOUR, SERVER, place=place) for place in places()}
    cleanest_first = sorted(by_place, key=lambda place: places()[place]["value"])
    shares = [by_place[place].embodied_share for place in cleanest_first]
    assert shares == sorted(shares, reverse=True) and shares[0] > 2 * shares[-1]
    assert len({f.embodied.value for f in by_place.values()}) == 1


def test_measured_energy_stays_only_as_sure_as_the_grid_figure():
    assert footprint(JOULES, HOUR, SERVER).operational.provenance == "recorded"
    estimated = Reading(3.6e6, "J", "estimated", 3.6e5)
    assert footprint(estimated, HOUR, SERVER).operational.provenance == "estimated"


def test_a_machine_that_emitted_nothing_on_a_free_joule():
    free = footprint(Reading(0.0, "J", "measured"), HOUR, Machine(kg=0.0))
    assert free.total.value == free.embodied_share == 0.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Machine(kg=-1.0), "kg must be"),
        (lambda: Machine(kg=1.0, years=0.0), "years must be"),
        (lambda: Machine(kg=1.0, utilization=1.2), "utilization must be"),
        (lambda: footprint(JOULES, JOULES, SERVER), "seconds must be a time"),
        (lambda: footprint(HOUR, HOUR, SERVER), "carbon takes joules"),
        (lambda: footprint(JOULES, HOUR, SERVER, place="Atlantis"), "'Atlantis'"),
        (lambda: per_token(JOULES, 0), "tokens must be"),
        (lambda: per_correct(JOULES, Reading(91.2, "%", "measured")), "divide percent by 100"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()


def test_energy_per_token_and_per_correct_answer():
    joules = Reading(10.0, "J", "estimated", 5.0, "lower")
    assert per_token(joules, 20).value == 0.5 and per_token(joules, 20).unit == "J/token"
    right = per_correct(joules, Reading(0.8, "", "measured", 0.04, "higher"))
    assert right.value == pytest.approx(12.5) and right.unit == "J/correct answer"
    assert right.spread == pytest.approx(12.5 * math.hypot(0.5, 0.05))
    assert right.provenance == "estimated" and right.better == "lower"
    assert per_correct(joules, Reading(0.0, "", "measured")).value == math.inf


@given(some, part, some, part)
def test_a_cheaper_but_worse_model_may_cost_more_for_each_right_answer(joules, accuracy, more, better):
    cost = lambda j, a: per_correct(Reading(j, "J", "counted"), Reading(a, "", "counted")).value  # noqa: E731
    assert (cost(joules, accuracy) < cost(more, better)) == (joules * better < more * accuracy) or math.isclose(
        joules * better, more * accuracy, rel_tol=1e-9
    )


@pytest.mark.peers("codecarbon")
def test_codecarbon_lists_the_same_places_alike():
    """Its table is of another year: single grids change by up to a third, their order hardly."""
    root = Path(importlib.util.find_spec("codecarbon").origin).parent
    table = json.loads((root / "data" / "private_infra" / "global_energy_mix.json").read_text())
    theirs = {row["country_name"]: row.get("carbon_intensity") for row in table.values()}
    both = {place: (row["value"], theirs[place]) for place, row in places().items() if theirs.get(place)}
    assert len(both) >= 15
    assert all(2 / 3 < ours / other < 3 / 2 for ours, other in both.values()), both


@pytest.mark.peers("codecarbon")
def test_codecarbon_turns_kwh_into_grams_as_we_do():
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    emissions = Emissions(DataSource())
    kilograms = emissions.get_country_emissions(Energy.from_energy(kWh=2.0), GeoMetadata("FRA", "France"))
    ours = carbon(Reading(7.2e6, "J", "counted"), "France")
    assert 1000 * kilograms / ours.value == pytest.approx(56.039 / 44, rel=0.35)  # their year, our year


def test_the_module_offers_what_it_names():
    assert module_function is footprint
