"""One file for a model: every kind of module comes back, with its numbers, modes, ties and outputs."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from effkit.core.checkpoint import fingerprint, load, save

KINDS = [
    (nn.Linear(3, 5, bias=False), (2, 3)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False), (2, 4, 9, 9)),
    (nn.Conv3d(2, 3, 3, padding="same"), (1, 2, 4, 4, 4)),
    (nn.BatchNorm1d(3, affine=False), (4, 3)),
    (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    (nn.LayerNorm((3, 4), eps=1e-3, bias=False), (2, 3, 4)),
    (nn.RMSNorm(4, eps=0.1), (2, 4)),
    (nn.PReLU(3, init=0.1), (2, 3)),
    (nn.GELU(approximate="tanh"), (2, 3)),
    (nn.Softmax(dim=0), (2, 3)),
    (nn.Flatten(2), (1, 2, 3, 4)),
    (nn.MaxPool2d(2, ceil_mode=True), (1, 1, 5, 5)),
    (nn.AvgPool2d(2, count_include_pad=False, padding=1), (1, 1, 5, 5)),
    (nn.AdaptiveAvgPool2d((1, 2)), (1, 1, 5, 5)),
]


@pytest.mark.parametrize("layer, shape", KINDS, ids=[type(layer).__name__ for layer, _ in KINDS])
def test_a_layer_comes_back_with_its_numbers(layer, shape, tmp_path):
    model, x = nn.Sequential(layer, nn.Identity()), torch.randn(shape)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    save(model.eval(), tmp_path / "m.safetensors")
    opened = load(tmp_path / "m.safetensors")
    assert repr(opened) == repr(model) and torch.equal(opened(x), model(x))


def test_modes_frozen_parameters_and_ties_come_back(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.Linear(7, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    size = save(model.train(), tmp_path / "m.safetensors")
    opened = load(tmp_path / "m.safetensors")
    assert size == (tmp_path / "m.safetensors").stat().st_size
    assert opened.training and opened[1].weight is opened[0].weight
    assert [p.requires_grad for p in opened[2].parameters()] == [True, False]


def test_slices_of_large_tensors_are_stored_without_the_rest(tmp_path):
    wide = nn.Linear(4, 4, bias=False)
    wide.weight = nn.Parameter(torch.randn(4, 10_000)[:, :4])
    assert save(nn.Sequential(wide), tmp_path / "m.safetensors") < 2000


def test_a_narrowed_layer_says_its_own_width(tmp_path):
    layer = nn.Linear(6, 4)
    layer.weight, layer.bias, layer.out_features = nn.Parameter(layer.weight[:2]), nn.Parameter(layer.bias[:2]), 2
    save(nn.Sequential(layer), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors")(torch.zeros(1, 6)).shape == (1, 2)


class Foreign(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)


def test_a_foreign_class_needs_its_base_and_the_right_one(tmp_path):
    model, path = Foreign(), tmp_path / "m.safetensors"
    save(model, path)
    with pytest.raises(ValueError, match=r"holds a Foreign.*pass base=Foreign"):
        load(path)
    x = torch.randn(2, 3)
    assert torch.equal(load(path, base=Foreign(5))(x), model(x)), "a layer's numbers are the file's, not the base's"
    with pytest.raises(ValueError, match="does not fit the model"):
        load(path, base=nn.Sequential(Foreign()))


def test_what_cannot_be_rebuilt_is_never_mistaken_for_something_else(tmp_path):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="no kind of module called 'Doubled'"):
        load(tmp_path / "m.safetensors")


def test_the_same_bytes_read_as_two_dtypes_are_two_tensors(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("floats", torch.tensor([1.0, 2.0]))
            self.register_buffer("ints", self.floats.view(torch.int32))

    made, path = Both(), tmp_path / "m.safetensors"
    save(made, path)
    opened = load(path, base=Both())
    assert opened.ints.dtype == torch.int32 and torch.equal(opened.ints, made.ints)


def test_a_module_that_stands_in_two_places_is_one_in_the_file_too(tmp_path):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(nn.Tanh(), shared), shared).eval()
    save(model, tmp_path / "m.safetensors")
    opened = load(tmp_path / "m.safetensors")
    assert opened[0] is opened[2][1] is opened[3] and opened[0].weight is opened[3].weight
    x = torch.randn(3, 4)
    assert torch.equal(opened(x), model(x))


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_a_fingerprint_tells_which_tensor_is_which():
    """The same bytes in the same order under other names are other weights."""
    x, y = torch.ones(2), torch.zeros(2)
    models = [dict(a=x, b=y), dict(b=x, a=y), dict(a=x, c=y), dict(a=y, b=x), dict(a=x), dict(a=torch.ones(2, 1), b=y)]
    assert len({fingerprint([Holder(**model)]) for model in models}) == len(models)
    assert fingerprint([Holder(a=x, b=y)]) == fingerprint([Holder(a=x.clone(), b=y.clone())])


@pytest.mark.parametrize("place, seen", [("", ", but a folder"), ("nothing", "")])
def test_what_is_no_file_is_named_with_the_way_out(tmp_path, place, seen):
    path = tmp_path / place
    with pytest.raises(FileNotFoundError) as caught:
        load(path)
    assert str(caught.value) == f"there is no file {path}{seen}: give the path of a file that effkit.save wrote"
