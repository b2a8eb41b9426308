"""Exercises of chapter 01: where a grid's numbers come from, how far it can be off, and what rounding well takes."""

from itertools import product

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case
from effkit.exercises.values import legible


def affine(x: Tensor, *, bits: int) -> tuple[float, int]:
    """Scale and zero point of the grid scale * (q - zero_point), q = 0 ... 2**bits - 1, that covers x and zero."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0  # all zeros: any step will do
    return scale, round(-low / scale)


def ranges(rng: torch.Generator):
    """First by hand; then ranges whose zero falls near a grid point: a tie would round by the last bit."""
    yield case(torch.tensor([-1.0, 0.2, 0.7]), bits=2)
    for bits in (3, 4, 8):
        last = 2**bits - 1
        step, beside = torch.rand(2, generator=rng).tolist()
        zero = int(torch.randint(1, last, (), generator=rng)) + 0.6 * (beside - 0.5)
        points = torch.cat((torch.tensor([0.0, last]), last * torch.rand(5, generator=rng)))
        yield case((points - zero) * (step + 0.1), bits=bits)
    yield case(torch.rand(6, generator=rng) + 2, bits=4)
    yield case(-torch.rand(6, generator=rng) - 2, bits=4)
    yield case(torch.zeros(3), bits=4)


def zero_is_a_point(answer, given):
    zero_point, last = answer[1], 2 ** given.settings["bits"] - 1
    return None if 0 <= zero_point <= last else (f"zero_point {zero_point}", f"one of 0 ... {last}, to store zero as")


def forgets_zero(x, *, bits):
    scale = (x.max() - x.min()).item() / (2**bits - 1) or 1.0
    return scale, round(-x.min().item() / scale)


def counts_points_not_steps(x, *, bits):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 2**bits or 1.0
    return scale, min(round(-low / scale), 2**bits - 1)


def leaves_zero_between_points(x, *, bits):
    scale, _ = affine(x, bits=bits)
    return scale, max(0.0, -x.min().item() / scale)


def symmetric(x, *, bits):
    return x.abs().max().item() * 2 / (2**bits - 1) or 1.0, 2 ** (bits - 1)


def affine_by_heart(x, *, bits):
    return 1.7 / 3, 2


AFFINE = Exercise(
    name="quantization.affine",
    prompt="""**Find the grid.** A tensor `x` is to be stored as whole numbers q from 0 to 2^bits - 1, with
