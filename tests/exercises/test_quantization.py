"""The answers of chapter 01's exercises are the library's own mathematics."""

import pytest
import torch

from effkit.exercises import quantization as asked
from effkit.quantization import mixed
from effkit.quantization.gptq import feed_back, inverse_factor
from effkit.quantization.lsq import LearnedStep
from effkit.quantization.observers import min_max


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_has_four_mistakes_or_more_that_are_refused():
    assert {"quantization.affine", "quantization.range", "quantization.feedback", "quantization.step_gradient", "quantization.budget"} <= {
        one.name for one in asked.EXERCISES
    }
    assert all(len(one.wrong) >= 4 for one in asked.EXERCISES)


def test_the_answer_to_one_column_column_after_column_is_gptq():
    w, x = drawn(5, 7, seed=1), drawn(7, 60, seed=2)
    x = x + drawn(1, 60, seed=3)
    factor = inverse_factor(x @ x.T, damping=0.01).float()
    scale, zero = (part.expand_as(w) for part in min_max(w, bits=3))
    codes, moved = feed_back(w, factor, scale, zero, bits=3), w
    for i in range(7):
        on_grid = scale[:, i] * ((moved[:, i] / scale[:, i]).round() + zero[:, i]).clamp(0, 7) - scale[:, i] * zero[:, i]
        moved = asked.pass_on(moved, on_grid, factor, column=i)
    torch.testing.assert_close(moved, scale * (codes - zero), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_step_s_gradient_is_what_training_sees(bits):
    v, upstream = 4 * drawn(6, 11, seed=bits), drawn(6, 11, seed=bits + 9)
    rounding = LearnedStep(v.abs().mean().reshape(1, 1), v.numel(), bits=bits, signed=True)
    (rounding(v) * upstream).sum().backward()
    step = rounding.grid()[0].item()
    ours = asked.step_gradient(v, upstream, step=step, bits=bits) * rounding.first
    torch.testing.assert_close(rounding.share.grad, ours.reshape(1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_widths_are_the_knapsacks(seed):
    for given in list(asked.budgets(torch.Generator().manual_seed(seed))):
        (sizes, losses), widths, budget = given.args, given.settings["widths"], given.settings["budget"]
        chosen = asked.choose_bits(sizes, losses, widths=widths, budget=budget)
        best = mixed.exact(losses, sizes, budget)
        lost = [sum(row[i] for row, i in zip(losses, choice, strict=True)) for choice in (map(widths.index, chosen), best)]
        assert lost[0] == pytest.approx(lost[1])


def test_clipping_pays_ever_less_with_more_bits():
    """What the exercise says once it is passed."""
    w, parts = drawn(400, seed=0), tuple(i / 20 for i in range(20, 0, -1))
    kept = [asked.least_error_scale(w, bits=b, parts=parts) * (2 ** (b - 1) - 1) / w.abs().max().item() for b in (2, 3, 4, 8)]
    assert kept == sorted(kept) and kept[0] == pytest.approx(0.3) and kept[-1] == 1
