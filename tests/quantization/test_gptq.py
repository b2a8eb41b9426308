"""GPTQ: never far worse than rounding to nearest and nearly always better, equal to optimal brain surgery done step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effkit import log
from effkit.core.calibration import Statistics, layer_error
from effkit.core.task import Batches, Task
from effkit.quantization import GPTQ, RTN, gptq
from effkit.quantization.affine import dequantize, quantize
from tests.subjects import gpt, language_task, resnet


def correlated(seed, *, tokens=200, columns=48, directions=6):
    """Inputs that mostly lie in a few directions, some channels larger than others."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, directions, generator=rng) @ torch.randn(directions, columns, generator=rng)
    sizes = torch.randn(columns, generator=rng).exp()
    return (mixed + 0.3 * torch.randn(tokens, columns, generator=rng)) * sizes


def errors(seed, *, bits=3, group_size=16, **settings):
    """The layer's error on its inputs, rounded to nearest and with errors passed on."""
    x, w = correlated(seed), torch.randn(24, 48, generator=torch.Generator().manual_seed(seed + 10_000))
    seen = Statistics(x.T @ x, x.abs().amax(0), len(x))
    grid = dict(bits=bits, group_size=group_size)
    return [layer_error(w, t.store(w, seen)(), seen.gram).item() for t in (RTN(**grid), GPTQ(**grid, **settings))]


# laws


@pytest.mark.slow
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_loses_less_on_the_inputs_it_saw(bits, order):
    ratios = torch.tensor([b / a for a, b in (errors(seed, bits=bits, order=order) for seed in range(100))])
    assert (ratios <= 1).float().mean() >= 0.99 and ratios.max() <= 1.3


def test_columns_that_do_not_correlate_are_rounded_to_nearest():
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    seen = Statistics(torch.diag(torch.rand(40).add(0.1)), torch.ones(40), 100)
    for order in (True, False):
        ours, nearest = (t.store(w, seen) for t in (GPTQ(order=order), RTN()))
        assert torch.equal(ours.codes, nearest.codes) and torch.equal(ours.scale, nearest.scale)


def test_a_layer_whose_inputs_were_all_zero_is_rounded_to_nearest():
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(GPTQ().store(w, Statistics(torch.zeros(40, 40), torch.zeros(40), 3))(), RTN().store(w, None)())


@pytest.mark.slow
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 300), bits=st.integers(2, 8), seed=st.integers(0, 99),
    group_size=st.sampled_from([-1, 0, 1, 7, 32]), size=st.sampled_from([0.0, 1e-30, 1.0, 1e6]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_whatever_the_weights_every_code_is_on_the_grid(rows, columns, bits, seed, group_size, size):
    rng = torch.Generator().manual_seed(seed)
    w, x = size * torch.randn(rows, columns, generator=rng), torch.randn(4, columns, generator=rng)
    made = GPTQ(bits=bits, group_size=group_size).store(w, Statistics(x.T @ x, x.abs().amax(0), 4))
    assert made.shape == (rows, columns) and torch.isfinite(made()).all()
    assert made.bits_per_weight() == RTN(bits=bits, group_size=group_size).store(w, None).bits_per_weight()


def test_by_hand():
    """Of (0.4, 0.4) with equal inputs and whole numbers for a grid, the second weight makes up for the first."""
    w, one = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2)
    factor = gptq.inverse_factor(torch.ones(2, 2), damping=1e-6)
    assert gptq.feed_back(w, factor, one, 0 * one, bits=2).tolist() == [[0, 1]]
    assert quantize(w, one, 0 * one, bits=2).tolist() == [[0, 0]]


# oracle


