"""Exercises of chapter 01: where a grid's numbers come from, and how far it can be off."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


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

EXERCISES = (AFFINE, ERROR_BOUND)
