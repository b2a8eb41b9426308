"""Fisher: the mean squared gradient of single examples; equal to the expected Hessian where the model is the truth."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from effkit.core.task import Batches, Task
from effkit.pruning import Fisher, Magnitude, scores
from effkit.pruning.scores import diagonal_fisher, saliency
from effkit.zoo.tasks import classification_loss
from tests.subjects import gpt, image_task, language_task, mlp


def task_of(x, y, size=3):
    data = Batches(x, y, size=size)
    return Task("toy", (x[:2],), data, data, data, data, classification_loss)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def check_equals_vmap(size=3):
    net, rng = small_net(), torch.Generator().manual_seed(1)
    x, y = torch.randn(10, 5, generator=rng, dtype=torch.float64), torch.randint(3, (10,), generator=rng)
    ours = diagonal_fisher(net, {"0": net[0], "2": net[2]}, task_of(x, y, size), examples=10)

    def loss(weights, one, label):
        return F.cross_entropy(functional_call(net, weights, (one[None],)), label[None])

    each = vmap(grad(loss), (None, 0, 0))(dict(net.named_parameters()), x, y)
    for path in ("0", "2"):
        wanted = each[f"{path}.weight"].square().mean(0)
        torch.testing.assert_close(ours[path].double(), wanted, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_equals_per_example_gradients_by_vmap(size):
    check_equals_vmap(size)


def test_only_so_many_examples_are_read():
    net, x = small_net(), torch.randn(10, 5, dtype=torch.float64)
    y = torch.zeros(10, dtype=torch.long)
    layers = {"0": net[0]}
    four = diagonal_fisher(net, layers, task_of(x, y), examples=4)["0"]
    assert torch.equal(four, diagonal_fisher(net, layers, task_of(x[:4], y[:4]), examples=99)["0"])


def test_fisher_is_the_expected_hessian_where_the_model_is_the_truth():
    """A softmax regression: labels drawn in exact proportion to the model's own probabilities, E[g^2] = diag E[H]."""
    net, rng = nn.Linear(4, 3, bias=False).double(), torch.Generator().manual_seed(2)
    x = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    p = net(x).softmax(-1).detach()

    def loss(w):
        return -(p * F.linear(x, w).log_softmax(-1)).sum(1).mean()

    hessian = torch.autograd.functional.hessian(loss, net.weight.detach()).reshape(12, 12).diagonal().reshape(3, 4)
    total = torch.zeros(3, 4, dtype=torch.float64)
    for label in range(3):  # E over y of g^2, by enumeration: one class at a time, weighted
        for i in range(6):
            one = task_of(x[i : i + 1], torch.tensor([label]))
            total += p[i, label] * diagonal_fisher(net, {"": net}, one, examples=1)[""] / 6
    torch.testing.assert_close(total, hessian, rtol=1e-5, atol=1e-8)


def check_predicts_the_loss():
    """At a minimum, taking out one weight costs about (1/2) F w^2: ranks agree with trying it."""
    torch.manual_seed(0)
    x = torch.randn(400, 4, dtype=torch.float64)
    net = nn.Linear(4, 3).double()
    with torch.no_grad():
        net.weight.mul_(torch.tensor([0.1, 0.4, 0.8, 1.6]))
    y = torch.multinomial(net(x).softmax(-1).detach(), 1).squeeze(1)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    guess = Fisher(examples=400).score(net, {"": net}, task_of(x, y, 50))[""].flatten().double()
    tried = []
    with torch.no_grad():
        base = F.cross_entropy(net(x), y)
        for i in range(12):
            w = net.weight.clone()
            w.view(-1)[i] = 0
            tried.append(F.cross_entropy(F.linear(x, w, net.bias), y) - base)
    ranks = torch.stack([guess.argsort().argsort(), torch.stack(tried).argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9
    small = torch.stack(tried) < 0.05  # where a quadratic is a good picture
    assert ((guess - torch.stack(tried)).abs()[small] < 0.02).all() and small.sum() >= 4


def test_predicts_what_the_loss_loses():
    check_predicts_the_loss()


def test_by_hand():
    """(1/2) F w^2: a large weight that hardly matters goes before a small one that does."""
    w, fisher = torch.tensor([2.0, 0.5]), torch.tensor([0.1, 4.0])
    assert saliency(w, fisher).tolist() == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize("build, task", [(mlp, image_task), (gpt, language_task)])
def test_frozen_and_masked_weights_have_scores(build, task):
    model = build()
    model.requires_grad_(False)
    result = Fisher(0.4, examples=4)(model, task())
    assert not any(p.requires_grad for p in result.parameters())
    again = Fisher(0.7, examples=4)(result, task())
    assert Magnitude().claim(again).value == pytest.approx(0.7, abs=2e-3)


def test_a_layer_that_is_never_reached_is_named():
    from effkit import log

    net = small_net()
    net.spare = nn.Linear(5, 5).double()
    net.forward = lambda x: net[2](net[1](net[0](x)))
    toy = task_of(torch.randn(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    assert "spare: scored 0" in repr(log(Fisher(0.5)(net, toy)))
    assert not Fisher().score(net, {"0": net[0], "spare": net.spare}, toy)["spare"].any()


def test_looks_in_evaluation_mode_whatever_the_callers_is():
    net, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train(), torch.randn(6, 5)
    toy = task_of(x, torch.zeros(6, dtype=torch.long))
    seen = diagonal_fisher(net, {"0": net[0]}, toy, examples=6)["0"]
    assert net.training and net[1].training
    assert torch.equal(seen, diagonal_fisher(net.eval(), {"0": net[0]}, toy, examples=6)["0"])


def test_works_for_a_caller_without_gradients():
    with torch.no_grad():
        check_equals_vmap()


def test_needs_calibration_data_and_a_loss():
    with pytest.raises(ValueError, match=r"task\.calib"):
        Fisher(0.5)(mlp(), Task())
    with pytest.raises(ValueError, match="examples"):
        Fisher(examples=0)


# Planted bugs.


def test_squaring_a_batchs_gradient_is_caught(monkeypatch):
    monkeypatch.setattr(scores, "singly", lambda task, n: iter(task.calib))
    with pytest.raises(AssertionError):
        check_equals_vmap()


@pytest.mark.parametrize("bug", [lambda w, f: 0.5 * f * w, lambda w, f: f * w.square()])
def test_another_saliency_is_caught(monkeypatch, bug):
    monkeypatch.setattr(scores, "saliency", bug)
    with pytest.raises(AssertionError):
        check_predicts_the_loss()
