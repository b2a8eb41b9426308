"""Capture: the graph computes what the model does, and what has no graph is refused."""

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from effkit.compilation.capture import CannotCompile, capture
from effkit.compilation.ir import Ref, run
from effkit.zoo import GPT, MLP, ResNet
from tests.compilation.programs import close, inputs, programs

SMALL = {
    "mlp": (lambda: MLP((784, 20, 10)), lambda: torch.randn(3, 1, 28, 28)),
    "resnet": (lambda: ResNet((4, 8)), lambda: torch.randn(2, 1, 28, 28)),
    "gpt": (
        lambda: GPT(vocab_size=32, d_model=16, layers=2, heads=4, kv_heads=2, d_ff=24),
        lambda: torch.randint(32, (2, 7)),
    ),
}


@pytest.mark.slow
@given(programs())
@settings(max_examples=10)
def test_a_graph_computes_what_the_model_does(program):
    graph = capture(program, inputs())
    for seed in (0, 1):
        with torch.no_grad():
            assert close(run(graph, inputs(seed=seed)), program(*inputs(seed=seed)), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_zoo_is_captured(name):
    build, example = SMALL[name]
    model, x = build().eval(), example()
    with torch.no_grad():
        assert torch.equal(run(capture(model, (x,)), (x,)), model(x))


def test_a_graph_prints_one_line_a_node_with_its_type():
    text = str(capture(nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval(), (torch.ones(4, 3),)))
    assert text.splitlines()[0] == "%p_0_weight: float32[2, 3] = weight"
    assert "%relu: float32[4, 2] = relu(%addmm)" in text and text.endswith("return %relu")


def test_every_use_stands_behind_its_definition_and_views_know_their_owner():
    graph = capture(nn.Flatten(), (torch.ones(2, 3, 4),))
    assert [node.op for node in graph.nodes[:1]] == ["input"] and graph.outputs == (Ref(graph.nodes[-1].name),)
    assert graph.root(graph.nodes[-1].name) == "x0", "flattening a contiguous tensor shows the same memory"


def test_weights_stay_live():
    model = nn.Linear(3, 2).eval()
    graph = capture(model, (torch.ones(1, 3),))
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.zero_()
    assert run(graph, (torch.ones(1, 3),)).tolist() == [[6.0, 6.0]]


def test_a_nested_output_comes_back_as_it_was():
    class Nested(nn.Module):
        def forward(self, x):
            return {"twice": x * 2, "rest": [x + 1, None, 3]}

    x = torch.ones(2)
    result = run(capture(Nested(), (x,)), (x,))
    assert result["rest"][1:] == [None, 3] and result["twice"].tolist() == [2.0, 2.0]


def test_capturing_leaves_nothing_fake_behind():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(3, 3)
            self.first, self.second, self.last = nn.Sequential(shared), nn.Sequential(shared), None

        def forward(self, x):
            self.last = self.second(self.first(x))
            return self.last

    model = Remembers().eval()
    graph = capture(model, (torch.ones(2, 3),))
    assert (
        model.last is None
        and type(model(torch.ones(2, 3))) is torch.Tensor
        and type(model.first[0].weight) is nn.Parameter
    )
    assert sum(node.op == "weight" for node in graph.nodes) == 2, "one linear layer, used twice"


class Replaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x + self.calls


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    "model, said",
    [
        (Branches(), "cannot be captured"),
        (Counts(), "writes into"),
        (Replaces(), "in the place of"),
        (Noisy(), "random"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(model, said):
    with pytest.raises(CannotCompile, match=said):
        capture(model, (torch.ones(3),))


def test_weights_whose_paths_differ_by_a_dot_alone_stay_two():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
            self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})

        def forward(self, x):
            return self.a["b_c"](x) - 2 * self.a_b["c"](x)

    model, x = Twice(), torch.randn(3, 4)
    assert torch.allclose(run(capture(model, (x,)), (x,)), model(x), atol=1e-6)