x ~ `scale * (q - zero_point)`. Write `affine(x, bits=...)`, which returns `scale` (a positive number, in the units of
x) and `zero_point` (a whole number, one of the q), so that the grid reaches from the smallest to the largest value of x
and zero is a point of it. If x is nothing but zeros, take the scale 1.""",
    reference=affine,
    checks=(
        checks.not_the_librarys_own("affine_parameters", "min_max"),
        checks.same_shape_and_dtype(ranges),
        checks.holds("zero is a point of the grid", ranges, zero_is_a_point),
        checks.equals_reference(ranges),
        checks.input_unchanged(ranges),
    ),
    hints=(
        "2^bits points have one step fewer between them, and the range that they cover must contain zero.",
        "`scale` is the range over the number of steps; `zero_point` says how many steps zero lies above the low end.",
        "`low = min(x.min().item(), 0.0)`, `high` likewise; `scale = (high - low) / (2**bits - 1)`.",
    ),
    after="With zero on a grid point, what is padded, masked or pruned stays exactly zero.",
    wrong=(
        (forgets_zero, "zero is a point of the grid"),
        (counts_points_not_steps, "the right numbers"),
        (leaves_zero_between_points, "shape and dtype"),
        (symmetric, "the right numbers"),
        (affine_by_heart, "the right numbers"),
    ),
)


def error_bound(x: Tensor, *, scale: float, zero_point: int, bits: int) -> Tensor:
    """The most by which each element of x can be off once it is rounded to the grid, or clipped to its ends."""
    low, high = scale * (0 - zero_point), scale * (2**bits - 1 - zero_point)
    outside = (low - x).clamp(min=0) + (x - high).clamp(min=0)
    return outside.clamp(min=scale / 2)


def grids(rng: torch.Generator):
    """Values within and beyond the grid, in several shapes."""
    yield case(torch.tensor([-2.0, 0.2, 0.7, 3.0]), scale=0.5, zero_point=2, bits=2)
    for shape, bits in (((7,), 3), ((4, 6), 4), ((2, 3, 5), 8)):
        scale = 0.1 + torch.rand((), generator=rng).item()
        zero_point = int(torch.randint(0, 2**bits, (), generator=rng))
        points = (torch.rand(shape, generator=rng) * 2 - 0.5) * 2**bits
        yield case((points - zero_point) * scale, scale=scale, zero_point=zero_point, bits=bits)


def never_exceeded(bound, given):
    """Rounds the case for real, and looks at the element that errs most beyond its bound."""
    (x,), s = given.args, given.settings
    q = (x / s["scale"] + s["zero_point"]).round().clamp(0, 2 ** s["bits"] - 1)
    error = (x - s["scale"] * (q - s["zero_point"])).abs()
    i = (error - bound).argmax()
    x, error, bound = (t.flatten()[i].item() for t in (x, error, bound))
    within = error <= 1.0001 * bound + 1e-5
    return None if within else (f"{bound:.4g} at {x:.4g}", f"at least its error, {error:.4g}")


def forgets_clipping(x, *, scale, zero_point, bits):
    return torch.full_like(x, scale / 2)


def counts_one_point_too_many(x, *, scale, zero_point, bits):
    on_grid = x.clamp(-scale * zero_point, scale * (2**bits - zero_point))
    return (x - on_grid).abs().clamp(min=scale / 2)


def adds_rounding_to_clipping(x, *, scale, zero_point, bits):
    return (x - x.clamp(-scale * zero_point, scale * (2**bits - 1 - zero_point))).abs() + scale / 2


def writes_into_x(x, *, scale, zero_point, bits):
    on_grid = x.clamp(-scale * zero_point, scale * (2**bits - 1 - zero_point))
    return x.sub_(on_grid).abs_().clamp_(min=scale / 2)


def error_bound_by_heart(x, *, scale, zero_point, bits):
    return torch.tensor([1.0, 0.25, 0.25, 2.5])


ERROR_BOUND = Exercise(
    name="quantization.error_bound",
    prompt="""**How wrong can it be?** Each value of `x` is rounded to the nearest point of the grid
