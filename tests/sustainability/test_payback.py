"""Payback: two lines cross where they must, the interval holds the truth, and the meters see the technique's own work."""

import math
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effkit.core.report import Reading
from effkit.core.task import Task
from effkit.core.technique import Identity, Technique
from effkit.sustainability import Payback, payback
from effkit.sustainability.payback import inferences

some = st.floats(0.01, 1000.0)
share = st.floats(0.0, 0.5)
module = sys.modules["effkit.sustainability.payback"]


def joules(value, spread=None, provenance="estimated"):
    return Reading(value, "J", provenance, spread, "lower")


@given(some, some, some)
def test_the_two_lines_cross_there(cost, before, after):
    n = inferences(cost, before, after)
    if math.isinf(n):
        assert after >= before
    else:
        assert cost + n * after == pytest.approx(n * before)


@given(some, some, some, share, share, share, st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_the_interval_holds_whatever_the_readings_allow(cost, before, after, c, b, a, u, v, w):
    known = Payback(joules(cost, c * cost), joules(before, b * before), joules(after, a * after))
    low, high = known.interval
    truth = inferences(cost * (1 + u * c), before * (1 + v * b), after * (1 + w * a))
    assert low * (1 - 1e-9) <= known.inferences <= high * (1 + 1e-9)
    assert low * (1 - 1e-9) <= truth <= high * (1 + 1e-9)


def test_an_interval_that_ignores_one_spread_is_caught(monkeypatch):
    monkeypatch.setattr(module, "corners", lambda reading: (reading.value, reading.value))
    with pytest.raises(AssertionError):
        test_the_interval_holds_whatever_the_readings_allow.hypothesis.inner_test(10, 3, 1, 0.1, 0.1, 0.1, 1, 1, -1)


def test_forgetting_what_the_compressed_model_still_takes_is_caught(monkeypatch):
    monkeypatch.setitem(globals(), "inferences", lambda cost, before, after: cost / before)
    with pytest.raises(AssertionError):
        test_the_two_lines_cross_there.hypothesis.inner_test(10.0, 3.0, 1.0)


def test_by_hand():
    known = Payback(joules(100.0, 10.0), joules(3.0, 0.5), joules(1.0, 0.5))
    assert known.inferences == 50.0
    assert known.interval == (90.0 / 3.0, 110.0 / 1.0)
    assert known.saved(50).value == 0.0 and known.saved(60).value == 20.0
    assert known.saved(10).unit == "J" and known.saved(10).provenance == "estimated"
    assert str(known).startswith("pays back after 50 inferences (30 to 110)")


def test_no_saving_never_pays_and_a_free_one_pays_at_once():
    assert str(Payback(joules(1.0), joules(2.0), joules(3.0))).startswith("never pays back")
    assert Payback(joules(0.0), joules(2.0), joules(3.0)).inferences == 0.0
    unclear = Payback(joules(1.0), joules(3.0, 1.0), joules(2.0, 1.0))
    assert unclear.inferences == 1.0 and unclear.interval[1] == math.inf


def test_an_assumed_power_cancels():
    """In joules by one power or in seconds: the same number, but the assumption's interval is gone from the second."""
    seconds = [Reading(v, "s", "measured", v / 50, "lower") for v in (20.0, 0.3, 0.2)]
    power = Reading(24.0, "W", "estimated", 20.0)
    by_watts = [replace(s * power, unit="J") for s in seconds]
    assert Payback(*by_watts).inferences == pytest.approx(Payback(*seconds).inferences)
    assert Payback(*by_watts).interval[1] == math.inf > Payback(*seconds).interval[1]


def test_units_must_agree():
    with pytest.raises(ValueError, match="must share one unit, got J, s"):
        Payback(joules(1.0), joules(1.0), Reading(1.0, "s", "measured"))


@dataclass(frozen=True)
class Halve(Technique):
    """Works hard once; what comes out does half the products."""

    loops: int = 200
    paper = Identity.paper

    def rewrite_(self, model, task):
        for _ in range(self.loops):
            model(*task.example)
        return model[0]

    def claim(self, model):
        return Reading(1.0, "x", "counted")


def linear():
    return nn.Linear(512, 512).requires_grad_(False)


def test_measured_on_a_technique_that_works_hard_once():
    model, task = nn.Sequential(linear(), linear()), Task(example=(torch.ones(64, 512),))
    found = payback(Halve(), model, task, budget_s=0.05)
    assert {found.cost.unit, found.before.unit, found.after.unit} in ({"s"}, {"J"})
    assert found.cost.provenance == found.before.provenance == "measured"
    assert found.cost.value > 10 * found.before.value  # 200 passes were its work
    assert found.inferences > 10  # never, or after more than a few: it took 200 passes to save half of one


def test_with_counters_it_is_in_joules(monkeypatch):
    """A toy counter: each linear layer that runs takes one joule."""
    ran = []

    class Counter:
        name, seconds = "toy", math.inf

        def joules(self):
            return float(len(ran))

    monkeypatch.setattr(sys.modules["effkit.measure.energy"], "counters", lambda: [Counter()])
    model, task = nn.Sequential(linear(), linear()), Task(example=(torch.ones(1, 512),))
    for layer in model:
        layer.register_forward_hook(lambda *_: ran.append(1))
    found = payback(Halve(loops=5), model, task, budget_s=0.01)
    assert [(r.value, r.unit, r.provenance) for r in (found.cost, found.before, found.after)] == [
        (10.0, "J", "measured"),
        (2.0, "J", "measured"),
        (1.0, "J", "measured"),
    ]
    assert found.inferences == 10.0


def test_the_models_modes_are_kept():
    model, task = nn.Sequential(linear(), linear()).train(), Task(example=(torch.ones(1, 512),))
    payback(Halve(loops=1), model, task, budget_s=0.01)
    assert model.training and model[1].training
