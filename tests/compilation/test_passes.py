"""Each pass preserves the outputs of random programs; each does what it is for; each planted bug is noticed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from effkit.compilation import passes
from effkit.compilation.capture import capture
from effkit.compilation.compiled import PASSES
from effkit.compilation.ir import Ref, run
from effkit.zoo import ResNet
from tests.compilation.programs import Program, close, inputs, programs

aten = torch.ops.aten
PURE = ["conv_bn", "algebra", "fold", "cse", "dce", "schedule"]


def captured(program):
    return capture(program, inputs())


def check_preserved(name, graph):
    after = PASSES[name](graph)
    assert [n.name for n in after.nodes if n.op == "input"] == ["x0", "x1"]
    for seed in (0, 1):
        assert close(run(after, inputs(seed=seed)), run(graph, inputs(seed=seed)), 1e-12)
    assert str(PASSES[name](after)) == str(after), "a second time changes nothing"
    return after


@pytest.mark.slow
@given(programs())
@settings(max_examples=15)
def test_every_pass_preserves_the_outputs_alone_and_behind_others_and_adds_no_work(program):
    graph = after = captured(program)
    for name in PURE:
        check_preserved(name, graph)
        after = check_preserved(name, after)
    assert len(after.operators) <= len(graph.operators)


def of(function, *example):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(1, 2, 4))

        def forward(self, *xs):
            return function(self.w, *xs)

    return capture(Model().eval(), example or (torch.randn(3, 4),))


def names(graph):
    return [node.op.__name__.split(".")[0] for node in graph.operators]


def test_dead_code_goes():
    def function(w, x):
        torch.exp(x)
        return x + 1

    assert names(passes.dce(of(function))) == ["add"]


def test_what_depends_on_weights_only_is_computed_once():
    graph = passes.dce(passes.fold(of(lambda w, x: x * (w.exp() + torch.arange(4)).sqrt())))
    assert names(graph) == ["mul"] and len(graph.values) == 1


def test_folding_does_not_unpack_weights_for_good():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.zeros(1000, 100, dtype=torch.uint8))

        def forward(self, x):
            return x @ self.codes.float()

    graph = passes.fold(capture(Packed(), (torch.ones(2, 1000),)))
    assert "_to_copy" in names(graph), "the float matrix takes four times the memory of its codes"


def test_equal_subexpressions_are_computed_once():
    graph = passes.cse(of(lambda w, x: torch.sin(x * w) + torch.sin(x * w) * 2))
    assert sorted(names(graph)) == ["add", "mul", "mul", "sin"]


def test_numbers_of_different_type_are_different_subexpressions():
    graph = of(lambda w, x: (x.sum(1) * 1, x.sum(1) * 1.0, x.long() * 1, x.long() * 1.0))
    after = passes.cse(graph)
    assert [t.dtype for t in run(after, (torch.ones(3, 4),))] == [
        torch.float32,
        torch.float32,
        torch.int64,
        torch.float32,
    ]


def test_zeros_of_either_sign_are_different_subexpressions():
    function = lambda w, x: (x * 0.0).reciprocal() + (x * -0.0).reciprocal()  # noqa: E731  (inf - inf)
    assert run(passes.cse(of(function)), (torch.ones(3, 4),))[0].isnan().all()


def test_what_is_made_from_nothing_is_folded_only_while_small():
    for n, kept in ((2**10, False), (2**18, True)):
        graph = passes.dce(passes.fold(of(lambda w, x, n=n: x.sum() * torch.arange(n))))
        assert ("arange" in names(graph)) is kept


def test_results_that_are_returned_never_share_memory_with_others():
    x = torch.randn(3, 4)
    for name in PURE:
        a, b, c = run(PASSES[name](of(lambda w, x: (x.exp(), x.exp(), x * 1))), (x,))
        assert len({t.untyped_storage().data_ptr() for t in (a, b, c, x)}) == 4, name


@pytest.mark.parametrize(
    "function", [lambda w, x: torch.relu(-(-((x + 0) * 1 - 0) / 1)), lambda w, x: torch.relu(x.clone().float())]
)
def test_algebra_leaves_only_what_matters(function):
    assert names(passes.dce(passes.algebra(of(function)))) == ["relu"]


def test_views_of_views_become_one():
    graph = passes.dce(passes.algebra(of(lambda w, x: x.exp().view(12).view(2, 6).view(6, 2).sin())))
    assert names(graph) == ["exp", "view", "sin"]


def test_algebra_keeps_what_changes_type_or_broadcasts():
    graph = of(lambda w, x: (torch.relu(x.long() * 1.0), torch.relu(x[:1] * torch.ones(3, 1))))
    assert names(passes.algebra(graph)).count("mul") == 2


def test_scaled_filters_by_hand():
    w, gamma, beta = torch.full((1, 1, 1, 1), 2.0), torch.tensor([3.0]), torch.tensor([5.0])
    filters, shift = passes.scaled_filters(w, None, gamma, beta, torch.tensor([1.0]), torch.tensor([4.0]), 0.0)
    assert filters.item() == 3.0 and shift.item() == 3.5  # (2 x - 1) / 2 * 3 + 5 = 3 x + 3.5
    filters, shift = passes.scaled_filters(w, torch.tensor([7.0]), gamma, beta, torch.tensor([1.0]), torch.tensor([3.0]), 1.0)
    assert filters.item() == 3.0 and shift.item() == 14.0  # (2 x + 7 - 1) / sqrt(3 + 1) * 3 + 5 = 3 x + 14


def resnet():
    model = ResNet((4, 8)).eval()
    rng = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5, generator=rng)
    return model


def check_normalization_moves_into_convolutions():
    model, x = resnet(), torch.randn(2, 1, 28, 28)
    graph = passes.conv_bn(capture(model, (x,)))
    assert not any("batch_norm" in name for name in names(graph))
    with torch.no_grad():
        assert torch.allclose(run(graph, (x,)), model(x), 1e-4, 1e-5)


def test_normalization_moves_into_convolutions():
    check_normalization_moves_into_convolutions()


def test_a_convolution_that_others_read_keeps_its_normalization():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    graph = capture(Both().eval(), (torch.randn(1, 1, 5, 5),))
    assert "native_batch_norm" in names(passes.conv_bn(graph))


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return y, self.norm(y)


@pytest.mark.parametrize("make", [Returned, lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.BatchNorm2d(2))])
def test_a_convolution_that_is_returned_or_transposed_keeps_its_normalization(make):
    model, x = make().eval(), (torch.randn(1, 2, 5, 5),)
    [norm] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norm.weight.data = torch.tensor([2.0, 5.0])
    graph = capture(model, x)
    assert close(run(passes.conv_bn(graph), x), run(graph, x), 1e-5)


# planted bugs


def test_swapped_operands_in_cse_would_be_noticed(monkeypatch):
    monkeypatch.setattr(
        passes, "_hashable", lambda value: frozenset(map(str, value)) if isinstance(value, tuple) else str(value)
    )
    with pytest.raises(AssertionError):
        check_preserved("cse", captured(Program([(13, 0, 1), (13, 1, 0), (12, 2, 3)], [0])))


def test_dropping_a_neutral_element_of_the_wrong_operator_would_be_noticed(monkeypatch):
    monkeypatch.setitem(passes._NEUTRAL, aten.mul.Tensor, 2)
    with pytest.raises(AssertionError):
        check_preserved("algebra", captured(Program([(1, 0, 0)], [0])))


def test_a_forgotten_mean_would_be_noticed(monkeypatch):
    real = passes.scaled_filters
    monkeypatch.setattr(
        passes, "scaled_filters", lambda w, b, g, beta, mean, var, eps: real(w, b, g, beta, mean * 0, var, eps)
    )
    with pytest.raises(AssertionError):
        check_normalization_moves_into_convolutions()


def test_dead_code_elimination_that_forgets_keyword_arguments_would_be_noticed(monkeypatch):
    graph = of(lambda w, x: x + 1)
    node = replace(graph.operators[0], kwargs={"out": Ref("p_w")})
    assert "p_w" in node.uses
