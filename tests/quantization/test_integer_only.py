"""Integers from codes to codes: bit by bit against a NumPy emulation that shares nothing with the library, operator by
operator against float, and code by code against ONNX Runtime; then the bugs that these tests are there for."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effkit import load, log, save, zoo
from effkit.core.task import Batches, Task
from effkit.quantization import IntegerOnly, integer_net, integer_only
from effkit.quantization.integer_net import IntegerLinear, IntegerNet, fixed_point, round_shift
from effkit.quantization.integer_only import OBSERVERS, REAL_ZERO, fold
from tests.subjects import image_task, mlp, resnet


def task_of(x: torch.Tensor) -> Task:
    return Task("images", (x[:2],), calib=Batches(x, torch.zeros(len(x), dtype=torch.long), size=4))


def integers(model: nn.Module, x: torch.Tensor, **how) -> IntegerNet:
    return IntegerOnly(**how)(model.eval(), task_of(x))


# the emulation: codes, multipliers and shapes are read, everything else is written from the paper


def emulate(net: IntegerNet, q: torch.Tensor) -> dict[str, np.ndarray]:
    values = {"x": q.numpy().astype(np.int64)}
    zeros = {"x": net.zero_point}
    for step in net.steps:
        kind, zero_in = type(step).__name__, zeros[step.inputs[0]]
        read = [values[name] for name in step.inputs]
        if kind in ("IntegerConv2d", "IntegerLinear"):
            values[step.name] = product_of(step, read[0], zero_in, image=kind == "IntegerConv2d")
        elif kind == "IntegerSum":
            parts = [(v - zeros[n]) * m for v, n, m in zip(read, step.inputs, step.multipliers, strict=True)]
            total = np.concatenate(parts, step.dim) if step.dim else np.sum(np.broadcast_arrays(*parts), axis=0)
            values[step.name] = rounded(total, step.shift, step)
        elif kind == "IntegerMean":
            total = places(read[0] - zero_in, step, 0).sum((-2, -1)) * step.multiplier
            values[step.name] = rounded(total.reshape(len(total), -1) if step.flat else total, step.shift, step)
        elif kind == "IntegerMax":
            values[step.name] = places(read[0], step, -128).max((-2, -1))
        else:
            values[step.name] = read[0].reshape(len(read[0]), *step.shape)
        zeros[step.name] = step.zero_point
    return values


def places(x: np.ndarray, step, fill: int) -> np.ndarray:
    left, right, top, bottom = step.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    (kh, kw), (sh, sw), (dh, dw) = step.kernel_size, step.stride, getattr(step, "dilation", (1, 1))
    return sliding_window_view(x, (dh * (kh - 1) + 1, dw * (kw - 1) + 1), (2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]


def product_of(step, x: np.ndarray, zero_in: int, image: bool) -> np.ndarray:
    """sum q_w (q_x - Z_x) + q_b, with padding that adds nothing; q_b is the offset once Z_x sum q_w is added."""
    w = step.codes.numpy().astype(np.int64)
    bias = step.offset.numpy().astype(np.int64) + zero_in * w.sum(1)
    multiplier, shift = step.multiplier.numpy().astype(np.int64), step.shift.numpy().astype(np.int64)
    if not image:
        return rounded(((x - zero_in) @ w.T + bias) * multiplier, shift, step)
    seen, each = places(x - zero_in, step, 0), len(w) // step.groups
    inputs, sums = seen.shape[1] // step.groups, []
    for o in range(len(w)):
        group = seen[:, o // each * inputs : (o // each + 1) * inputs]
        kernel = w[o].reshape(*step.kernel_size, inputs)
        sums.append(rounded((np.einsum("bcijkl,klc->bij", group, kernel) + bias[o]) * multiplier[o], shift[o], step))
    return np.stack(sums, 1)


def rounded(p: np.ndarray, shift, step) -> np.ndarray:
    """Nearest integer to p / 2^shift, halves away from zero, in Python's integers; then zero point and clamp."""
    p, two = p.astype(object), 2 ** np.asarray(shift).astype(object)
    q = np.sign(p) * ((2 * abs(p) + two) // (2 * two)) + step.zero_point
    return np.clip(q, step.zero_point if step.relu else -128, 127).astype(np.int64)


def check_emulation(net: IntegerNet, x: torch.Tensor) -> None:
    q = net.enter(x)
    theirs = emulate(net, q)
    for name, ours in net.run(q).items():
        assert ours.dtype is torch.int8
        assert np.array_equal(ours.numpy(), theirs[name]), name


class Zoo(nn.Module):
    """Every operator that is supported, with sizes to draw: convolutions of all kinds, sums, a concatenation, pools."""

    def __init__(self, c, width, kernel, stride, padding, dilation, groups, pool, classes):
        super().__init__()
        self.stem = nn.Conv2d(c, width, kernel, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped = nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=groups)
        self.drop, self.relu6, self.point = nn.Dropout(0.5), nn.ReLU6(inplace=True), nn.Conv2d(width, width, 1)
        self.pool = {"max": nn.MaxPool2d(2, 1, 1), "mean": nn.AvgPool2d((1, 2), 1, (0, 1)), "none": nn.Identity()}[pool]
        self.classifier, self.head = nn.Linear(2 * width, 7), nn.Linear(7, classes, bias=False)
        for p in [p for p in self.parameters() if p.dim() == 1] + [self.norm.running_mean]:
            nn.init.uniform_(p, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.1, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = x + self.depthwise(x)
        z = self.relu6(F.max_pool2d(self.grouped(self.pool(torch.relu(y))), (1, 2), stride=1, padding=(0, 1)))
        z = torch.cat((z, self.drop(self.point(z))), 1)
        z = F.adaptive_avg_pool2d(z, 1).view(z.size(0), -1)
        return self.head(self.classifier(z).relu())


@st.composite
def cases(draw):
    """A model and images for it, odd sizes and all."""
    seed, c, width = draw(st.integers(0, 99)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 6]))
    kernel, dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.integers(1, 2))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 6) if width % g == 0]))
    torch.manual_seed(seed)
    padding = draw(st.sampled_from([0, 1, 2, (0, 1)]))
    model = Zoo(c, width, kernel, draw(st.integers(1, 3)), padding, dilation, groups,
                draw(st.sampled_from(["max", "mean", "none"])), draw(st.integers(1, 5)))  # fmt: skip
    images = torch.randn(6, c, draw(st.integers(7, 14)), draw(st.integers(7, 14)))
    return model.eval(), images * 10.0 ** draw(st.sampled_from([-12, -2, 0, 3])) + draw(
        st.sampled_from([0.0, 0.7, -3.0])
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(cases())
def test_equals_an_emulation_in_numpy_bit_by_bit(case):
    model, images = case
    check_emulation(integers(model, images[:4]), images * 1.2)  # beyond the calibrated range as well


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=4), st.integers(1, 9), st.booleans())
def test_linear_layers_of_any_size_equal_the_emulation(widths, batch, bias):
    torch.manual_seed(sum(widths))
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b, bias), nn.ReLU())]
    x = torch.randn(batch, 3, widths[0]).transpose(0, 1)  # tokens, and not contiguous
    check_emulation(integers(nn.Sequential(*layers[:-1]), x), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_shipped_models_equal_the_emulation(name):
    model, task = zoo.load(name)
    check_emulation(IntegerOnly()(model, task), task.test.inputs[:2])


# against float


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "lenet-300-100", "resnet"])
def test_accuracy_stays_within_a_point(name):
    model, task = zoo.load(name)
    with torch.no_grad():
        before, after = (task.per_example(m, task.test.first(500)).mean() for m in (model, IntegerOnly()(model, task)))
    assert before > 0.9 and abs(after - before) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("examples", [8, 256])
