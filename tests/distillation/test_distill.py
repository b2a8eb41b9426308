"""Distill: teacher in, student out, for classifiers and language models."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from effkit import load, log, save
from effkit.core.generation import Sampler
from effkit.core.surgery import swap
from effkit.core.task import Batches, Task
from effkit.core.technique import Paper, Pipeline, Technique
from effkit.core.training import Schedule, fit
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.distillation import Distill, distill
from effkit.distillation.losses import forward_kl, reverse_kl
from effkit.zoo.build import Fresh
from effkit.zoo.data import Windows
from effkit.zoo.gpt import GPT
from effkit.zoo.vision import MLP, ResNet

STUDENT = Fresh("MLP", (("widths", (12, 6, 3)),), seed=4)


def images(n=96, seed=0, labels=True):
    """Three overlapping clouds, so that a teacher has something to doubt."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=rng)
    x = torch.randn(n, 12, generator=rng) + 1.5 * F.one_hot(y, 12).float()
    loss = (lambda out, batch: F.cross_entropy(out, batch[1])) if labels else None
    return Task("clouds", train=Batches(x, y, size=16, shuffle=True), loss=loss)


def trained_mlp(widths=(12, 24, 3), epochs=20):
    torch.manual_seed(0)
    model = MLP(widths)
    fit(model, images(), Schedule(epochs * 6, 1e-2))
    return model.eval()


@pytest.fixture(scope="module")
def teacher():
    return trained_mlp()


def tokens(vocab=16):
    ids = torch.randint(vocab, (900,), generator=torch.Generator().manual_seed(1)).cumsum(0) % vocab
    loss = lambda out, batch: F.cross_entropy(out.flatten(0, 1), batch[1].flatten())  # noqa: E731
    return Task("tokens", train=Windows(ids, length=12, size=8, shuffle=True), loss=loss)


def gpt(**changes):
    return GPT(**dict(vocab_size=16, d_model=16, layers=2, heads=2, kv_heads=1, d_ff=24, context=32) | changes).eval()


def doubts(student, teacher, task):
    """How far the student's probabilities are from the teacher's, nats."""
    with torch.no_grad():
        x = task.train.at(0)[0]
        return forward_kl(student(x), teacher(x)).mean().item()


def test_alpha_one_is_plain_training_step_by_step(teacher):
    task = images()
    plain = STUDENT(teacher, task)
    fit(plain, task, Schedule(3 * len(task.train), 1e-2))
    distilled = Distill(STUDENT, alpha=1.0, epochs=3, lr=1e-2)(teacher, task)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in distilled.state_dict().items())


def test_a_teacher_that_still_speaks_at_alpha_one_is_caught(monkeypatch, teacher):
    """Planted: the weights of the mixture exchanged."""
    original = distill.distillation_loss
    swapped = lambda *args, alpha, **rest: original(*args, alpha=1 - alpha, **rest)  # noqa: E731
    monkeypatch.setattr(distill, "distillation_loss", swapped)
    with pytest.raises(AssertionError):
        test_alpha_one_is_plain_training_step_by_step(teacher)


def test_the_mixture_weighs_labels_by_alpha_and_the_teacher_by_the_rest(teacher):
    student, task = STUDENT(teacher), images()
    x, y = batch = task.train.at(0)
    z, v = student(x), teacher(x)
    p, q = (v / 3).softmax(1), (z / 3).softmax(1)
    wanted = 0.2 * F.cross_entropy(z, y) + 0.8 * 9 * (p * (p / q).log()).sum(1).mean()
    loss = distill.distillation_loss(teacher, task, alpha=0.2, temperature=3.0, divergence="forward")
    torch.testing.assert_close(loss(student, batch), wanted, rtol=1e-4, atol=1e-5)


def test_alpha_zero_needs_no_labels_and_ends_near_the_teacher(teacher):
    unlabelled = images(labels=False)
    student = Distill(STUDENT, alpha=0.0, temperature=2.0, epochs=60, lr=2e-2)(teacher, unlabelled)
    before = doubts(STUDENT(teacher), teacher, unlabelled)
    assert doubts(student, teacher, unlabelled) < 0.1 * before


