"""Laws of the affine map and of finding its range; oracles: brute force, torchao, and numbers checked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit.quantization import affine
from effkit.quantization.affine import dequantize, grouped, pack, quantize, storable, ungrouped, unpack
from effkit.quantization.observers import OBSERVERS, least_squares, min_max, squared_error

bits_ = st.integers(2, 8)


@st.composite
def weights(draw):
    """Matrices of 1 to 300 a side, odd sizes, with zero rows, constants, huge and tiny ranges."""
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 300))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=rng) * 10.0 ** draw(st.integers(-20, 20))
    kind = draw(st.sampled_from(["plain", "zero row", "constant", "positive", "outlier"]))
    if kind == "zero row":
        w[0] = 0
    if kind == "constant":
        w[:] = w[0, 0]
    if kind == "positive":
        w = w.abs()
    if kind == "outlier":
        w[0, 0] *= 1000
    return w


def error_and_step(w, bits, group_size, symmetric, search="min-max"):
    groups = grouped(w, group_size)
    scale, zero_point = OBSERVERS[search](groups, bits=bits, symmetric=symmetric)
    back = dequantize(quantize(groups, scale, zero_point, bits=bits), scale, zero_point)
    return (groups - back).abs(), scale, zero_point


@settings(max_examples=60)
@given(weights(), bits_, st.sampled_from([0, -1, 1, 3, 32, 1000]), st.booleans())
def test_error_is_at_most_half_a_step(w, bits, group_size, symmetric):
    error, scale, _ = error_and_step(w, bits, group_size, symmetric)
    assert (error <= scale / 2 * (1 + 1e-5)).all()


@settings(max_examples=40)
@given(weights(), bits_, st.booleans())
def test_zero_is_exact_and_zero_point_is_a_code(w, bits, symmetric):
    groups = grouped(w, 32)
    scale, zero_point = min_max(groups, bits=bits, symmetric=symmetric)
    assert (dequantize(quantize(torch.zeros_like(groups), scale, zero_point, bits=bits), scale, zero_point) == 0).all()
    assert ((zero_point >= 0) & (zero_point < 2**bits) & (zero_point == zero_point.round())).all()


@settings(max_examples=40)
@given(weights(), st.integers(1, 8))
def test_pack_and_unpack_are_inverses(w, bits):
    q = (w.abs() * 997).nan_to_num(0, 0, 0).remainder(2**bits).to(torch.uint8)
    packed = pack(q, bits)
    assert torch.equal(unpack(packed, bits, q.shape[1]), q)
    assert packed.shape == (q.shape[0], -(-q.shape[1] // 8) * bits)


@given(weights(), st.sampled_from([0, -1, 1, 7, 32, 1000]))
@settings(max_examples=30)
def test_grouping_and_ungrouping_are_inverses(w, group_size):
    assert torch.equal(ungrouped(grouped(w, group_size), tuple(w.shape)), w)


@settings(max_examples=40)
@given(weights(), bits_, st.booleans())
def test_least_squares_is_never_worse_than_min_max(w, bits, symmetric):
    groups = grouped(w, 32)
    ours = squared_error(groups, least_squares(groups, bits=bits, symmetric=symmetric), bits)
    assert (ours <= squared_error(groups, min_max(groups, bits=bits, symmetric=symmetric), bits)).all()


def test_least_squares_is_near_the_optimum_found_by_brute_force():
    """All scales on a fine lattice, all zero points: nothing is more than 5 % better."""
    x = torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(3))
    scales = torch.linspace(0.05, 1.5, 400)
    best = torch.full((6, 1, 1), torch.inf)
    for scale in scales:
        for zero in range(8):
            candidate = (storable(scale.expand(6, 1, 1)), torch.full((6, 1, 1), float(zero)))
            best = torch.minimum(best, squared_error(x, candidate, 3))
    found = squared_error(x, least_squares(x, bits=3), 3)
    assert (found.sum() <= 1.05 * best.sum()) and found.sum() < 0.95 * squared_error(x, min_max(x, bits=3), 3).sum()


def test_the_worked_example():
    """Three weights and two bits, small enough for paper."""
    x = torch.tensor([[-1.0, 0.2, 0.7]])
    scale, zero_point = min_max(x, bits=2)
    q = quantize(x, scale, zero_point, bits=2)
    assert scale.item() == pytest.approx(1.7 / 3, rel=2**-7) and zero_point.item() == 2
    assert q.tolist() == [[0, 2, 3]]


@settings(max_examples=30)
@given(weights())
def test_a_stored_scale_is_never_below_the_exact_one(w):
    scale = w.abs().clamp(min=1e-25)
    assert (storable(scale) >= scale).all() and (storable(scale) <= scale * (1 + 2**-7)).all()


@pytest.mark.slow
def test_rounding_scales_down_would_be_caught(monkeypatch):
    """Planted: scales rounded to nearest leave the largest weights off the grid."""
    monkeypatch.setattr(
        affine, "storable", lambda s: torch.where(s > 0, s, 1.0).to(torch.bfloat16).float() * (1 - 2**-8)
    )
    with pytest.raises(AssertionError):
        test_error_is_at_most_half_a_step()


@pytest.mark.peers("torchao")
@pytest.mark.parametrize("bits, symmetric", [(8, True), (4, False), (4, True)])
def test_equals_torchao(bits, symmetric):
    """Same scales given, torchao's primitive and ours give the same codes and the same numbers. Scales themselves differ
    on purpose: ours are bfloat16 rounded up, and a symmetric grid here is -(2^(b-1) - 1) ... 2^(b-1) - 1."""
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    groups = grouped(x, 32)
    scale, zero_point = min_max(groups, bits=bits, symmetric=symmetric)
    args = ((1, 32), scale.squeeze(-1), zero_point.squeeze(-1).to(torch.int32))
    theirs = quantize_affine(x, *args, torch.uint8, 0, 2**bits - 1)
    ours = ungrouped(quantize(groups, scale, zero_point, bits=bits), (16, 64))
    assert torch.equal(ours, theirs)
    back = dequantize_affine(theirs, *args, torch.uint8, 0, 2**bits - 1, output_dtype=torch.float32)
    assert torch.allclose(
        back,
        ungrouped(dequantize(quantize(groups, scale, zero_point, bits=bits), scale, zero_point), (16, 64)),
        atol=1e-6,
    )
