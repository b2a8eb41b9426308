"""Masks: exactly as sparse as asked, what training cannot undo; oracle: torch.nn.utils.prune; the cubic schedule."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

from effkit import Pipeline, load, save
from effkit.core.surgery import bake
from effkit.core.training import Schedule, fit
from effkit.pruning import Filters, Fisher, Magnitude, masks
from effkit.pruning.magnitude import below
from effkit.pruning.masks import keep_largest, mask_of, threshold
from effkit.pruning.schedules import cubic, cutting_steps
from effkit.quantization import RTN
from tests.subjects import gpt, image_task, language_task, mlp, outputs, resnet

sparsities = st.floats(0, 1, exclude_max=True)


@st.composite
def scores(draw):
    """Few values, so that ties are everywhere, or many."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    return torch.randint(4, shape, generator=rng).float() if draw(st.booleans()) else torch.rand(shape, generator=rng)


def check_exactly_as_sparse(score, sparsity):
    keep = keep_largest(score, sparsity=sparsity)
    assert int((~keep).sum()) == round(sparsity * score.numel())
    if keep.any() and not keep.all():
        assert score[keep].min() >= score[~keep].max()


@given(scores(), sparsities)
def test_sparsity_is_exactly_what_was_asked(score, sparsity):
    check_exactly_as_sparse(score, sparsity)


@given(scores(), sparsities)
def test_the_threshold_cuts_where_the_ranking_does(score, sparsity):
    """Without ties P = {w : |w| < tau} is what goes; with ties it is a part of it."""
    goes = ~keep_largest(score, sparsity=sparsity)
    cut = below(score, threshold(score, sparsity=sparsity))
    assert not (cut & ~goes).any() or goes.all()
    if score.unique().numel() == score.numel() and not goes.all():
        assert torch.equal(cut, goes)


@settings(max_examples=30)
@given(st.lists(scores(), min_size=1, max_size=4), sparsities, st.integers(0, 1))
def test_global_is_exact_over_all_and_spares_the_best(parts, sparsity, least):
    named = {str(i): s for i, s in enumerate(parts)}
    keep = masks.choose(named, sparsity=sparsity, scope="global", least=least)
    total = sum(s.numel() for s in parts)
    assert sum(int((~k).sum()) for k in keep.values()) == min(round(sparsity * total), total - least * len(parts))
    assert all(int(k.sum()) >= least for k in keep.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("build, task", [(mlp, image_task), (resnet, image_task), (gpt, language_task)])
def test_models_are_exactly_as_sparse(build, task, scope, dtype):
    model = build().to(dtype)
    result = Magnitude(0.37, scope=scope)(model, task())
    layers = [m for m in result.modules() if mask_of(m) is not None]
    zeros, total = sum(int((m.weight == 0).sum()) for m in layers), sum(m.weight.numel() for m in layers)
    if scope == "global":
        assert zeros == round(0.37 * total)
    assert all(int((m.weight == 0).sum()) == round(0.37 * m.weight.numel()) for m in layers if scope == "layer")
    assert Magnitude().claim(result).value == zeros / total


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_equals_torch_prune(scope):
    model, twin = mlp(), mlp()
    result = Magnitude(0.6, scope=scope)(model, image_task())
    weights = [(layer, "weight") for layer in twin.layers]
    if scope == "global":
        prune.global_unstructured(weights, prune.L1Unstructured, amount=0.6)
    else:
        for layer, name in weights:
            prune.l1_unstructured(layer, name, amount=0.6)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(result.layers, twin.layers, strict=True))


def test_by_hand():
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.1, 2.0], [-0.7, 0.2, 0.1]]))
    assert torch.equal(Magnitude(0.5)(layer).weight, torch.tensor([[0.5, 0, 2.0], [-0.7, 0, 0]]))
    assert Magnitude(tau=0.5)(layer).weight.ne(0).tolist() == [[True, False, True], [True, False, False]], (
        "0.5 is not below 0.5"
    )


@pytest.mark.parametrize(
    "technique", [Magnitude(0.8), Fisher(0.8), Magnitude(0.8, epochs=2), Magnitude(0.8, schedule="cubic", epochs=3)]
)
def test_a_mask_survives_training_file_and_copy(technique, tmp_path):
    task = image_task()
    result = technique(mlp(), task)
    assert technique.claim(result).value == pytest.approx(0.8, abs=1e-3)
    before = [layer.weight == 0 for layer in result.layers]
    fit(result, task, Schedule(steps=4, lr=1e-1, weight_decay=0.1))
    save(result, tmp_path / "m.safetensors")
    for model in (copy.deepcopy(result), load(tmp_path / "m.safetensors"), result):
        assert all(torch.equal(layer.weight == 0, zero) for layer, zero in zip(model.layers, before, strict=True))
        assert torch.equal(outputs(model, task), outputs(result, task))
        fit(model, task, Schedule(steps=1, lr=1e-1))
        assert technique.claim(model).value == technique.claim(result).value