def test_a_copy_has_nothing_to_learn_from_its_teacher(teacher):
    student, task = copy.deepcopy(teacher), images(labels=False)
    loss = distill.distillation_loss(teacher, task, alpha=0.0, temperature=4.0, divergence="forward")
    value = loss(student, task.train.at(0))
    value.backward()
    assert abs(value.item()) < 1e-5
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-5
    assert doubts(Distill(alpha=0.0)(teacher, task), teacher, task) < 1e-5


def test_t_squared_keeps_the_teacher_as_loud_at_every_temperature(teacher):
    """Gradients of the whole loss at T = 1 and 20 are of one size; without the factor they would be 400 to one."""
    norms = []
    for temperature in (4.0, 20.0):
        student, task = STUDENT(teacher), images()
        loss = distill.distillation_loss(teacher, task, alpha=0.0, temperature=temperature, divergence="forward")
        loss(student, task.train.at(0)).backward()
        norms.append(torch.cat([p.grad.flatten() for p in student.parameters()]).norm().item())
    assert 0.5 < norms[1] / norms[0] < 2


def test_a_missing_t_squared_is_caught(monkeypatch, teacher):
    def faded(z, v, *, temperature, divergence):
        return divergence(z, v, temperature=temperature).mean()

    monkeypatch.setattr(distill, "soft_loss", faded)
    with pytest.raises(AssertionError):
        test_t_squared_keeps_the_teacher_as_loud_at_every_temperature(teacher)


def test_the_teacher_is_unchanged_and_runs_in_eval_mode():
    torch.manual_seed(0)
    teacher, task = ResNet((4,), blocks=1, classes=3).train(), images()
    task = replace(task, train=Batches(torch.rand(32, 1, 8, 8), task.train.targets[:32], size=8))
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    modes, seen = [], []
    teacher.norm.register_forward_hook(lambda m, *_: seen.append((m.training, m.weight.requires_grad)))
    student = Distill(Fresh(), alpha=0.5)(teacher, task)
    modes = [m.training for m in (teacher, teacher.norm, student, student.norm)]
    assert modes == [True] * 4
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert seen and not any(training for training, _ in seen), "the teacher's BatchNorm saw training batches"
    assert student.norm.num_batches_tracked == 4


def test_language_models_learn_every_token():
    teacher, task = gpt(), tokens()
    student = Fresh(numbers=(("layers", 1),), seed=1)
    distilled = Distill(student, alpha=0.0, temperature=1.0, epochs=4, lr=1e-2)(teacher, task)
    assert len(distilled.blocks) == 1
    assert doubts(distilled, teacher, task) < 0.5 * doubts(student(teacher), teacher, task)
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert distilled.generate(ids, 4, sampler=Sampler(temperature=0.0)).shape == (1, 7)


def test_reverse_kl_trains_too(teacher):
    task = images(labels=False)
    student = Distill(STUDENT, alpha=0.0, divergence="reverse", temperature=1.0, epochs=30, lr=2e-2)(teacher, task)
    assert doubts(student, teacher, task) < 0.2 * doubts(STUDENT(teacher), teacher, task)


class Keep(nn.Module):
    """A mask as pruning would leave it."""

    def __init__(self, keep):
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, w):
        return w * self.keep


@dataclass(frozen=True)
class Half(Technique):
    """Masks every other weight."""

    paper = Paper("nobody", 2000, "a test", "")

    def rewrite_(self, model, task):
        for layer in model.layers:
            keep = torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 2 == 0
            parametrize.register_parametrization(layer, "weight", Keep(keep))
        return model


@dataclass(frozen=True)
class Packed(Technique):
    """Turns weights into buffers, as quantization does."""

    layers: str = "*"
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("nobody", 2000, "a test", "")

    def rewrite_(self, model, task):
        return swap(model, nn.Linear, PackedLinear, layers=self.layers)