def surgery(w, gram, scale, zero_point, *, bits, damping):
    """Hassibi and Stork's update, one column after the other, with the inverse of what is left computed anew each time."""
    w, n = w.double().clone(), len(gram)
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(n)
    made = torch.empty_like(w)
    for i in range(n):
        inverse = torch.linalg.inv(damped[i:, i:])
        q = quantize(w[:, i : i + 1].float(), scale[:, i : i + 1], zero_point[:, i : i + 1], bits=bits)
        made[:, i] = dequantize(q, scale[:, i : i + 1], zero_point[:, i : i + 1])[:, 0]
        w[:, i:] -= ((w[:, i] - made[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return made


@pytest.mark.parametrize("columns", [5, 31, 32, 33, 200])
def test_equals_optimal_brain_surgery_in_a_fixed_order(columns):
    x = correlated(3, columns=columns, tokens=400)
    gram, rng = x.T @ x, torch.Generator().manual_seed(1)
    w, scale = torch.randn(6, columns, generator=rng), torch.full((6, columns), 0.25)
    zero_point = torch.full((6, columns), 8.0)
    codes = gptq.feed_back(
        w.double(), gptq.inverse_factor(gram, damping=0.01), scale.double(), zero_point.double(), bits=4
    )
    wanted = surgery(w, gram, scale, zero_point, bits=4, damping=0.01)
    agree = (dequantize(codes, scale, zero_point).double() == wanted).double().mean()
    assert agree > 0.99  # a value between two grid points may fall to either side
    assert_close(
        layer_error(w, dequantize(codes, scale, zero_point), gram),
        layer_error(w, wanted.float(), gram), rtol=0.02, atol=0.0,
    )  # fmt: skip


def test_the_factor_is_that_of_the_damped_inverse():
    x = correlated(0)
    u = gptq.inverse_factor(x.T @ x, damping=0.01)
    gram = (x.T @ x).double()
    assert_close(u.T @ u @ (gram + 0.01 * gram.diagonal().mean() * torch.eye(48)), torch.eye(48, dtype=torch.float64))
    assert torch.equal(u, u.triu())


# the technique


def test_a_model_loses_less_than_by_rounding_to_nearest():
    model, task = gpt(), language_task()
    with torch.no_grad():
        wanted = model(task.calib.ids[None, :64])
        off = [(t(model, task)(task.calib.ids[None, :64]) - wanted).square().mean() for t in (RTN(3, 16), GPTQ(3, 16))]
    assert off[1] < off[0]


def test_what_no_input_reaches_is_rounded_to_nearest_and_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    x = torch.randn(6, 8)
    made = GPTQ(group_size=8)(model, Task(calib=Batches(x, x)))
    assert torch.equal(made.idle.dense_weight(), RTN(group_size=8)(model).idle.dense_weight())
    assert "idle: rounded to nearest (no calibration input reached it)" in str(log(made))


def test_convolutions_are_rounded_to_nearest_and_said_so():
    from tests.subjects import image_task

    model = resnet()
    made, nearest = GPTQ()(model, image_task()), RTN()(model)
    assert torch.equal(made.stem.weight_store(), nearest.stem.weight_store())
    assert "stem: rounded to nearest (a convolution's inputs are not gathered)" in str(log(made))


@pytest.mark.parametrize("bad", [dict(examples=0), dict(damping=0.0), dict(damping=-1.0), dict(bits=17), dict(bits=2.5)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GPTQ(**bad)


# planted bugs


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["no feedback", "not conditioned on what is fixed", "not divided by the diagonal"])
def test_a_wrong_update_is_caught(monkeypatch, bug):
    right = gptq.inverse_factor

    def wrong(gram, *, damping):
        factor = right(gram, damping=damping)
        if bug == "no feedback":
            return factor.diagonal().diag()
        if bug == "not divided by the diagonal":
            return factor / factor.diagonal()
        return factor.T @ factor  # rows of the whole inverse: columns that are fixed already would move along

    monkeypatch.setattr(gptq, "inverse_factor", wrong)
    with pytest.raises(AssertionError):
        test_it_loses_less_on_the_inputs_it_saw(3, True)
        test_equals_optimal_brain_surgery_in_a_fixed_order(33)
