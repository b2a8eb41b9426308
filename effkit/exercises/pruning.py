"""Exercises of chapter 02: exactly how many go, what a weight is worth, and what goes with a neuron."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def keep_mask(w: Tensor, *, sparsity: float) -> Tensor:
    """True where a weight stays: round(sparsity * number of weights) of the smallest |w| go, ties by order of index."""
    order = w.abs().flatten().argsort(stable=True)
    keep = torch.ones(w.numel(), dtype=torch.bool)
    keep[order[: round(sparsity * w.numel())]] = False
    return keep.reshape(w.shape)


def weights(rng: torch.Generator):
    """By hand; then with ties, which a threshold alone cannot part; then larger ones of either sign."""
    yield case(torch.tensor([0.5, -0.1, 2.0, -0.7]), sparsity=0.5)
    yield case(torch.ones(2, 3), sparsity=0.5)
    for shape in ((7,), (4, 5), (3, 2, 3)):
        sparsity = torch.rand((), generator=rng).item() * 0.98
        yield case(torch.randint(-3, 4, shape, generator=rng).float(), sparsity=sparsity)
        yield case(torch.randn(shape, generator=rng), sparsity=sparsity)
    yield case(torch.randn(4, generator=rng), sparsity=0.0)


def as_many_as_asked(keep, given):
    (w,), sparsity = given.args, given.settings["sparsity"]
    gone, wanted = int((~keep.bool()).sum()), round(sparsity * w.numel())
    return None if gone == wanted else (f"{gone} weights gone", f"{wanted}")


def lets_ties_through(w, *, sparsity):
    n = round(sparsity * w.numel())
    return w.abs() > w.abs().flatten().sort().values[n - 1] if n else torch.ones_like(w, dtype=torch.bool)


def forgets_the_sign(w, *, sparsity):
    keep = torch.ones(w.numel(), dtype=torch.bool)
    keep[w.flatten().argsort(stable=True)[: round(sparsity * w.numel())]] = False
    return keep.reshape(w.shape)


def says_what_goes(w, *, sparsity):
    return ~keep_mask(w, sparsity=sparsity)


def cuts_at_a_share_of_the_largest(w, *, sparsity):
    return w.abs() >= sparsity * w.abs().max()


def mask_by_heart(w, *, sparsity):
    return torch.tensor([False, False, True, True])


KEEP = Exercise(
    name="pruning.keep_mask",
    prompt="""**Exactly half.** Write `keep_mask(w, sparsity=...)` for a tensor `w` of any shape: a tensor of booleans like
w, `True` where a weight stays. The `round(sparsity * number of weights)` weights with the smallest magnitude |w| go: exactly as
many, also where magnitudes are equal. Of equal ones, those that come first (in the flattened tensor) go first.""",
    reference=keep_mask,
    checks=(
        checks.not_the_librarys_own("keep_largest", "without_smallest", "Magnitude"),
        checks.same_shape_and_dtype(weights),
        checks.holds("as many as asked", weights, as_many_as_asked),
        checks.equals_reference(weights),
        checks.input_unchanged(weights),
    ),
    hints=(
        "A threshold says which *value* to cut at, and several weights may have it; an order says which weights to cut.",
        "`argsort(stable=True)` of the flattened magnitudes lists indices from the smallest on, ties in order of index.",
        "`order = w.abs().flatten().argsort(stable=True)`; then set `keep[order[:n]] = False` and `reshape`.",
    ),
    after="Weights in bfloat16 have thousands of ties: a threshold alone misses the sparsity that it promised.",
    wrong=(
        (lets_ties_through, "as many as asked"),
        (forgets_the_sign, "the right numbers"),
        (says_what_goes, "as many as asked"),
        (cuts_at_a_share_of_the_largest, "as many as asked"),
        (mask_by_heart, "shape and dtype"),
    ),
)


def fisher_saliency(w: Tensor, gradients: Tensor) -> Tensor:
    """What the loss gains without each weight: half the mean squared gradient of single examples, times w squared."""
    fisher = gradients.square().mean(dim=0)
    return 0.5 * fisher * w.square()


def examples(rng: torch.Generator):
    """By hand: gradients that cancel on average, and matter all the same."""
    yield case(torch.tensor([2.0, 0.5]), torch.tensor([[0.5, 2.0], [-0.5, 2.0]]))
    for shape in ((3,), (2, 4)):
        n = int(torch.randint(2, 9, (), generator=rng))
        yield case(torch.randn(shape, generator=rng), torch.randn(n, *shape, generator=rng))


def nobody_gains(saliency, given):
    low = saliency.min().item()
    return None if low >= 0 else (f"{low:.4g} for a weight", "0 or more: F and w^2 are squares")


def cancels(w, gradients):
    return 0.5 * gradients.mean(dim=0).square() * w.square()


def adds_up(w, gradients):
    return 0.5 * gradients.square().sum(dim=0) * w.square()


def forgets_the_half(w, gradients):
    return gradients.square().mean(dim=0) * w.square()


def first_order(w, gradients):
    return -gradients.mean(dim=0) * w


def saliency_by_heart(w, gradients):
    return torch.tensor([0.5, 0.5])


FISHER = Exercise(
    name="pruning.fisher_saliency",
    prompt="""**What is a weight worth?** At a minimum of the loss, setting a weight w to zero costs (1/2) H w^2 to second order,