@pytest.mark.parametrize("search", [name for name in OBSERVERS if name not in REAL_ZERO])
def test_no_observer_breaks_a_trained_model(search, examples):
    """KL and percentiles clip the ResNet's last ranges to a seventh and lose up to a point by that."""
    model, task = zoo.load("resnet")
    few = task.test.first(250)
    with torch.no_grad():
        before, after = (task.per_example(m, few).mean() for m in (model, IntegerOnly(search, examples)(model, task)))
    assert before > 0.95 and after >= before - 0.02


def check_operators(net: IntegerNet, model: nn.Module, x: torch.Tensor) -> None:
    """On the same dequantized inputs each operator is as far from the float model's own as its roundings allow:
    half a step of the output, half a step of each weight times its input, half a step of the bias."""
    paths = {path.replace(".", "_"): path for path, _ in model.named_modules()}
    grids = {"x": (net.scale, net.zero_point)} | {s.name: (s.scale, s.zero_point) for s in net.steps}
    real = {n: grids[n][0] * (q.double() - grids[n][1]) for n, q in net.run(net.enter(x)).items()}
    for step in net.steps:
        read, margin = [real[n] for n in step.inputs], step.scale * 0.5000001
        if isinstance(step, integer_net.IntegerConv2d):
            layer = model.get_submodule(paths[step.name])
            exact, slack = twin(layer, norm_after(model, paths[step.name]), read[0], step, grids[step.inputs[0]][0])
            margin = margin + slack
        elif isinstance(step, integer_net.IntegerSum):
            exact = torch.cat(read, step.dim) if step.dim else sum(read)
            margin += sum(grids[n][0] for n in step.inputs) * 2.0**-22
        elif isinstance(step, integer_net.IntegerMean):
            left, _, top, _ = step.pads
            exact = F.avg_pool2d(read[0], step.kernel_size, step.stride, (top, left)).reshape(real[step.name].shape)
        elif isinstance(step, integer_net.IntegerMax):
            left, _, top, _ = step.pads
            exact, margin = F.max_pool2d(read[0], step.kernel_size, step.stride, (top, left), step.dilation), 0.0
        else:
            exact, margin = read[0].reshape(real[step.name].shape), 0.0
        low, high = (step.scale * (q - step.zero_point) for q in (-128, 127))
        exact = exact.clamp(max(low, 0.0) if step.relu else low, high)
        assert ((real[step.name] - exact).abs() <= margin + 1e-12 * step.scale).all(), step.name


