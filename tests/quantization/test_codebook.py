"""Levels that are not evenly spaced: published tables, other people's formats, and what a Gaussian allows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effkit import load, save
from effkit.quantization import FP8, MXFP4, NF4, RTN, KMeans, codebook
from effkit.quantization.affine import quantize
from effkit.quantization.codebook import E2M1, E4M3, NORMAL, entropy, lloyd, nearest
from tests.quantization.test_affine import weights

TECHNIQUES = [KMeans(2), KMeans(4), KMeans(8, 20), NF4(), NF4(16, double=False), FP8(), FP8(32), MXFP4()]

#: Dettmers et al. 2023, arXiv:2305.14314, appendix E
PUBLISHED_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                 -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                 0.7229568362236023, 1.0]  # fmt: skip
#: Max 1960, table I: the least mean squared error of a quantizer of 1, 2, 3 and 4 bits for a normal variable
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def floats(n=1 << 18, largest=448.0):
    """Floats of all bit patterns, and all points half way between two values of E4M3 with their neighbours."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    half = (E4M3[1:] + E4M3[:-1]) / 2
    up, down = torch.nextafter(half, half + 1), torch.nextafter(half, half - 1)
    every = torch.cat((bits.view(torch.float32), half, up, down, E4M3))
    return every[every.abs() <= largest]


# laws


@pytest.mark.slow
@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 256), st.integers(-20, 20), st.integers(0, 999), st.booleans())
def test_nearest_is_nearest(n, k, exponent, seed, repeated):
    x = normal(n, seed=seed) * 10.0**exponent
    levels = (normal(k, seed=seed + 1) * 10.0**exponent).sort().values
    if repeated:
        levels = levels[torch.arange(k) // 2]
    off = (x - levels[nearest(x, levels).long()]).abs()
    best = (x[:, None] - levels).abs().amin(1)
    assert (off <= best + 1e-6 * levels.abs().max()).all()


@pytest.mark.slow
@settings(max_examples=80)
@given(weights(), st.sampled_from(TECHNIQUES), st.booleans())
def test_whatever_the_weights_each_gets_the_nearest_of_its_grid(w, technique, half):
    """And the grid reaches them: none is off by more than the widest gap between levels, a tenth more for scales in 8
    bits. Below 1e-30 a scale in bfloat16 has its floor."""
    w = w.bfloat16() if half else w
    store = technique.store(w, None)
    back, levels, w = store(), store.levels, w.float()
    assert back.shape == w.shape and back.dtype == torch.float32 and torch.isfinite(back).all()
    assert (levels.diff() >= 0).all() and len(levels) <= 2**store.bits
    groups, scale = codebook.grouped(w, store.group_size), store.scales()
    best = ((groups / torch.where(scale == 0, 1.0, scale))[..., None] - levels).abs().amin(-1) * scale.abs()
    off = (groups - codebook.grouped(back, store.group_size)).abs()
    reached = torch.where(scale == 0, groups.abs(), best) + 1e-5 * groups.abs().amax()
    assert codebook.ungrouped(off <= reached, tuple(w.shape)).all()
    if not isinstance(technique, KMeans):
        assert ((w - back).abs() <= 1.1 * w.abs().max() * levels.diff().max() / levels[-1] + 1e-30).all()


@pytest.mark.parametrize("technique", TECHNIQUES, ids=repr)
@pytest.mark.parametrize("value", [0.0, 0.37, -1e-20, 1e20])
def test_zeros_and_constants(technique, value):
    w = normal(6, 96)
    w[2], w[4, :32] = value, value
    back = technique.store(w, None)()
    assert torch.isfinite(back).all()
    if value == 0 and not isinstance(technique, KMeans):
        assert (back[2] == 0).all() and (back[4, :16] == 0).all(), "zero is a level of every other grid"
    whole = torch.full((6, 96), value)
    torch.testing.assert_close(technique.store(whole, None)(), whole, rtol=0.35 if technique == MXFP4() else 2**-5, atol=0)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=repr)
def test_layout_and_file(technique, tmp_path):
    layer = nn.Linear(77, 9)
    made = technique(nn.Sequential(layer))
    turned = nn.Linear(77, 9)
    turned.weight, turned.bias = nn.Parameter(layer.weight.detach().t().contiguous().t()), layer.bias
    assert torch.equal(technique(nn.Sequential(turned))[0].dense_weight(), made[0].dense_weight())
    save(made, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors")[0].dense_weight(), made[0].dense_weight())


@pytest.mark.parametrize(
    "technique, expected",
    [
        (KMeans(3), 3 + 8 * 32 / (512 * 1024)),
        (NF4(64, double=False), 4 + 32 / 64 + 16 * 32 / (512 * 1024)),
        (NF4(64), 4 + 8 / 64 + 32 / (64 * 256) + 17 * 32 / (512 * 1024)),  # Dettmers et al., sec. 3: 0.127 for scales
        (FP8(), 8 + 16 / 1024 + 253 * 32 / (512 * 1024)),
        (MXFP4(), 4.25 + 15 * 32 / (512 * 1024)),
    ],
    ids=repr,
)
def test_bits_per_weight_count_codes_scales_and_levels(technique, expected):
    assert technique.store(normal(512, 1024), None).bits_per_weight() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [dict(bits=1), dict(bits=9), dict(iterations=-1)])
