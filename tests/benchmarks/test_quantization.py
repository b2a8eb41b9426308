"""Races of chapter 01, each a ratio to read within one run: `effkit bench`. Never in a timed test."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effkit.measure import roofline
from effkit.quantization import RTN
from effkit.quantization.integer import Int8Linear
from effkit.quantization.packed import FEW


@pytest.fixture(autouse=True)
def all_threads():
    """The tests run on one thread; a race uses what the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)


def run(benchmark, module, x):
    with torch.inference_mode():
        module(x)
        benchmark(module, x)


def dynamic_int8(layer: nn.Linear, folder):
    """The layer as ONNX Runtime runs it in int8: a scale an output, and one for all activations of the moment."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    held = {"w": layer.weight.t().contiguous(), "b": layer.bias}
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["xw"]), onnx.helper.make_node("Add", ["xw", "b"], ["y"])]
    ends = [[onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None])] for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "layer", *ends, [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in held.items()])
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    quantize_dynamic(model, folder / "layer.onnx", weight_type=QuantType.QInt8, per_channel=True)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads take the cores from the next racer
    session = runtime.InferenceSession(folder / "layer.onnx", options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


@pytest.mark.benchmark(group="1024 x 1024, 256 rows")
@pytest.mark.parametrize("kind", ["float32", "effkit W8A8", "torchao eager", "torchao compiled", "ONNX Runtime dynamic int8"])
def test_w8a8(benchmark, kind, tmp_path):
    layer, x = nn.Linear(1024, 1024).requires_grad_(False), torch.randn(256, 1024)
    if kind == "effkit W8A8":
        layer = Int8Linear.from_float(layer)
    if kind.startswith("ONNX"):
        layer = dynamic_int8(layer, tmp_path)
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = nn.Sequential(layer)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        layer = torch.compile(layer, mode="max-autotune") if "compiled" in kind else layer
    run(benchmark, layer, x)


def int4(size: int):
    """A square layer of int4 weights, and the bytes that one token reads of it."""
    layer = RTN(bits=4, group_size=32).replacement(nn.Linear(size, size, bias=False).requires_grad_(False))
    return layer, sum(b.numel() * b.element_size() for b in layer.buffers())


@pytest.mark.benchmark(group="4096 x 4096, one row")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "effkit int4", "torch packed int8", "the bytes of int4, read"])
def test_one_token(benchmark, kind):
    layer, x = nn.Linear(4096, 4096, bias=False).requires_grad_(False), torch.randn(1, 4096)
    runs = {"float32": lambda x: F.linear(x, layer.weight)}
    if kind == "bfloat16":
        weight = layer.weight.bfloat16()
        runs[kind] = lambda x: F.linear(x.bfloat16(), weight)
    if kind == "effkit int4":
        runs[kind] = int4(4096)[0]
    if kind == "torch packed int8":
        codes, scale = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8), torch.rand(4096).bfloat16()
        runs[kind] = lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), codes, scale)
    if kind.startswith("the bytes"):  # the roofline's limit for int4: the time to read as many bytes and do nothing with them
        floats = torch.randn(int4(4096)[1] // 4)
        runs[kind] = lambda x: floats.sum()
    run(benchmark, runs[kind], x)


@pytest.mark.benchmark(group="4096 x 4096 in int4, some rows")
@pytest.mark.parametrize("rows", [1, 8, FEW, FEW + 1])
def test_some_tokens(benchmark, rows):
    run(benchmark, int4(4096)[0], torch.randn(rows, 4096))


@pytest.mark.benchmark(group="share of the memory's bandwidth")
def test_int4_reads_at_a_share_of_the_bandwidth(benchmark):
    """`extra_info` of the saved results: bytes of codes, scales and zero points a second, over what this memory gives."""
    layer, held = int4(16_384)  # larger than any cache here
    run(benchmark, layer, torch.randn(1, 16_384))
    roof = roofline()
    benchmark.extra_info["share of bandwidth"] = held / benchmark.stats["median"] / roof.bandwidth.value
