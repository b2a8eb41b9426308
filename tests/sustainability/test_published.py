"""Published accounts come out of their own inputs, to within the rounding of what was printed."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit.sustainability import ACCOUNTS, Machine, electricity, embodied, operational, span
from effkit.sustainability.published import BLOOM, BLOOM_TOTAL, PATTERSON, STRUBELL, bloom_total

LINES = [line for lines in ACCOUNTS.values() for line in lines]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.what)
def test_a_line_agrees_with_its_inputs(line):
    assert line.agrees, (line.published, line.computed())
    assert line.computed().value == pytest.approx(span(line.published)[0], rel=0.04)
    assert line.computed().provenance == "recorded" and line.source.startswith("arXiv:")


def test_the_whole_of_bloom():
    """The whole account: 433,196 kWh at 57 g is 24.7 t, waiting 14.6 t, the machines 11.2 t: 50.5 t."""
    low, high = span(BLOOM_TOTAL)
    assert low <= bloom_total() <= high
    assert [f"{line.computed().value:.1f}" for line in BLOOM if line.unit == "t"] == ["24.7", "14.6", "11.2"]


def test_bloom_by_the_library_s_own_functions():
    kwh = electricity(1_082_990, watts=400)
    assert round(kwh) == 433_196
    server, gpu = Machine(2500.0, 6.0, 0.85), Machine(150.0, 6.0, 0.85)
    life = [dict(years=m.years, utilization=m.utilization) for m in (server, gpu)]
    made = embodied(server.kg, hours=1_082_990 / 8, **life[0]) + embodied(gpu.kg, hours=1_082_990, **life[1])
    tonnes = (operational(kwh + 256_646, intensity=57) + 1000 * made) / 1e6
    assert f"{tonnes:.1f}" == BLOOM_TOTAL


@pytest.mark.parametrize("left_out", ["PUE", "hours"])
def test_an_account_that_leaves_out_an_input_is_caught(left_out):
    for line in STRUBELL + PATTERSON:
        if left_out in line.inputs and line.what != "Meena, energy":
            inputs = {name: value for name, value in line.inputs.items() if name != left_out}
            assert not replace(line, inputs=inputs).agrees


def test_the_other_pound_is_caught():
    tonnes = replace(BLOOM[1], inputs=BLOOM[1].inputs | {"t a g": 1 / 453.6 / 2000})  # short tons
    assert not tonnes.agrees


@given(st.decimals("0.01", "1e6", places=2))
def test_a_printed_number_stands_for_what_rounds_to_it(number):
    low, high = span(f"{number:,}")
    assert high - low == pytest.approx(0.01)
    assert (low + high) / 2 == pytest.approx(float(number))


def test_the_span_of_some_numbers():
    assert span("3.1") == pytest.approx((3.05, 3.15))
    assert span("1,287") == (1286.5, 1287.5)
    assert span(400.0) == (400.0, 400.0)
