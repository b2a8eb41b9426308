"""Interactions, forbidden orders, and the one quadratic form behind three techniques."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effkit.combining.pairs import Pair, cross_entropy, forbidden, interaction
from effkit.core.calibration import gather, layer_error
from effkit.core.surgery import dense_weight
from effkit.core.task import Batches, Task
from effkit.distillation import Distill
from effkit.factorization import SVD
from effkit.factorization.svd import LowRankLinear
from effkit.pruning import Magnitude
from effkit.quantization import RTN
from effkit.zoo.vision import MLP


def clouds(n=100, size=16):
    rng = torch.Generator().manual_seed(3)
    y = torch.randint(4, (n,), generator=rng)
    x = torch.randn(n, 16, generator=rng) + 2 * F.one_hot(y, 16).float()
    data = Batches(x, y, size=size)
    return Task("clouds", train=data, calib=data, test=data, loss=lambda out, batch: F.cross_entropy(out, batch[1]))


def test_losses_that_add_do_not_interact():
    assert interaction(0.5, 0.2, 0.3) == 0
    pair = Pair("A", "B", unchanged=1.0, after_first=1.25, after_second=1.5, after_both=2.0)
    assert pair.deltas == (0.25, 0.5, 1.0) and pair.interaction == 0.25


@pytest.mark.parametrize("first, second", [(RTN(), Magnitude()), (RTN(), SVD()), (Magnitude(), SVD()), (RTN(), RTN(3))])
def test_forbidden_orders_say_why_and_what_else(first, second):
    why = forbidden(first, second)
    assert why.startswith(type(second).__name__) and f"put {type(second).__name__} first" in why


@pytest.mark.parametrize("first, second", [(Magnitude(), RTN()), (SVD(), RTN()), (SVD(), Magnitude())])
def test_possible_orders_are_possible(first, second):
    assert forbidden(first, second) == ""
    model = second(first(MLP((16, 24, 4))))
    assert model(torch.randn(2, 16)).shape == (2, 4)


def test_cross_entropy_weighs_every_example_once():
    task, model = clouds(n=100, size=64), MLP((16, 8, 4)).train()
    wanted = F.cross_entropy(model(task.test.inputs), task.test.targets).item()
    assert cross_entropy(model, task) == pytest.approx(wanted, rel=1e-5) and model.training


def test_a_mean_of_means_is_caught(monkeypatch):
    """Planted: batches counted alike, whatever their size."""

    def careless(model, task, split="test"):
        losses = [task.loss(model(batch[0]), batch).item() for batch in getattr(task, split)]
        return sum(losses) / len(losses)

    monkeypatch.setitem(globals(), "cross_entropy", careless)
    with pytest.raises(AssertionError):
        test_cross_entropy_weighs_every_example_once()


@pytest.mark.parametrize("technique", [RTN(bits=3), Magnitude(0.5), SVD(rank=3)], ids=lambda t: type(t).__name__)
def test_one_gram_matrix_knows_every_techniques_error(technique):
    """||(W - W_hat) X||^2 from X X^T, against the outputs themselves: a grid, zeros, a product of factors alike."""
    torch.manual_seed(0)
    layer, task = nn.Linear(16, 12), clouds()
    seen = gather(layer, task)[""]
    changed = technique(nn.Sequential(layer))[0]
    with torch.no_grad():
        wanted = (layer(task.calib.inputs) - changed(task.calib.inputs)).square().sum()
    got = layer_error(layer.weight.detach(), dense_weight(changed).detach(), seen.gram)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_factorized_student_learns_from_its_teacher():
    torch.manual_seed(0)
    task, teacher = clouds(), MLP((16, 24, 4))
    task = Task(train=task.train, test=task.test, loss=task.loss)
    from effkit.core.training import Schedule, fit

    fit(teacher, task, Schedule(60, 1e-2))
    cut = SVD(rank=2)
    student = Distill(cut, alpha=0.0, temperature=2.0, epochs=10, lr=1e-2)(teacher, task)
    assert isinstance(student.layers[0], LowRankLinear) and student.layers[0].rank == 2
    assert cross_entropy(student, task) < cross_entropy(cut(teacher), task)