def norm_after(model: nn.Module, path: str) -> nn.Module | None:
    for old, new in (("stem", "norm"), ("conv", "norm"), ("shortcut.0", "shortcut.1")):
        other = path.replace(old, new)
        if other != path and other in dict(model.named_modules()):
            return model.get_submodule(other)
    return None


def twin(layer, norm, x, step, s_x):
    """The float layer, its batch norm applied after it, on x; and by how much rounded weights and bias may be off."""
    layer, w = copy.deepcopy(layer).double(), torch.ones(step.codes.shape, dtype=torch.float64)
    s_w = step.multiplier.double() * 2.0 ** -step.shift.double() * step.scale / s_x
    exact = layer(x) if norm is None else copy.deepcopy(norm).double()(layer(x))
    conv = isinstance(layer, nn.Conv2d)
    shape = (-1, 1, 1) if conv else (-1,)
    layer.weight.data, layer.bias = w.reshape(layer.weight.shape), None
    return exact.detach(), ((layer(x.abs()) + s_x) * s_w.reshape(shape) / 2 * (1 + 1e-6)).detach()


def subject(name: str):
    model, task = {"mlp": mlp, "resnet": resnet}[name](), image_task()
    return IntegerOnly()(model, task), model, task.test.inputs[:4]


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_each_operator_is_as_near_to_float_as_its_roundings_allow(name):
    check_operators(*subject(name))


@pytest.mark.slow
@settings(max_examples=25)
@given(cases())
def test_operators_of_any_size_are_near_to_float(case):
    model, images = case
    check_operators(integers(model, images[:4]), model, images)


