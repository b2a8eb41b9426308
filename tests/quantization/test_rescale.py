"""What changes sides: the product stays, AWQ is never worse than rounding to nearest, SmoothQuant repairs what outliers break."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effkit import load, log, save
from effkit.core.calibration import Statistics, layer_error
from effkit.core.task import Batches, Task
from effkit.quantization import AWQ, RTN, W8A8, SmoothQuant, rescale
from effkit.quantization.affine import grouped
from effkit.quantization.integer import Int8Linear, int8_product, int8_step, to_int8
from effkit.quantization.rescale import (
    column_scale,
    cut_ranges,
    expected_error,
    group_errors,
    outliers_put_in,
    smoothing,
)
from tests.subjects import gpt, image_task, language_task, mlp, outputs, resnet

sizes = st.integers(1, 300)


def inputs(seed, *, tokens=200, columns=48, spread=1.5):
    """Correlated inputs, some channels much larger than others, one of them far larger and one never used."""
    rng = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 6, generator=rng) @ torch.randn(6, columns, generator=rng)
    x = mixed + torch.randn(tokens, columns, generator=rng)
    x = x * (spread * torch.randn(columns, generator=rng)).exp()
    if columns > 2:
        x[:, 1] = 0
    return x


def summed(x):
    return Statistics(x.T @ x, x.abs().amax(0), len(x))


def weights(seed, rows, columns, dtype=torch.float32):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 10_000)).to(dtype)
    w[0] = 0
    return w


def error(store, w, seen):
    return layer_error(w.float(), store(), seen.gram).item()


# AWQ: laws


@pytest.mark.slow
@settings(max_examples=40)
@given(
    rows=st.integers(1, 9), columns=sizes, bits=st.integers(2, 8), group_size=st.sampled_from([-1, 0, 1, 7, 32]),
    size=st.sampled_from([0.0, 1e-15, 1.0, 1e6]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), symmetric=st.booleans(),
)  # fmt: skip
def test_never_worse_than_rounding_to_nearest(rows, columns, bits, group_size, size, dtype, symmetric):
    seen, w = summed(inputs(columns, tokens=9, columns=columns)), size * weights(rows, rows, columns, dtype)
    w = w.t().contiguous().t()
    how = dict(bits=bits, group_size=group_size, symmetric=symmetric)
    nearest = RTN(**how).store(w, None)
    for clip in (True, False):
        made = AWQ(**how, clip=clip).store(w, seen)
        assert made.shape == (rows, columns) and torch.isfinite(made()).all()
        assert error(made, w, seen) <= error(nearest, w, seen)
        assert made.bits_per_weight() == pytest.approx(nearest.bits_per_weight() + 16 / rows)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_channels_of_unequal_size_make_it_much_better(bits):
    ratios = []
    for seed in range(30):
        seen, w = summed(inputs(seed)), weights(seed, 24, 48)
        nearest, scaled, cut = (error(t.store(w, seen), w, seen) for t in (
            RTN(bits, 16), AWQ(bits, 16, clip=False), AWQ(bits, 16)))  # fmt: skip
        assert cut <= scaled
        ratios.append(scaled / nearest)
    assert np.median(ratios) < 0.5


@settings(max_examples=20)
@given(st.integers(1, 9), sizes, st.sampled_from([-1, 0, 1, 7, 32]))
def test_alpha_zero_uncut_is_rounding_to_nearest(rows, columns, group_size):
    w, sizes_ = weights(0, rows, columns), torch.rand(columns)
    made, nearest = AWQ(group_size=group_size).rescaled(w, column_scale(sizes_, 0.0)), RTN(group_size=group_size).store(w, None)
    assert torch.equal(made.codes, nearest.codes) and torch.equal(made.scale, nearest.scale) and torch.equal(made(), nearest())


def test_the_scale_is_eq_4_up_to_a_constant_and_what_was_never_used_stays_finite():
    sizes_ = torch.tensor([8.0, 2.0, 0.5, 0.0])
    made = column_scale(sizes_, 0.5)
    assert_close(made[:3] / made[0], (sizes_[0] / sizes_[:3]).sqrt(), rtol=0.01, atol=0.0)
    assert made[3] == 100 and torch.equal(column_scale(torch.zeros(3), 1.0), torch.full((3,), 1e4).bfloat16().float())


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 80), st.sampled_from([-1, 0, 1, 7, 32]))
def test_a_group_s_error_is_what_its_inputs_make_of_it(rows, columns, group_size):
    """NumPy, token by token."""
    x, off = inputs(rows, tokens=20, columns=columns), weights(1, rows, columns)
    ours = group_errors(off, x.T @ x, group_size)
    assert ours.shape[:2] == grouped(off, group_size).shape[:2]
    step = {-1: columns, 0: columns}.get(group_size, group_size)
    parts = [(off[:, i : i + step].numpy() @ x[:, i : i + step].numpy().T) ** 2 for i in range(0, columns, step)]
    wanted = np.stack([part.sum(1) for part in parts], 1)
    wanted = wanted.sum().reshape(1, 1) if group_size == 0 else wanted
    assert np.allclose(ours[..., 0].numpy(), wanted, rtol=1e-3, atol=1e-4 * wanted.max())


@pytest.mark.parametrize("group_size", [-1, 0, 5, 16])
def test_no_cut_costs_a_group_more_than_its_whole_range(group_size):
    x, w = inputs(0), weights(0, 24, 48)
    found = []
    for cuts in ([1.0], rescale.CUTS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rescale, "CUTS", cuts)
            scale, zero = cut_ranges(w, x.T @ x, bits=3, group_size=group_size, symmetric=False)
        groups = grouped(w, group_size)
        off = groups - scale * (((groups / scale).round() + zero).clamp(0, 7) - zero)
        found.append(group_errors(rescale.ungrouped(off, w.shape), x.T @ x, group_size))
    assert (found[1] <= found[0] * 1.001 + 1e-9).all() and found[1].sum() < found[0].sum()


def test_one_alpha_by_hand():
    """Two weights of one group, 2 bits, the second meets inputs a hundred times larger: with s = (0.1, 1) it sets the grid."""
    w, seen = torch.tensor([[0.9, -0.3]]), summed(torch.tensor([[0.01, 1.0]]))
    plain, made = (t.store(w, seen)() for t in (RTN(2, -1), AWQ(2, -1, clip=False)))
    assert abs(plain[0, 1] + 0.3) > 0.09 and abs(made[0, 1] + 0.3) < 0.01


@pytest.mark.slow
@pytest.mark.peers("torchao")
def test_the_search_is_as_good_as_torchao_s():
    """Its scales (from mean |x|, 20 alphas, measured on the inputs themselves) with our rounding: the same errors within 10 %."""
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    for seed in range(5):
        x, w = inputs(seed), weights(seed, 24, 48)
        theirs = AWQObserver(w, None, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))
        theirs(x, None)
        how, seen = AWQ(4, 16, symmetric=True, clip=False), summed(x)
        peer = error(how.rescaled(w, (1 / theirs.calculate_qparams()).bfloat16().float()), w, seen)
        ours = error(how.store(w, seen), w, seen)
        assert ours <= 1.1 * peer, (seed, ours, peer)


# AWQ: the technique


@pytest.mark.slow
def test_a_model_loses_less_than_by_rounding_to_nearest():
    model, task = outliers_put_in(gpt(), factor=16.0, rng=torch.Generator().manual_seed(0)), language_task()
    wanted = outputs(model, task)
    off = [(outputs(t(model, task), task) - wanted).square().mean() for t in (RTN(3, 16), AWQ(3, 16))]
    assert off[1] < 0.5 * off[0]


def test_convolutions_and_idle_layers_are_rounded_to_nearest_and_said_so():
    model = resnet()
    made, nearest = AWQ()(model, image_task()), RTN()(model)
    assert torch.equal(made.stem.weight_store(), nearest.stem.weight_store())
    assert "stem: rounded to nearest (a convolution's inputs are not gathered)" in str(log(made))


@pytest.mark.parametrize("bad", [dict(examples=0), dict(bits=17)])
def test_bad_settings_of_awq_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AWQ(**bad)


# SmoothQuant


@settings(max_examples=40)
@given(st.integers(1, 20), sizes, st.floats(0, 1), st.sampled_from([1e-30, 1.0, 1e6]))
def test_smoothing_preserves_the_product(rows, columns, alpha, size):
    x, w = size * inputs(rows, tokens=7, columns=columns).double(), weights(rows, rows, columns).double()
    s = smoothing(x.abs().amax(0), w, alpha).double()
    assert_close((x / s) @ (w * s).T, x @ w.T, rtol=1e-12, atol=1e-13 * size * x.abs().max().item() * columns)


@given(sizes)
def test_half_gives_both_sides_the_same_range(columns):
    x, w = inputs(0, columns=columns), torch.randn(9, columns)
    x[:, 0] = 1
    s = smoothing(x.abs().amax(0), w, 0.5)
    used = x.abs().amax(0) > 0
    assert_close((x / s).abs().amax(0)[used], (w * s).abs().amax(0)[used], rtol=1e-4, atol=0.0)
    assert torch.equal(s[~used], torch.ones_like(s[~used]))


@pytest.mark.peers("torchao")
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_equals_torchao_s_smoothing(alpha):
    from torchao.prototype.smoothquant.core import SmoothQuantObserver

    x, w = torch.randn(60, 48) * torch.randn(48).exp(), torch.randn(24, 48)
    theirs = SmoothQuantObserver(w, alpha)
    theirs(x)
    assert_close(smoothing(x.abs().amax(0), w, alpha), theirs.calculate_qparams()[0], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("static", [True, False])
def test_the_layer_is_its_dense_weight_up_to_the_roundings(static):
    """Each factor is off by half a step: |y - y_hat| <= sum |w s| s_x / 2 + sum |x / s| s_w / 2 + n s_x s_w / 4."""
    x, layer = inputs(0), nn.Linear(48, 9).requires_grad_(False)
    made = SmoothQuant("tensor" if static else "token").replacement(layer, summed(x))
    xs, ws = x / made.divisor, layer.weight * made.divisor
    s_x = xs.abs().amax() / 127 if static else xs.abs().amax(1, keepdim=True) / 127
    s_w = ws.abs().amax(1) / 127
    bound = s_x / 2 * ws.abs().sum(1) + xs.abs().sum(1, keepdim=True) * s_w / 2 + 48 * s_x * s_w / 4
    assert ((made(x) - layer(x)).abs() <= bound + 1e-4).all()
    assert ((made.dense_weight() - layer.weight).abs() <= s_w[:, None] / 2 / made.divisor + 1e-6).all()


def test_the_forecast_is_what_comes():
    """Within a quarter, over alphas whose errors differ by far more."""
    x, layer = inputs(1, tokens=2000, spread=1.0), nn.Linear(48, 24, bias=False).requires_grad_(False)
    seen, told, came = summed(x), [], []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        s = smoothing(seen.absmax, layer.weight, alpha)
        told.append(expected_error(layer.weight, seen, s))
        made = SmoothQuant("tensor", alpha=alpha).replacement(layer, seen)
        came.append((made(x) - layer(x)).double().square().sum().item())
    assert max(came) > 3 * min(came)
    assert np.allclose(np.array(told) / came, 1, atol=0.25), np.array(told) / came


def test_the_searched_alpha_loses_no_more_than_the_default():
    off = np.array([_static_errors(seed) for seed in range(20)])
    assert (off[:, 1] <= 1.05 * off[:, 0]).all() and np.median(off[:, 1] / off[:, 0]) < 0.95


def _static_errors(seed):
    x, layer = inputs(seed, tokens=400), nn.Linear(48, 24, bias=False).requires_grad_(False)
    made = [SmoothQuant("tensor", alpha=alpha).replacement(layer, summed(x)) for alpha in (0.5, "search")]
    return [(m(x) - layer(x)).double().square().sum().item() for m in made]


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_a_file_holds_the_divisors(activations, tmp_path):
    model, task = mlp(), image_task()
    result = SmoothQuant(activations)(model, task)
    save(result, tmp_path / "model.safetensors")
    assert torch.equal(outputs(load(tmp_path / "model.safetensors"), task), outputs(result, task))
    extra = sum(32 * m.in_features for m in result.modules() if isinstance(m, Int8Linear))
    codes = sum(m.codes.numel() for m in result.modules() if isinstance(m, Int8Linear))
    assert SmoothQuant().claim(result).value == pytest.approx(W8A8(activations).claim(W8A8(activations)(model, task)).value + extra / codes)


def test_layers_that_no_input_reaches_are_not_smoothed():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    x = torch.randn(6, 8)
    result = SmoothQuant("tensor")(Idle(), Task(calib=Batches(x, x)))
    assert result.used.divisor is not None and result.idle.divisor is None and result.idle.input_scale is None
    assert "idle: not smoothed (no calibration input reached it)" in str(log(result))


@pytest.mark.parametrize("bad", [dict(alpha=1.5), dict(alpha="best"), dict(alpha="search"), dict(activations="row")])
def test_bad_settings_of_smoothquant_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SmoothQuant(**bad)


# the construction


def test_a_power_of_two_changes_no_bit_and_any_factor_no_output():
    model, task = gpt(), language_task()
    for factor, tolerance in ((64.0, 0.0), (37.0, 1e-5)):
        made = outliers_put_in(model, factor=factor, rng=torch.Generator().manual_seed(0))
        assert_close(outputs(made, task), outputs(model, task), rtol=0.0, atol=tolerance)
        assert made.blocks[0].ff_norm.weight.max() == factor and (made.blocks[1].attention_norm.weight == factor).sum() == 4
    assert model.blocks[0].ff_norm.weight.max() == 1


def test_static_scales_suffer_and_smoothing_repairs():
    model, task = gpt(), language_task()
    made = outliers_put_in(model, factor=256.0, rng=torch.Generator().manual_seed(0))
    wanted = outputs(model, task)
    off = lambda technique, model: (outputs(technique(model, task), task) - wanted).square().mean().item()  # noqa: E731
    plain, broken, repaired = off(W8A8("tensor"), model), off(W8A8("tensor"), made), off(SmoothQuant("tensor"), made)
    assert broken > 30 * plain and repaired < 4 * plain
    split = off(W8A8("tensor", outliers=6.0), made)
    assert 30 * plain < split < broken, "weights as small as the outliers are large get no code but 0: float inputs don't help"


def test_only_decoders_take_outliers():
    with pytest.raises(ValueError, match="MLP"):
        outliers_put_in(mlp(), rng=torch.Generator())


# planted bugs


def fails(law):
    with pytest.raises(AssertionError):
        law()


@pytest.mark.slow
def test_a_search_that_takes_the_worst_is_caught(monkeypatch):
    monkeypatch.setattr(rescale, "min", lambda *tried, key: max(*tried, key=key), raising=False)
    fails(lambda: test_channels_of_unequal_size_make_it_much_better(4))
    fails(test_the_searched_alpha_loses_no_more_than_the_default)


@pytest.mark.slow
def test_a_column_scale_on_one_side_only_is_caught(monkeypatch):
    monkeypatch.setattr(AWQ, "rescaled", lambda self, w, scale: RTN.store(self, w / scale, None))
    fails(lambda: test_channels_of_unequal_size_make_it_much_better(4))


@pytest.mark.slow
def test_small_channels_protected_instead_of_large_ones_is_caught(monkeypatch):
    right = rescale.column_scale
    monkeypatch.setattr(rescale, "column_scale", lambda sizes, alpha: right(sizes, -alpha))
    fails(lambda: test_channels_of_unequal_size_make_it_much_better(4))


def test_cuts_that_look_at_weights_alone_are_caught(monkeypatch):
    monkeypatch.setattr(rescale, "group_errors", lambda off, gram, group_size: grouped(off, group_size).square().sum(-1, keepdim=True))
    fails(lambda: test_no_cut_costs_a_group_more_than_its_whole_range(5))


@pytest.mark.parametrize("bug", ["squared", "upside down", "weights' share and activations' exchanged"])
def test_a_wrong_divisor_is_caught(monkeypatch, bug):
    right = rescale.smoothing
    wrong = {
        "squared": lambda x, w, alpha: right(x, w, alpha) ** 2,
        "upside down": lambda x, w, alpha: 1 / right(x, w, alpha),
        "weights' share and activations' exchanged": lambda x, w, alpha: right(x, w, alpha) * x.clamp(min=1e-9),
    }[bug]
    monkeypatch.setattr(rescale, "smoothing", wrong)
    fails(test_static_scales_suffer_and_smoothing_repairs)


def test_weights_that_were_not_multiplied_are_caught(monkeypatch):
    right = Int8Linear.from_float.__func__

    def wrong(cls, layer, *, divisor=None, **how):
        new = right(cls, layer, **how)
        new.divisor = divisor
        return new

    monkeypatch.setattr(Int8Linear, "from_float", classmethod(wrong))
    fails(lambda: test_the_layer_is_its_dense_weight_up_to_the_roundings(True))


def test_outliers_that_are_not_undone_are_caught(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__itruediv__", lambda self, other: self)
    fails(test_a_power_of_two_changes_no_bit_and_any_factor_no_output)


def test_what_is_foreseen_is_what_happens_even_where_nearly_all_values_round_to_zero():
    """One far input makes the step so coarse that the others become 0: they err by themselves, not by a twelfth of a step squared."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=rng), 0.01 * torch.randn(400, 64, generator=rng)
    x[:, 0] = 100 * torch.rand(400, generator=rng)
    seen = Statistics(x.T @ x, x.abs().amax(0), len(x))
    codes, scale = to_int8(weight)
    made = int8_product(x, codes, scale.t(), int8_step(x.abs().max()).reshape(1, 1))
    happened = (made - x @ weight.t()).square().sum().item()
    assert expected_error(weight, seen, torch.ones(64)) == pytest.approx(happened, rel=0.5)
