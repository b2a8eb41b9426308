"""Packed weights against NumPy: what is held, and that the int4 kernel, wherever it runs, multiplies by just that.

The oracle decodes the bytes by the format's words alone and multiplies in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effkit.core import native
from effkit.core.calibration import Statistics
from effkit.measure import processor
from effkit.quantization import AWQ, GPTQ, RTN, packed
from effkit.quantization.affine import pack
from effkit.quantization.packed import FEW, PackedWeight
from effkit.quantization.qat import fake_quantize

compiles = pytest.mark.skipif(native.compiler() is None, reason="no C compiler (cc, gcc, clang): the int4 kernel falls back")
SETTINGS = dict(bits=4, group_size=32, symmetric=False, search="min-max")
sizes = st.integers(1, 100)
#: what stands before the source, and the compiler's flags
BUILDS = {
    "as here": ("", native.FLAGS),
    "without byte products": ("#undef __AVX512VNNI__\n#undef __AVXVNNI__\n", native.FLAGS),
    "without rewritten arithmetic": ("/* exact division */\n", tuple(f for f in native.FLAGS if f not in native.MATH)),
}


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """The kernel as each of these builds makes it."""
    before, flags = BUILDS[request.param]
    monkeypatch.setattr(native, "FLAGS", flags)
    monkeypatch.setattr(packed, "_SOURCE", before + packed._SOURCE.read_text())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_layer(columns: int, rows: int, *, symmetric: bool = False, bias: bool = False):
    layer = nn.Linear(columns, rows, bias=bias)
    layer.weight.data = drawn(rows, columns, seed=rows + columns) / columns**0.5
    return RTN(**{**SETTINGS, "symmetric": symmetric}).replacement(layer).requires_grad_(False)


def decoded(store: PackedWeight) -> np.ndarray:
    """The matrix in float64: two codes a byte, the first in the low half; scales as the upper halves of float32."""
    columns, held = store.shape[1], store.codes.numpy()
    codes = np.stack([held & 15, held >> 4], -1).reshape(len(held), -1)[:, :columns]
    scale = (store.scale.view(torch.uint16).numpy().astype(np.uint32) << 16).view(np.float32)
    zero = np.full(scale.shape, 8) if store.zero_point is None else store.zero_point.numpy()
    spread = lambda part: np.repeat(part.astype(np.float64), min(32, columns), 1)[:, :columns]  # noqa: E731
    return spread(scale) * (codes - spread(zero))


def product(x: torch.Tensor, store: PackedWeight) -> np.ndarray:
    """x W^T; written out, since a library's product may treat infinities in its own way."""
    with np.errstate(invalid="ignore"):
        return (x.double().numpy()[..., None, :] * decoded(store)).sum(-1)


def off(y: torch.Tensor, x: torch.Tensor, store: PackedWeight) -> float:
    """The largest error, in units of what the kernel promises: 2^-23 of the largest input of each group, times the sizes of its
    weights, for rounding x; and half as much for every sum that is rounded: one a group, and a few at the end."""
    groups = -(-x.shape[-1] // 32)
    filled = np.pad(np.abs(x.double().numpy()), [(0, 0)] * (x.ndim - 1) + [(0, 32 * groups - x.shape[-1])])
    largest = np.repeat(filled.reshape(*x.shape[:-1], groups, 32).max(-1), 32, -1)[..., : x.shape[-1]]
    promise = (groups + 12) * 2.0**-24 * largest @ np.abs(decoded(store)).T + 1e-43  # below, float32 has a few digits left
    return float((np.abs(y.double().numpy() - product(x, store)) / promise).max())


# what is held


@settings(max_examples=30)
@given(sizes, sizes, st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from([-1, 0, 1, 5, 32]), st.booleans())
def test_packed_and_simulated_agree(rows, columns, bits, group_size, symmetric):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 101 + columns))
    packed = PackedWeight.from_float(w, bits=bits, group_size=group_size, symmetric=symmetric, search="min-max")
    assert torch.equal(
        packed(), fake_quantize(w, bits=bits, group_size=group_size, symmetric=symmetric).float().nan_to_num()
    ) or torch.allclose(packed(), fake_quantize(w, bits=bits, group_size=group_size, symmetric=symmetric), atol=1e-6)


@pytest.mark.parametrize(
    "bits, group_size, symmetric, expected",
    [(4, 32, False, 4 + 24 / 32), (4, 32, True, 4.5), (3, 64, False, 3 + 24 / 64), (8, -1, True, 8 + 16 / 512)],
)
def test_bits_per_weight_count_every_byte_held(bits, group_size, symmetric, expected):
    packed = PackedWeight.from_float(
        torch.randn(64, 512), bits=bits, group_size=group_size, symmetric=symmetric, search="min-max"
    )
    assert packed.bits_per_weight() == pytest.approx(expected)


