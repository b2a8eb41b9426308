"""W8A8 with scales fixed beforehand, and with outliers in float: equal to NumPy's emulation, and to its plain twin at the limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from effkit import load, log, save
from effkit.core import calibration
from effkit.core.task import Batches, Task
from effkit.quantization import W8A8, integer
from effkit.quantization.integer import Int8Linear, int8_step, to_int8
from tests.subjects import gpt, language_task, outputs

sizes = st.integers(1, 300)


def made(seed, batch, inputs, outputs=5, *, far=0.0, size=1.0, dtype=torch.float32):
    """A layer and its inputs; `far` makes about that share of columns twenty times larger."""
    rng = torch.Generator().manual_seed(seed)
    x = size * torch.randn(batch, inputs, generator=rng) * torch.where(torch.rand(inputs, generator=rng) < far, 20.0, 1.0)
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=rng))
        layer.bias.copy_(torch.randn(outputs, generator=rng))
    return layer.to(dtype).requires_grad_(False), x.to(dtype)


def error(layer, x, **settings):
    return (Int8Linear.from_float(layer, **settings)(x) - layer(x)).square().sum()


# oracle: NumPy, written from the equations, with integers of 64 bits


def emulated(layer, x, *, input_scale=None, divisor=None, outliers=None):
    w, bias, x = layer.weight.numpy(), layer.bias.numpy(), x.numpy()
    if divisor is not None:
        w, x = w * divisor.numpy(), x / divisor.numpy()
    s_w = np.abs(w).max(1) / np.float32(127)
    q_w = np.rint(w / s_w[:, None]).astype(np.int64)
    far = np.zeros(x.shape[1], bool) if outliers is None else (np.abs(x) > outliers).any(0)
    near = x[:, ~far]
    if input_scale is None:
        s_x = np.abs(near).max(1, keepdims=True, initial=0) / np.float32(127)
        s_x[s_x == 0] = 1
    else:
        s_x = input_scale.numpy()
    q_x = np.clip(np.rint(near / s_x), -127, 127).astype(np.int64)
    in_float = x[:, far].astype(np.float64) @ (q_w[:, far] * s_w[:, None].astype(np.float64)).T
    return (q_x @ q_w[:, ~far].T).astype(np.float64) * s_x * s_w + in_float + bias


@settings(max_examples=60)
@given(st.integers(1, 20), sizes, st.sampled_from([None, 0.0, 3.0, 6.0]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_equals_an_independent_emulation(batch, inputs, outliers, static, divided, seed):
    layer, x = made(seed, batch, inputs, far=0.1)
    how = dict(outliers=outliers)
    if divided:
        how["divisor"] = torch.rand(inputs, generator=torch.Generator().manual_seed(seed)) + 0.5
    if static:
        how["input_scale"] = int8_step(x.abs().max() * 0.7)  # some values are clipped
    wanted = emulated(layer, x, **how)
    ours = Int8Linear.from_float(layer, **how)(x).numpy()
    assert np.allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


# laws


@settings(max_examples=40)
@given(st.integers(1, 20), sizes, st.sampled_from([1e-30, 1.0, 1e6]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_scale_for_all_is_each_token_s_own_where_all_have_the_same_maximum(batch, inputs, size, dtype):
    layer, x = made(batch, batch, inputs, size=size, dtype=dtype)
    x = x.t().contiguous().t()  # whatever the layout
    x[:, 0] = 2 * x.abs().max()
    static = Int8Linear.from_float(layer, input_scale=int8_step(x.abs().max()))
    assert torch.equal(static(x), Int8Linear.from_float(layer)(x)) and static(x).dtype == dtype


@settings(max_examples=30)
@given(st.integers(1, 20), sizes, st.booleans())
def test_a_threshold_that_nothing_passes_is_none(batch, inputs, static):
    layer, x = made(batch, batch, inputs)
    scale = int8_step(x.abs().max()) if static else None
    plain = Int8Linear.from_float(layer, input_scale=scale)
    assert torch.equal(Int8Linear.from_float(layer, input_scale=scale, outliers=x.abs().max().item())(x), plain(x))


@settings(max_examples=30)
@given(st.integers(1, 20), sizes)
def test_a_threshold_of_zero_leaves_the_activations_in_float(batch, inputs):
    layer, x = made(batch, batch, inputs)
    split = Int8Linear.from_float(layer, outliers=0.0)
    assert_close(split(x), F.linear(x, split.dense_weight(), layer.bias), rtol=1e-5, atol=1e-5 * math.sqrt(inputs))


def test_a_threshold_of_zero_is_the_float_layer_where_its_weights_are_on_the_grid():
    layer, x = nn.Linear(30, 4).requires_grad_(False), torch.randn(7, 30)
    layer.weight.copy_(torch.randint(-127, 128, (4, 30)))
    layer.weight[:, 0] = 127
    assert_close(Int8Linear.from_float(layer, outliers=0.0)(x), layer(x), rtol=1e-5, atol=1e-3)


@settings(max_examples=30)
@given(st.integers(2, 20), st.integers(10, 300), st.integers(0, 99))
def test_outliers_in_float_lose_less(batch, inputs, seed):
    layer, x = made(seed, batch, inputs)
    layer.weight.copy_(Int8Linear.from_float(layer).dense_weight())  # whose rounding the outliers meet either way
    x[:, seed % inputs] += 200
    assert error(layer, x, outliers=6.0) < 0.05 * error(layer, x)


def test_one_far_value_takes_its_column_out_for_the_whole_batch():
    layer, x = made(0, 4, 50)
    beside = x.clone()
    beside[3, 7] = 100
    split = Int8Linear.from_float(layer, outliers=6.0)
    assert not torch.equal(split(x)[0], split(beside)[0]), "the docstring says that it does"
    assert torch.equal(split(x)[:1], split(x[:1]))


def test_nothing_overflows_where_everything_is_clipped():
    """Codes stay within 127 whatever comes, so the limit of the int32 holds for a fixed scale too."""
    q, _ = to_int8(torch.tensor([[1e30, -1e30, 3.0]]), torch.ones(1, 1))
    assert q.tolist() == [[127, -127, 3]]


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("outliers", [None, 6.0])
def test_an_empty_batch_and_leading_dimensions(static, outliers):
    layer, x = made(0, 12, 9)
    made_ = Int8Linear.from_float(layer, outliers=outliers, input_scale=torch.tensor(0.1) if static else None)
    assert made_(x[:0]).shape == (0, 5)
    assert torch.equal(made_(x.reshape(2, 3, 2, 9)).flatten(0, 2), made_(x))


# the technique


def two_sizes() -> tuple[nn.Module, Task]:
    """Calibration whose first batch is small."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(16, 12, generator=rng) * torch.tensor([1.0] * 8 + [50.0] * 8)[:, None]
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 4)).eval()
    return model, Task(calib=Batches(x, x, size=8))