`scale * (q - zero_point)`, q = 0 ... 2^bits - 1; what lies beyond the grid is clipped to its last point. Write
`error_bound(x, scale=..., zero_point=..., bits=...)`: a tensor like x, the largest error that each element can have.
Make it as small as it can be without looking at where inside its step a value lies.""",
    reference=error_bound,
    checks=(
        checks.not_the_librarys_own("quantize", "dequantize"),
        checks.same_shape_and_dtype(grids),
        checks.finite(grids),
        checks.holds("no element errs by more", grids, never_exceeded),
        checks.equals_reference(grids),
        checks.input_unchanged(grids),
    ),
    hints=(
        "Two things go wrong, never both at once: rounding within the grid, clipping beyond it.",
        "Rounding costs half a step at most; clipping costs the distance to the grid's end, q = 0 or q = 2^bits - 1.",
        "`outside = (low - x).clamp(min=0) + (x - high).clamp(min=0)`; then the larger of that and `scale / 2`.",
    ),
    after="Rounding costs half a step at most, clipping has no limit: to choose a range is to trade one for the other.",
    wrong=(
        (forgets_clipping, "no element errs by more"),
        (counts_one_point_too_many, "no element errs by more"),
        (adds_rounding_to_clipping, "the right numbers"),
        (writes_into_x, "its input unchanged"),
        (error_bound_by_heart, "shape and dtype"),
    ),
)

def least_error_scale(w: Tensor, *, bits: int, parts: tuple[float, ...]) -> float:
    """Of the steps that reach to some part of the largest magnitude in w, the one with the least mean squared error."""
    last = 2 ** (bits - 1) - 1
    scales = [part * w.abs().max().item() / last for part in parts]
    return min(scales, key=lambda s: (w - s * (w / s).round().clamp(-last, last)).square().mean().item())


PARTS = (1.0, 0.75, 0.5, 0.25)


def tails(rng: torch.Generator):
    """First by hand, where the half is best; then one where little |error| and little error^2 disagree; then long tails."""
    yield case(torch.tensor([-0.4, 0.4, 0.4, 1.0]), bits=2, parts=PARTS)
    size, *beside = torch.rand(5, generator=rng).tolist()
    few = torch.tensor([*(0.3 + 0.01 * (b - 0.5) for b in beside), -1.0])
    yield case(few * (size + 0.5), bits=2, parts=PARTS)
    for bits in (2, 3, 4):
        yield case(torch.randn(400, generator=rng) ** 3, bits=bits, parts=tuple(i / 20 for i in range(20, 0, -1)))


def errs_least(answer, given):
    """Its error is measured here, so that of two steps as good as each other either will do."""
    (w,), bits = given.args, given.settings["bits"]
    last, scale = 2 ** (bits - 1) - 1, float(answer)
    offered = [part * w.abs().max().item() / last for part in given.settings["parts"]]
    error = lambda s: (w - s * (w / s).round().clamp(-last, last)).square().mean().item()  # noqa: E731
    best = min(offered, key=error)
    if not any(abs(scale - s) <= 1e-4 * s for s in offered):
        return f"a step of {scale:.4g}", f"one of {', '.join(f'{s:.4g}' for s in offered)}"
    if error(scale) <= 1.001 * error(best):
        return None
    return f"a step of {scale:.4g}, which errs by {error(scale):.4g}", f"{best:.4g}, which errs by {error(best):.4g}"


def covers_everything(w, *, bits, parts):
    return max(parts) * w.abs().max().item() / (2 ** (bits - 1) - 1)


def never_clips(w, *, bits, parts):
    scales = [part * w.abs().max().item() / (2 ** (bits - 1) - 1) for part in parts]
    return min(scales, key=lambda s: (w - s * (w / s).round()).square().mean().item())


def least_absolute_error(w, *, bits, parts):
    last = 2 ** (bits - 1) - 1
    scales = [part * w.abs().max().item() / last for part in parts]
    return min(scales, key=lambda s: (w - s * (w / s).round().clamp(-last, last)).abs().mean().item())


def takes_both_sides_for_one(w, *, bits, parts):
    last = 2**bits - 1
    scales = [part * w.abs().max().item() / last for part in parts]
    return min(scales, key=lambda s: (w - s * (w / s).round().clamp(-last, last)).square().mean().item())


def returns_the_part(w, *, bits, parts):
    last, largest = 2 ** (bits - 1) - 1, w.abs().max().item()
    error = lambda s: (w - s * (w / s).round().clamp(-last, last)).square().mean().item()  # noqa: E731
    return min(parts, key=lambda part: error(part * largest / last))


def scale_by_heart(w, *, bits, parts):
    return 0.5


RANGE = Exercise(
    name="quantization.range",
    prompt="""**Cut the range where it pays.** Weights `w` are rounded to s * q with q a whole number from -L to L,