@settings(max_examples=30)
@given(sizes, sizes, st.booleans())
def test_unpacking_equals_numpy(rows, columns, symmetric):
    store = packed_layer(columns, rows, symmetric=symmetric).weight_store
    assert np.array_equal(store().double().numpy(), decoded(store))


# the kernel's product


@compiles
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns, rows", [(32, 1), (64, 7), (96, 15), (64, 16), (96, 33), (576, 300), (2048, 512)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_kernel_equals_numpy(build, columns, rows, symmetric, tokens):
    layer, x = packed_layer(columns, rows, symmetric=symmetric, bias=True), drawn(1, tokens, columns)
    y = layer.weight_store.matvec(x)
    assert y is not None, "the kernel should apply here"
    assert off(y, x, layer.weight_store) <= 1 and torch.equal(layer(x), y + layer.bias)


@compiles
@pytest.mark.parametrize("tokens", [1, FEW - 1, FEW, FEW + 1])
def test_either_side_of_the_last_token_that_the_kernel_takes(build, tokens):
    layer, x = packed_layer(128, 24), drawn(tokens, 128)
    assert (layer.weight_store.matvec(x) is not None) == (tokens <= FEW)
    assert off(layer(x), x, layer.weight_store) <= 1


@compiles
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 1024])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0, -1000.0])
def test_wherever_inputs_lie_the_kernel_loses_no_more_than_twice_what_floats_do(build, mean, columns, symmetric):
    """A zero point times a sum of inputs is large where they all lie on one side; it must not be rounded before it is subtracted."""
    store, x = packed_layer(columns, 256, symmetric=symmetric).weight_store, drawn(FEW, columns) + mean
    exact = torch.from_numpy(product(x, store))
    ours, floats = ((y.double() - exact).norm() for y in (store.matvec(x), F.linear(x, store())))
    assert ours <= 2 * floats


def a_whole_number_of_steps_is_the_nearest():
    """One weight a row, so that an input's own rounding is seen, which sums hide: half a step, beside the small inputs that
    float32 would round less."""
    store, x = packed_layer(32, 32).weight_store, drawn(FEW, 32) / 50
    store.codes, store.scale, store.zero_point = pack(8 + torch.eye(32).byte(), 4), store.scale * 0 + 1, store.zero_point * 0 + 8
    x[:, 5] = 1
    off = (store.matvec(x).double() - x.double())[:, 6:].abs().max()
    assert off <= 0.55 / 8355000


@compiles
def test_a_whole_number_of_steps_is_the_nearest(build, monkeypatch):
    a_whole_number_of_steps_is_the_nearest()
    source = packed._SOURCE.read_text() if isinstance(packed._SOURCE, Path) else packed._SOURCE
    if "#undef" not in source and "vnni" in str(processor()):  # elsewhere the floats' loop runs, which has no such line
        monkeypatch.setattr(packed, "_SOURCE", source.replace("(at[i] < 0 ? -0.5f : 0.5f)", "0"))
        with pytest.raises(AssertionError):
            a_whole_number_of_steps_is_the_nearest()


@compiles
@settings(max_examples=50)
@given(st.lists(st.integers(-46, 36), min_size=3, max_size=3), st.booleans(), st.integers(0, 99))
def test_no_size_of_inputs_breaks_the_promise(powers, symmetric, seed):
    """Groups of a token as unlike as floats can be, some too small or too large for bytes."""
    store = packed_layer(96, 24, symmetric=symmetric).weight_store
    x = (drawn(2, 96, seed=seed) * (10.0 ** torch.tensor(powers, dtype=torch.float64)).repeat_interleave(32)).float()
    assert off(store.matvec(x), x, store) <= 1


@compiles
@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-60, 2.0**60])
def test_tiny_and_huge_inputs_of_the_kernel(build, factor):
    store, x = packed_layer(96, 24).weight_store, drawn(FEW, 96) * factor
    assert off(store.matvec(x), x, store) <= 1


@compiles
@pytest.mark.parametrize("technique", [RTN(), RTN(search="least-squares"), AWQ(), GPTQ(), GPTQ(search="least-squares")], ids=repr)
def test_however_a_grid_was_found_the_kernel_reads_it(technique):
    """Searches leave scales transposed in memory; a kernel that trusts their order once read other groups' scales."""
    layer, x = nn.Linear(96, 24, bias=False), torch.randn(64, 96)
    store = technique.store(layer.weight.detach(), Statistics(x.T @ x, x.abs().amax(0), len(x)))
    y = store.matvec(x[:3])
    assert y is not None and torch.allclose(y, x[:3] @ store().T, atol=1e-5)


