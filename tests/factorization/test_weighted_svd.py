"""Whitened SVD: its error on the inputs is predicted by what it discards, and nothing of that rank has less."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effkit import log
from effkit.core.calibration import layer_error
from effkit.core.task import Batches, Task
from effkit.factorization import SVD, WhitenedSVD, weighted_svd
from effkit.factorization.weighted_svd import square_root
from effkit.zoo import MLP

RIDGE = 1e-9


def inputs(n=400, width=24, seed=0):
    """Correlated: most of the energy in few directions, one channel far larger than the others."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng) * torch.logspace(0, -2, width)
    x = torch.randn(n, width, generator=rng) @ mix.T
    x[:, 3] *= 30
    return x


def task(x):
    return Task(calib=Batches(x, torch.zeros(len(x)), size=64))


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(0, 99))
def test_the_loss_is_the_discarded_singular_values(rank, seed):
    x, layer = inputs(seed=seed).double(), nn.Linear(24, 16, bias=False).double()
    thin = WhitenedSVD(rank=rank, examples=400, ridge=RIDGE)(layer, task(x))
    lost = (x @ (layer.weight - thin.dense_weight()).T).square().sum()
    s = torch.linalg.svdvals(layer.weight.detach() @ square_root(x.T @ x, ridge=RIDGE))
    assert_close(lost, s[rank:].square().sum(), rtol=0.01, atol=0.0)


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(0, 99))
def test_it_loses_less_on_its_inputs_than_svd(rank, seed):
    x, layer = inputs(seed=seed), nn.Linear(24, 16)
    gram = x.T @ x
    losses = [layer_error(layer.weight, t(layer, task(x)).dense_weight(), gram) for t in (WhitenedSVD(rank=rank), SVD(rank=rank))]
    assert losses[0] <= losses[1] * (1 + 1e-3)


def test_white_inputs_make_it_svd():
    layer, x = nn.Linear(6, 5), torch.eye(6) * 6**0.5
    white, plain = WhitenedSVD(rank=2)(layer, task(x)), SVD(rank=2)(layer)
    assert_close(white.dense_weight(), plain.dense_weight(), atol=1e-5, rtol=1e-4)


def test_unused_directions_and_dead_inputs_stay_finite():
    x = torch.zeros(50, 8)
    x[:, :2] = torch.randn(50, 2)
    for data in (x, torch.zeros(50, 8)):
        thin = WhitenedSVD(rank=2)(nn.Linear(8, 8), task(data))
        assert torch.isfinite(thin.dense_weight()).all()
    layer = nn.Linear(8, 8)
    thin = WhitenedSVD(rank=2)(layer, task(x))
    assert_close(thin(x), layer(x), atol=1e-3, rtol=1e-3)  # two directions are all there is to keep


def test_the_square_root_is_one():
    gram = inputs().T @ inputs()
    s = square_root(gram, ridge=1e-6)
    assert_close(s @ s.T, gram.double() + 1e-6 * gram.double().diagonal().mean() * torch.eye(24, dtype=torch.float64))


def test_a_layer_counts_as_much_as_it_has_weights():
    s = torch.tensor([30.0, 2.0, 1.0])
    assert (s * WhitenedSVD().weight_of(s, 6, 4)).square().sum() == pytest.approx(6 * 4)
    assert WhitenedSVD().weight_of(0 * s, 6, 4) == 0


def test_a_layer_that_no_input_reaches_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.used(x)

    thin = WhitenedSVD(rank=3)(Aside(), task(inputs()))
    assert "unused: factorized without inputs (no calibration input reached it)" in str(log(thin))
    assert type(thin.unused).__name__ == "LowRankLinear"


def test_only_so_many_examples_are_looked_at():
    x = inputs()
    far = torch.cat((x[:100], 1e6 * torch.randn(300, 24)))
    layer = nn.Linear(24, 16)
    few, all_of_few = (WhitenedSVD(rank=3, examples=100)(layer, task(d)).dense_weight() for d in (far, x[:100]))
    assert torch.equal(few, all_of_few)


def test_twice_and_in_a_deep_model():
    x = inputs(width=20)
    model = MLP((20, 16, 12, 5)).eval()
    once = WhitenedSVD(keep=0.6)(model, task(x))
    twice = WhitenedSVD(keep=0.6)(once, task(x))
    assert_close(once(x), twice(x), atol=1e-3, rtol=1e-2)


def test_bad_settings_and_a_missing_calibration():
    with pytest.raises(ValueError, match="reads task.calib"):
        WhitenedSVD()(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="ridge must be"):
        WhitenedSVD(ridge=0.0)
    with pytest.raises(ValueError, match="reads task.calib"):
        WhitenedSVD()(nn.Linear(24, 8), replace(task(inputs()), calib=task(inputs(n=0)).calib))


def test_a_root_on_the_wrong_side_is_caught(monkeypatch):
    """Planted: S^T instead of S, the slip that G = S S^T invites."""
    monkeypatch.setattr(weighted_svd, "square_root", lambda gram, ridge: square_root(gram, ridge=ridge).T.contiguous())
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda s, b, upper, left: torch.linalg.solve(s, b, left=left))
    with pytest.raises(AssertionError):
        test_the_loss_is_the_discarded_singular_values.hypothesis.inner_test(3, 0)


def test_the_budget_does_not_depend_on_the_units_of_a_layer():
    """Inputs a thousand times as large change no rank: each layer's error is measured against its own outputs."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.scale = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False), 1.0

        def forward(self, x):
            return self.first(x) + self.second(self.scale * x)

    torch.manual_seed(0)
    model, data = Two(), task(inputs())
    ranks = []
    for model.scale in (1.0, 1000.0):
        thin = WhitenedSVD(keep=0.5)(model, data)
        ranks.append((thin.first.rank, thin.second.rank))
    assert ranks[0] == ranks[1]