L = 2^(bits - 1) - 1; what lies beyond is clipped to the last point. With s = max|w| / L nothing is clipped; a fraction p of
that step is finer, and clips what is larger than p max|w|. Write `least_error_scale(w, bits=..., parts=...)`: of the steps
p max|w| / L, p from `parts`, return the one with the least mean squared error, clipping included.""",
    reference=least_error_scale,
    checks=(
        checks.not_the_librarys_own("least_squares", "percentile", "kl", "RTN"),
        checks.same_shape_and_dtype(tails),
        checks.holds("no other step errs less", tails, errs_least),
        checks.input_unchanged(tails),
    ),
    hints=(
        "Nothing to derive: round with each step that is offered, measure, and keep the best.",
        "Rounded and clipped, w is `s * (w / s).round().clamp(-L, L)`. Its error is squared before the mean is taken.",
        "`min(scales, key=error)`, where `error` is a function of a step and `scales` the list of all that are offered.",
    ),
    after="The more bits, the less is worth clipping: of normal weights it is best to keep the whole range at 8 bits, a third of it at 2.",
    wrong=(
        (covers_everything, "no other step errs less"),
        (never_clips, "no other step errs less"),
        (least_absolute_error, "no other step errs less"),
        (takes_both_sides_for_one, "no other step errs less"),
        (returns_the_part, "no other step errs less"),
        (scale_by_heart, "no other step errs less"),
    ),
)


def pass_on(w: Tensor, rounded: Tensor, factor: Tensor, *, column: int) -> Tensor:
    """The weights once this column was rounded, and its error answered by the columns behind it."""
    w = w.clone()
    error = (w[:, column] - rounded) / factor[column, column]
    w[:, column] = rounded
    w[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return w


def layers(rng: torch.Generator):
    """Two columns by hand; then inputs that correlate, and a column with others before and behind it."""
    yield case(torch.tensor([[0.3, 0.7]]), torch.tensor([0.0]), torch.tensor([[2.0, -1.0], [0.0, 1.0]]), column=0)
    for outputs, n, column in ((3, 5, 2), (2, 7, 4), (4, 4, 1)):
        mixed = torch.eye(n).double() + 0.6 * torch.randn(n, n, generator=rng).double()
        inverse = torch.linalg.inv(mixed @ mixed.T + 0.1 * torch.eye(n))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        w = 3 * torch.randn(outputs, n, generator=rng)
        shift = 0.2 + 0.2 * torch.rand(outputs, generator=rng)  # a grid on which nothing is exact, so that something is passed on
        yield case(w, w[:, column] + shift, factor, column=column)


def only_those_behind_move(answer, given):
    (w, rounded, _), column = given.args, given.settings["column"]
    wanted = torch.cat((w[:, :column], rounded[:, None]), 1)
    seen = answer[:, : column + 1]
    near = torch.allclose(seen, wanted, atol=1e-6)
    return None if near else (f"{legible(seen)} up to column {column}", f"{legible(wanted)}: what is rounded stays as it is")


def nothing_errs_less(answer, given):
    """Where the columns behind are at the least of e^T H e, its derivative by each of them is zero."""
    (w, _, factor), column = given.args, given.settings["column"]
    h = torch.linalg.inv((factor.T @ factor).double())
    e = (answer - w).double()
    slope = (e @ h)[:, column + 1 :].abs().max().item()
    allowed = 1e-3 * (e[:, column].abs().max() * h.abs().max()).item()
    return None if slope <= allowed else (f"weights where the error still falls, by {slope:.2g} a unit", "its least, where the derivative is zero")


def forgets_to_divide(w, rounded, factor, *, column):
    w = w.clone()
    error, w[:, column] = w[:, column] - rounded, rounded
    w[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return w


def pushes_the_wrong_way(w, rounded, factor, *, column):
    w = w.clone()
    error, w[:, column] = (w[:, column] - rounded) / factor[column, column], rounded
    w[:, column + 1 :] += error[:, None] * factor[column, column + 1 :]
    return w


def reads_a_column_of_the_factor(w, rounded, factor, *, column):
    w = w.clone()
    error, w[:, column] = (w[:, column] - rounded) / factor[column, column], rounded
    w[:, column + 1 :] -= error[:, None] * factor[column + 1 :, column]
    return w


def moves_what_is_rounded(w, rounded, factor, *, column):
    inverse = factor.T @ factor
    return w - ((w[:, column] - rounded) / inverse[column, column])[:, None] * inverse[column]


def only_rounds(w, rounded, factor, *, column):
    w = w.clone()
    w[:, column] = rounded
    return w


def answers_into_w(w, rounded, factor, *, column):
    error = (w[:, column] - rounded) / factor[column, column]
    w[:, column:] -= error[:, None] * factor[column, column:]
    return w


def pass_on_by_heart(w, rounded, factor, *, column):
    return torch.tensor([[0.0, 0.85]])


FEEDBACK = Exercise(
    name="quantization.feedback",
    prompt="""**Pass the error on.** GPTQ rounds a matrix `w` (outputs x inputs) column after column. `column` has just been
