"""Removal: what is gone equals what is masked, on every input; groups equal Torch-Pruning's; what cannot go stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effkit import Sampler, load, log, save
from effkit.core.task import Batches, Task
from effkit.core.technique import clone
from effkit.pruning import Filters, Fisher, graph, groups, rules, structured
from effkit.zoo.gpt import GPT
from effkit.zoo.tasks import classification_loss
from effkit.zoo.vision import MLP, ResNet
from tests.subjects import gpt, image_task, language_task, mlp, resnet


class Forked(nn.Module):
    """Concatenation of two branches, one depthwise, into flattening; a gate; a convolution in groups."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(9)
        self.squeeze, self.excite = nn.Linear(9, 6), nn.Linear(6, 9)
        self.grouped = nn.Conv2d(9, 6, 1, groups=3)
        self.out = nn.Linear(6 * 9, 4)

    def forward(self, x):
        x = self.norm(torch.cat((self.left(x), self.depthwise(F.relu6(self.right(x)))), dim=1))
        gate = self.excite(F.gelu(self.squeeze(x.mean((2, 3))))).sigmoid()
        x = F.adaptive_avg_pool2d(self.grouped(F.max_pool2d(x * gate[..., None, None], 2)), 3)
        return self.out(x.flatten(1))


class Shared(nn.Module):
    """A module used twice around a residual, a bare parameter, a transposed convolution, a PReLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.up = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.ConvTranspose2d(6, 5, 2)
        self.slope, self.scale = nn.PReLU(5), nn.Parameter(torch.rand(5))
        self.mid, self.out = nn.Linear(5, 7), nn.Linear(7, 4, bias=False)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.again(F.relu(self.again(x)))
        x = self.slope(self.up(x)).mean((2, 3))
        return self.out(F.silu(self.mid(x * self.scale)))


def images(n=4):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def task_of(x):
    data = Batches(x, torch.arange(len(x)) % 4, size=2)
    return Task("toy", (x,), data, data, data, data, classification_loss)


MODELS = {
    "resnet": (resnet, lambda: torch.rand(3, 1, 28, 28)),
    "deep resnet": (lambda: ResNet((4, 6), blocks=2).eval(), lambda: torch.rand(3, 1, 28, 28)),
    "mlp": (mlp, lambda: torch.rand(3, 1, 28, 28)),
    "gpt": (gpt, lambda: torch.randint(64, (2, 12))),
    "forked": (lambda: Forked().eval(), images),
    "shared": (lambda: Shared().eval(), images),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval(), lambda: torch.randn(2, 5, 8)),
}


def built(name):
    torch.manual_seed(1)
    build, example = MODELS[name]
    model, x = build(), example()
    for module in model.modules():  # an untrained BatchNorm would hide a lost statistic
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return model, x, [g for g in groups(model, (x,)) if g.layers and not g.held]


def with_inputs_zeroed(model, choice):
    """The masked twin by another road: hooks put zeros into the channels just before whatever reads them."""
    model = clone(model)
    for group, keep in choice:
        gone = (~keep).nonzero().flatten().tolist()
        for place, indices in group.where.items():
            path, _, name = place.tensor.rpartition(".")
            layer = model.get_submodule(path)
            reads = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            if name == "weight" and place.dim == reads and not isinstance(layer, nn.Embedding):
                index = torch.tensor([i for c in gone for i in indices[c]], dtype=torch.long)
                dim = 1 if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else -1
                layer.register_forward_pre_hook(lambda _, args, d=dim, i=index: (args[0].index_fill(d, i, 0.0),))
    return model


def check_removed_equals_masked(name, seed):
    model, x, free = built(name)
    rng = torch.Generator().manual_seed(seed)
    choice = []
    for group in free:
        keep = torch.rand(len(group), generator=rng) < 0.6
        keep[int(torch.randint(len(group), (), generator=rng))] = True
        choice.append((group, keep))
    masked, removed = with_inputs_zeroed(model, choice), clone(model)
    structured.remove_channels_(removed, choice)
    for _ in range(3):
        x = (
            torch.randint(64, x.shape, generator=rng)
            if x.dtype == torch.long
            else torch.randn(x.shape, generator=rng) * 3
        )
        with torch.no_grad():
            assert (masked(x) - removed(x)).abs().max() <= 1e-5 * (1 + masked(x).abs().max())
    fewer = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in removed.parameters())
    assert fewer > 0 or all(keep.all() for _, keep in choice)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MODELS if n != "encoder"])  # its layers are read without being called
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_removed_equals_masked_on_every_input(name, seed):
    check_removed_equals_masked(name, seed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_technique_narrows_every_model(name, scope):
    model, x, free = built(name)
    result = Filters(0.5, scope=scope)(model, task_of(x))
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in model.parameters())
    assert result(x).shape == model(x).shape
    if name == "gpt":  # a single head that is left is no longer told apart from its inside
        return
    left = {frozenset(g.layers): len(g) for g in groups(result, (x,)) if g.layers and not g.held}
    assert all(left[frozenset(g.layers)] >= 1 for g in free)
    if scope == "layer":
        assert all(left[frozenset(g.layers)] == len(g) - min(round(0.5 * len(g)), len(g) - 1) for g in free)


def test_a_residual_stream_goes_together_and_a_block_by_itself():
    found = {frozenset(g.layers): g for g in groups(resnet(), image_task().example)}
    stream = found[frozenset({"stem", "norm", "stages.0.conv2", "stages.0.norm2"})]
    readers = {p.tensor for p in stream.where if p.dim == 1}
    assert readers == {"stages.0.conv1.weight", "stages.1.conv1.weight", "stages.1.shortcut.0.weight"}
    assert len(stream) == 4 and not stream.held
    assert not found[frozenset({"stages.0.conv1", "stages.0.norm1"})].held
    assert "output" in found[frozenset({"classifier"})].held


def test_flattening_repeats_a_channel_and_concatenation_shifts_it():
    _, _, free = built("forked")
    where = {tuple(g.layers): {p.tensor: w for p, w in g.where.items()} for g in free}
    assert ("depthwise", "norm", "right") not in where, "the grouped convolution reads these"
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(2 * 64, 5), nn.ReLU(), nn.Linear(5, 4))
    first = groups(net, (images(),))[0]
    assert [w for p, w in first.where.items() if p.tensor == "2.weight"] == [[list(range(64)), list(range(64, 128))]]

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(5, 4)

        def forward(self, x):
            return self.out(torch.cat((self.a(x), self.b(x)), 1))

    found = {tuple(g.layers): g.where for g in groups(Joined(), (torch.rand(2, 4),))}
    assert found[("b",)][graph.Place("out.weight", 1)] == [[2], [3], [4]]


def test_depthwise_follows_its_inputs_and_groups_stay():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
    )
    small = Filters(0.5)(net.eval(), task_of(images()))
    assert small[1].groups == small[1].in_channels == small[1].out_channels == small[0].out_channels == 3
    assert small[3].out_channels == 4 and "grouped" in repr(log(small))


def test_heads_of_a_decoder_go_with_the_queries_that_share_them(tmp_path):
    model, task = gpt(), language_task()
    small = Filters(0.5, layers="*.attention.*")(model, task)
    a = small.blocks[0].attention
    assert (a.q.out_features, a.k.out_features, a.v.out_features, a.o.in_features) == (16, 8, 8, 16)
    ids = task.example[0][:, :5]
    text = small.generate(ids, 4, sampler=Sampler(temperature=0.0))
    assert torch.equal(text[:, 5:], small(text).argmax(-1)[:, 4:-1]), "with its cache it says what it says without"
    save(small, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(ids), small(ids))


def test_neurons_of_a_decoder_gate_up_and_down_together():
    small = Filters(0.25, layers="*.ff.*")(gpt(), language_task())
    for block in small.blocks:
        assert block.ff.gate.out_features == block.ff.up.out_features == block.ff.down.in_features == 48
        assert block.attention.q.out_features == 32


@pytest.mark.parametrize("kind", [Filters, Fisher])
def test_the_least_channels_go(kind):
    """Two neurons are nothing, and go first."""
    model, task = MLP((784, 8, 10)).eval(), image_task()
    with torch.no_grad():
        model.layers[0].bias.fill_(1.0)  # a neuron that is never active is worth nothing too
        for i in (2, 5):
            model.layers[0].weight[i] = model.layers[1].weight[:, i] = 1e-6
    small = kind(0.25, pattern="channels")(model, task)
    stays = [i for i in range(8) if i not in (2, 5)]
    assert torch.equal(small.layers[0].weight, model.layers[0].weight[stays])
    assert torch.equal(small.layers[1].weight, model.layers[1].weight[:, stays])


def test_ties_modes_hooks_dtypes_and_frozen_weights_are_kept():
    model, x, _ = built("shared")
    model = model.bfloat16()
    model.stem.weight.requires_grad_(False)
    seen = []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    small = Filters(0.5)(model, task_of(x.bfloat16()))
    before = len(seen)
    small(x.bfloat16())
    assert len(seen) == before + 1
    assert not small.stem.weight.requires_grad and small.again.weight.requires_grad
    assert small.stem.weight.dtype == torch.bfloat16 and small.stem.weight.is_contiguous()


def test_fine_tuning_after_removal_lowers_the_loss():
    model, task = mlp(), image_task()

    def loss(m):
        with torch.no_grad():
            return sum(task.loss(m(x), (x, y)).item() for x, y in task.train)

    assert loss(Filters(0.5, epochs=4)(model, task)) < loss(Filters(0.5)(model, task)) - 0.1


class WrittenIn(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.conv, self.out, self.code = nn.Conv2d(3, 4, 1), nn.Linear(4 * 64, 4), code

    def forward(self, x):
        return self.out(self.code(self.conv(x)))


def divided(y):
    """Runs without a channel, and means something else."""
    return y.flatten(1) / y.shape[1]


@pytest.mark.parametrize("code", [lambda y: y.view(-1, 4 * 64), lambda y: y.reshape(len(y), 4, 64).flatten(1), divided])
def test_a_size_written_into_the_code_is_refused(code):
    with pytest.raises(ValueError, match=r"sizes written in.*4 channels of conv"):
        Filters(0.5)(WrittenIn(code).eval(), task_of(images()))


def test_a_slice_is_held_rather_than_cut_elsewhere():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.out = nn.Linear(4, 6), nn.Linear(3, 4)

        def forward(self, x):
            a, b = self.both(x).chunk(2, dim=-1)
            return self.out(a * b)

    (found,) = [g for g in groups(Split(), (torch.rand(2, 4),)) if "both" in g.layers]
    assert "slices" in found.held


@pytest.mark.parametrize("pick", [lambda h: h[:, 2], lambda h: h.unbind(1)[2], lambda h: h.select(1, -1)])
def test_a_picked_index_is_held_though_all_else_would_let_it_go(pick):
    """What reads every channel could do with fewer; the index that is written into the code would pick another one."""

    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = self.hidden(x)
            return self.out(h), pick(h)

    (found,) = [g for g in groups(Picks(), (torch.rand(2, 4),)) if "hidden" in g.layers]
    assert found.held == "single indices are picked from it"


@pytest.mark.parametrize("a, b, equal", [
    ([1.0, 2.0], [1.0, 2.0 + 5e-4], True), ([1.0, 2.0], [1.0, 2.0 + 2e-3], False),  # eps^0.5 = 3.5e-4, times 1 + 2
    ([100.0, 0.0], [100.0, 2e-2], True), ([100.0, 0.0], [100.0, 5e-2], False), ([0.0], [3e-4], True), ([0.0], [4e-4], False),
    ([1.0, 2.0], [1.0], False), ([[1.0, 2.0]], [[1.0], [2.0]], False), ([], [], True), ([1, 2], [2, 1], True), ([1, 2], [1], False),
    ([-torch.inf, 1.0], [-torch.inf, 1.0], True), ([-torch.inf, 1.0], [-torch.inf, 9.0], False), ([torch.inf], [-torch.inf], False),
    ([torch.nan], [torch.nan], True), ([torch.nan], [1.0], False), ([1.0], [torch.nan], False),
])  # fmt: skip
def test_outputs_are_equal_to_half_of_the_digits(a, b, equal):
    """Indices, which are whole numbers, may differ: of nearly equal numbers another one may be the largest."""
    assert structured._equal(torch.tensor(a), torch.tensor(b)) is equal


def test_half_precision_is_compared_to_half_of_its_own_digits():
    a, b = torch.tensor([1.0]).bfloat16(), torch.tensor([1.125]).bfloat16()
    assert structured._equal(a, b) and not structured._equal(a.double(), b.double())


@pytest.mark.parametrize(
    "model, settings, said",
    [
        (nn.Linear(4, 4), {}, "must be left alone.*output"),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)), {}, "must be left alone.*native_layer_norm"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), {"layers": "5"}, "matches no layer.*8 channels of 0"),
    ],
)
def test_refusals_say_why(model, settings, said):
    with pytest.raises(ValueError, match=said):
        Filters(0.5, **settings)(model.eval(), task_of(torch.rand(4, 4)))


def test_a_task_without_an_example_is_refused():
    with pytest.raises(ValueError, match="task.example"):
        Filters(0.5)(mlp(), Task())


# Oracle: Torch-Pruning's groups on the same network.


@pytest.mark.peers("torch_pruning")
@pytest.mark.parametrize("name", ["resnet", "deep resnet", "mlp", "shared"])
def test_groups_equal_torch_prunings(name):
    import torch_pruning as tp

    model, x, free = built(name)
    paths = {module: path for path, module in model.named_modules()}
    theirs = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    kinds = {nn.Conv2d: tp.prune_conv_out_channels, nn.Linear: tp.prune_linear_out_channels}
    for group in free:
        layer = next(m for m in map(model.get_submodule, group.layers) if type(m) in kinds)
        peer = theirs.get_pruning_group(layer, kinds[type(layer)], [0])
        wanted = set()
        for dependency, indices in peer:
            if dependency.target.module in paths:
                reads = "in" in dependency.handler.__name__.split("_")
                wanted.add((paths[dependency.target.module], int(reads), tuple(sorted(indices))))
        ours = set()
        for place, where in group.where.items():
            path, _, tensor = place.tensor.rpartition(".")
            swapped = isinstance(model.get_submodule(path), nn.ConvTranspose2d) and tensor == "weight"
            ours.add((path, 1 - place.dim if swapped else place.dim, tuple(where[0])))
        assert ours == wanted


# Planted bugs: each is noticed by the law above.


def forgets_the_reader(t, out, bias, a, b, **settings):
    return [[t.axes(a)[0], t.axes(b)[1]]]


def loses_the_addition(t, out, *args, **settings):
    return [t.axes(args[0]) for _ in [out]]


@pytest.mark.parametrize(
    "rule, bug, name", [("addmm", forgets_the_reader, "mlp"), ("add", loses_the_addition, "deep resnet")]
)
def test_a_forgotten_tie_is_caught(monkeypatch, rule, bug, name):
    monkeypatch.setitem(rules.RULES, rule, bug)
    with pytest.raises((AssertionError, RuntimeError)):
        check_removed_equals_masked(name, seed=1)


def test_a_lost_statistic_is_caught(monkeypatch):
    """Channels are taken out of BatchNorm's mean in another order than out of its other tensors."""
    honest = torch.Tensor.index_select

    def shifted(self, dim, index):
        return (
            honest(self, dim, index).roll(1) if self.dim() == 1 and not self.requires_grad else honest(self, dim, index)
        )

    monkeypatch.setattr(torch.Tensor, "index_select", shifted)
    with pytest.raises(AssertionError):
        check_removed_equals_masked("resnet", seed=1)


def test_the_check_on_the_example_is_caught_when_it_is_gone(monkeypatch):
    monkeypatch.setattr(structured, "_equal", lambda a, b: True)
    with pytest.raises(pytest.fail.Exception):
        test_a_size_written_into_the_code_is_refused(divided)


def test_a_decoder_with_gqa_of_every_ratio_keeps_its_law():
    for heads, kv in ((4, 4), (4, 1), (6, 2)):
        torch.manual_seed(0)
        MODELS["ratio"] = (
            lambda h=heads, k=kv: GPT(
                vocab_size=64, d_model=24, head_dim=4, layers=1, heads=h, kv_heads=k, d_ff=16
            ).eval(),
            MODELS["gpt"][1],
        )
        try:
            check_removed_equals_masked("ratio", seed=2)
        finally:
            del MODELS["ratio"]
