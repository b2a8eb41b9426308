"""Mixed precision: the exact choice is every other solver's, the greedy one is never better, and what was measured is what is built."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp
from torch import nn

from effkit.quantization import GPTQ, RTN, mixed
from effkit.quantization.mixed import MixedPrecision, exact, greedy, mean_loss, sensitivity
from tests.subjects import gpt, image_task, language_task, mlp, resnet


def total(table, choice):
    return sum(row[i] for row, i in zip(table, choice, strict=True))


@st.composite
def problems(draw):
    """Layers with one to four choices each, and a budget that the smallest ones fit."""
    choices = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    sizes = [draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)) for n in choices]
    costs = [draw(st.lists(st.integers(-3, 9).map(float), min_size=n, max_size=n)) for n in choices]
    return costs, sizes, sum(map(min, sizes)) + draw(st.integers(0, 20))


def brute_force(costs, sizes, budget):
    every = itertools.product(*(range(len(row)) for row in costs))
    return min(total(costs, choice) for choice in every if total(sizes, choice) <= budget)


def many_layers(seed, layers=60):
    """Sizes that share no divisor, and costs that fall with size as rounding errors do."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1_000, 9_000, layers)
    sizes = [[int(w) * b for b in (2, 3, 4, 6, 8)] for w in weights]
    costs = [[float(c * 4.0**-b * rng.uniform(0.5, 2)) for b in (2, 3, 4, 6, 8)] for c in rng.lognormal(0, 2, layers)]
    return costs, sizes, int(weights.sum() * 3.9)


# laws


@pytest.mark.slow
@settings(max_examples=300)
@given(problems())
def test_the_exact_choice_is_brute_forces(problem):
    costs, sizes, budget = problem
    choice = exact(costs, sizes, budget)
    assert total(sizes, choice) <= budget and total(costs, choice) == brute_force(costs, sizes, budget)


@pytest.mark.slow
@settings(max_examples=300)
@given(problems())
def test_the_greedy_choice_fits_and_no_widening_that_gains_fits_beside_it(problem):
    costs, sizes, budget = problem
    choice = greedy(costs, sizes, budget)
    left = budget - total(sizes, choice)
    assert left >= 0 and total(costs, choice) >= brute_force(costs, sizes, budget)
    for layer, now in enumerate(choice):
        gains = [i for i, c in enumerate(costs[layer]) if c < costs[layer][now]]
        assert all(sizes[layer][i] - sizes[layer][now] > left for i in gains)


def test_greedy_comes_close_where_layers_are_many():
    """Within one step of the largest layer: the more layers, the less that is."""
    for seed in range(5):
        problem = many_layers(seed)
        best, close = (total(problem[0], solve(*problem)) for solve in (exact, greedy))
        assert best <= close <= 1.15 * best


@pytest.mark.slow
@pytest.mark.parametrize(("make", "task"), [(mlp, image_task()), (resnet, image_task()), (gpt, language_task())])
def test_the_result_keeps_its_budget_and_each_layer_is_what_its_rounding_makes(make, task):
    model = make()
    result = MixedPrecision(bits=3.7, widths=(8, 2, 4))(model, task)
    held = [MixedPrecision().claim(m).value for m in (RTN(bits=3)(model, task), result, RTN(bits=4)(model, task))]
    assert held[1] <= held[0] + 0.7 * (held[2] - held[0]) + 1e-9
    for path, layer in result.named_modules():
        if hasattr(layer, "weight_store"):
            twin = RTN(bits=layer.weight_store.bits)(model, task).get_submodule(path)
            assert torch.equal(layer.weight_store(), twin.weight_store())


def test_with_one_width_it_is_the_rounding_itself():
    task = language_task()
    for rounding in (RTN(group_size=16, symmetric=True), GPTQ(group_size=16)):
        ours = MixedPrecision(bits=3, widths=(3,), rounding=rounding)(gpt(), task).state_dict()
        plain = replace(rounding, bits=3)(gpt(), task).state_dict()
        assert ours.keys() == plain.keys() and all(torch.equal(ours[key], plain[key]) for key in plain)