rounded, to the numbers `rounded`; the columns before it are done and stay, those behind it may still move to make up
for the error. `factor` is U, upper triangular, with U^T U = H^-1 and H = X X^T of the inputs. For an error
e = (w_i - rounded) / U[i, i] in column i, the answer is that each later column j loses e U[i, j]. Write
`pass_on(w, rounded, factor, column=...)`: the whole matrix afterwards, a new tensor.""",
    reference=pass_on,
    checks=(
        checks.not_the_librarys_own("feed_back", "inverse_factor", "GPTQ"),
        checks.same_shape_and_dtype(layers),
        checks.input_unchanged(layers),
        checks.holds("only the columns behind it move", layers, only_those_behind_move),
        checks.holds("no other answer errs less", layers, nothing_errs_less),
        checks.equals_reference(layers, rtol=1e-3, atol=1e-4),
    ),
    hints=(
        "All rows of w share their inputs, so one row of U serves all of them: the answer is an outer product.",
        "Row i of U, from i + 1 on, times each output's error over U[i, i]; take the error before you overwrite column i.",
        "`w[:, column + 1:] -= error[:, None] * factor[column, column + 1:]`, on a clone of w.",
    ),
    after="That loop over all columns, with each column rounded to its grid first, is GPTQ; with zeros for `rounded`, SparseGPT.",
    wrong=(
        (forgets_to_divide, "no other answer errs less"),
        (pushes_the_wrong_way, "no other answer errs less"),
        (reads_a_column_of_the_factor, "no other answer errs less"),
        (moves_what_is_rounded, "only the columns behind it move"),
        (only_rounds, "no other answer errs less"),
        (answers_into_w, "its input unchanged"),
        (pass_on_by_heart, "shape and dtype"),
    ),
)


def step_gradient(v: Tensor, upstream: Tensor, *, step: float, bits: int) -> Tensor:
    """d loss / d step of v rounded to step * (-2^(bits-1) ... 2^(bits-1) - 1), as LSQ scales it; a tensor of one number."""
    least, most = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    place = v / step
    slope = torch.where(place <= -least, -least, torch.where(place >= most, most, place.round() - place))
    return (upstream * slope).sum() / (v.numel() * most) ** 0.5


def values_and_gradients(rng: torch.Generator):
    """One value below the grid, two inside, one above; then tensors of several shapes, a good part of them clipped."""
    yield case(torch.tensor([-3.0, -0.4, 0.3, 2.0]), torch.tensor([1.0, 1.0, 2.0, -1.0]), step=1.0, bits=2)
    for shape, bits in (((12,), 2), ((5, 7), 3), ((2, 3, 8), 4)):
        step = 0.1 + torch.rand((), generator=rng).item()
        v, upstream = torch.randn(2, *shape, generator=rng)
        yield case(v * step * 2 ** (bits - 1), upstream, step=step, bits=bits)


def forgets_the_ends(v, upstream, *, step, bits):
    place = v / step
    return (upstream * (place.round() - place)).sum() / (v.numel() * (2 ** (bits - 1) - 1)) ** 0.5


def sees_the_ends_only(v, upstream, *, step, bits):
    least, most = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    slope = torch.where(v / step <= -least, -least, torch.where(v / step >= most, most, 0.0))
    return (upstream * slope).sum() / (v.numel() * most) ** 0.5


def has_the_sign_turned(v, upstream, *, step, bits):
    least, most = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    place = v / step
    slope = torch.where(place <= -least, -least, torch.where(place >= most, most, place - place.round()))
    return (upstream * slope).sum() / (v.numel() * most) ** 0.5


def forgets_the_gradient_s_scale(v, upstream, *, step, bits):
    least, most = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    place = v / step
    return (upstream * torch.where(place <= -least, -least, torch.where(place >= most, most, place.round() - place))).sum()


def forgets_the_root(v, upstream, *, step, bits):
    return forgets_the_gradient_s_scale(v, upstream, step=step, bits=bits) / (v.numel() * (2 ** (bits - 1) - 1))


def forgets_what_comes_from_above(v, upstream, *, step, bits):
    return step_gradient(v, torch.ones_like(v), step=step, bits=bits)


def ends_alike(v, upstream, *, step, bits):
    most = 2 ** (bits - 1) - 1
    place = v / step
    slope = torch.where(place.abs() >= most, most * place.sign(), place.round() - place)
    return (upstream * slope).sum() / (v.numel() * most) ** 0.5


def step_gradient_by_heart(v, upstream, *, step, bits):
    return torch.tensor(-1.6)


LEARNED = Exercise(
    name="quantization.step_gradient",
    prompt="""**Let the step learn.** Numbers `v` are rounded to s round(clip(v / s, -Q_N, Q_P)), with Q_N = 2^(bits - 1) and
Q_P = 2^(bits - 1) - 1. Straight through the rounding, each of them changes with s by

