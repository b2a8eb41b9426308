"""What people really feed this chapter, over all of its techniques and their main settings: handled, or refused in a sentence
that names the layer. The suite over all chapters (tests/test_badinputs.py) tries one setting of each."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effkit import log
from effkit.core import native
from effkit.core.surgery import dense_weight
from effkit.core.task import Batches, Task
from effkit.quantization import (
    AWQ,
    FP8,
    GPTQ,
    LSQ,
    MXFP4,
    NF4,
    QAT,
    RTN,
    W8A8,
    IntegerOnly,
    KMeans,
    MixedPrecision,
    SmoothQuant,
    affine,
    inputs,
    integer,
)
from effkit.quantization.inputs import InputGrid, RoundedLinear
from effkit.quantization.integer_only import OBSERVERS, REAL_ZERO
from effkit.quantization.lsq import LearnedWeightStep
from effkit.quantization.packed import PackedWeight
from effkit.zoo.tasks import classification_loss, correct
from tests.subjects import outputs

ALIKE = (RTN(), RTN(2, symmetric=True), RTN(3, 0), RTN(8, -1), KMeans(), NF4(), NF4(double=False), FP8(), FP8(16), MXFP4())
SEARCHED = tuple(RTN(3, search=search) for search in OBSERVERS if search != "min-max")
LOOKING = (GPTQ(), GPTQ(3, order=False, search="real-zero"), AWQ(), AWQ(3, -1, clip=False), MixedPrecision(), MixedPrecision(rounding=GPTQ()))
WEIGHTS = ALIKE + SEARCHED + LOOKING
STATIC = (W8A8(activations="tensor"), W8A8(activations="tensor", outliers=6.0), SmoothQuant(), SmoothQuant(activations="tensor", alpha="search"))
INTEGER = (W8A8(), W8A8(outliers=6.0), *STATIC)
NETS = tuple(IntegerOnly(search) for search in OBSERVERS if search not in REAL_ZERO)
TRAINED = (QAT(), QAT(3, -1, True, activation_bits=3), LSQ(2, 2), LSQ(3, 4, ends=8))
EVERY = WEIGHTS + INTEGER + NETS + TRAINED
#: those that look at the inputs of layers beforehand
CALIBRATED = tuple(t for t in LOOKING if not isinstance(t, MixedPrecision)) + LOOKING[-1:] + STATIC + NETS + TRAINED[1:]


def over(techniques):
    return pytest.mark.parametrize("technique", techniques, ids=repr)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def task(inputs: int = 32, outputs: int = 4, n: int = 32) -> Task:
    labels = torch.randint(outputs, (n,), generator=torch.Generator().manual_seed(1))
    data = Batches(drawn(n, inputs, seed=2), labels, size=8)
    return Task("toy", (data.inputs[:4],), data, data, data, data, classification_loss, correct)


def model(inputs: int = 32, hidden: int = 64, outputs: int = 4) -> nn.Sequential:
    """Of widths that the int4 kernel takes."""
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).eval()
    with torch.no_grad():
        for seed, layer in enumerate((net[0], net[2])):
            layer.weight.copy_(drawn(*layer.weight.shape, seed=seed) / layer.weight.shape[1] ** 0.5)
            layer.bias.copy_(drawn(len(layer.bias), seed=seed + 5))
    return net


def calibrated_on(inputs: torch.Tensor) -> Task:
    """A task whose calibration has these inputs; it trains on others."""
    whole = task()
    return dataclasses.replace(whole, calib=dataclasses.replace(whole.calib, inputs=inputs))


# calibration


class Idle(nn.Module):
    """A layer that no forward pass reaches, beside two that are used."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = model(), nn.Linear(32, 4)

    def forward(self, x):
        return self.used(x)


@over(CALIBRATED)
def test_a_layer_that_calibration_never_reaches_is_named(technique):
    result = technique(Idle().eval(), task())
    (entry,) = (str(entry) for entry in log(result) if "reach" in str(entry))
    assert "spare" in entry
    assert torch.isfinite(outputs(result, task())).all()


@over(CALIBRATED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_layer_at_which_nan_or_infinity_arrives_in_calibration_is_named(technique, value):
    x = task().calib.inputs.clone()
    x[9, 3] = value
    with pytest.raises(ValueError, match=r"layer '?0|layer 0|\b(x|input_1|input)\b yields|loss on task.calib is nan") as caught:
        technique(model(), calibrated_on(x))
    assert "NaN" in str(caught.value) and "data" in str(caught.value)


@over(CALIBRATED)
def test_infinity_that_arises_inside_is_named_where_it_arises(technique):
    net = model()
    with torch.no_grad():
        net[0].weight *= 1e38
    x = task().calib.inputs * 1e5
    with pytest.raises(ValueError, match=r"layer '?2|\b0 yields|loss on task.calib is nan"):
        technique(net, calibrated_on(x))


@over(EVERY)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(technique, value):
    net = model()
    net[2].weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"2\.weight"):
        technique(net, task())


# activations that are no numbers, once the model runs