class PackedLinear(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", layer.weight.detach().half())
        self.bias = layer.bias

    def dense_weight(self):
        return self.codes.float()

    def forward(self, x):
        return F.linear(x, self.dense_weight(), self.bias)


def test_masks_survive(teacher):
    student = Distill(Half(), epochs=2, lr=1e-2)(teacher, images())
    for layer, old in zip(student.layers, teacher.layers, strict=True):
        flat, was = layer.weight.detach().flatten(), old.weight.detach().flatten()
        assert not flat[1::2].any() and flat[::2].all() and not torch.equal(flat[::2], was[::2])


def test_packed_and_frozen_students_are_refused(teacher):
    with pytest.raises(ValueError, match="cannot be trained, its weights are packed or frozen; distil first"):
        Distill(Packed())(teacher, images())
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze the teacher"):
        Distill()(frozen, images())
    partly = Distill(Packed(layers="layers.0"))(teacher, images())
    assert torch.equal(partly.layers[0].codes, teacher.layers[0].weight.half())
    assert not torch.equal(partly.layers[1].weight, teacher.layers[1].weight)


def test_traits_are_those_of_the_students_technique():
    assert Distill(Packed()).breaks == {FLOAT_WEIGHTS} and Distill().breaks == frozenset()
    assert FLOAT_WEIGHTS in Distill(Fresh()).gives
    Pipeline((Packed(), Distill(Fresh())))


def test_the_seed_changes_the_order_of_batches_and_dropout(teacher):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    first, again, other = (Distill(seed=seed, lr=1e-2)(model, images()) for seed in (0, 0, 1))
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)


def test_the_tasks_seed_orders_the_batches_and_ours_drops_units():
    torch.manual_seed(0)
    model, task = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 3)), images()
    batches = [replace(task.train, seed=1), replace(task.train, shuffle=False)]
    first, reordered, fixed = (Distill(lr=1e-2)(model, replace(task, train=b))[0].weight for b in (task.train, *batches))
    assert not torch.equal(first, reordered)
    assert not torch.equal(fixed, Distill(lr=1e-2, seed=1)(model, replace(task, train=batches[1]))[0].weight)


@pytest.mark.parametrize("name, divergence", [("forward", forward_kl), ("reverse", reverse_kl)])
def test_the_divergence_that_is_named_is_the_one_that_counts(name, divergence, teacher):
    student, batch = STUDENT(teacher), images().train.at(0)
    loss = distill.distillation_loss(teacher, images(), alpha=0.0, temperature=1.0, divergence=name)
    torch.testing.assert_close(loss(student, batch), divergence(student(batch[0]), teacher(batch[0])).mean())


def test_the_student_opens_without_its_teacher(tmp_path, teacher):
    student = Distill(STUDENT)(teacher, images())
    save(student, tmp_path / "student")
    opened = load(tmp_path / "student")
    x = torch.randn(5, 12)
    assert torch.equal(opened(x), student(x)) and all(p.grad is None for p in student.parameters())
    assert "teacher's logits" in str(log(student)) and Distill(STUDENT).claim(student).value == 12 * 6 + 6 + 6 * 3 + 3


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Distill("MLP"), "student must be a technique"),
        (lambda: Distill(alpha=1.5), "alpha must be"),
        (lambda: Distill(temperature=0.0), "temperature must be"),
        (lambda: Distill(temperature=-1.0), "temperature must be"),
        (lambda: Distill(epochs=0), "epochs must be"),
        (lambda: Distill(lr=0.0), "lr must be"),
        (lambda: Distill(divergence="sideways"), "divergence must be"),
        (lambda: Distill()(MLP((12, 3))), "task.train, loss"),
        (lambda: Distill(alpha=0.5)(MLP((12, 3)), images(labels=False)), "task.loss"),
        (lambda: Distill(alpha=0.0)(MLP((12, 3)), replace(images(), train=images().train.first(0))), "task.train"),
        (lambda: Distill(Fresh("MLP", (("widths", (12, 4)),)))(MLP((12, 3)), images()), "logits have shape"),
        (lambda: Distill()(Pair(), images()), "returns tuple; wrap it"),
    ],
)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        return self.out(x), x


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_outside_is_refused_with_the_way_out(alpha):
    with pytest.raises(ValueError, match=r"alpha must be a number in \[0.0, 1.0\], got .*: the labels' share of the loss"):
        Distill(alpha=alpha)