def test_zeros_without_a_mask_do_not_survive():
    """The reason for the parametrization."""
    task = image_task()
    model = bake(Magnitude(0.8)(mlp(), task).layers[0])
    assert (model.weight == 0).float().mean() == pytest.approx(0.8, abs=1e-3)
    net = mlp()
    net.layers[0] = model
    fit(net, task, Schedule(steps=2, lr=1e-2))
    assert (net.layers[0].weight == 0).float().mean() < 0.5


def test_pruning_on_goes_on_from_what_is_gone():
    task = image_task()
    once = Magnitude(0.5)(mlp(), task)
    twice = Magnitude(0.8)(once, task)
    assert Magnitude().claim(twice).value == pytest.approx(0.8, abs=1e-3)
    assert all((b.weight == 0)[a.weight == 0].all() for a, b in zip(once.layers, twice.layers, strict=True))
    assert all(len(layer.parametrizations["weight"]) == 1 for layer in twice.layers)
    less = Magnitude(0.3)(once, task)
    assert Magnitude().claim(less).value == Magnitude().claim(once).value, "nothing grows back"


def test_a_mask_composes_with_weight_norm():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    result = Magnitude(0.5)(layer)
    assert (result.weight == 0).sum() == 12 and parametrize.is_parametrized(result, "weight")


def test_rounding_a_masked_model_leaves_the_masked_one_alone():
    """Copies of a parametrized layer share a class; baking one must not take the mask from the other."""
    task = image_task()
    masked = Magnitude(0.5)(mlp(), task)
    before = outputs(masked, task)
    for technique in (RTN(8), Magnitude(0.6)):
        technique(masked, task)
        bake(copy.deepcopy(masked).layers[0])
        assert torch.equal(outputs(masked, task), before) and mask_of(masked.layers[0]) is not None


def test_a_masked_weight_gets_no_gradient():
    result = Magnitude(0.5)(mlp(), image_task())
    outputs_ = result(image_task().example[0])
    outputs_.sum().backward()
    for layer in result.layers:
        assert (layer.parametrizations["weight"].original.grad[~mask_of(layer).keep] == 0).all()


def test_cubic_equals_the_paper_by_hand():
    """Half of the way leaves an eighth of the distance."""
    assert cubic(0, steps=10, final=0.8) == 0
    assert cubic(5, steps=10, final=0.8) == pytest.approx(0.8 - 0.8 / 8)
    assert cubic(10, steps=10, final=0.8) == cubic(99, steps=10, final=0.8) == 0.8
    assert cubic(5, steps=10, final=0.8, initial=0.4) == pytest.approx(0.8 - 0.4 / 8)


@given(st.integers(1, 3000))
def test_the_last_cut_ends_the_ramp(total):
    ramp, cuts = cutting_steps(total)
    assert max(cuts) == ramp <= total and min(cuts) >= 1 and len(cuts) <= 40


def test_sparsity_grows_while_training(monkeypatch):
    seen = []
    honest = Magnitude._mask
    monkeypatch.setattr(
        Magnitude,
        "_mask",
        lambda self, model, *rest: (honest(self, model, *rest), seen.append(self.claim(model).value)),
    )
    Magnitude(0.9, schedule="cubic", epochs=4)(mlp(), image_task())
    assert seen == sorted(seen) and len(set(seen)) > 4 and seen[-1] == pytest.approx(0.9, abs=1e-3)
    assert seen[len(seen) // 2] > 0.45, "most of it goes early"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"pattern": "rows"}, "weights"),
        ({"scope": "net"}, "global"),
        ({"schedule": "cubic"}, "epochs must be 1 or more"),
        ({"schedule": "cubic", "epochs": 1, "pattern": "channels"}, "one-shot"),
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"tau": -1.0}, "tau"),
        ({"tau": 1.0, "pattern": "channels"}, "give a sparsity"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Magnitude(**settings)


def test_an_impossible_order_is_refused_at_once():
    with pytest.raises(ValueError, match="put Filters first"):
        Pipeline((Magnitude(0.5), Filters(0.5)))
    Pipeline((Filters(0.5), Magnitude(0.5)))


# Planted bugs.


def test_a_threshold_that_cuts_ties_is_caught(monkeypatch):
    monkeypatch.setattr(masks, "without_smallest", lambda s, n: s >= s.flatten().kthvalue(max(1, n)).values)
    with pytest.raises(AssertionError):
        check_exactly_as_sparse(torch.ones(4), 0.5)


def test_a_mask_that_is_only_written_once_is_caught(monkeypatch, tmp_path):
    monkeypatch.setattr(masks.Mask, "forward", lambda self, w: w)
    with pytest.raises(AssertionError):
        test_a_mask_survives_training_file_and_copy(Magnitude(0.8), tmp_path)