- round(v / s) - v / s inside, where -Q_N < v / s < Q_P,
- -Q_N where v / s <= -Q_N, and Q_P where v / s >= Q_P.

`upstream` is d loss / d rounded, of v's shape. Write `step_gradient(v, upstream, step=..., bits=...)`: d loss / d s, summed
over all numbers, times LSQ's g = 1 / sqrt(N Q_P), N being how many numbers share the step.""",
    reference=step_gradient,
    checks=(
        checks.not_the_librarys_own("LearnedStep", "LearnedWeightStep", "round_through", "grad", "backward"),
        checks.same_shape_and_dtype(values_and_gradients),
        checks.finite(values_and_gradients),
        checks.equals_reference(values_and_gradients, rtol=1e-3, atol=1e-5),
        checks.input_unchanged(values_and_gradients),
    ),
    hints=(
        "The chain rule: what comes from above times the slope, number by number, then one sum, since all share the step.",
        "Three cases: two nested `torch.where`, or the two ends first and `round(v / s) - v / s` for the rest.",
        "`torch.where(v / step <= -least, -least, torch.where(v / step >= most, most, (v / step).round() - v / step))`.",
    ),
    after="Clipped values ask for a larger step, those inside for one that brings a grid point nearer; training finds the balance.",
    wrong=(
        (forgets_the_ends, "the right numbers"),
        (sees_the_ends_only, "the right numbers"),
        (has_the_sign_turned, "the right numbers"),
        (forgets_the_gradient_s_scale, "the right numbers"),
        (forgets_the_root, "the right numbers"),
        (forgets_what_comes_from_above, "the right numbers"),
        (ends_alike, "the right numbers"),
        (step_gradient_by_heart, "the right numbers"),
    ),
)


def choose_bits(sizes: list[list[int]], losses: list[list[float]], *, widths: tuple[int, ...], budget: int) -> list[int]:
    """One width a layer: those with the least sum of losses whose sizes are within the budget."""
    total = lambda table, choice: sum(row[i] for row, i in zip(table, choice, strict=True))  # noqa: E731
    choices = product(range(len(widths)), repeat=len(sizes))
    fitting = [choice for choice in choices if total(sizes, choice) <= budget]
    if not fitting:
        raise ValueError(f"nothing fits into {budget} bytes: the least is {sum(map(min, sizes))}")
    return [widths[i] for i in min(fitting, key=lambda choice: total(losses, choice))]


def budgets(rng: torch.Generator):
    """By hand, and in the second case the best gain a byte, taken first, leaves no room for the best sum; then drawn."""
    yield case([[2, 4], [2, 4]], [[3.0, 1.0], [5.0, 1.0]], widths=(2, 4), budget=6)
    yield case([[1, 2], [1, 11], [1, 11]], [[3.0, 0.0], [9.0, 0.0], [8.0, 0.0]], widths=(2, 4), budget=13)
    for layers, widths in ((3, (2, 4, 8)), (4, (2, 3, 4)), (4, (2, 3, 4, 8))):
        sizes = [[n * bits for bits in widths] for n in torch.randint(1, 50, (layers,), generator=rng).tolist()]
        scale = (10 * torch.rand(layers, generator=rng)).tolist()
        losses = [[(s + 0.1) / 4**bits for bits in widths] for s in scale]
        chosen = [1, *torch.randint(0, len(widths), (layers - 1,), generator=rng).tolist()]  # never all the narrowest
        yield case(sizes, losses, widths=widths, budget=sum(row[i] for row, i in zip(sizes, chosen, strict=True)))


def within_the_budget(answer, given):
    (sizes, _), widths, budget = given.args, given.settings["widths"], given.settings["budget"]
    if len(answer) != len(sizes) or not set(answer) <= set(widths):
        return f"{answer}", f"{len(sizes)} of the widths {widths}, one a layer"
    held = sum(row[widths.index(bits)] for row, bits in zip(sizes, answer, strict=True))
    return None if held <= budget else (f"{answer}, {held} bytes", f"at most {budget}")


def no_choice_loses_less(answer, given):
    """By the sums, so that of two choices as good as each other either will do."""
    (_, losses), widths = given.args, given.settings["widths"]
    lost = lambda choice: sum(row[widths.index(bits)] for row, bits in zip(losses, choice, strict=True))  # noqa: E731
    best = choose_bits(*given.args, **given.settings)
    near = lost(answer) <= lost(best) + 1e-9
    return None if near else (f"{answer}, a loss of {lost(answer):.4g}", f"{best}, a loss of {lost(best):.4g}")