def test_bad_settings_of_kmeans_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        KMeans(**bad)


@pytest.mark.parametrize("kind", [NF4, FP8])
def test_bad_group_sizes_are_refused(kind):
    with pytest.raises(ValueError, match="group_size"):
        kind(group_size=-2)


# k-means


@settings(max_examples=40)
@given(weights(), st.integers(2, 6))
def test_kmeans_is_never_worse_than_where_it_starts_and_each_iteration_than_the_last(w, bits):
    errors = [(w - KMeans(bits, n).store(w, None)()).double().square().sum() for n in (0, 1, 2, 5, 40)]
    assert all(later <= first * (1 + 1e-5) + 1e-60 for first, later in zip(errors, errors[1:], strict=False))


def test_lloyd_is_kmeans_as_it_is_usually_written():
    x, levels = normal(3000), torch.linspace(-3, 3, 8)
    ours = lloyd(x, levels, iterations=7)
    theirs, data = levels.double().numpy(), x.double().numpy()
    for _ in range(7):
        near = np.abs(data[:, None] - theirs).argmin(1)
        theirs = np.array([data[near == k].mean() if (near == k).any() else theirs[k] for k in range(8)])
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5)


def test_a_level_that_nothing_is_near_to_stays():
    assert lloyd(torch.tensor([0.0, 0.1, 9.0]), torch.tensor([0.0, 5.0, 10.0]), iterations=9).tolist() == pytest.approx([0.05, 5.0, 9.0])


# rate and distortion of a normal variable


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_finds_what_max_found(bits):
    x = normal(1, 1_000_000)
    error = (x - KMeans(bits).store(x, None)()).square().mean()
    assert error.item() == pytest.approx(MAX_1960[bits], rel=0.005)


def decibels(error):
    return -10 * math.log10(error)


@pytest.mark.slow
def test_a_bit_is_worth_6_02_decibels_and_even_levels_with_an_entropy_code_end_1_53_below_shannon():
    """Shannon: error >= 2^(-2 bits), that is 6.02 dB a bit. Even steps, the codes' entropy for bits: pi e / 6 short of it
    as steps become fine. Lloyd-Max with codes of equal length: sqrt(3) pi / 2, 4.35 dB, in the limit of many bits."""
    x, gaps = torch.special.ndtri((torch.arange(2e6, dtype=torch.float64) + 0.5) / 2e6)[None], []
    for step in (1.0, 0.5, 0.25, 0.125, 0.0625):
        codes = (x / step).round()
        gaps.append(20 * math.log10(2) * entropy(codes) - decibels((x - codes * step).square().mean().item()))
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] == pytest.approx(10 * math.log10(math.pi * math.e / 6), abs=0.003)
    fixed = [6.0206 * b - decibels((x - KMeans(b, 3000).store(x, None)()).square().mean().item()) for b in (2, 4, 6)]
    assert fixed == sorted(fixed) and fixed[0] > 1.53 and 3.5 < fixed[-1] < 4.35


def test_even_levels_lose_more_than_lloyds_and_ever_more():
    x, lost = normal(1, 200_000), []
    for bits in (2, 3, 4, 5):
        steps = [s * 2.0**-bits for s in (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5)]
        even = min(uniform_error(x, s, bits) for s in steps)
        lost.append(even / (x - KMeans(bits, 3000).store(x, None)()).square().mean().item())
    assert lost == sorted(lost) and lost[0] > 1.0 and lost[-1] > 1.2, lost


def uniform_error(x, step, bits):
    one = torch.ones(1, 1)
    zero = (2**bits - 1) / 2 * one  # levels on both sides of zero, none on it
    return (x - step * (quantize(x, step * one, zero, bits=bits).float() - zero)).square().mean().item()


def test_entropy_of_a_fair_and_of_a_loaded_coin():
    assert entropy(torch.tensor([0, 1] * 50)) == pytest.approx(1) and entropy(torch.zeros(9)) == 0
    assert entropy(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.8112781)


# NF4


