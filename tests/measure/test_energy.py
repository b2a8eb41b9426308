"""Counters wrap around and must not count twice; without one a number is an estimate and stays one."""

import sys
from types import SimpleNamespace

import pytest
import torch

from effkit.core.report import Reading
from effkit.measure import Power, carbon, energy, grid_intensity, once, places
from effkit.measure.energy import Nvml, Rapl, counters

RANGE = 1_000_000  # microjoules: these toy counters wrap around every joule


@pytest.fixture
def powercap(tmp_path):
    """A folder like /sys/class/powercap, and a way to use energy in it."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    for zone, name in (names | {"intel-rapl-mmio:0": "package-0"}).items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (tmp_path / zone / "energy_uj").write_text("900000\n")
    return tmp_path


def use(powercap, microjoules, zones=None):
    for zone in zones or powercap.iterdir():
        path = powercap / zone / "energy_uj"
        path.write_text(f"{(int(path.read_text()) + microjoules) % RANGE}\n")


def test_packages_and_memory_add_up_and_nothing_counts_twice(powercap):
    rapl = Rapl(powercap)
    use(powercap, 50_000)
    assert rapl.joules() == pytest.approx(2 * 0.05)
    assert rapl.name == "RAPL package-0, dram"


def test_a_counter_that_wraps_around_goes_on(powercap):
    rapl = Rapl(powercap)
    for step in range(1, 6):
        use(powercap, 300_000, ["intel-rapl:0"])  # the first step passes the end of the range
        assert rapl.joules() == pytest.approx(0.3 * step)


def test_a_difference_that_ignores_the_wrap_is_caught(powercap, monkeypatch):
    def naive(self):
        return sum(n - last for (n, _), (last, _) in zip(self._read(), self._last, strict=True)) / 1e6

    monkeypatch.setattr(Rapl, "joules", naive)
    with pytest.raises(AssertionError):
        test_a_counter_that_wraps_around_goes_on(powercap)


def test_with_a_counter_energy_is_measured(powercap):
    work = lambda: use(powercap, 40_000, ["intel-rapl:0"])  # noqa: E731
    reading = energy(work, seconds=Reading(0.01, "s", "recorded"), meters=[Rapl(powercap)], budget_s=0.5)
    assert (reading.value, reading.unit, reading.provenance) == (pytest.approx(0.04), "J", "measured")
    assert "RAPL" in reading.note


def test_without_a_counter_energy_is_an_estimate_with_an_interval():
    seconds, power = Reading(2.0, "s", "measured", 0.0), Power(core=10.0, low=5.0, high=20.0)
    reading = energy(lambda: None, seconds=seconds, meters=[], power=power)
    assert reading.value == 2.0 * power.reading().value
    assert reading.spread == pytest.approx(2.0 * power.reading().spread)
    assert (reading.unit, reading.provenance) == ("J", "estimated")
    assert str(reading).startswith("~") and "W a core" in reading.note


def test_a_counter_that_stands_still_is_not_believed(powercap):
    reading = energy(lambda: None, seconds=Reading(0.1, "s", "measured"), meters=[Rapl(powercap)], budget_s=0.1)
    assert reading.provenance == "estimated"


def test_a_single_call_gives_its_result_and_what_it_took(powercap, monkeypatch):
    module = sys.modules["effkit.measure.energy"]
    monkeypatch.setattr(module, "counters", lambda: [Rapl(powercap)])
    result, seconds, joules = once(lambda: use(powercap, 30_000, ["intel-rapl:0"]) or "done")
    assert (result, seconds.provenance, seconds.unit) == ("done", "measured", "s")
    assert (joules.value, joules.provenance) == (pytest.approx(0.03), "measured")
    monkeypatch.setattr(module, "counters", lambda: [])
    _, seconds, joules = once(lambda: None)
    assert joules.provenance == "estimated" and joules.value == seconds.value * Power().reading().value


def test_a_gpu_counts_millijoules(monkeypatch):
    counter = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetTotalEnergyConsumption=lambda handle: 7000
    )
    monkeypatch.setitem(sys.modules, "pynvml", counter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert Nvml().joules() == 7.0


def test_every_busy_core_draws_its_power(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    watts = Power(core=10.0, low=5.0, high=20.0).reading()
    assert (watts.value, watts.spread) == (30.0, 22.5)  # 15 to 60 W


def test_a_folder_without_counters_has_none(tmp_path):
    assert counters(tmp_path) == counters(tmp_path / "nothing") == []


def test_power_lies_in_its_interval():
    with pytest.raises(ValueError, match="core must be"):
        Power(core=30.0)


@pytest.mark.parametrize("provenance", ["estimated", "measured"])
def test_carbon_is_as_sure_as_its_weakest_part(provenance):
    grams = carbon(Reading(3.6e6, "J", provenance, 3.6e5), "France", pue=1.5)
    assert (grams.value, grams.spread) == (pytest.approx(44 * 1.5), pytest.approx(4.4 * 1.5))
    assert (grams.unit, grams.provenance) == ("gCO2e", "estimated" if provenance == "estimated" else "recorded")


def test_the_table_is_dated_and_sourced():
    assert len(places()) >= 15
    for place, row in places().items():
        assert 0 < row["value"] < 1000 and row["year"] >= 2020 and row["source"] and row["provenance"] == "recorded"
        assert str(row["year"]) in grid_intensity(place).note


def test_what_carbon_cannot_take_is_refused():
    with pytest.raises(ValueError, match="'Atlantis'"):
        grid_intensity("Atlantis")
    with pytest.raises(ValueError, match="pue"):
        carbon(Reading(1.0, "J", "measured"), pue=0.9)
    with pytest.raises(ValueError, match="joules"):
        carbon(Reading(1.0, "s", "measured"))
