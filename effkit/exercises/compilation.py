"""Exercises of chapter 05: a normalization that disappears, memory that must be there, and code that nobody needs."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def absorb(w: Tensor, b: Tensor, *, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out) of the linear layer that does both: w x + b, then the normalization."""
    scale = gamma / var.sqrt()
    return w * scale[:, None], (b - mean) * scale + beta


def layers(rng: torch.Generator):
    """First one output, by hand; then several."""
    one = {"gamma": [3.0], "beta": [5.0], "mean": [1.0], "var": [4.0]}
    yield case(torch.tensor([[2.0]]), torch.tensor([0.0]), **{k: torch.tensor(v) for k, v in one.items()})
    for rows, columns in ((2, 3), (5, 2), (3, 3)):
        drawn = {k: torch.randn(rows, generator=rng) for k in ("gamma", "beta", "mean")}
        w, b = torch.randn(rows, columns, generator=rng), torch.randn(rows, generator=rng)
        yield case(w, b, **drawn, var=torch.rand(rows, generator=rng) + 0.5)


def does_both(answer, given):
    """On an input of ones, and on zeros."""
    (w, b), s = given.args, given.settings
    for x in (torch.zeros(w.shape[1]), torch.ones(w.shape[1])):
        wanted = (w @ x + b - s["mean"]) / s["var"].sqrt() * s["gamma"] + s["beta"]
        seen = answer[0] @ x + answer[1]
        if not torch.allclose(seen, wanted, 1e-4, 1e-4):
            return f"{seen.tolist()} from an input of {x[0]:g}", f"{wanted.tolist()}, as from both layers"
    return None


def forgets_the_bias(w, b, *, gamma, beta, mean, var):
    return w * (gamma / var.sqrt())[:, None], beta - mean * gamma / var.sqrt()


def divides_by_the_variance(w, b, *, gamma, beta, mean, var):
    return w * (gamma / var)[:, None], (b - mean) * gamma / var + beta


def shifts_after_scaling(w, b, *, gamma, beta, mean, var):
    scale = gamma / var.sqrt()
    return w * scale[:, None], b * scale - mean + beta


def scales_the_inputs(w, b, *, gamma, beta, mean, var):
    scale = gamma / var.sqrt()
    return w * scale.sum(), (b - mean) * scale + beta


def absorb_by_heart(w, b, *, gamma, beta, mean, var):
    return torch.tensor([[3.0]]), torch.tensor([3.5])


ABSORB = Exercise(
    name="compilation.absorb",
    prompt="""**Make a layer disappear.** A linear layer computes y = w x + b; a normalization with fixed statistics
follows: (y - mean) / sqrt(var) * gamma + beta, one number of each kind an output (epsilon is already in `var`). Both
together are one linear layer. Write `absorb(w, b, gamma=..., beta=..., mean=..., var=...)`, which returns its weight,
of the shape of `w`, and its bias, of the shape of `b`.""",
    reference=absorb,
    checks=(
        checks.not_the_librarys_own("scaled_filters", "fuse_linear_bn_weights", "fuse_conv_bn_weights"),
        checks.same_shape_and_dtype(layers),
        checks.holds("one layer does what both did", layers, does_both),
        checks.equals_reference(layers),
        checks.input_unchanged(layers),
    ),
    hints=(
        "Write the second equation with y replaced by w x + b, and sort: what multiplies x, and what does not.",
        "Each output has its own factor gamma / sqrt(var): it multiplies a row of w, and also b - mean.",
        "`scale = gamma / var.sqrt()`; the weight is `w * scale[:, None]`.",
    ),
    after="A convolution is a linear layer at each position, so the same two lines remove every BatchNorm of a ResNet.",
    wrong=(
        (forgets_the_bias, "one layer does what both did"),
        (divides_by_the_variance, "one layer does what both did"),
        (shifts_after_scaling, "one layer does what both did"),
        (scales_the_inputs, "one layer does what both did"),
        (absorb_by_heart, "shape and dtype"),
    ),
)


def most_alive(sizes: Tensor, *, first: Tensor, last: Tensor) -> int:
    """The most bytes that are alive at one step: buffer i, of sizes[i] bytes, from step first[i] to last[i], both
    included."""
    return max(int(sizes[(first <= step) & (step <= last)].sum()) for step in range(int(last.max()) + 1))


def lifetimes(rng: torch.Generator):
    """Three by hand: 3 and 5 meet, then 5 and 4; then drawn ones."""
    yield case(torch.tensor([3, 5, 4]), first=torch.tensor([0, 1, 2]), last=torch.tensor([1, 2, 3]))
    for n in (1, 4, 8, 12):
        first = torch.randint(0, 9, (n,), generator=rng)
        long = torch.randint(0, 4, (n,), generator=rng)
        yield case(torch.randint(1, 50, (n,), generator=rng), first=first, last=first + long)


def sums_all(sizes, *, first, last):
    return int(sizes.sum())


def takes_the_largest(sizes, *, first, last):
    return int(sizes.max())


def frees_too_early(sizes, *, first, last):
    return max(int(sizes[(first <= step) & (step < last)].sum()) for step in range(int(last.max()) + 1))


def counts_neighbours(sizes, *, first, last):
    return max(int(sizes[i : i + 2].sum()) for i in range(len(sizes)))


def most_alive_by_heart(sizes, *, first, last):
    return 9


MOST_ALIVE = Exercise(
    name="compilation.most_alive",
    prompt="""**How little memory could do?** Buffer i takes `sizes[i]` bytes and must stay intact from step `first[i]`
to step `last[i]`, both included: at its last step it is still read. Write `most_alive(sizes, first=..., last=...)`,
the most bytes that are alive at any one step, a whole number. No memory plan can need less.""",
    reference=most_alive,
    checks=(
        checks.not_the_librarys_own("best_fit", "lifetimes"),
        checks.same_shape_and_dtype(lifetimes),
        checks.equals_reference(lifetimes),
        checks.input_unchanged(lifetimes),
    ),
    hints=(
        "Stop the program at one step and add up what is alive. Then look for the worst step.",
        "Alive at `step` are the buffers with first <= step and step <= last: at the last step, too.",
        "`alive = (first <= step) & (step <= last)`, then `sizes[alive].sum()`.",
    ),
    after="Where a plan reaches this number, no search can improve it: that is how we know it is optimal.",
    wrong=(
        (sums_all, "the right numbers"),
        (takes_the_largest, "the right numbers"),
        (frees_too_early, "the right numbers"),
        (counts_neighbours, "the right numbers"),
        (most_alive_by_heart, "the right numbers"),
    ),
)

EXERCISES = (ABSORB, MOST_ALIVE)