def test_nf4_is_the_published_table():
    torch.testing.assert_close(NORMAL, torch.tensor(PUBLISHED_NF4), atol=1e-6, rtol=0)


def nf4_in_numpy(w, size):
    """The published table, argmin for the nearest."""
    table, blocks = np.array(PUBLISHED_NF4), w.reshape(-1, size)
    largest = np.abs(blocks).max(1, keepdims=True)
    return (table[np.abs(blocks[:, :, None] / largest[:, :, None] - table).argmin(-1)] * largest).reshape(w.shape)


def test_nf4_is_numpys():
    w = normal(32, 256).double().numpy()
    ours = NF4(64, double=False).store(torch.from_numpy(w).float(), None)()
    np.testing.assert_allclose(ours.numpy(), nf4_in_numpy(w, 64), atol=1e-6)


@pytest.mark.peers("bitsandbytes")
def test_nf4_is_bitsandbytes():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = normal(64, 256)
    theirs = dequantize_4bit(*quantize_4bit(w, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(NF4(64, double=False).store(w, None)(), theirs, atol=1e-6, rtol=0)
    double = dequantize_4bit(*quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True))
    ours = NF4(64).store(w, None)()  # their 8 bits are another float, so that scales differ by its rounding
    assert ((ours - w).square().mean() <= 1.02 * (double - w).square().mean()).all()


def test_scales_in_8_bits_cost_next_to_nothing():
    w = normal(256, 512) * normal(256, 1, seed=1).exp()
    plain, double = ((w - NF4(64, double=d).store(w, None)()).square().mean() for d in (False, True))
    assert double < 1.05 * plain
    scale, store = w.unflatten(1, (-1, 64)).abs().amax(-1), NF4(64).store(w, None)
    spread = (scale - scale.mean()).abs().flatten().unflatten(0, (-1, 256)).amax(1).repeat_interleave(256)
    assert ((store.scales()[..., 0] - scale).abs().flatten() <= spread / 28).all()  # 448 - 416 is the widest gap of E4M3


def test_double_quantization_spends_its_8_bits_on_what_scales_differ_by():
    """Scales that differ by a hundredth are told apart, though E4M3 has but 8 values between 1 and 2."""
    w = torch.ones(64, 64) * torch.linspace(1, 1.01, 64)[:, None]
    scale = NF4(64).store(w, None).scales().flatten()
    assert ((scale - torch.linspace(1, 1.01, 64)).abs() <= 0.005 / 28 + 1e-6).all()


def test_nf4_beats_even_symmetric_levels_on_normal_weights_at_equal_bits():
    w = normal(512, 1536)
    nf4, even = NF4(64).store(w, None), RTN(4, 128, symmetric=True).store(w, None)
    assert nf4.bits_per_weight() == pytest.approx(even.bits_per_weight(), abs=0.005)
    assert (w - nf4()).square().mean() < 0.85 * (w - even()).square().mean()


# FP8


def test_e4m3_rounds_as_torch_does_bit_for_bit():
    x = floats()
    assert torch.equal(E4M3[nearest(x, E4M3).long()], x.to(torch.float8_e4m3fn).float())


def test_e4m3_has_the_values_of_torch():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(E4M3, every[torch.isfinite(every)].unique()) and E4M3[-1] == 448


@pytest.mark.parametrize("group_size", [-1, 0, 32])
def test_fp8_is_torchs_float8_times_its_scale(group_size):
    w = normal(48, 96) * normal(48, 1, seed=2).exp()
    store = FP8(group_size).store(w, None)
    groups = codebook.grouped(w, group_size)
    cast = (groups / store.scales()).to(torch.float8_e4m3fn).float() * store.scales()
    assert torch.equal(store(), codebook.ungrouped(cast, (48, 96)))
    assert (groups.abs().amax(-1) / store.scales()[..., 0] > 440).all()


@settings(max_examples=30)
@given(weights())
def test_fp8_is_off_by_at_most_a_sixteenth_of_each_weight(w):
    """Half of the last of 3 bits, down to the smallest normal number, 2^-6, of the largest, 448."""
    back, least = FP8().store(w, None)(), w.abs().amax(1, keepdim=True) * 2**-9 / 448
    assert ((w - back).abs() <= torch.maximum(w.abs() / 16, least) * (1 + 1e-5) + 1e-30).all()


# MXFP4


#: OCP Microscaling Formats v1.0, sec. 5.3.3, by code; each with both signs
SPECIFIED = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e2m1_is_the_table_of_the_specification():
    assert E2M1.tolist() == [-v for v in SPECIFIED[:0:-1]] + SPECIFIED


@pytest.mark.peers("ml_dtypes")
def test_e2m1_rounds_as_ml_dtypes_does():
    import ml_dtypes

    x = torch.cat((torch.linspace(-6, 6, 1201), (E2M1[1:] + E2M1[:-1]) / 2))
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert torch.equal(E2M1[nearest(x, E2M1).long()], torch.from_numpy(theirs))


def mxfp4_in_numpy(w):
    """Rouhani et al., algorithm 1: the shared exponent is floor(log2 of the largest) - 2. Even codes come first, and argmin
    takes the first: ties to even."""
    blocks, table = w.reshape(-1, 32), np.array(SPECIFIED[::2] + SPECIFIED[1::2])
    x = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(1, keepdims=True))) - 2)
    near = table[np.abs(np.abs(blocks / x)[:, :, None] - table).argmin(-1)]
    return (np.sign(blocks) * near * x).reshape(w.shape)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20])