def test_the_sum_of_costs_is_no_more_than_any_uniform_widths_of_the_same_size():
    model, task = gpt(), language_task()
    technique = MixedPrecision(widths=(2, 3, 4, 8))
    twins = technique.twins([(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)], {})
    costs = sensitivity(model, twins, task)
    sizes = [[mixed.bits_held(twin) for twin in choices] for choices in twins.values()]
    for i in range(4):
        uniform = [i] * len(twins)
        assert total(costs, exact(costs, sizes, total(sizes, uniform))) <= total(costs, uniform)


def test_sensitivity_is_the_loss_of_the_model_with_that_layer_alone_rounded():
    model, task = mlp(), image_task()
    before = {name: p.clone() for name, p in model.named_parameters()}
    twins = MixedPrecision(widths=(2, 4)).twins([(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)], {})
    costs = sensitivity(model, twins, task)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the weights must be as before"
    paths = [path for path, m in model.named_modules() if m in twins]
    for path, row in zip(paths, costs, strict=True):
        for bits, cost in zip((2, 4), row, strict=True):
            alone = RTN(bits=bits, layers=path)(model, task)
            with torch.no_grad():
                assert cost == pytest.approx(mean_loss(alone, task) - mean_loss(model, task), abs=1e-6)


# oracle


def integer_program(costs, sizes, budget):
    """The same knapsack for SciPy's branch and bound: one binary variable a choice."""
    n = [len(row) for row in costs]
    one_each = np.zeros((len(n), sum(n)))
    for layer, start in enumerate(np.cumsum([0, *n[:-1]])):
        one_each[layer, start : start + n[layer]] = 1
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(sizes)[None], -np.inf, budget)]
    return milp(np.concatenate(costs), constraints=limits, integrality=np.ones(sum(n)), bounds=(0, 1), options={"mip_rel_gap": 0}).fun


@pytest.mark.slow
def test_the_exact_choice_is_an_integer_programs():
    for seed in range(3):
        problem = many_layers(seed)
        assert total(problem[0], exact(*problem)) == pytest.approx(integer_program(*problem), rel=1e-6)


# bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(widths=()), "widths is empty"),
        (dict(widths=(4, 1)), "from 2 to 8, got 1"),
        (dict(bits=0), r"bits must be a number in \[2, 8\], got 0"),
        (dict(bits=3, widths=(4, 8)), r"in \[4, 8\], got 3: allow narrower"),
        (dict(method="best"), "'exact', 'greedy', got 'best'"),
        (dict(rounding="GPTQ"), "rounding must be RTN"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        MixedPrecision(**settings)


# planted bugs: the tests above would notice


def test_a_weight_that_is_not_put_back_is_caught(monkeypatch):
    @contextmanager
    def forgetful(layer, twin):
        layer.weight.data.copy_(twin.weight_store().reshape(layer.weight.shape))
        yield

    monkeypatch.setattr(mixed, "rounded", forgetful)
    with pytest.raises(AssertionError, match="as before"):
        test_sensitivity_is_the_loss_of_the_model_with_that_layer_alone_rounded()


def test_room_that_later_layers_need_and_do_not_get_is_caught(monkeypatch):
    def careless(costs, sizes, budget):  # each layer takes its cheapest choice that still fits
        chosen = []
        for cost, size in zip(costs, sizes, strict=True):
            fits = [i for i in range(len(size)) if size[i] <= budget] or [0]
            chosen.append(min(fits, key=cost.__getitem__))
            budget -= size[chosen[-1]]
        return chosen

    monkeypatch.setitem(globals(), "exact", careless)
    with pytest.raises(AssertionError):
        test_the_exact_choice_is_an_integer_programs()
