"""Layers over rounded weights: integer products against an independent emulation, training through the rounding, gradients."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effkit.core.task import Batches, Task
from effkit.quantization import QAT, RTN, W8A8, integer, qat
from effkit.quantization.integer import Int8Linear, int8_product, to_int8
from effkit.quantization.qat import fake_quantize
from tests.subjects import image_task, mlp

SETTINGS = dict(bits=4, group_size=32, symmetric=False, search="min-max")
sizes = st.integers(1, 100)


@settings(max_examples=25)
@given(sizes, sizes, sizes)
def test_integer_product_equals_an_independent_emulation(batch, inputs, outputs):
    """NumPy, int64 accumulators, written from the equation and not from our code."""
    rng = torch.Generator().manual_seed(batch * 7919 + inputs * 101 + outputs)
    x, w = torch.randn(batch, inputs, generator=rng), torch.randn(outputs, inputs, generator=rng)
    q_w, s_w = to_int8(w)
    ours = int8_product(x, q_w, s_w.t()).numpy()
    scale = np.abs(x.numpy()).max(1, keepdims=True) / np.float32(127)
    q_x = np.rint(x.numpy() / scale).astype(np.int64)
    theirs = (q_x @ q_w.numpy().astype(np.int64).T).astype(np.float64) * scale * s_w.numpy().T
    assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 64), st.integers(1, 200))
def test_w8a8_error_is_bounded_by_both_roundings(batch, inputs):
    """|y - y_hat| <= sum |w| s_x / 2 + |x| s_w / 2 + s_x s_w / 4."""
    rng = torch.Generator().manual_seed(batch * 1009 + inputs)
    x, w = torch.randn(batch, inputs, generator=rng), torch.randn(5, inputs, generator=rng)
    (q_w, s_w), (_, s_x) = to_int8(w), to_int8(x)
    bound = s_x / 2 * w.abs().sum(1) + x.abs().sum(1, keepdim=True) * s_w.t() / 2 + inputs * s_x * s_w.t() / 4
    assert ((int8_product(x, q_w, s_w.t()) - x @ w.t()).abs() <= bound + 1e-4).all()


def test_layers_that_could_overflow_int32_are_refused():
    with pytest.raises(ValueError, match="overflow"):
        Int8Linear.from_float(nn.Linear(integer._MOST_INPUTS + 1, 1))


def test_a_layer_of_the_largest_numbers_just_fits_an_int32():
    assert 127**2 * integer._MOST_INPUTS < 2**31 <= 127**2 * (integer._MOST_INPUTS + 1)


def test_whole_activations_leave_nothing_but_the_weights_to_be_rounded():
    """Whole numbers up to 127 are their own codes, so the integer layer is its dense weight and its bias."""
    layer, x = nn.Linear(40, 6), torch.randint(-127, 128, (2, 5, 40)).float()
    x[..., 0] = 127
    eight = Int8Linear.from_float(layer)
    torch.testing.assert_close(eight(x), F.linear(x, eight.dense_weight(), layer.bias), atol=1e-3, rtol=1e-4)
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((eight.dense_weight() - layer.weight).abs() <= step / 2 * (1 + 1e-5)).all()
    assert W8A8().claim(eight).value == 8 + 32 / 40


def test_the_smallest_floats_are_rounded_too():
    x = torch.tensor([[1e-44, -3e-44]])
    q, scale = to_int8(x)
    assert ((q * scale - x).abs() <= scale / 2).all()


def test_gradients_pass_straight_through():
    w = torch.randn(3, 40, requires_grad=True)
    fake_quantize(w, bits=3, group_size=8, symmetric=False).square().sum().backward()
    expected = 2 * fake_quantize(w.detach(), bits=3, group_size=8, symmetric=False)
    assert torch.allclose(w.grad, expected)


def separable(n: int = 256) -> Task:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 20, generator=rng)
    labels = torch.arange(n) % 10
    data = Batches(centres[labels] + 0.7 * torch.randn(n, 20, generator=rng), labels, size=32, shuffle=True)
    return Task("separable", (data.inputs[:4],), data, data, data, data, lambda y, b: F.cross_entropy(y, b[1]))


def test_training_through_the_rounding_beats_rounding_afterwards():
    from effkit.core.training import Schedule, fit

    task = separable()
    model = nn.Sequential(nn.Linear(20, 32, bias=False), nn.ReLU(), nn.Linear(32, 10, bias=False))
    fit(model, task, Schedule(120, 1e-2))
    loss = lambda m: task.loss(m(task.train.inputs), (None, task.train.targets)).item()  # noqa: E731
    after, during = loss(RTN(2, -1)(model, task)), loss(QAT(2, -1, epochs=8, lr=3e-3)(model, task))
    assert during < 0.8 * after


def test_without_straight_through_qat_would_be_caught(monkeypatch):
    """Planted: the true derivative of rounding is zero, and nothing is learnt."""
    monkeypatch.setattr(
        qat.FakeQuantize,
        "forward",
        lambda self, w: fake_quantize(w.detach().flatten(1), bits=self.bits, group_size=self.group_size, symmetric=self.symmetric).reshape(w.shape) + 0 * w,
    )
    with pytest.raises(AssertionError):
        test_training_through_the_rounding_beats_rounding_afterwards()


@pytest.mark.parametrize("bits", [0, 1, 17, 2.5, "4", True])
def test_bits_that_make_no_sense_are_refused(bits):
    for technique in (RTN, QAT):
        with pytest.raises(ValueError, match=f"bits must be .* 2 to 8, got {bits!r}"):
            technique(bits=bits)


def test_one_technique_is_one_word_away_from_the_other():
    model, task = mlp(), image_task()
    assert all(isinstance(t(model, task), nn.Module) for t in (RTN(), W8A8(), QAT()))


def test_a_module_used_twice_is_quantized_once_and_copies_stay_independent():
    model = mlp()
    result = RTN()(model)
    twin = copy.deepcopy(result)
    twin.layers[0].weight_store.scale.zero_()
    assert result.layers[0].weight_store.scale.abs().min() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_flow_through_packed_weights_and_no_floats_wait_for_them(bits):
    layer = RTN(bits=bits)(nn.Linear(96, 64))
    x = torch.randn(5, 7, 96, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert all(n < 96 * 64 for n in kept), "autograd holds the unpacked weight"
    (found,) = torch.autograd.grad(y.square().sum(), x)
    plain = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    (wanted,) = torch.autograd.grad(plain.square().sum(), x)
    assert torch.allclose(y, plain, atol=1e-6) and torch.allclose(found, wanted, atol=1e-5)


def test_one_token_gets_its_gradient():
    """The kernel in C has none: where one is wanted, it must stand aside."""
    layer = RTN(**SETTINGS).replacement(nn.Linear(64, 16))
    x = torch.randn(1, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0, keepdim=True))
