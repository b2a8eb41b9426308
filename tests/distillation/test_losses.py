"""The losses: laws of the divergence, Hinton's gradients, and two oracles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from effkit.distillation.losses import composite, forward_kl, reverse_kl, soft_loss, soften

temperatures = st.sampled_from((0.5, 1.0, 2.5, 4.0, 20.0))


def logits(seed: int, *shape: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(*shape, generator=rng, dtype=dtype) for _ in range(2))


@given(st.integers(0, 99), st.integers(2, 9), temperatures)
@settings(max_examples=30)
def test_both_divergences_are_zero_for_a_copy_and_positive_elsewhere(seed, classes, temperature):
    student, teacher = logits(seed, 4, classes)
    for divergence in (forward_kl, reverse_kl):
        assert_close(divergence(teacher, teacher, temperature=temperature), torch.zeros(4, dtype=torch.float64))
        shifted = divergence(teacher + 7, teacher, temperature=temperature)  # the same probabilities
        assert_close(shifted, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
        assert (divergence(student, teacher, temperature=temperature) > 0).all()
    assert_close(forward_kl(student, teacher), reverse_kl(teacher, student))


def by_hand(z, v, temperature):
    """T^2 KL of one example in plain Python, from the definitions."""
    p = [math.exp(x / temperature) for x in v]
    q = [math.exp(x / temperature) for x in z]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(st.integers(0, 99), temperatures)
@settings(max_examples=20)
def test_equals_the_definition_by_hand(seed, temperature):
    student, teacher = logits(seed, 3, 5)
    wanted = sum(by_hand(z, v, temperature) for z, v in zip(student.tolist(), teacher.tolist(), strict=True)) / 3
    assert soft_loss(student, teacher, temperature=temperature).item() == pytest.approx(wanted, rel=1e-12)


@given(st.integers(0, 99), temperatures)
@settings(max_examples=20)
def test_equals_torch(seed, temperature):
    student, teacher = logits(seed, 6, 5, dtype=torch.float32)
    mean = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    wanted = mean((student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)) * temperature**2
    assert_close(soft_loss(student, teacher, temperature=temperature), wanted, rtol=1e-4, atol=1e-6)


def test_every_token_counts_once():
    student, teacher = logits(0, 2, 7, 5)
    rows = soft_loss(student.flatten(0, 1), teacher.flatten(0, 1), temperature=2.0)
    assert_close(soft_loss(student, teacher, temperature=2.0), rows)


def gradient(student, teacher, temperature):
    student = student.clone().requires_grad_()
    soft_loss(student, teacher, temperature=temperature).backward()
    return student.grad


@pytest.mark.parametrize("temperature", (1.0, 4.0, 100.0))
def test_the_gradient_is_hintons_second_equation(temperature):
    """dC/dz_i = (q_i - p_i) / T for the unscaled loss; ours carries T^2."""
    student, teacher = logits(1, 1, 6)
    q, p = soften(student, temperature).exp(), soften(teacher, temperature).exp()
    assert_close(gradient(student, teacher, temperature), temperature * (q - p))


def centred(x):
    return x - x.mean(-1, keepdim=True)


def test_hot_gradients_match_logits():
    """Hinton's eq. 4: (z_i - v_i) / N about their means as T grows, off by O(1 / T)."""
    student, teacher = logits(2, 1, 6)
    limit = (centred(student) - centred(teacher)) / 6
    errors = [(gradient(student, teacher, t) - limit).abs().max().item() for t in (1e2, 1e3, 1e4)]
    assert errors[0] < 0.1 and errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.1)


def test_without_t_squared_the_teacher_fades_and_the_law_notices(monkeypatch):
    """Planted: the factor T^2 is missing."""
    unscaled = lambda z, v, *, temperature: forward_kl(z, v, temperature=temperature).mean()  # noqa: E731
    monkeypatch.setitem(globals(), "soft_loss", unscaled)
    for law in (test_hot_gradients_match_logits, lambda: test_the_gradient_is_hintons_second_equation(4.0)):
        with pytest.raises(AssertionError):
            law()


def test_forward_covers_and_reverse_settles():
    """Two modes and one bump to fit them with: forward KL puts it between, reverse KL on one of them."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    two = torch.logaddexp(-((x - 3) ** 2), -((x + 3) ** 2) - 0.1)
    means = torch.linspace(-4, 4, 81, dtype=torch.float64)
    bump = -((x - means[:, None]) ** 2) / 2
    covering = means[forward_kl(bump, two).argmin()].item()
    settling = means[reverse_kl(bump, two).argmin()].item()
    assert abs(covering) < 0.5 and settling == pytest.approx(3, abs=0.3)


def test_swapped_arguments_are_caught(monkeypatch):
    """Planted: forward and reverse exchanged."""
    monkeypatch.setitem(globals(), "forward_kl", reverse_kl)
    with pytest.raises(AssertionError):
        test_forward_covers_and_reverse_settles()


def test_the_mixture_has_its_ends():
    hard, soft = torch.tensor(2.0), torch.tensor(5.0)
    assert composite(hard, soft, alpha=1) == hard and composite(hard, soft, alpha=0) == soft
    assert composite(hard, soft, alpha=0.25) == 0.25 * 2 + 0.75 * 5


def test_half_precision_is_computed_in_float32():
    student, teacher = (x.to(torch.bfloat16) for x in logits(3, 4, 9, dtype=torch.float32))
    got = soft_loss(student, teacher, temperature=4.0)
    assert got.dtype == torch.float32
    assert_close(got, soft_loss(student.float(), teacher.float(), temperature=4.0))
