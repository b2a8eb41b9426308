"""A fresh model: of the class and numbers asked for, untrained, the same for the same seed."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from effkit import catalog, load, save
from effkit.core import recipe
from effkit.zoo import build
from effkit.zoo.build import Fresh
from effkit.zoo.gpt import GPT
from effkit.zoo.vision import MLP


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def test_numbers_that_change_are_changed_and_the_others_stay():
    teacher = GPT(vocab_size=64, d_model=32, layers=2, heads=4, kv_heads=2, d_ff=64, context=48).eval()
    student = Fresh(numbers=(("layers", 1), ("d_ff", 40)))(teacher)
    assert student.config.layers == 1 and student.blocks[0].ff.up.out_features == 40
    assert (student.config.vocab_size, student.config.context) == (64, 48)
    assert not student.training


def test_another_class_takes_its_own_numbers(tmp_path):
    student = Fresh("MLP", (("widths", (784, 30, 10)),), seed=3)(GPT(vocab_size=8, d_model=8, heads=2, kv_heads=1))
    assert student.widths == (784, 30, 10)
    save(student, tmp_path / "student")
    assert same(load(tmp_path / "student"), student)


def test_the_seed_decides_and_nothing_else_does():
    teacher = MLP((6, 5, 4))
    first = Fresh(seed=1)(teacher)
    torch.rand(7)
    assert same(Fresh(seed=1)(teacher), first) and not same(Fresh(seed=2)(teacher), first)
    assert not same(first, teacher)


def test_a_seed_that_is_forgotten_is_caught(monkeypatch):
    monkeypatch.setattr(build.torch, "manual_seed", lambda seed: None)
    with pytest.raises(AssertionError):
        test_the_seed_decides_and_nothing_else_does()


def test_the_global_random_state_is_kept():
    teacher, foreign = MLP((6, 5, 4)), nn.Sequential(nn.Linear(3, 2))
    state = torch.get_rng_state()
    Fresh().rewrite_(teacher, None)
    Fresh().rewrite_(foreign, None)
    assert torch.equal(state, torch.get_rng_state())


def test_a_foreign_model_draws_its_own_weights_again():
    teacher = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(torch.bfloat16)
    teacher[1].running_mean.fill_(3)
    student = Fresh(seed=5)(teacher)
    assert not torch.equal(student[0].weight, teacher[0].weight) and student[1].running_mean.sum() == 0
    assert student[2].weight.dtype == torch.bfloat16


def test_masks_are_not_inherited():
    class Zero(nn.Module):
        def forward(self, w):
            return 0 * w

    for teacher in (nn.Sequential(nn.Linear(6, 5)), nn.Linear(6, 5)):
        layer = teacher if isinstance(teacher, nn.Linear) else teacher[0]
        parametrize.register_parametrization(layer, "weight", Zero())
        student = Fresh()(teacher)
        assert not any(parametrize.is_parametrized(m) for m in student.modules())
        assert all(p.any() for p in student.parameters())


def test_recipes_round_trip():
    fresh = Fresh("MLP", (("widths", (784, 30, 10)),), seed=3)
    data = json.loads(json.dumps(recipe.to_json(fresh)))
    assert recipe.from_json(data, catalog.techniques()) == fresh


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fresh("Perceptron"), "kind must be one of"),
        (lambda: Fresh(numbers=("layers", 2)), "pairs of name and value"),
        (lambda: Fresh(seed=-1), "seed must be"),
        (lambda: Fresh("MLP", (("depth", 2),))(nn.Linear(2, 2)), "no MLP can be built"),
        (lambda: Fresh(numbers=(("layers", 2),))(nn.Sequential(nn.Linear(2, 2))), "name a kind"),
        (
            lambda: Fresh()(nn.Sequential(nn.ParameterList([nn.Parameter(torch.ones(2))]))),
            "which 0 .ParameterList. lacks",
        ),
        (lambda: Fresh()(nn.Sequential(Packed())), "packed weights"),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Packed(nn.Module):
    in_features, out_features = 2, 2

    def dense_weight(self):
        return torch.zeros(2, 2)