and the curvature H is approximated by the Fisher information F: the mean, over examples, of the squared gradient of *one*
example's loss. Write `fisher_saliency(w, gradients)`: `w` is a tensor of any shape, `gradients` has one more
dimension in front, one row an example. Return a tensor like w: what each weight's removal costs.""",
    reference=fisher_saliency,
    checks=(
        checks.not_the_librarys_own("saliency", "diagonal_fisher", "Fisher"),
        checks.same_shape_and_dtype(examples),
        checks.holds("no weight has a negative worth", examples, nobody_gains),
        checks.equals_reference(examples),
        checks.input_unchanged(examples),
    ),
    hints=(
        "At a minimum the mean gradient is zero. What is left is how much single examples pull, to either side.",
        "Square first, then average over the examples (dimension 0); the order matters.",
        "`fisher = gradients.square().mean(dim=0)`; the cost is `0.5 * fisher * w.square()`.",
    ),
    after="Square and mean do not commute: squaring a batch's mean gradient would call every weight worthless at a minimum.",
    wrong=(
        (cancels, "the right numbers"),
        (adds_up, "the right numbers"),
        (forgets_the_half, "the right numbers"),
        (first_order, "no weight has a negative worth"),
        (saliency_by_heart, "shape and dtype"),
    ),
)


def remove_neurons(first: Tensor, bias: Tensor, second: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of second @ relu(first @ x + bias) with only the neurons that stay, everything smaller for real."""
    return first[keep], bias[keep], second[:, keep]


def networks(rng: torch.Generator):
    """Two neurons of three stay; then larger ones, whose biases would be missed."""
    yield case(torch.eye(3)[:, :2], torch.tensor([0.0, 1.0, 2.0]), torch.ones(1, 3), torch.tensor([True, False, True]))
    for inputs, neurons, outputs in ((4, 5, 2), (3, 8, 3), (5, 5, 5)):
        first, second = torch.randn(neurons, inputs, generator=rng), torch.randn(outputs, neurons, generator=rng)
        keep = torch.rand(neurons, generator=rng) < 0.6
        keep[0], keep[1] = True, False
        yield case(first, torch.randn(neurons, generator=rng), second, keep)


def really_smaller(answer, given):
    seen, stay = sum(part.numel() for part in answer), int(given.args[3].sum())
    first, _, second, _ = given.args
    wanted = stay * (first.shape[1] + 1 + second.shape[0])
    return None if seen == wanted else (f"{seen} numbers left", f"{wanted}, for {stay} neurons")


def zeroes_instead(first, bias, second, keep):
    return first * keep[:, None], bias * keep, second * keep


def forgets_the_readers(first, bias, second, keep):
    return first[keep], bias[keep], second


def takes_the_first_ones(first, bias, second, keep):
    n = int(keep.sum())
    return first[:n], bias[:n], second[:, :n]


def keeps_the_others(first, bias, second, keep):
    return first[~keep], bias[~keep], second[:, ~keep]


def removed_by_heart(first, bias, second, keep):
    return torch.eye(3)[[0, 2]][:, :2], torch.tensor([0.0, 2.0]), torch.ones(1, 2)


REMOVE = Exercise(
    name="pruning.remove_neurons",
    prompt="""**Gone, not zero.** A small network computes `second @ relu(first @ x + bias)`; `first` is (neurons, inputs), `bias`
(neurons), `second` (outputs, neurons). `keep` holds a boolean for each neuron. Write `remove_neurons(first, bias, second, keep)`, which
returns the three tensors of a network with only the neurons that stay. It must compute what the old one computes when the
others' outputs are set to zero, on every x.""",
    reference=remove_neurons,
    checks=(
        checks.not_the_librarys_own("remove_channels_"),
        checks.holds("really smaller", networks, really_smaller),
        checks.same_shape_and_dtype(networks),
        checks.equals_reference(networks),
        checks.input_unchanged(networks),
    ),
    hints=(
        "A neuron lives in three places: where it is computed, its bias, and wherever its output is read.",
        "It is a *row* of the weight that computes it, and a *column* of each weight that reads it.",
        "`first[keep]` takes rows, `second[:, keep]` takes columns.",
    ),
    after="In a network with residuals, one channel lives in dozens of places; finding them all is what the library's graph does.",
    wrong=(
        (zeroes_instead, "really smaller"),
        (forgets_the_readers, "really smaller"),
        (takes_the_first_ones, "the right numbers"),
        (keeps_the_others, "really smaller"),
        (removed_by_heart, "really smaller"),
    ),
)

EXERCISES = (KEEP, FISHER, REMOVE)