# infinity and NaN


def kinds(y: np.ndarray) -> np.ndarray:
    """0 for a number, 1 and -1 for the infinities, 2 for NaN."""
    return np.where(np.isnan(y), 2, np.isposinf(y) * 1 - np.isneginf(y) * 1)


@compiles
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("placed", [
    {3: torch.inf}, {3: -torch.inf}, {3: torch.nan}, {40: torch.inf}, {3: torch.inf, 17: -torch.inf}, {3: torch.inf, 70: torch.inf},
    {3: torch.inf, 70: torch.nan}, {95: -torch.nan},
], ids=str)  # fmt: skip
def test_infinity_and_nan_come_out_where_a_product_of_floats_has_them(build, placed, symmetric):
    """Infinity times a weight of exactly 0 is NaN, times another it is infinite; the tokens beside it are as they were."""
    store, x = packed_layer(96, 64, symmetric=symmetric).weight_store, drawn(4, 96)
    before = store.matvec(x)
    for column, value in placed.items():
        x[1, column] = value
    y, wanted = store.matvec(x), product(x, store)
    assert (decoded(store)[:, 3] == 0).any() and not (decoded(store)[:, 3] == 0).all(), "both cases should be here"
    assert np.array_equal(kinds(y.numpy()), kinds(wanted)) and kinds(wanted)[1].all()
    assert torch.equal(y[[0, 2, 3]], before[[0, 2, 3]])
    assert np.array_equal(kinds(F.linear(x, store()).numpy()), kinds(wanted)), "what is wanted is not what floats do"


# what is handed in


@compiles
def test_strided_inputs_are_read_as_they_stand():
    store, wide = packed_layer(96, 24).weight_store, drawn(8, 5, 200)
    views = [wide[0, :, :96], wide[0, :, 4:196:2], wide[1].t()[:96].t(), wide[:, 2, 100:196], wide[:4, 1:4, :96].transpose(0, 1),
             wide[2, :1, :96].expand(6, 96), drawn(96, 3).t(), wide[3, 4, 7:103]]  # fmt: skip
    for x in views:
        y = store.matvec(x)
        assert y is not None and y.shape == (*x.shape[:-1], 24) and off(y, x, store) <= 1
        assert torch.equal(y, store.matvec(x.contiguous()))


@pytest.mark.parametrize("columns", [1, 20, 31, 33, 48, 63, 65, 95])
@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_widths_that_no_group_divides_are_multiplied_in_floats(columns, tokens):
    layer, x = packed_layer(columns, 9), drawn(tokens, columns)
    assert layer.weight_store.matvec(x) is None
    assert off(layer(x), x, layer.weight_store) <= 1


@compiles
@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_short_floats_are_rounded_once_after_the_product(dtype, rounding, mean):
    """Their own product would round the weights as well."""
    store, x = packed_layer(96, 24).weight_store, (drawn(5, 96) + mean).to(dtype)
    y, exact = store.matvec(x), product(x, store)
    assert y.dtype == dtype
    assert (np.abs(y.double().numpy() - exact) <= rounding * np.abs(exact) + 1e-5).all()
    assert torch.equal(y, store.matvec(x.float()).to(dtype))


@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_float64_is_multiplied_in_float64(tokens):
    layer, x = packed_layer(96, 24), drawn(tokens, 96).double() + 1e-9
    y = layer(x)
    assert y.dtype == torch.float64 and np.allclose(y.numpy(), product(x, layer.weight_store), rtol=0, atol=1e-14)


@pytest.mark.parametrize("wanted", [False, True], ids=["", "with a gradient"])
@pytest.mark.parametrize("tokens", [1, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_that_comes_in_goes_out_however_many_tokens_there_are(dtype, tokens, wanted):
    layer, x = packed_layer(64, 8, bias=True), drawn(tokens, 64)
    y = layer(x.to(dtype).requires_grad_(wanted))
    assert y.dtype == dtype and torch.allclose(y.float(), layer(x), atol=0.05)


def test_the_kernel_takes_only_what_it_can_read():
    """It is told how many rows and columns there are, and believes it."""
    layer = RTN().replacement(nn.Linear(96, 40, bias=False))
    for shape in ((2, 48), (96, 1), (1, 3072), (FEW + 1, 96), (0, 96)):
        assert layer.weight_store.matvec(torch.randn(shape)) is None
    for dtype in (torch.long, torch.float64, torch.complex64):
        assert layer.weight_store.matvec(torch.ones(2, 96, dtype=dtype)) is None
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 48))


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_a_cast_of_the_model_does_not_change_its_weights(cast):
    """`model.float()` makes every float of it wide, scales too, which a kernel that is not told reads as pairs of scales."""
    layer, x = packed_layer(96, 24), drawn(2, 96)
    wanted = torch.from_numpy(product(x, layer.weight_store)).float()
    assert torch.allclose(cast(layer)(x), wanted, atol=2e-3 if cast is nn.Module.half else 1e-5)


