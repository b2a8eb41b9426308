"""Fused kernels compute what the operators do, for every shape and layout; groups are legal; the code is what it seems."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effkit.compilation import codegen, expressions, fusion
from effkit.compilation.capture import capture
from effkit.compilation.fusion import Kernel, fuse, groups
from effkit.compilation.ir import refs, run
from effkit.core import native
from tests.compilation.programs import Program, close, inputs, programs

compiles = pytest.mark.skipif(native.compiler() is None, reason="no C compiler (cc, gcc, clang): kernels fall back")


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *xs):
        return self.function(*xs)


def fused(function, *example):
    graph = capture(Function(function).eval(), example)
    after = fuse(graph)
    return after, [node.op for node in after.operators if isinstance(node.op, Kernel)]


def check_equals_eager(function, *example, tolerance=2e-6):
    """In float32 against eager in float64, and the kernel in float64 against it closely."""
    wide = tuple(x.double() for x in example)
    wanted = function(*wide)
    for xs, bound in ((example, tolerance), (wide, 1e-12)):
        graph, kernels = fused(function, *xs)
        assert len(kernels) == 1 and len(graph.operators) == 1, graph
        (seen,) = run(graph, xs) if graph.spec is None else (run(graph, xs),)
        assert seen.dtype == xs[0].dtype and seen.stride() == function(*xs).stride()
        assert (seen.double() - wanted).abs().max() <= bound * (1 + wanted.abs().max())


CHAINS = {
    "five pointwise": lambda x, y: torch.sigmoid(x * y + 1).mul(2).sub(x),
    "all the functions": lambda x, y: x.exp() + (x.abs() + 1).log() + (x.abs() + 1).sqrt() + x.sin() * y.cos() - x.tanh(),
    "activations": lambda x, y: F.relu(x) + F.silu(y) * F.gelu(x) - F.gelu(y, approximate="tanh") + F.leaky_relu(x, 0.2),
    "powers": lambda x, y: x**2 + y**3 - (x.abs() + 1) ** 0.5 + (y.abs() + 1) ** -0.5 + (x.abs() + 1) ** 1.7 + (x**2 + 1).reciprocal(),
    "limits": lambda x, y: torch.maximum(x, y).clamp(-0.5, 1) - torch.minimum(x, y).clamp_min(0.1) + F.hardtanh(x),
    "scaled": lambda x, y: torch.sub(torch.add(x, y, alpha=3), y, alpha=0.5) + (1 - x) / 4,
    "RMSNorm": lambda x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * y,
    "softmax of a difference": lambda x, y: torch.softmax(x - y, -1) * 2,
    "log of a sum of exponentials": lambda x, y: x - (x - x.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True).log() - x.amax(-1, keepdim=True) + y,
    "softmax of a softmax": lambda x, y: torch.softmax(torch.softmax(x * y, -1) * 9, -1) + x,
}  # fmt: skip


@compiles
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_becomes_one_kernel_that_equals_eager(name):
    check_equals_eager(CHAINS[name], torch.randn(5, 33), torch.randn(5, 33))


@pytest.mark.slow
@compiles
@given(st.sampled_from([(1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 1), (9000,), (2, 4500)]), st.integers(0, 5))
@settings(max_examples=6)
def test_any_shape_and_layout(shape, how):
    x, y = torch.randn(shape), torch.randn(shape)
    if how % 2:
        x = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))
    if how // 2 == 1:
        y = torch.randn(shape[-1:])
    elif how // 2 == 2:
        y = y[..., :1]
    check_equals_eager(lambda x, y: torch.tanh(x * y) + x, x, y)


@compiles
@given(programs(8))
@settings(max_examples=6)
def test_fusion_preserves_random_programs(program):
    graph = capture(program, inputs())
    after = fuse(graph)
    for seed in (0, 1):
        assert close(run(after, inputs(seed=seed)), run(graph, inputs(seed=seed)), 1e-9)


def check_groups(program):
    graph = capture(program, inputs())
    users, seen, position = graph.users(), set(), {n.name: i for i, n in enumerate(graph.nodes)}
    for group in groups(graph):
        inside = {node.name for node in group}
        assert len(group) > 1 and not inside & seen
        seen |= inside
        for node in group[:-1]:
            assert users[node.name] <= inside and node.name not in set(refs(graph.outputs))
        assert max(position[name] for name in inside) == position[group[-1].name]


@pytest.mark.slow
@given(programs())
@settings(max_examples=8)
def test_groups_are_disjoint_and_only_their_last_value_is_read_outside(program):
    check_groups(program)


@pytest.mark.slow
@given(programs(8))
@settings(max_examples=6)
def test_a_kernel_read_operator_by_operator_means_the_same(program):
    graph = capture(program, inputs())
    values = {}
    run(graph, inputs(), lambda node, value: values.update({node.name: value}))
    for group in groups(graph):
        kernel = Kernel.of(graph, group)
        assert torch.equal(kernel.eager(*(values[name] for name in kernel.reads)), values[group[-1].name])


@compiles
def test_infinities_nan_and_denormal_numbers_are_as_in_eager():
    def function(x, y):
        return torch.relu(x * y + 1).exp() - torch.sigmoid(x).clamp(0.1, 0.9), torch.softmax(
            torch.maximum(x, y) * 2, -1
        )

    x, y = torch.randn(4, 20), torch.randn(4, 20)
    graph, kernels = fused(function, x, y)
    x[0, 0], x[0, 1], y[1, 1] = torch.nan, torch.inf, -torch.inf
    x[2], y[2] = -torch.inf, -torch.inf
    assert len(kernels) == 2
    assert close(run(graph, (x, y)), function(x, y), 1e-5)
    assert (torch.tensor([1e-40]) * 1).item() > 0, "loading a kernel made the process flush denormal numbers"


@compiles
def test_equal_groups_have_equal_source_and_are_compiled_once():
    def function(x, y):
        return torch.relu(x + 1) @ torch.relu(y + 1)

    _, kernels = fused(function, torch.randn(4, 4), torch.randn(4, 4))
    assert len(kernels) == 2 and kernels[0].source == kernels[1].source
    assert native.library(kernels[0].source) is native.library(kernels[1].source)


@pytest.mark.parametrize(
    "function, example",
    [
        (lambda x: (x + 1) * 2, torch.arange(4)),
        (lambda x: (x + 1) * 2, torch.randn(4).bfloat16()),
        (lambda x: torch.relu(x + 1), torch.randn(0, 3)),
        (lambda x: torch.relu(x), torch.randn(3)),
        (lambda x: x.mean(0, keepdim=True) - 1, torch.randn(3, 3)),
    ],
    ids=["integers", "bfloat16", "nothing", "one operator", "a reduction of columns"],
)
def test_what_cannot_or_need_not_be_fused_stays(function, example):
    graph = capture(Function(function), (example,))
    assert groups(graph) == [] and str(fuse(graph)) == str(graph)


def test_without_a_compiler_the_graph_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("EFFKIT_NO_COMPILER", "1")
    graph = capture(Function(lambda x: torch.relu(x + 1)), (torch.randn(3),))
    assert len(groups(graph)) == 1 and str(fuse(graph)) == str(graph)


def test_the_code_reads_as_the_group_does():
    graph = capture(Function(lambda x: torch.relu(x + 1)), (torch.randn(3, 5),))
    source = Kernel.of(graph, groups(graph)[0]).source
    for line in (
        "for (long j = 0; j < width; j++)",
        "const real v0 = (in0 + (real)1.0);",
        "const real v1 = (v0 < 0 ? 0 : v0);",
        "outp[j] = v1;",
    ):
        assert line in source


# planted bugs: each turns a test of this file red


@compiles
def test_a_wrong_expression_would_be_noticed(monkeypatch):
    monkeypatch.setitem(expressions.POINTWISE, torch.ops.aten.silu.default, lambda a: f"({a} / ((real)1 + EXP({a})))")
    with pytest.raises(AssertionError):
        check_equals_eager(CHAINS["activations"], torch.randn(5, 33), torch.randn(5, 33))


@compiles
def test_a_mean_that_is_a_sum_would_be_noticed(monkeypatch):
    monkeypatch.setitem(
        expressions.REDUCTIONS, torch.ops.aten.mean.dim, expressions.REDUCTIONS[torch.ops.aten.sum.dim_IntList]
    )
    with pytest.raises(AssertionError):
        check_equals_eager(CHAINS["RMSNorm"], torch.randn(5, 33), torch.randn(5, 33))


@compiles
def test_broadcasting_forgotten_would_be_noticed(monkeypatch):
    monkeypatch.setattr(codegen, "_broadcast", lambda kind, rank: [0] * (rank - len(kind.shape)) + list(kind.stride))
    with pytest.raises(AssertionError):
        check_equals_eager(
            lambda x, y: torch.tanh(x * y) + x, torch.randn(3, 4), torch.randn(3, 1).expand(3, 1).clone()[:, :1]
        )


def test_a_value_that_others_read_must_not_be_swallowed(monkeypatch):
    """A group that takes whatever stands before its root would lose values; the law on groups notices."""

    def everything(root, before, graph, users, barred):
        return tuple(node for node in (*before, root) if node.computes and node.name not in barred)

    monkeypatch.setattr(fusion, "_grown", everything)
    with pytest.raises(AssertionError):
        check_groups(Program([(0, 0, 0), (1, 2, 2), (12, 2, 3)], [0, 1]))
