"""Tucker-2: HOOI against HOSVD and TensorLy, three convolutions against one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effkit import load, log, save
from effkit.factorization import SVD, Tucker2, tucker
from effkit.factorization.tucker import TuckerConv2d, expand, hooi, hosvd, size
from effkit.zoo import ResNet

few = settings(max_examples=20)


def filters(o=10, i=8, k=3, seed=0):
    return torch.randn(o, i, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(w, factors):
    u_out, core, u_in = factors
    return (w - expand(core, u_out, u_in)).square().sum()


ranks = st.tuples(st.integers(1, 10), st.integers(1, 8))


@few
@given(ranks, st.integers(0, 99))
def test_hooi_is_never_worse_than_hosvd(r, seed):
    w = filters(seed=seed)
    assert error(w, hooi(w, r)) <= error(w, hosvd(w, r)) * (1 + 1e-9) + 1e-12


@few
@given(ranks, st.integers(0, 99))
def test_the_error_is_the_norm_that_the_core_lacks(r, seed):
    w = filters(seed=seed)
    u_out, core, u_in = hooi(w, r)
    assert_close(error(w, (u_out, core, u_in)), w.square().sum() - core.square().sum(), atol=1e-8, rtol=1e-8)
    assert_close(u_out.T @ u_out, torch.eye(r[0], dtype=w.dtype))
    assert_close(u_in.T @ u_in, torch.eye(r[1], dtype=w.dtype))


@few
@given(ranks, st.integers(0, 99))
def test_hosvd_is_within_its_bound(r, seed):
    """At most the sum of what each mode discards, and at least the larger of the two (De Lathauwer 2000, property 10)."""
    w = filters(seed=seed)
    spectra = [np.linalg.svd(tucker.unfold(w, mode).numpy(), compute_uv=False) for mode in (0, 1)]
    discarded = [float((s[n:] ** 2).sum()) for s, n in zip(spectra, r, strict=True)]
    assert max(discarded) - 1e-9 <= error(w, hosvd(w, r)) <= sum(discarded) + 1e-9
    assert max(discarded) - 1e-9 <= error(w, hooi(w, r))


def test_full_ranks_are_the_identity():
    w = filters()
    for find in (hosvd, hooi):
        u_out, core, u_in = find(w, (10, 8))
        assert_close(expand(core, u_out, u_in), w)


def test_a_tensor_of_low_rank_is_found_exactly():
    core, u_out, u_in = filters(3, 2), *(torch.linalg.qr(filters(n, n, 1)[:, :, 0, 0])[0] for n in (10, 8))
    w = expand(core, u_out[:, :3], u_in[:, :2])
    assert error(w, hosvd(w, (3, 2))) < 1e-20 * w.numel()


@pytest.mark.peers("tensorly")
@pytest.mark.parametrize("r", [(4, 3), (2, 6), (7, 5)])
def test_error_is_tensorlys(r):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    w = filters(12, 9)
    (core, factors), _ = partial_tucker(tensorly.tensor(w.numpy()), rank=list(r), modes=[0, 1], init="svd")
    theirs = ((w.numpy() - tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])) ** 2).sum()
    assert error(w, hooi(w, r)) == pytest.approx(theirs, rel=0.01)


WINDOWS = [
    dict(),
    dict(stride=2, padding=1),
    dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    dict(padding="same"),
    dict(padding=1, padding_mode="reflect"),
    dict(padding=1, bias=False),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_three_layers_are_the_one_with_the_reconstructed_weight(window):
    layer = nn.Conv2d(8, 10, 3, **window)
    thin = Tucker2(rank=3)(layer)
    assert isinstance(thin, TuckerConv2d) and thin.ranks == (3, 3)
    assert all(type(part) is nn.Conv2d for part in thin.children())
    x = torch.randn(2, 8, 9, 11)
    u_out, core, u_in = hooi(layer.weight.detach(), (3, 3))
    twin = nn.Conv2d(8, 10, 3, **window)
    twin.weight, twin.bias = nn.Parameter(expand(core, u_out, u_in)), layer.bias
    assert_close(thin(x), twin(x), atol=1e-5, rtol=1e-4)
    assert_close(thin.dense()(x), thin(x), atol=1e-5, rtol=1e-4)


def test_full_ranks_compute_the_same():
    layer, x = nn.Conv2d(6, 30, 5), torch.randn(2, 6, 9, 9)
    u = hooi(layer.weight.detach(), (30, 6))
    assert_close(TuckerConv2d.from_factors(u, layer)(x), layer(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    layer = nn.Conv2d(8, 10, 3).to(dtype)
    thin = Tucker2(rank=3)(layer)
    assert {p.dtype for p in thin.parameters()} == {dtype}
    assert torch.isfinite(thin(torch.randn(1, 8, 5, 5, dtype=dtype))).all()


def test_what_would_grow_or_does_not_mix_is_left_alone():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3))
    thin = Tucker2(fraction=0.5)(model)
    assert [type(m) for m in thin] == [nn.Conv2d, nn.Conv2d, TuckerConv2d]
    said = str(log(thin))
    assert "0: left alone (three layers of ranks (4, 4) would hold no fewer numbers)" in said
    assert "1: left alone (its 8 groups of channels do not mix)" in said
    with pytest.raises(ValueError, match="rank must be smaller here, got 8"):
        Tucker2(rank=8)(nn.Conv2d(8, 8, 3))


@few
@given(ranks)
def test_size_counts_the_three_layers(r):
    thin = TuckerConv2d.from_factors(hosvd(filters().float(), r), nn.Conv2d(8, 10, 3, bias=False))
    assert size((10, 8, 3, 3), r) == sum(p.numel() for p in thin.parameters())


def test_a_residual_network_keeps_its_interface_and_its_file(tmp_path):
    torch.manual_seed(0)
    model, x = ResNet((8, 16)).eval(), torch.rand(2, 1, 28, 28)
    thin = Tucker2(fraction=0.5)(model)
    assert thin(x).shape == (2, 10) and Tucker2().claim(thin).value < 0.5
    save(thin, tmp_path / "thin.safetensors")
    assert torch.equal(load(tmp_path / "thin.safetensors")(x), thin(x))
    twice = Tucker2(fraction=0.5)(thin)
    assert_close(twice(x), thin(x), atol=1e-4, rtol=1e-3)
    nearly = Tucker2(energy=0.999)(model)
    assert_close(nearly(x), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(rank=0), "rank must be a whole number, at least 1, got 0"),
        (dict(fraction=0.0), "fraction must be"),
        (dict(energy=1.5), "energy must be"),
        (dict(rank=2, energy=0.5), "give one of rank, fraction and energy"),
    ],
)
def test_bad_settings_get_one_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        Tucker2(**settings)


def test_an_alternation_that_forgets_to_project_is_caught(monkeypatch):
    """Planted: HOOI that takes the trailing singular vectors of the projected tensor."""
    right = tucker.leading

    def trailing(w, mode, rank):
        return right(w, mode, w.shape[mode])[:, -rank:]

    def bad(w, ranks):
        u_out, core, u_in = hosvd(w, ranks)
        u_out = trailing(torch.einsum("oihw,iq->oqhw", w, u_in), 0, ranks[0])
        return u_out, tucker.project(w, u_out, u_in), u_in

    monkeypatch.setitem(globals(), "hooi", bad)
    with pytest.raises(AssertionError):
        test_hooi_is_never_worse_than_hosvd.hypothesis.inner_test((3, 4), 0)


def test_a_window_on_the_wrong_layer_is_caught(monkeypatch):
    """Planted: the padding is lost on the way to the core."""
    right = tucker._window
    monkeypatch.setattr(tucker, "_window", lambda layer: right(layer) | {"padding": 0})
    with pytest.raises(AssertionError):
        test_three_layers_are_the_one_with_the_reconstructed_weight(dict(stride=2, padding=1))


@pytest.mark.parametrize("ranks", [(2,), (2, 2, 2), 2, "22", None])
def test_ranks_that_are_not_two_are_refused(ranks):
    for decompose in (hosvd, hooi):
        with pytest.raises(ValueError, match=r"ranks must be two whole numbers, \(R_out, R_in\), got .*: one for each mode"):
            decompose(torch.rand(4, 3, 2, 2), ranks)


@pytest.mark.parametrize("ranks, said", [((5, 2), "R_out .* from 1 to 4, got 5"), ((2, 0), "R_in .* from 1 to 3, got 0"), ((2, 1.5), "R_in .*1.5")])
def test_a_rank_beyond_the_channels_is_refused(ranks, said):
    with pytest.raises(ValueError, match=said):
        hosvd(torch.rand(4, 3, 2, 2), ranks)


@pytest.mark.parametrize("kind", [Tucker2, SVD])
@pytest.mark.parametrize("rank", [0, [4, 4], 2.5])
def test_a_rank_that_is_none_is_refused_with_the_way_out(kind, rank):
    with pytest.raises(ValueError, match="rank must be a whole number, at least 1, got .*: one number for every layer"):
        kind(rank=rank)