@pytest.mark.skipif(native.compiler() is None, reason="no C compiler (cc, gcc, clang): the int4 kernel falls back")
@over((RTN(), RTN(symmetric=True), GPTQ(), AWQ(), QAT()))
def test_the_int4_kernel_runs_in_these_models(technique, monkeypatch):
    """Or the tests below would say nothing of it."""
    result, plain, taken = technique(model(), task()), PackedWeight.matvec, []
    monkeypatch.setattr(PackedWeight, "matvec", lambda store, x: taken.append(plain(store, x)) or taken[-1])
    with torch.no_grad():
        result(task().example[0])
    assert len(taken) == 2 and all(y is not None for y in taken)


@over(WEIGHTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_layer_sends_what_is_no_number_where_its_dense_weight_would(technique, value):
    result, x = technique(nn.Sequential(model()[0]).eval(), task(outputs=64)), task().example[0].clone()
    x[1, 3], x[2, 5] = value, -value
    with torch.no_grad():
        ours, floats = result(x), x.double() @ dense_weight(result[0]).double().T
    assert not floats[1:3].isfinite().any() and ours[[0, 3]].isfinite().all()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(floats))


@over(EVERY)
def test_nan_is_never_turned_into_a_number(technique):
    """The row of the batch that holds it yields NaN, as in the float model, or is refused; the other rows stay as they were."""
    result, x = technique(model(), task()), task().example[0].clone()
    with torch.no_grad():
        before = result(x)
        x[1, 3] = torch.nan
        try:
            after = result(x)
        except ValueError as error:
            assert "NaN" in str(error)
            return
    assert after[1].isnan().all(), "a number came out of NaN"
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


@over(EVERY)
def test_infinity_makes_the_largest_code_or_no_number_and_leaves_other_rows_alone(technique):
    result, x = technique(model(), task()), task().example[0].clone()
    with torch.no_grad():
        before = result(x)
        x[1, 3] = torch.inf
        after = result(x)
    others = after[[0, 2, 3]]
    if getattr(technique, "outliers", None) is None:
        assert torch.equal(others, before[[0, 2, 3]])
    else:  # the whole column is in float now: other rows lose their rounding there
        torch.testing.assert_close(others, before[[0, 2, 3]], atol=0.05, rtol=0.05)


# groups


@over(WEIGHTS + TRAINED + INTEGER)
def test_a_group_of_zeros_stays_zero_and_a_constant_one_nearly_constant(technique):
    net = model(64, 8)
    with torch.no_grad():
        net[0].weight[3, :32] = 0.0
        net[0].weight[5, :32] = 0.25
    technique = dataclasses.replace(technique, lr=1e-9) if hasattr(technique, "lr") else technique
    result = technique(net, task(64))
    w = dense_weight(result[0])
    assert torch.isfinite(outputs(result, task(64))).all() and torch.isfinite(w).all()
    step = net[0].weight.abs().max() / (2 ** (getattr(technique, "bits", 4) - 1) - 1)  # of the coarsest grid here
    exact = getattr(technique, "search", "") not in REAL_ZERO and not isinstance(technique, GPTQ | KMeans | MixedPrecision | QAT | LSQ)
    assert not exact or (w[3, :32] == 0).all()
    assert (w[3, :32].abs() <= step).all() and ((w[5, :32] - 0.25).abs() <= step).all()


@over(tuple(t for t in WEIGHTS + TRAINED if hasattr(t, "group_size")))
def test_a_layer_with_fewer_inputs_than_a_group_has_one_group_a_row(technique):
    whole = dataclasses.replace(technique, group_size=-1)
    narrow = dataclasses.replace(technique, group_size=64)
    results = [t(model(5, 7, 3), task(5, 3)) for t in (narrow, whole)]
    assert torch.equal(*(outputs(result, task(5, 3)) for result in results))


@over((MXFP4(), MixedPrecision(), KMeans()))
def test_a_layer_with_fewer_inputs_than_a_fixed_group_is_handled(technique):
    assert torch.isfinite(outputs(technique(model(1, 3, 2), task(1, 2)), task(1, 2))).all()


# layouts and precisions