def spends_without_looking(sizes, losses, *, widths, budget):
    return [widths[row.index(min(row))] for row in losses]


def one_width_for_all(sizes, losses, *, widths, budget):
    fitting = [i for i in range(len(widths)) if sum(row[i] for row in sizes) <= budget]
    return [widths[max(fitting)]] * len(sizes)


def best_gain_a_byte_first(sizes, losses, *, widths, budget):
    chosen, left = [0] * len(sizes), budget - sum(row[0] for row in sizes)
    while True:
        gains = [
            ((losses[k][i] - losses[k][j]) / (sizes[k][j] - sizes[k][i]), k, j)
            for k, i in enumerate(chosen)
            for j in range(i + 1, len(widths))
            if sizes[k][j] - sizes[k][i] <= left
        ]
        if not gains:
            return [widths[i] for i in chosen]
        _, k, j = max(gains)
        left, chosen[k] = left - sizes[k][j] + sizes[k][chosen[k]], j


def leaves_a_byte(sizes, losses, *, widths, budget):
    return choose_bits(sizes, losses, widths=widths, budget=budget - 1)


def fills_the_budget(sizes, losses, *, widths, budget):
    total = lambda choice: sum(row[i] for row, i in zip(sizes, choice, strict=True))  # noqa: E731
    fitting = [c for c in product(range(len(widths)), repeat=len(sizes)) if total(c) <= budget]
    return [widths[i] for i in max(fitting, key=total)]


def returns_positions(sizes, losses, *, widths, budget):
    return [widths.index(bits) for bits in choose_bits(sizes, losses, widths=widths, budget=budget)]


def gives_the_narrowest_anyway(sizes, losses, *, widths, budget):
    try:
        return choose_bits(sizes, losses, widths=widths, budget=budget)
    except ValueError:
        return [min(widths)] * len(sizes)


def bits_by_heart(sizes, losses, *, widths, budget):
    return [2, 4]


BUDGET = Exercise(
    name="quantization.budget",
    prompt="""**Spend a budget of bytes.** Each layer may have one of the `widths`, in bits. `sizes[k][i]` says how many bytes
layer k takes at width number i, and `losses[k][i]` what that width costs the model. Write
`choose_bits(sizes, losses, widths=..., budget=...)`: a list of widths, one a layer, with the least sum of losses of all whose
sizes add up to at most `budget`. Layers are few, so all choices may be tried. Raise a ValueError where nothing fits.""",
    reference=choose_bits,
    checks=(
        checks.not_the_librarys_own("MixedPrecision", "exact", "greedy"),
        checks.same_shape_and_dtype(budgets),
        checks.holds("within the budget", budgets, within_the_budget),
        checks.holds("no choice within the budget loses less", budgets, no_choice_loses_less),
        checks.raises_when(case([[2, 4], [2, 4]], [[3.0, 1.0], [5.0, 1.0]], widths=(2, 4), budget=3)),
        checks.input_unchanged(budgets),
    ),
    hints=(
        "Of k layers with w widths there are w^k choices: few enough to look at each of them here.",
        "`itertools.product(range(len(widths)), repeat=len(sizes))` yields them all; keep those that fit, take the best.",
        "`min(fitting, key=loss)`, with `loss = lambda choice: sum(row[i] for row, i in zip(losses, choice))`.",
    ),
    after="Of 30 layers and 5 widths there are 10^21 choices; dynamic programming finds the best of them all the same.",
    wrong=(
        (spends_without_looking, "within the budget"),
        (one_width_for_all, "no choice within the budget loses less"),
        (best_gain_a_byte_first, "no choice within the budget loses less"),
        (leaves_a_byte, "no choice within the budget loses less"),
        (fills_the_budget, "no choice within the budget loses less"),
        (returns_positions, "within the budget"),
        (gives_the_narrowest_anyway, "a ValueError"),
        (bits_by_heart, "shape and dtype"),
    ),
)


EXERCISES = (AFFINE, ERROR_BOUND, RANGE, FEEDBACK, LEARNED, BUDGET)
