"""Quantization-aware pruning: the zeros stay, the grid is the one that was trained on, and training helps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effkit import Pipeline, load, save
from effkit.combining import qap
from effkit.combining.qap import QAP, masked_and_rounded
from effkit.core.task import Batches, Task
from effkit.core.training import Schedule, fit
from effkit.pruning import Magnitude
from effkit.quantization import QAT, RTN
from effkit.zoo.vision import MLP


def clouds(n=192):
    rng = torch.Generator().manual_seed(3)
    y = torch.randint(4, (n,), generator=rng)
    x = torch.randn(n, 16, generator=rng) + 2 * F.one_hot(y, 16).float()
    data = Batches(x, y, size=16, shuffle=True)
    return Task("clouds", train=data, test=data, loss=lambda out, batch: F.cross_entropy(out, batch[1]))


def trained():
    torch.manual_seed(0)
    model = MLP((16, 32, 4))
    fit(model, clouds(), Schedule(60, 1e-2))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return trained()


def loss(model):
    task = clouds()
    with torch.no_grad():
        return F.cross_entropy(model(task.test.inputs), task.test.targets).item()


def zeros(model):
    weights = [layer.dense_weight() for layer in model.layers]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("symmetric", (False, True))
def test_zeros_survive_training_and_packing(model, symmetric):
    result = QAP(sparsity=0.75, bits=4, symmetric=symmetric, epochs=2, lr=1e-2)(model, clouds())
    for layer, old in zip(result.layers, model.layers, strict=True):
        smallest = old.weight.abs() < old.weight.abs().flatten().kthvalue(round(0.75 * old.weight.numel()) + 1).values
        assert not layer.dense_weight()[smallest].any()
    assert QAP().claim(result).value == zeros(result) >= 0.75


def test_a_mask_that_is_dropped_before_training_is_caught(model, monkeypatch):
    """Planted: what QAT alone does to a masked layer."""
    monkeypatch.setattr(qap, "mask_", lambda layer, keep: None)
    monkeypatch.setattr(qap, "masked", lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"))
    with pytest.raises(AssertionError):
        test_zeros_survive_training_and_packing(model, False)


def test_prune_then_qat_forgets_the_mask(model):
    """Why this technique exists."""
    pipeline = Pipeline((Magnitude(0.75), QAT(bits=4, epochs=2, lr=1e-2)))(model, clouds())
    assert zeros(pipeline) < 0.6


@pytest.mark.parametrize("symmetric", (False, True))
def test_packed_is_what_was_trained(model, monkeypatch, symmetric):
    """The last forward pass of training and the packed model agree: mask and grid are the very same."""
    seen = []
    monkeypatch.setattr(qap, "masked", lambda layer, real=qap.masked: (seen.append(layer.weight.detach()), real(layer)))
    result = QAP(sparsity=0.5, bits=3, symmetric=symmetric, epochs=1, lr=1e-2)(model, clouds())
    for layer, weight in zip(result.layers, seen, strict=True):
        torch.testing.assert_close(layer.dense_weight(), weight, atol=1e-6, rtol=1e-6)


def test_only_the_layers_that_are_named_lose_weights_and_bits(model):
    result = QAP(sparsity=0.75, layers="layers.1")(model, clouds())
    assert type(result.layers[0]) is nn.Linear and result.layers[0].weight.all()
    assert type(result.layers[1]) is not nn.Linear


def test_gradients_reach_only_what_the_mask_keeps():
    layer = masked_and_rounded(nn.Linear(8, 4), sparsity=0.5, bits=3, group_size=8, symmetric=False)
    layer(torch.randn(5, 8)).square().sum().backward()
    gradient = layer.parametrizations["weight"].original.grad
    keep = layer.parametrizations["weight"][0].keep
    assert not gradient[~keep].any() and gradient[keep].all()


def test_training_together_beats_rounding_what_was_pruned(model):
    settings = dict(bits=2, group_size=16)
    before = loss(Pipeline((Magnitude(0.75), RTN(**settings)))(model))
    after = loss(QAP(sparsity=0.75, epochs=8, lr=1e-2, **settings)(model, clouds()))
    assert after - loss(model) < 0.5 * (before - loss(model))


def test_convolutions_too(tmp_path):
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    data = Batches(torch.rand(16, 1, 8, 8, generator=rng), torch.arange(16) % 3, size=8)
    task = Task(train=data, loss=lambda out, batch: F.cross_entropy(out, batch[1]))
    result = QAP(sparsity=0.5)(model, task)
    assert QAP().claim(result).value >= 0.5
    save(result, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(data.inputs), result(data.inputs))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QAP(sparsity=1.0), "sparsity must be"),
        (lambda: QAP(sparsity=-0.1), "sparsity must be"),
        (lambda: QAP(bits=17), "bits must be"),
        (lambda: QAP(epochs=0), "epochs must be"),
        (lambda: QAP(lr=0.0), "lr must be"),
        (lambda: QAP()(MLP((4, 2))), "task.train, loss"),
        (lambda: QAP()(RTN()(MLP((4, 2))), clouds()), "float weights"),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_is_refused_with_the_way_out(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0.0, 1.0\), got .*: 0.9 takes out nine of ten"):
        QAP(sparsity=sparsity)