@pytest.mark.slow
@over(EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_give_equal_results_and_bfloat16_stays(technique, dtype):
    data = task()
    cast = {name: dataclasses.replace(getattr(data, name), inputs=data.train.inputs.to(dtype)) for name in ("train", "calib", "val", "test")}
    data = dataclasses.replace(data, example=(data.example[0].to(dtype),), **cast)
    plain, twisted = model().to(dtype), model().to(dtype)
    for layer in (twisted[0], twisted[2]):
        layer.weight.data = layer.weight.data.t().contiguous().t()
    ours, theirs = (outputs(technique(net, data), data) for net in (plain, twisted))
    assert ours.dtype == dtype and torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    x = data.example[0].t().contiguous().t()  # the activation is transposed as well
    with torch.no_grad():
        torch.testing.assert_close(technique(plain, data)(x), ours, atol=1e-5, rtol=1e-5)


# sizes


@pytest.mark.slow
@over(tuple(t for t in EVERY if t not in SEARCHED and not isinstance(t, MixedPrecision)))
@settings(max_examples=4)
@given(st.data())
def test_sizes_from_1_to_300_none_of_them_round(technique, data):
    odd = st.integers(0, 149).map(lambda n: 2 * n + 1)
    inputs, hidden, classes = data.draw(odd), data.draw(odd), data.draw(odd)
    job = task(inputs, classes, n=9)
    net = model(inputs, hidden, classes)
    result, floats = outputs(technique(net, job), job), outputs(net, job)
    assert result.shape == floats.shape and torch.isfinite(result).all()
    if getattr(technique, "bits", 8) >= 4 and not isinstance(technique, QAT | LSQ):
        assert (result - floats).norm() <= 0.5 * floats.norm(), "more is lost than left"


# ranges


@over(ALIKE + LOOKING[:4] + SEARCHED)
@pytest.mark.parametrize("power", [-100, 100])  # 1e-30 and 1e30
def test_tiny_and_huge_weights_are_rounded_as_others_are(technique, power):
    """Powers of two change no mantissa: what is 2^100 times as large has codes, and an error, of 2^100 times the size. What
    searches by squared errors, which a float32 doesn't hold there, has at least the grid that it starts from."""
    nets = nn.Sequential(model()[0]), nn.Sequential(model()[0])  # what a second layer would see has no finite squares
    with torch.no_grad():
        nets[1][0].weight.mul_(2.0**power)
    unit, scaled = (dense_weight(technique(net, task())[0]).double() for net in nets)
    scaled = scaled * 2.0**-power
    w = nets[0][0].weight.double()
    if technique in ALIKE or isinstance(technique, GPTQ) and technique.search == "min-max":
        assert torch.equal(unit, scaled)
    else:
        plain = dense_weight(RTN(technique.bits, technique.group_size)(nets[0], task())[0]).double()
        assert (scaled - w).norm() <= 1.3 * max((unit - w).norm(), (plain - w).norm())


@over((W8A8(), W8A8(activations="tensor"), SmoothQuant()))
@pytest.mark.parametrize("power", [-100, 100])
def test_tiny_and_huge_activations_are_rounded_as_others_are(technique, power):
    net, job = nn.Sequential(model()[0]).eval(), task()
    net[0].bias = None
    far = dataclasses.replace(job, calib=dataclasses.replace(job.calib, inputs=job.calib.inputs * 2.0**power))
    if power > 0 and technique != W8A8():
        with pytest.raises(ValueError, match="layer 0 sees inputs whose squares are not finite"):
            technique(net, far)
        return
    with torch.no_grad():
        unit, scaled = technique(net, job)(job.example[0]), technique(net, far)(job.example[0] * 2.0**power)
    torch.testing.assert_close(scaled * 2.0**-power, unit, rtol=2e-2, atol=2e-2)


# accumulators


@pytest.mark.parametrize("inputs", [65_793, 65_794, 100_001, 131_071, 140_000])
def test_no_accumulator_of_rounded_layers_overflows(inputs):
    """The farthest that 8-bit codes go: every input 255 steps from its zero, every weight 128 from its own."""
    layer = nn.Linear(inputs, 1, bias=False)
    layer.weight.data.fill_(-128.0)
    store = LearnedWeightStep(layer.weight, bits=8, group_size=0)
    store.first.fill_(1.0)
    ours = RoundedLinear.from_float(layer, store.pack(layer.weight))
    ours.input_grid = InputGrid.from_grid(8, (torch.tensor(1.0), torch.tensor(0.0)))
    with torch.no_grad():
        y = ours(torch.full((2, inputs), 255.0))
    torch.testing.assert_close(y, torch.full_like(y, -128.0 * 255.0 * inputs), rtol=1e-4, atol=0)


def test_layers_whose_sums_could_overflow_are_refused():
    with pytest.raises(ValueError, match="133145 inputs could overflow int32; at most 133144 are allowed: leave it out with `layers`"):
        W8A8()(nn.Sequential(nn.Linear(133_145, 1)), task())


# planted bugs


def test_a_bound_on_the_product_alone_is_caught(monkeypatch):
    """What stood here once: the product fits an int32, and so does the zero point's part, but not their sum."""
    monkeypatch.setattr(inputs, "_MOST_INPUTS", (2**31 - 1) // 128**2)
    with pytest.raises(AssertionError):
        test_no_accumulator_of_rounded_layers_overflows(100_001)


def test_a_scale_of_one_for_nan_is_caught(monkeypatch):
    """What stood here once, since NaN > 0 is false."""
    monkeypatch.setattr(integer, "int8_step", lambda largest: torch.where(largest > 0, largest / 127, 1.0))
    with pytest.raises(AssertionError, match="a number came out of NaN"):
        test_nan_is_never_turned_into_a_number(W8A8())


def test_a_floor_that_is_too_high_is_caught(monkeypatch):
    monkeypatch.setattr(affine, "FLOOR", 2.0**-100)
    with pytest.raises(AssertionError):
        test_tiny_and_huge_weights_are_rounded_as_others_are(RTN(), -100)