def test_the_fixed_scale_covers_every_input_of_calibration():
    model, task = two_sizes()
    result, x = W8A8(activations="tensor")(model, task), task.calib.inputs
    for layer, seen in zip(result, (x, model[0](x)), strict=True):
        assert_close(layer.input_scale.max() * 127, seen.abs().max().detach(), rtol=1e-6, atol=0.0)
    assert W8A8("tensor").claim(result).value == pytest.approx(8 + (16 + 4 + 2) * 32 / (12 * 16 + 16 * 4))


def test_only_the_first_examples_are_looked_at():
    model, task = two_sizes()
    x = task.calib.inputs[:8]
    assert_close(W8A8("tensor", examples=8)(model, task)[0].input_scale.max() * 127, x.abs().max(), rtol=1e-6, atol=0.0)


def test_what_passes_the_threshold_does_not_widen_the_fixed_scale():
    model, task = two_sizes()
    first = W8A8("tensor", outliers=6.0)(model, task)[0]
    assert first.input_scale.item() == pytest.approx(6 / 127) and first.outliers == 6.0


def test_layers_that_no_input_reaches_find_their_scales_while_running():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    x = torch.randn(6, 8)
    result = W8A8("tensor")(Idle(), Task(calib=Batches(x, x)))
    assert result.used.input_scale is not None and result.idle.input_scale is None
    assert "idle: activations rounded token by token (no calibration input reached it)" in str(log(result))