@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 99))
def test_folding_batch_norm_changes_nothing(inputs, outputs, affine, bias, seed):
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(inputs, outputs, 3, bias=bias), nn.BatchNorm2d(outputs, affine=affine).eval()
    norm.running_mean.uniform_(-2, 2), norm.running_var.uniform_(1e-3, 3)
    if affine:
        nn.init.uniform_(norm.weight, -2, 2), nn.init.uniform_(norm.bias, -2, 2)
    x, b = torch.randn(2, inputs, 5, 6), conv.bias if bias else torch.zeros(outputs)
    with torch.no_grad():
        w, b = fold(conv.weight.double().flatten(1), b.double(), norm)
        exact = norm(conv(x))
        folded = F.conv2d(x, w.float().reshape(conv.weight.shape), b.float())
    assert (folded - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())


# nothing but integers


class Dtypes(TorchDispatchMode):
    """Writes down which operators yield or read a floating-point tensor."""

    def __init__(self):
        super().__init__()
        self.seen, self.floats = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.add(func.overloadpacket.__name__)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.floats += [func.overloadpacket.__name__ for t in tensors if t.is_floating_point() or t.is_complex()]
        return result


def check_no_floats(net: IntegerNet, x: torch.Tensor) -> None:
    q = net.enter(x)
    with Dtypes() as watch:
        net.run(q)
    assert "_int_mm" in watch.seen and not watch.floats, watch.floats
    held = [t for t in net.state_dict().values() if t.is_floating_point()]
    assert not held, "a floating-point tensor is stored"


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_no_floating_point_tensor_between_the_codes(name):
    net, _, x = subject(name)
    check_no_floats(net, x)


def test_a_float_inside_would_be_caught(monkeypatch):
    """Planted: the scale as a float, which every simulated quantization does."""
    net, _, x = subject("resnet")
    monkeypatch.setattr(integer_net, "round_shift", lambda p, shift: (p.double() / 2.0**shift).round().long())
    with pytest.raises(AssertionError):
        check_no_floats(net, x)


# fixed point


@given(st.floats(2.0**-32, 2.0**29))
def test_the_multiplier_is_right_to_31_bits(m):
    m0, shift = fixed_point(torch.tensor([m], dtype=torch.float64))
    assert m0.dtype is torch.int32 and 2**30 <= int(m0) < 2**31 and 1 <= shift <= 62
    assert abs(Fraction(m) - Fraction(int(m0), 2 ** int(shift))) <= Fraction(m) / 2**31


@given(
    st.one_of(st.floats(0, 2.0**-32, exclude_max=True), st.floats(2.0**29, 1e300)), st.integers(-(2**31) + 1, 2**31 - 1)
)
def test_beyond_its_range_the_multiplier_gives_what_the_exact_one_would(m, total):
    m0, shift = fixed_point(torch.tensor([m], dtype=torch.float64))
    q = round_shift(torch.tensor([total]) * m0.long(), shift.long()).item()
    exact = Fraction(m) * total
    assert abs(q) == 0 if abs(exact) < Fraction(1, 2) else abs(q) > 255 and (q > 0) == (exact > 0)


@given(st.integers(-(2**62) + 1, 2**62 - 1) | st.integers(-40, 40), st.integers(1, 62))
def test_rounding_is_to_nearest_and_halves_go_away_from_zero(p, shift):
    q = round_shift(torch.tensor([p]), shift).item()
    exact = Fraction(p, 2**shift)
    assert abs(q - exact) <= Fraction(1, 2)
    assert abs(q - exact) < Fraction(1, 2) or abs(q) > abs(exact)


