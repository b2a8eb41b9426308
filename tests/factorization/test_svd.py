"""Truncated SVD: Eckart-Young as a law, numpy as the oracle, and layers that are really two."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from effkit import load, log, save
from effkit.core.surgery import dense_weight
from effkit.core.technique import Pipeline
from effkit.factorization import SVD, rank, svd
from effkit.factorization.svd import LowRankLinear, truncate
from effkit.quantization import RTN
from effkit.zoo import MLP

few = settings(max_examples=25)


def matrix(rows, columns, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(widths=(20, 16, 12, 5)):
    torch.manual_seed(0)
    return MLP(widths).eval()


# laws of the factors


@few
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_error_is_what_was_discarded(rows, columns, r, seed):
    w = matrix(rows, columns, seed)
    up, down = truncate(w, r)
    discarded = torch.from_numpy(np.linalg.svd(w.numpy(), compute_uv=False))[r:].square().sum()
    assert_close((w - up @ down).square().sum(), discarded, atol=1e-10, rtol=1e-8)


@few
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
def test_no_competitor_of_this_rank_is_closer(rows, columns, seed):
    """Eckart-Young, against projections onto random subspaces, each given its best coordinates."""
    w, r = matrix(rows, columns, seed), 1 + seed % (min(rows, columns) - 1)
    up, down = truncate(w, r)
    least = (w - up @ down).square().sum()
    for rival in range(20):
        q, _ = torch.linalg.qr(matrix(rows, r, 1000 * seed + rival))
        assert least <= (w - q @ (q.T @ w)).square().sum() + 1e-12
        nudged = up + 1e-3 * matrix(rows, r, rival), down + 1e-3 * matrix(r, columns, rival)
        assert least <= (w - nudged[0] @ nudged[1]).square().sum() + 1e-12


def test_full_rank_is_the_identity():
    for shape in ((7, 4), (4, 7), (5, 5)):
        up, down = truncate(w := matrix(*shape), min(shape))
        assert_close(up @ down, w)


def test_both_factors_carry_half():
    up, down = truncate(matrix(9, 6), 4)
    assert_close(up.T @ up, down @ down.T)  # diag(s), both


def test_factors_keep_nothing_else_alive():
    up, down = truncate(matrix(64, 64), 2)
    assert up.untyped_storage().nbytes() == up.numel() * 8 and down.untyped_storage().nbytes() == down.numel() * 8


def test_a_split_on_one_side_is_caught(monkeypatch):
    """Planted: all of the singular values in one factor; the product is right, the balance is not."""

    def lopsided(w, r):
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return u[:, :r] * s[:r], vt[:r].clone()

    monkeypatch.setitem(globals(), "truncate", lopsided)
    test_full_rank_is_the_identity()
    with pytest.raises(AssertionError):
        test_both_factors_carry_half()


def test_the_smallest_singular_values_are_caught(monkeypatch):
    """Planted: an ascending spectrum, so that the wrong end is kept."""

    def wrong_end(w, r):
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return u[:, -r:] * s[-r:].sqrt(), s[-r:].sqrt()[:, None] * vt[-r:]

    monkeypatch.setitem(globals(), "truncate", wrong_end)
    with pytest.raises(AssertionError):
        test_no_competitor_of_this_rank_is_closer.hypothesis.inner_test(5, 4, 1)


# the layer and the technique


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_factorized_layer_is_the_layer_with_the_reconstructed_weight(bias, dtype):
    layer = nn.Linear(12, 10, bias=bias).to(dtype)
    thin = SVD(rank=3)(layer)
    assert isinstance(thin, LowRankLinear) and (thin.rank, thin.in_features, thin.out_features) == (3, 12, 10)
    assert type(thin.up) is nn.Linear and type(thin.down) is nn.Linear and thin.up.weight.dtype == dtype
    x, rounding = torch.randn(2, 5, 12, dtype=dtype), 0.1 if dtype == torch.bfloat16 else 1e-5
    one = nn.functional.linear(x, thin.dense_weight(), layer.bias)
    assert_close(thin(x), one, atol=rounding, rtol=rounding)
    u, s, vt = np.linalg.svd(layer.weight.detach().double().numpy(), full_matrices=False)
    oracle = torch.from_numpy((u[:, :3] * s[:3]) @ vt[:3])
    assert_close(thin.dense_weight().double(), oracle, atol=rounding / 3, rtol=rounding)


def test_a_layer_that_would_grow_is_left_alone_and_says_so():
    thin = SVD(rank=7)(mlp())
    assert isinstance(thin.layers[0], LowRankLinear) and type(thin.layers[1]) is nn.Linear  # 16 x 12: 6.9
    assert "layers.1: left alone (two factors would hold no fewer numbers than 12 x 16)" in str(log(thin))
    with pytest.raises(ValueError, match="rank must be at most 8 here, got 9"):
        SVD(rank=9)(mlp())


@few
@given(st.integers(1, 30), st.integers(1, 30))
def test_the_largest_useful_rank_is_just_below_the_break_even(rows, columns):
    r = rank.largest_useful(rows, columns)
    assert r * (rows + columns) < rows * columns <= (r + 1) * (rows + columns)
    assert r < rank.break_even(rows, columns) <= r + 1


@few
@given(st.floats(0.01, 1.0), st.integers(0, 99))
def test_energy_is_reached_and_one_rank_less_would_not_do(energy, seed):
    s = torch.linalg.svdvals(matrix(8, 6, seed))
    r, share = rank.by_energy(s, energy), lambda k: s[:k].square().sum() / s.square().sum()
    assert share(r) >= energy - 1e-12
    assert r == 1 or share(r - 1) < energy
    assert rank.by_energy(torch.zeros(4), energy) == 1


@few
@given(st.floats(0.35, 1.0), st.integers(0, 99))
def test_the_budget_is_kept_and_spent(keep, seed):
    shapes = [(8, 12), (12, 5), (20, 20)]
    spectra = [torch.linalg.svdvals(matrix(*shape, seed + i)) for i, shape in enumerate(shapes)]
    whole = sum(m * n for m, n in shapes)
    ranks = rank.by_budget(spectra, shapes, int(keep * whole))
    prices = [m * n if r is None else r * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True)]
    assert sum(prices) <= keep * whole
    assert keep < 1 or ranks == [None] * 3
    for r, (m, n), price in zip(ranks, shapes, prices, strict=True):  # nothing more fits
        step = min(m + n, m * n - price)
        assert r is None or sum(prices) + step > int(keep * whole)


def test_the_budget_goes_where_the_singular_values_are():
    concentrated, flat = torch.tensor([9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]), torch.full((8,), 3.0)
    first, second = rank.by_budget([concentrated, flat], [(8, 8), (8, 8)], 16 * 4)
    assert (first, second) == (1, 3)


@pytest.mark.parametrize("seed", range(8))
def test_no_division_of_the_budget_beats_the_greedy_one(seed):
    """Equal prices: greedy is optimal among ranks, and a layer kept whole can only help; all divisions are tried."""
    spectra = [torch.linalg.svdvals(matrix(10, 10, 3 * seed + i)) for i in range(3)]
    lost = lambda ranks: sum(s[r:].square().sum() for s, r in zip(spectra, ranks, strict=True) if r)  # noqa: E731
    greedy = rank.by_budget(spectra, [(10, 10)] * 3, 20 * 7)
    rivals = [(a, b, 7 - a - b) for a in range(1, 5) for b in range(1, 5) if 1 <= 7 - a - b <= 4]
    assert lost(greedy) <= min(map(lost, rivals)) + 1e-12


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(ValueError, match="a budget of 5 parameters is too small: rank 1 everywhere takes 10"):
        rank.by_budget([torch.ones(5)], [(5, 5)], 5)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_the_model_holds_what_was_asked_for(keep):
    model = mlp((64, 64, 64, 10))
    thin = SVD(keep=keep)(model)
    held, dense = (sum(p.numel() for p in m.parameters() if p.dim() == 2) for m in (thin, model))
    assert held <= keep * dense and held > (keep - 0.05) * dense


def test_truncating_twice_is_truncating_once():
    once, twice = SVD(rank=3)(mlp()), SVD(rank=3)(SVD(rank=4)(mlp()))
    assert isinstance(twice.layers[0], LowRankLinear) and type(twice.layers[0].up) is nn.Linear
    x = torch.randn(6, 20)
    assert_close(once(x), twice(x))


def test_keeping_everything_changes_nothing():
    model = mlp()
    same = SVD(keep=1.0)(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert str(log(same)).count("left alone") == 3


def test_the_file_is_smaller_and_opens(tmp_path):
    model = mlp((64, 64, 10))
    thin = SVD(rank=2)(model)
    assert save(thin, tmp_path / "thin.safetensors") < 0.4 * save(model, tmp_path / "dense.safetensors")
    opened, x = load(tmp_path / "thin.safetensors"), torch.randn(3, 64)
    assert torch.equal(opened(x), thin(x)) and opened.layers[0].rank == 2


def test_factors_can_be_quantized_and_masks_come_later(tmp_path):
    x = torch.randn(4, 20)
    packed = Pipeline((SVD(rank=3), RTN(8)))(mlp())
    assert type(packed.layers[0].up).__name__ == "QuantizedLinear"
    assert_close(packed(x), SVD(rank=3)(mlp())(x), atol=0.05, rtol=0.05)
    save(packed, tmp_path / "both.safetensors")
    assert torch.equal(load(tmp_path / "both.safetensors")(x), packed(x))
    assert dense_weight(packed.layers[0]).shape == (16, 20)
    masked = mlp()
    parametrizations.weight_norm(masked.layers[0])
    with pytest.raises(ValueError, match="SVD needs plain weights .*which this model lacks"):
        SVD()(masked)


def test_frozen_weights_stay_frozen_and_the_bias_is_the_same():
    model = mlp()
    model.layers[0].weight.requires_grad_(False)
    thin = SVD(rank=2)(model)
    assert [n for n, p in thin.layers[0].named_parameters() if p.requires_grad] == ["up.bias"]
    assert torch.equal(thin.layers[0].up.bias, model.layers[0].bias)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(rank=0), "rank must be a whole number, at least 1, got 0"),
        (dict(rank=2.5), "rank must be"),
        (dict(keep=0.0), "keep must be a number in \\(0.0, 1.0\\]"),
        (dict(energy=1.2), "energy must be"),
        (dict(rank=2, keep=0.5), "give one of rank, energy and keep"),
    ],
)
def test_bad_settings_get_one_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        SVD(**settings)


def test_a_wrong_factor_in_the_layer_is_caught(monkeypatch):
    """Planted: the technique keeps one direction too few."""
    monkeypatch.setattr(svd, "truncate", lambda w, r: truncate(w, r - 1))
    with pytest.raises(AssertionError):
        test_the_factorized_layer_is_the_layer_with_the_reconstructed_weight(True, torch.float32)


def test_an_energy_that_would_make_a_layer_grow_leaves_it_whole():
    """A random square matrix holds 99 % of its energy only beyond half of its rank."""
    model = MLP((40, 40, 5)).eval()
    thin = SVD(energy=0.99)(model)
    assert type(thin.layers[0]) is nn.Linear and torch.equal(thin.layers[0].weight, model.layers[0].weight)
    assert isinstance(SVD(energy=0.3)(model).layers[0], LowRankLinear)
