"""Races of chapter 01, each a ratio to read within one run: `effkit bench`. Never in a timed test."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effkit.quantization import RTN
from effkit.quantization.integer import Int8Linear


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


@pytest.mark.benchmark(group="1024 x 1024, 256 rows")
@pytest.mark.parametrize("kind", ["float32", "effkit W8A8", "torchao eager", "torchao compiled"])
def test_w8a8(benchmark, kind):
    layer, x = nn.Linear(1024, 1024).requires_grad_(False), torch.randn(256, 1024)
    if kind == "effkit W8A8":
        layer = Int8Linear.from_float(layer)
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = nn.Sequential(layer)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        layer = torch.compile(layer, mode="max-autotune") if "compiled" in kind else layer
    run(benchmark, layer, x)


@pytest.mark.benchmark(group="4096 x 4096, one row")
@pytest.mark.parametrize("kind", ["float32", "effkit int4", "torch packed int8"])
def test_one_token(benchmark, kind):
    layer, x = nn.Linear(4096, 4096, bias=False).requires_grad_(False), torch.randn(1, 4096)
    if kind == "effkit int4":
        layer = RTN(bits=4, group_size=32).replacement(layer)
    if kind == "torch packed int8":
        codes, scale = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8), torch.rand(4096).bfloat16()
        run(benchmark, lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), codes, scale), x)
        return
    run(benchmark, layer if kind != "float32" else lambda x: F.linear(x, layer.weight), x)