def test_mxfp4_is_numpys(size):
    w = normal(16, 128) * size
    w[0, 0], w[1, 0] = 4 * size, 8 * size  # largest numbers that are powers of two, when size is
    assert np.array_equal(MXFP4().store(w, None)().double().numpy(), mxfp4_in_numpy(w.double().numpy()))


@settings(max_examples=30)
@given(weights())
def test_the_largest_of_a_block_lies_between_4_and_8(w):
    largest = codebook.grouped(w, 32).abs().amax(-1)
    scaled = (largest / MXFP4().store(w, None).scales()[..., 0])[largest > 0]
    assert ((scaled >= 4) & (scaled < 8)).all()


@pytest.mark.slow
@pytest.mark.peers("torchao")
def test_mxfp4_is_torchaos():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    w = normal(16, 128)
    theirs = mx.MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(MXFP4().store(w, None)(), theirs)


# planted bugs


@pytest.mark.slow
def test_the_level_below_instead_of_the_nearest_would_be_caught(monkeypatch):
    below = lambda x, levels: torch.searchsorted(levels, x, right=True).sub(1).clamp(min=0).to(torch.uint8)  # noqa: E731
    monkeypatch.setattr(codebook, "nearest", below)
    monkeypatch.setitem(globals(), "nearest", below)
    for test in (test_nearest_is_nearest, test_nf4_is_numpys, test_e4m3_rounds_as_torch_does_bit_for_bit):
        with pytest.raises(AssertionError):
            test()


@pytest.mark.slow
def test_levels_out_of_order_would_be_caught(monkeypatch):
    monkeypatch.setattr(codebook, "NORMAL", NORMAL.roll(8))  # positive ones first: the order of the bit patterns
    with pytest.raises(AssertionError):
        test_nf4_is_numpys()
    with pytest.raises(AssertionError):
        test_whatever_the_weights_each_gets_the_nearest_of_its_grid()


def test_a_mean_that_is_never_put_back_would_be_caught(monkeypatch):
    right = codebook.double_quantize
    monkeypatch.setattr(codebook, "double_quantize", lambda scale: (*right(scale)[:2], torch.zeros(())))
    with pytest.raises(AssertionError):
        test_scales_in_8_bits_cost_next_to_nothing()


def test_a_mean_that_is_never_taken_off_would_be_caught(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "mean", lambda self, *_: self.new_zeros(()))
    with pytest.raises(AssertionError):
        test_double_quantization_spends_its_8_bits_on_what_scales_differ_by()


@pytest.mark.slow
def test_a_shared_exponent_that_is_one_too_large_would_be_caught(monkeypatch):
    right = codebook.shared_exponent
    monkeypatch.setattr(codebook, "shared_exponent", lambda largest: right(largest) + 1)
    for test in (test_the_largest_of_a_block_lies_between_4_and_8, lambda: test_mxfp4_is_numpys(1.0)):
        with pytest.raises(AssertionError):
            test()


def test_lloyd_that_leaves_the_running_sum_one_off_would_be_caught(monkeypatch):
    right = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a, **k: (right(*a, **k) - 1).clamp(min=0))
    with pytest.raises(AssertionError):
        test_lloyd_is_kmeans_as_it_is_usually_written()


@pytest.mark.parametrize("largest, bias", [(240.0, 7), (448.0, 8)])
def test_an_e4m3_of_another_make_would_be_caught(monkeypatch, largest, bias):
    """Planted: the largest number of the float with infinities, and the other convention's bias."""
    wrong = codebook.minifloat(4, 3, largest=largest) * 2.0 ** (7 - bias)
    monkeypatch.setattr(codebook, "E4M3", wrong)
    monkeypatch.setitem(globals(), "E4M3", wrong)
    for law in (test_e4m3_has_the_values_of_torch, lambda: test_fp8_is_torchs_float8_times_its_scale(-1)):
        with pytest.raises(AssertionError):
            law()
