"""The roof is the lower of two lines; a machine's description is read from what Linux tells."""

import sys

import pytest

from effkit.core.report import Reading
from effkit.measure import Processor, Roofline, processor, roofline

HERE = Processor("a processor", 2, 2, ("avx2",), 2**20)


def rate(value, unit="macs/s"):
    return Reading(value, unit, "recorded")


BY_HAND = Roofline(
    HERE,
    rates={"float32": {64: rate(80e9), 128: rate(100e9), 256: rate(90e9)}, "int8": {64: rate(400e9)}},
    reads={2**20: rate(50e9, "B/s"), 2**28: rate(10e9, "B/s")},
    dispatch=rate(1e-6, "s"),
)


def test_peaks_are_the_best_sizes():
    assert BY_HAND.peaks["float32"].value == 100e9
    assert (BY_HAND.bandwidth.value, BY_HAND.cache_bandwidth.value) == (10e9, 50e9)


@pytest.mark.parametrize(
    ("intensity", "dtype", "cached", "value", "bound"),
    [
        (2.0, "float32", False, 20e9, "memory"),
        (2.0, "float32", True, 100e9, "compute"),  # the ridge itself
        (50.0, "float32", False, 100e9, "compute"),
        (20.0, "int8", False, 200e9, "memory"),
    ],
)
def test_the_lower_line_is_the_roof(intensity, dtype, cached, value, bound):
    assert BY_HAND.attainable(intensity, dtype, cached=cached).value == pytest.approx(value)
    assert BY_HAND.bound(intensity, dtype, cached=cached) == bound


def test_a_small_operator_is_bound_by_its_dispatch():
    assert BY_HAND.bound(50.0, macs=1e4) == "dispatch"  # 0.1 us of work
    assert BY_HAND.bound(50.0, macs=1e6) == "compute"


def test_a_dtype_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        BY_HAND.attainable(1.0, "bfloat16")


@pytest.mark.slow
def test_this_machine_has_a_roofline():
    here = roofline(sizes=(32, 64), largest=2**23)
    assert "float32" in here.peaks
    everything = [r for sweep in here.rates.values() for r in sweep.values()] + [*here.reads.values(), here.dispatch]
    assert all(r.provenance == "measured" and r.value > 0 for r in everything)
    assert max(here.reads) == 2**23
    assert here.attainable(1e9).value == here.peaks["float32"].value
    assert str(here.processor) in str(here)


def test_rates_count_the_bytes_that_are_read_and_macs_rather_than_flops(monkeypatch):
    """On a machine that reads a byte a second, and multiplies whole matrices in two."""
    module = sys.modules["effkit.measure.roofline"]
    taken = lambda f, **_: Reading(float(f.__self__.nbytes) if hasattr(f, "__self__") else 2.0, "s", "measured", 0.5)  # noqa: E731
    monkeypatch.setattr(module, "latency", taken)
    assert {r.value for r in module._reads(2**23).values()} == {1.0}
    rate = module._sweep("float32", (64,))[64]
    assert (rate.value, rate.spread) == (64**3 / 2, 64**3 / 8)  # a quarter of the time is a quarter of the rate


def test_a_processor_is_described_by_what_speed_hangs_on(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni avx512_bf16x\n")
    found = processor(told)
    assert (found.name, found.features) == ("Some CPU @ 2 GHz", ("avx2", "avx512_vnni"))
    assert processor(tmp_path / "nothing").name
