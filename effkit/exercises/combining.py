"""Exercises of chapter 10: one error for every technique, and what two of them do to each other."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def layer_error(weight: Tensor, approximate: Tensor, gram: Tensor) -> float:
    """The squared error of a layer's outputs, summed over all inputs that went into gram = sum_t x_t x_t^T."""
    off = weight - approximate
    return ((off @ gram) * off).sum().item()


def layers(rng: torch.Generator):
    """First by hand: one output, two inputs that always come together; then layers and inputs drawn afresh."""
    yield case(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 1.5]]), torch.ones(2, 2))
    yield case(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.ones(2, 2))
    for outputs, inputs, tokens in ((1, 3, 5), (4, 3, 2), (5, 6, 40)):
        weight, approximate = (torch.randn(outputs, inputs, generator=rng) for _ in range(2))
        x = torch.randn(tokens, inputs, generator=rng) + 1  # correlated: all channels share their mean
        yield case(weight, approximate, x.T @ x)


def not_negative(error, given):
    return None if error >= -1e-4 else (error, "at least 0: it is a sum of squares")


def ignores_the_inputs(weight, approximate, gram):
    return (weight - approximate).square().sum().item()


def knows_only_the_diagonal(weight, approximate, gram):
    return ((weight - approximate).square() * gram.diagonal()).sum().item()


def forgets_the_square(weight, approximate, gram):
    return ((weight - approximate) @ gram).sum().item()


def squares_after_the_product(weight, approximate, gram):
    return ((weight - approximate) @ gram).square().sum().item()


def layer_error_by_heart(weight, approximate, gram):
    return 0.0


LAYER_ERROR = Exercise(
    name="combining.layer_error",
    prompt="""**One error for all.** A layer multiplies inputs x by `weight`, W, of shape (outputs, inputs); a technique
has put `approximate`, W_hat, in its place. `gram` is the sum of x x^T over all inputs seen, of shape (inputs, inputs).
Write `layer_error(weight, approximate, gram)`: the sum over all inputs of ||(W - W_hat) x||^2, a number. The inputs
themselves are gone; you don't need them.""",
    reference=layer_error,
    checks=(
        checks.not_the_librarys_own("layer_error"),
        checks.same_shape_and_dtype(layers),
        checks.holds("a sum of squares", layers, not_negative),
        checks.equals_reference(layers, rtol=1e-3, atol=1e-4),
        checks.input_unchanged(layers),
    ),
    hints=(
        "||D x||^2 = x^T D^T D x is a number, hence its own trace, and a trace lets you move x to the other side.",
        "With D = W - W_hat the sum is tr(D G D^T): one row of D at a time, d G d^T.",
        "`off = weight - approximate`; then `((off @ gram) * off).sum().item()`.",
    ),
    after="Quantizing, pruning and factorizing all make this number small; they differ only in which W_hat they allow.",
    wrong=(
        (ignores_the_inputs, "the right numbers"),
        (knows_only_the_diagonal, "the right numbers"),
        (forgets_the_square, "a sum of squares"),
        (squares_after_the_product, "the right numbers"),
        (layer_error_by_heart, "the right numbers"),
    ),
)


def interaction(unchanged: float, first: float, second: float, both: float) -> float:
    """What two techniques cost together beyond the sum of what each costs alone; all four are losses."""
    return (both - unchanged) - (first - unchanged) - (second - unchanged)


def losses(rng: torch.Generator):
    """First by hand; then four losses drawn afresh."""
    yield case(1.0, 1.1, 1.3, 1.9)
    for _ in range(4):
        yield case(*(1 + torch.rand(4, generator=rng)).tolist())


def forgets_the_unchanged_model(unchanged, first, second, both):
    return both - first - second


def subtracts_it_once(unchanged, first, second, both):
    return both - unchanged - first - second


def compares_with_the_worse(unchanged, first, second, both):
    return both - max(first, second)


def a_ratio_instead(unchanged, first, second, both):
    return (both - unchanged) / (first + second - 2 * unchanged)


def interaction_by_heart(unchanged, first, second, both):
    return 0.5


INTERACTION = Exercise(
    name="combining.interaction",
    prompt="""**Together and apart.** Four losses of one model: `unchanged`, after the `first` technique alone, after
the `second` alone, and after `both` in this order. Write `interaction(unchanged, first, second, both)`: how much more
`both` adds to the loss than the two add one by one. Zero says that they don't know of each other.""",
    reference=interaction,
    checks=(
        checks.not_the_librarys_own("Pair"),
        checks.same_shape_and_dtype(losses),
        checks.equals_reference(losses, rtol=1e-4, atol=1e-5),
    ),
    hints=(
        "Costs add, losses don't: a loss contains the unchanged model's own, and that once only.",
        "d(A) = loss after A - unchanged. The interaction is d(A, B) - d(A) - d(B).",
        "`(both - unchanged) - (first - unchanged) - (second - unchanged)`, or `both - first - second + unchanged`.",
    ),
    after="With 1.0, 1.1, 1.3 and 1.9 it is 0.5: together they cost more than twice what they cost one by one.",
    wrong=(
        (forgets_the_unchanged_model, "the right numbers"),
        (subtracts_it_once, "the right numbers"),
        (compares_with_the_worse, "the right numbers"),
        (a_ratio_instead, "the right numbers"),
        (interaction_by_heart, "the right numbers"),
    ),
)

EXERCISES = (LAYER_ERROR, INTERACTION)