@pytest.mark.slow
@compiles
@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:torch.tensor results", "ignore:Converting a tensor")
@pytest.mark.parametrize("ahead", ["trace", "export", "fake"])
def test_who_writes_down_what_runs_sees_the_product_in_floats(ahead):
    """A kernel that torch cannot see would stand in a trace as the numbers of the moment."""
    layer, x = packed_layer(96, 24), drawn(2, 96)
    if ahead == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == (2, 24)
        return
    made = torch.jit.trace(layer, (x,), check_trace=False) if ahead == "trace" else torch.export.export(layer, (x,)).module()
    assert layer.weight_store.matvec(x) is not None
    assert torch.allclose(made(3 * x), layer(3 * x), atol=1e-5)


# where it works


@compiles
def test_threads_share_the_rows_and_change_no_bit():
    """Fifty times, since what threads do to each other they do now and then."""
    layer, x, before = packed_layer(640, 700), drawn(7, 640), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer.weight_store.matvec(x)
        for threads in (2, 3) * 25:
            torch.set_num_threads(threads)
            assert torch.equal(layer.weight_store.matvec(x), alone)
    finally:
        torch.set_num_threads(before)
    assert off(alone, x, layer.weight_store) <= 1


@compiles
@pytest.mark.parametrize("columns, rows, tokens", [(32, 1, 1), (32, 17, FEW), (96, 33, 3), (640, 5, FEW)])
@pytest.mark.parametrize("value", [1.0, torch.nan], ids=["bytes", "floats"])
def test_the_kernel_writes_all_of_its_output_and_nothing_beside_what_it_was_given(monkeypatch, build, columns, rows, tokens, value):
    store, x = packed_layer(columns, rows).weight_store, drawn(tokens, columns) * value
    plain, given, around = torch.Tensor.new_empty, [], 64

    def guarded(self, *shape):
        whole = plain(self, torch.Size(shape).numel() + 2 * around).fill_(12345.0)
        given.append(whole)
        return whole[around:-around].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    y = store.matvec(x)
    assert len(given) == 2 and not (y == 12345.0).any()
    assert all((whole[:around] == 12345.0).all() and (whole[-around:] == 12345.0).all() for whole in given)


@compiles
def test_defaults_of_the_process_do_not_move_the_kernel_s_numbers():
    store, x = packed_layer(96, 24).weight_store, drawn(2, 96)
    wanted, before = store.matvec(x), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(store.matvec(x), wanted)
    finally:
        torch.set_default_dtype(before)


def test_without_a_compiler_everything_falls_back(monkeypatch):
    layer = RTN(**SETTINGS).replacement(nn.Linear(64, 16))
    x = torch.randn(1, 64)
    with torch.no_grad():
        before = layer(x)
        monkeypatch.setenv("EFFKIT_NO_COMPILER", "1")
        assert layer.weight_store.matvec(x) is None and "compiler" in native.why_not(packed._SOURCE)
        assert torch.allclose(layer(x), before, atol=1e-5)


# planted bugs


@compiles
def test_two_totals_of_floats_are_caught(monkeypatch):
    """What stood here once: the zero point's part apart, a sum of the whole row, subtracted in the end."""
    right, source = "(byte[i] >> 4) - zero)", BUILDS["without byte products"][0] + packed._SOURCE.read_text()
    wrong = "(byte[i] >> 4)); first = byte[i] & 15; total -= s * zero * (at[i] + at[16 + i])"
    assert source.count(right) == 1
    monkeypatch.setattr(packed, "_SOURCE", source.replace(right, wrong))
    test_wherever_inputs_lie_the_kernel_loses_no_more_than_twice_what_floats_do(None, 0.0, 1024, False)
    with pytest.raises(AssertionError):
        test_wherever_inputs_lie_the_kernel_loses_no_more_than_twice_what_floats_do(None, 10.0, 1024, False)
    with pytest.raises(AssertionError):
        test_infinity_and_nan_come_out_where_a_product_of_floats_has_them(None, {3: torch.inf}, False)
