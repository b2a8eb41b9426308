"""Plans and schedules: nothing alive overlaps, nothing is below the bound, and small cases meet the optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effkit.compilation import plan, schedule
from effkit.compilation.capture import capture
from effkit.compilation.compiled import DEFAULT, PASSES
from effkit.compilation.ir import run
from effkit.compilation.plan import Buffer, best_fit, lifetimes, most_alive, overlaps
from effkit.compilation.schedule import peak
from effkit.zoo import GPT, ResNet
from tests.compilation.programs import Program, best_order, close, inputs, programs, respects


@st.composite
def buffers(draw, most=30):
    spans = draw(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 15), st.integers(0, 6)), min_size=1, max_size=most)
    )
    return [Buffer(f"b{i}", size * 64, first, first + length) for i, (size, first, length) in enumerate(spans)]


def check_plan(items):
    made = best_fit(items)
    assert overlaps(items, made) == []
    assert made.bound <= made.total <= made.naive
    assert all(made.offsets[b.name] >= 0 and made.offsets[b.name] + b.size <= made.total for b in items)
    return made


@given(buffers())
def test_no_two_buffers_alive_together_overlap_and_no_plan_is_below_the_bound(items):
    check_plan(items)


def test_the_bound_is_the_most_alive_at_any_position():
    items = [Buffer("a", 3, 0, 1), Buffer("b", 5, 1, 2), Buffer("c", 4, 2, 3)]
    assert most_alive(items) == 9 == max(sum(b.size for b in items if b.first <= t <= b.last) for t in range(4))


@given(buffers(7))
@settings(max_examples=15)
def test_the_best_of_all_orders_is_a_plan_and_never_worse(items):
    best, greedy = plan.optimal(items), best_fit(items)
    assert overlaps(items, best) == []
    assert greedy.bound <= best.total <= greedy.total


#: name, size, first and last position: best fit puts b and c side by side in the wrong order, and a finds no room
UNLUCKY = [("a", 2, 3, 5), ("b", 3, 1, 3), ("c", 3, 0, 2), ("d", 2, 3, 3)]


def test_best_fit_is_not_always_optimal_and_the_solver_knows_better():
    items = [Buffer(name, 64 * size, first, last) for name, size, first, last in UNLUCKY]
    assert best_fit(items).total > plan.optimal(items).total == most_alive(items)


def compiled_graph(model, x, passes=DEFAULT):
    graph = capture(model.eval(), (x,))
    for name in passes:
        graph = PASSES[name](graph)
    return graph


ZOO = {
    "resnet": lambda: compiled_graph(ResNet((8, 16, 32)), torch.randn(4, 1, 28, 28)),
    "gpt": lambda: compiled_graph(
        GPT(vocab_size=64, d_model=32, layers=3, heads=4, kv_heads=2, d_ff=48), torch.randint(64, (2, 16))
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_planned_within_a_tenth_of_the_bound_and_a_third_of_naive(name):
    made = check_plan(lifetimes(ZOO[name]()))
    assert made.total <= 1.1 * made.bound and made.naive >= 3 * made.total


def test_the_plan_of_a_small_network_is_proved_optimal():
    items = lifetimes(compiled_graph(ResNet((4, 8)), torch.randn(1, 1, 28, 28)))
    assert len(items) <= 30
    assert plan.optimal(items).total == best_fit(items).total


def test_views_keep_their_owner_alive_and_results_live_to_the_end():
    class Model(nn.Module):
        def forward(self, x):
            y = x.exp()
            return y.view(-1).sin() + y.sum()

    graph = capture(Model(), (torch.randn(2, 3),))
    by_name = {b.name: b for b in lifetimes(graph)}
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    assert set(by_name) == {"exp", "sin", "sum_1", "add"}
    assert by_name["exp"].last == position["sum_1"] and by_name["add"].last == len(graph.nodes)


def check_schedule(program):
    graph = capture(program, inputs())
    after = schedule.schedule(graph)
    assert respects(after, list(after.nodes)) and {n.name for n in after.nodes} == {n.name for n in graph.nodes}
    assert peak(after) <= peak(graph)
    assert close(run(after, inputs()), run(graph, inputs()), 0)
    return graph, after


@pytest.mark.slow
@given(programs())
@settings(max_examples=8)
def test_a_schedule_respects_what_depends_on_what_and_never_needs_more(program):
    check_schedule(program)


@pytest.mark.slow
@given(programs(5))
@settings(max_examples=8)
def test_the_best_of_all_orders_is_never_above_the_greedy_one(program):
    graph = PASSES["dce"](capture(program, inputs()))
    if len(graph.operators) > 14:
        return
    height, order = best_order(graph)
    best = schedule.reordered(graph, order)
    assert respects(best, list(best.nodes)) and peak(best) == height <= peak(schedule.schedule(graph))


class Wide(nn.Module):
    """Makes four large values before it reduces the first: any sensible order reduces each at once."""

    def forward(self, x):
        large = [torch.exp(x[:, None] * (i + x)) for i in range(4)]
        return sum(torch.sin(y).sum() for y in large)


def test_the_greedy_order_frees_before_it_makes():
    graph = capture(Wide(), (torch.randn(16),))
    after = schedule.schedule(graph)
    assert peak(after) <= peak(graph) / 2
    assert torch.equal(run(after, (torch.ones(16),)), run(graph, (torch.ones(16),)))


def test_too_many_buffers_for_all_orders_are_refused():
    items = [Buffer(name, 64 * size, first, last) for n in "123" for name, size, first, last in UNLUCKY]
    with pytest.raises(ValueError, match="12 buffers .* at most 8"):
        plan.optimal([Buffer(f"{b.name}{i}", b.size, b.first, b.last) for i, b in enumerate(items)])


# planted bugs


def test_a_plan_that_forgets_lifetimes_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Buffer, "meets", lambda self, other: self.first < other.last and other.first < self.last)
    made = best_fit([Buffer("a", 64, 0, 1), Buffer("b", 64, 1, 2)])
    monkeypatch.undo()
    assert overlaps([Buffer("a", 64, 0, 1), Buffer("b", 64, 1, 2)], made) == [("a", "b")], (
        "what is read and what is written share bytes"
    )


def test_a_gap_that_is_too_small_would_be_noticed(monkeypatch):
    monkeypatch.setattr(plan, "_gaps", lambda buffer, placed: iter([(0, 0)]))
    with pytest.raises(AssertionError):
        check_plan([Buffer("a", 64, 0, 1), Buffer("b", 64, 1, 2)])


def test_an_order_that_runs_ahead_would_be_noticed(monkeypatch):
    monkeypatch.setattr(schedule, "greedy", lambda graph: reversed([n.name for n in graph.operators]))
    heights = iter((0, 1))
    monkeypatch.setattr(schedule, "peak", lambda graph: next(heights))
    with pytest.raises((AssertionError, KeyError)):
        check_schedule(Program([(1, 0, 0), (1, 2, 2)], [0]))