def test_the_largest_layer_with_the_largest_numbers_fits():
    """Every bound of the proof at once, against Python's integers."""
    n = integer_net.MOST_INPUTS
    for sign, z_x in ((1, -128), (-1, -128), (1, 127), (-1, 127)):
        step = IntegerLinear("y", ("x",), 1.0, 0, False, n, 1, z_x)
        q_x = -128 if z_x == 127 else 127
        step.codes = torch.full((1, n), 127 * sign, dtype=torch.int8)
        inner = 127 * sign * (q_x - z_x) * n
        q_b = 2**30 if inner > 0 else -(2**30)
        offset = q_b - integer_net.cross_term(step.codes, z_x)
        step.offset, step.multiplier = offset.int(), torch.tensor([2**31 - 1], dtype=torch.int32)
        step.shift = torch.tensor([56], dtype=torch.int8)
        assert offset.item() == step.offset.item() and abs(inner + q_b) < 2**31
        wanted = rounded(np.array([(inner + q_b) * (2**31 - 1)], dtype=object), 56, step)
        assert step(torch.full((1, n), q_x, dtype=torch.int8)).tolist() == [wanted.tolist()]
        assert 0 < abs(wanted[0]) < 127, "a saturated code would hide an overflow"


# the field's own integers


def onnx_layer(step, x: np.ndarray, zero_in: int, s_x: float) -> np.ndarray:
    """The same layer by QLinearConv or QLinearMatMul, given the same codes and real scales."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    conv = type(step) is integer_net.IntegerConv2d
    s_w = (step.multiplier.double() * 2.0 ** -step.shift.double() * step.scale / s_x).numpy().astype(np.float32)
    w = step.codes.numpy()
    bias = (step.offset.long() + zero_in * step.codes.long().sum(1)).numpy().astype(np.int32)
    w = np.ascontiguousarray(np.moveaxis(w.reshape(len(w), *step.kernel_size, -1), -1, 1) if conv else w.T)
    given_ = dict(s_x=np.float32(s_x), z_x=np.int8(zero_in), w=w, s_w=s_w, z_w=np.zeros(len(s_w), np.int8),
                  s_y=np.float32(step.scale), z_y=np.int8(step.zero_point), b=bias)  # fmt: skip
    names = ["x", "s_x", "z_x", "w", "s_w", "z_w", "s_y", "z_y"]
    left, right, top, bottom = step.pads
    settings_ = dict(pads=[top, left, bottom, right], strides=step.stride, group=step.groups) if conv else {}
    op = "QLinearConv" if conv else "QLinearMatMul"
    node = helper.make_node(op, names + ["b"] * conv, ["y"], **settings_)
    info = [helper.make_tensor_value_info(n, TensorProto.INT8, None) for n in "xy"]
    held = [numpy_helper.from_array(np.asarray(v), n) for n, v in given_.items() if n != "b" or conv]
    graph = helper.make_graph([node], "layer", info[:1], info[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


@pytest.mark.slow
@pytest.mark.peers("onnx", "onnxruntime")
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_onnx_runtime_differs_by_one_code_at_most_and_hardly_ever(name):
    """It multiplies by a float32 M and rounds halves to even; QLinearMatMul has no bias, so the MLP here has none."""
    if name == "mlp":
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(40, 64, False), nn.ReLU(), nn.Linear(64, 10, False)), torch.randn(64, 40)
        net = integers(model, x)
    else:
        model, task = zoo.load("resnet")
        net, x = IntegerOnly()(model, task), task.test.inputs[:8]
    codes, different, total = net.run(net.enter(x)), 0, 0
    grids = {"x": (net.scale, net.zero_point)} | {s.name: (s.scale, s.zero_point) for s in net.steps}
    for step in net.steps:
        if isinstance(step, integer_net.IntegerConv2d) and (name == "mlp" or not isinstance(step, IntegerLinear)):
            s_x, z_x = grids[step.inputs[0]]
            theirs = onnx_layer(step, codes[step.inputs[0]].contiguous().numpy(), z_x, s_x)
            theirs = np.maximum(theirs, step.zero_point) if step.relu else theirs
            gap = np.abs(codes[step.name].numpy().astype(int) - theirs.astype(int))
            assert gap.max() <= 1, step.name
            different, total = different + (gap > 0).sum(), total + gap.size
    assert total > 4_000 and different / total < 1e-3, f"{different} of {total} codes differ"


def halving() -> IntegerNet:
    """One layer with M = 1 / 2, so that every odd code is a tie."""
    step = IntegerLinear("y", ("x",), 2.0, 0, False, 1, 1, 0)
    step.codes, step.multiplier = torch.ones(1, 1, dtype=torch.int8), torch.tensor([2**30], dtype=torch.int32)
    step.shift = torch.tensor([31], dtype=torch.int8)
    net = IntegerNet(1.0, 0)
    net.steps.append(step)
    return net


ODD = torch.arange(-9.0, 10, 2)[:, None]


@pytest.mark.peers("onnx", "onnxruntime")
def test_at_ties_onnx_runtime_goes_to_even_and_we_away_from_zero():
    net = halving()
    ours = net.run(net.enter(ODD))["y"].flatten().tolist()
    assert ours == [-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]
    theirs = onnx_layer(net.steps[0], net.enter(ODD).numpy(), 0, 1.0)
    assert theirs.flatten().tolist() == np.rint(ODD.numpy() / 2).flatten().tolist() != ours


# what people feed it


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.spare, self.what = nn.Linear(12, 12), nn.Linear(3, 3), what

    def forward(self, x):
        return self.what(self, self.layer(x))


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


def x12() -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "what, said",
    [
        (lambda self, y: torch.softmax(y, -1), "softmax"),
        (lambda self, y: y * y, "mul"),
        (lambda self, y: y + 1, "add"),
        (lambda self, y: y + self.spare.bias[0], "spare_bias"),
        (lambda self, y: y if y.sum() > 0 else -y, "control flow"),
        (lambda self, y: (y, y), "output"),
        (lambda self, y: y.mean(1), "mean"),
        (lambda self, y: y.reshape(-1), "mixes examples"),
        (lambda self, y: y[:, :3], "getitem"),
        (lambda self, y: torch.add(y, y, alpha=2), "add"),
        (lambda self, y: torch.cat((y, y)), "cat"),
        (lambda self, y: y + y.relu_(), "writes into layer"),
    ],
)
def test_what_has_no_integer_form_is_named_with_the_way_out(what, said):
    model = Odd(what)
    with pytest.raises(ValueError, match=said):
        integers(model, x12())


@pytest.mark.parametrize(
    "model, x, said",
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), torch.randn(2, 1, 5, 5), "reflect"),
        (nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.BatchNorm2d(1)), torch.randn(2, 1, 5, 5), "BatchNorm2d"),
        (nn.MaxPool2d(2, ceil_mode=True), torch.randn(2, 1, 5, 5), "ceil_mode"),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), torch.randn(2, 1, 5, 5), "not counted"),
        (nn.AdaptiveAvgPool2d(2), torch.randn(2, 1, 5, 5), "equal parts"),
        (nn.Conv1d(1, 1, 3), torch.randn(2, 1, 5), "Conv1d"),
        (nn.Linear(integer_net.MOST_INPUTS + 1, 1), torch.randn(2, integer_net.MOST_INPUTS + 1), "int32"),
        (Pair(), torch.randn(2, 2), "one input, got x, y"),
        (nn.Identity(), torch.randn(2, 2), "at least one operator"),
    ],
)  # fmt: skip
def test_layers_beyond_its_reach_are_refused(model, x, said):
    with pytest.raises(ValueError, match=said):
        integers(model, x)


def test_the_layer_at_which_infinity_arises_is_named():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    with pytest.raises(ValueError, match="^2 yields NaN or infinity"):
        integers(model, x12().abs() * 1e3)


def test_calibration_without_examples_and_token_ids_are_refused():
    with pytest.raises(ValueError, match="task.calib"):
        IntegerOnly()(nn.Linear(12, 12), Task())
    with pytest.raises(ValueError, match="none reaches"):
        integers(nn.Embedding(5, 5), torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="none reaches"):
        integers(nn.Linear(12, 12), x12()[:, None][:, :0])


def test_layers_that_the_pass_never_reaches_are_listed():
    assert any(e.path == "spare" and "never" in e.why for e in log(integers(Odd(lambda self, y: y), x12())))


def test_nan_has_no_code():
    with pytest.raises(ValueError, match="NaN"):
        integers(nn.Linear(12, 12), x12())(x12() / 0 * 0)
    assert torch.isfinite(integers(nn.Linear(12, 12), x12())(x12() / 0)).all()  # infinity saturates


def test_a_global_mean_refuses_images_of_another_size():
    net, _, _ = subject("resnet")
    with pytest.raises(ValueError, match="calibrate on images of that size"):
        net(torch.zeros(1, 1, 56, 56))


def test_rows_of_zeros_keep_their_bias_and_a_huge_bias_fits():
    layer = nn.Linear(12, 4)
    with torch.no_grad():
        layer.weight[0], layer.weight[1], layer.weight[3] = 0.0, 1e-12, 0.0
        layer.bias.copy_(torch.tensor([0.7, 1e9, -0.2, 0.0]))
    x = x12()
    step = integers(layer, x).steps[0]
    assert step.offset.dtype is torch.int32 and (step.codes[0] == 0).all()
    net = integers(nn.Sequential(nn.Linear(12, 4), nn.ReLU()), torch.zeros(4, 12))
    assert net(torch.zeros(2, 12)).sub(F.relu(torch.zeros(1))).isfinite().all()
    with torch.no_grad():
        layer.bias[1] = 0.0
        assert (integers(layer, x)(x) - layer(x)).abs().max() < 0.05


def test_a_relu6_that_stands_alone_is_cut_off_at_6():
    x = torch.linspace(-9, 12, 64).reshape(4, 1, 4, 4)
    net = integers(nn.Sequential(nn.MaxPool2d(1), nn.ReLU6()), x)
    assert (net(x) - F.relu6(x)).abs().max() <= net.scale / 2 + net.steps[-1].scale


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-30])
def test_constant_activations_are_kept(value):
    model = nn.Linear(12, 3)
    x = torch.full((4, 12), value)
    with torch.no_grad():
        exact = model(x)
        assert (integers(model, x)(x) - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)).to(dtype)
    x = x12().to(dtype)
    y = integers(model, x)(x)
    assert y.dtype is dtype and (y - model(x)).abs().max() < 0.05


def test_a_layer_that_is_used_twice_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(300, 300)

        def forward(self, x):
            return self.layer(F.relu(self.layer(x)))

    x = torch.randn(4, 300)
    net = integers(Twice(), x)
    assert save(net, tmp_path / "twice.safetensors") < 1.2 * 300 * 300
    opened = load(tmp_path / "twice.safetensors")
    assert torch.equal(opened(x), net(x)) and opened.steps[0].codes is opened.steps[1].codes


@settings(max_examples=5)
@given(cases())
def test_files_hold_every_operator(tmp_path_factory, case):
    model, images = case
    net, path = integers(model, images), tmp_path_factory.mktemp("net") / "net.safetensors"
    save(net, path)
    assert torch.equal(load(path)(images), net(images)) and repr(load(path)) == repr(net)


def test_ranges_come_from_the_chapters_observers(monkeypatch):
    asked = []

    def narrow(x, *, bits, symmetric=False):
        asked.append(bits)
        return integer_only.OBSERVERS["min-max"](x / 4, bits=bits, symmetric=symmetric)

    monkeypatch.setitem(integer_only.OBSERVERS, "narrow", narrow)
    model, x = nn.Linear(12, 3), x12()
    wide, tight = (integers(model, x, search=search) for search in ("min-max", "narrow"))
    assert asked == [8, 8] and tight.scale < wide.scale / 3
    check_emulation(tight, x)
    check_emulation(integers(model, x, search="least-squares"), x)
    with pytest.raises(ValueError, match="search must be one of"):
        IntegerOnly(search="guess")
    with pytest.raises(ValueError, match="examples"):
        IntegerOnly(examples=0)


def test_it_prints_as_a_program():
    lines = repr(subject("resnet")[0]).splitlines()
    assert (
        lines[1].split()[:5] == ["stem", "conv2d", "1", "->", "4"] and "relu" in lines[1] and lines[1].endswith("<- x")
    )


def test_bits_per_weight_count_every_byte_held():
    net = integers(nn.Linear(40, 6), torch.randn(4, 40))
    assert IntegerOnly().claim(net).value == pytest.approx(8 + 72 / 40)


# planted bugs


def no_cross_term(patch):
    patch.setattr(integer_net, "cross_term", lambda q_w, z_x: torch.zeros(len(q_w), dtype=torch.int64))


def bias_at_the_input_scale(patch):
    true = integer_net.quantize_layer

    def wrong(w, b, s_x):
        codes, q_b, s_w = true(w, b, s_x)
        return codes, (q_b * s_w).round().long(), s_w

    patch.setattr(integer_net, "quantize_layer", wrong)


def sum_without_rescaling(patch):
    def forward(step, *xs):
        total = sum(x.long() - z for x, z in zip(xs, step.zero_points, strict=True))
        return (total + step.zero_point).clamp(step.zero_point if step.relu else -128, 127).to(torch.int8)

    patch.setattr(integer_net.IntegerSum, "forward", forward)


def norm_forgotten(patch):
    patch.setattr(integer_only, "fold", lambda w, b, norm: (w, b))


def truncated(patch):
    patch.setattr(integer_net, "round_shift", lambda p, shift: p >> shift)


def halves_upward(patch):
    patch.setattr(integer_net, "round_shift", lambda p, shift: (p + (1 << (shift - 1))) >> shift)


def padded_with_code_0(patch):
    true = integer_net.windows
    patch.setattr(integer_net, "windows", lambda x, k, s, d, pads, fill: true(x, k, s, d, pads, 0))


def relu_forgotten(patch):
    true = integer_net.requantize
    patch.setattr(integer_net, "requantize", lambda p, shift, zero, relu: true(p, shift, zero, False))


def images() -> torch.Tensor:
    """Not positive throughout, so that the code of 0 is none of -128 and 0."""
    return torch.randn(8, 1, 14, 14, generator=torch.Generator().manual_seed(8)) + 0.7


@pytest.mark.parametrize(
    "bug, where",
    [(no_cross_term, "stem"), (bias_at_the_input_scale, "stem"), (norm_forgotten, "stem"), (padded_with_code_0, "stem"),
     (sum_without_rescaling, "add")],
)  # fmt: skip
def test_the_law_of_each_operator_would_notice(monkeypatch, bug, where):
    model, x = resnet(), images()
    check_operators(integers(model, x), model, x)
    bug(monkeypatch)
    with pytest.raises(AssertionError, match=where):
        check_operators(integers(model, x), model, x)


@pytest.mark.parametrize("bug", [truncated, padded_with_code_0, relu_forgotten, halves_upward])
def test_the_emulation_would_notice(monkeypatch, bug):
    x, net, ties = images(), integers(resnet(), images()), halving()
    ties.steps[0].relu = bug is relu_forgotten
    check_emulation(net, x), check_emulation(ties, ODD)
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_emulation(net, x), check_emulation(ties, ODD)


def test_the_largest_sizes_are_the_largest():
    """The bounds of the docstring, in Python's integers."""
    n = integer_net.MOST_INPUTS
    assert 255 * 127 * n <= 2**30 < 255 * 127 * (n + 1) and 128 * 127 * n < 2**29 + 2**21
    assert 255 * integer_net.MOST_PIXELS < 2**31 <= 255 * (integer_net.MOST_PIXELS + 1)
    assert 2**62 + 2**61 < 2**63