@pytest.mark.parametrize("technique", [W8A8("tensor"), W8A8(outliers=1.0), W8A8("tensor", outliers=1.0)], ids=repr)
def test_a_file_holds_all_of_it(technique, tmp_path):
    task = language_task()
    result = technique(gpt(), task)
    save(result, tmp_path / "model.safetensors")
    opened = load(tmp_path / "model.safetensors")
    assert torch.equal(outputs(opened, task), outputs(result, task))
    assert opened.blocks[0].ff.down.outliers == technique.outliers
    assert not torch.equal(outputs(result, task), outputs(W8A8()(gpt()), task)), "the setting did nothing"


@pytest.mark.parametrize(
    "bad", [dict(activations="row"), dict(outliers=-1.0), dict(outliers=float("nan")), dict(outliers="6"), dict(examples=0)]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        W8A8(**bad)


def test_a_fixed_scale_needs_calibration_and_says_so():
    with pytest.raises(ValueError, match="W8A8 reads task.calib"):
        W8A8("tensor")(nn.Linear(3, 3), Task())


@pytest.mark.peers("torchao")
def test_equals_torchao_s_symmetric_primitive():
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    _, x = made(0, 9, 40)
    for block, ours in (((1, 40), to_int8(x)), ((9, 40), to_int8(x, int8_step(x.abs().amax((0, 1), keepdim=True))))):
        how = dict(quant_min=-127, quant_max=127)
        scale, zero = choose_qparams_affine(x, MappingType.SYMMETRIC, block, torch.int8, **how, scale_dtype=torch.float32)
        theirs = quantize_affine(x, block, scale, zero, torch.int8, **how)
        assert (ours[0].int() - theirs.int()).abs().max() <= 1 and (ours[0] == theirs).float().mean() > 0.99
        assert_close(ours[1].flatten(), scale.flatten(), rtol=0.01, atol=0.0)


# planted bugs


def fails(law, *args):
    with pytest.raises(AssertionError):
        getattr(law, "hypothesis", law).inner_test(*args) if args else law()


def test_outliers_counted_twice_are_caught(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda x, *_: x)
    fails(test_equals_an_independent_emulation, 7, 40, 3.0, False, False, 0)
    fails(test_a_threshold_of_zero_leaves_the_activations_in_float, 7, 40)


def test_outliers_left_out_are_caught(monkeypatch):
    monkeypatch.setattr(integer, "split_product", lambda x, *held: integer.int8_product(
        x.masked_fill((x.abs() > held[-1]).any(0), 0.0), *held[:-1]))  # fmt: skip
    fails(test_outliers_in_float_lose_less, 7, 40, 0)


def test_a_fixed_scale_from_one_batch_alone_is_caught(monkeypatch):
    right = calibration.gathered
    first = lambda model, task, *rest: right(model, replace(task, calib=task.calib.first(8)), *rest)  # noqa: E731
    monkeypatch.setattr(calibration, "gathered", first)
    fails(test_the_fixed_scale_covers_every_input_of_calibration)


def test_codes_that_wrap_around_instead_of_being_clipped_are_caught(monkeypatch):
    right = integer.to_int8
    wrong = lambda x, scale=None: right(x) if scale is None else ((x / scale).round().long().to(torch.int8), scale)  # noqa: E731
    monkeypatch.setattr(integer, "to_int8", wrong)
    fails(test_equals_an_independent_emulation, 7, 40, None, True, False, 0)


def test_a_divisor_on_one_side_only_or_squared_is_caught(monkeypatch):
    right = Int8Linear.from_float.__func__
    for bug in (lambda d: None, lambda d: d * d):

        def wrong(cls, layer, *, divisor=None, bug=bug, **how):
            new = right(cls, layer, divisor=divisor, **how)
            new.divisor = None if divisor is None else bug(divisor)
            return new

        monkeypatch.setattr(Int8Linear, "from_float", classmethod(wrong))
        fails(test_equals_an_independent_emulation, 7, 40, None, False, True, 0)
