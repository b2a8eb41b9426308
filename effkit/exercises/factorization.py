"""Exercises of chapter 04: two thin matrices for one, and how thin they may be."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def thin(w: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors, (out, rank) and (rank, in), whose product is as close to w (out, in) as that rank allows."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def matrices(rng: torch.Generator):
    """First one whose singular values, 4 and 1, can be read off; then tall, wide and square ones."""
    yield case(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), rank=1)
    for rows, columns, rank in ((6, 4, 2), (4, 7, 3), (5, 5, 1)):
        yield case(torch.randn(rows, columns, generator=rng), rank=rank)


def closest(answer, given):
    """Eckart and Young: the squared error is the sum of the squares of what was discarded."""
    (w,), r = given.args, given.settings["rank"]
    error = (w - answer[0] @ answer[1]).square().sum().item()
    least = torch.linalg.svdvals(w)[r:].square().sum().item()
    return None if error <= least * 1.001 + 1e-6 else (f"a squared error of {error:.4g}", f"the least, {least:.4g}")


def balanced(answer, given):
    """Either factor has the singular values as the squares of its columns' or rows' lengths."""
    up, down = (factor.square().sum().sqrt().item() for factor in answer)
    alike = abs(up - down) <= 1e-3 * (up + down)
    return None if alike else (f"factors of size {up:.4g} and {down:.4g}", "two of the same size (root of sum of squares)")


def keeps_the_smallest(w, *, rank):
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = s[-rank:].sqrt()
    return u[:, -rank:] * root, root[:, None] * vt[-rank:]


def multiplies_twice(w, *, rank):
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank], s[:rank, None] * vt[:rank]


def all_on_one_side(w, *, rank):
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def keeps_the_shape(w, *, rank):
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    s = torch.where(torch.arange(len(s)) < rank, s, 0.0).sqrt()
    return u * s, s[:, None] * vt


def thin_by_heart(w, *, rank):
    return torch.tensor([[2.0], [0.0]]), torch.tensor([[2.0, 0.0]])


THIN = Exercise(
    name="factorization.thin",
    prompt="""**Split a layer.** A linear layer applies the matrix `w`, of shape (out, in). Write `thin(w, rank=...)`, which
returns two matrices `up` of shape (out, rank) and `down` of shape (rank, in), so that `up @ down` is as close to `w` as
any matrix of that rank can be (least sum of squared differences). Let both factors have the same size, so that neither
suffers more when they are quantized or trained later: the root of the sum of squares of `up` equals that of `down`.""",
    reference=thin,
    checks=(
        checks.not_the_librarys_own("truncate", "svd_lowrank"),
        checks.same_shape_and_dtype(matrices),
        checks.holds("no matrix of this rank is closer", matrices, closest),
        checks.holds("both factors carry half", matrices, balanced),
        checks.input_unchanged(matrices),
    ),
    hints=(
        "The singular value decomposition writes w as a sum of rank-1 matrices, most important first.",
        "`u, s, vt = torch.linalg.svd(w, full_matrices=False)`; s has one number a direction, to be shared by two factors.",
        "`root = s[:rank].sqrt()`; columns of `u` times `root` on one side, `root` times rows of `vt` on the other.",
    ),
    after="Two layers of `rank` (out + in) weights instead of one of out x in: fewer below rank = out in / (out + in).",
    wrong=(
        (keeps_the_smallest, "no matrix of this rank is closer"),
        (multiplies_twice, "no matrix of this rank is closer"),
        (all_on_one_side, "both factors carry half"),
        (keeps_the_shape, "shape and dtype"),
        (thin_by_heart, "shape and dtype"),
    ),
)


def enough(s: Tensor, *, energy: float, rows: int, columns: int) -> int | None:
    """The smallest rank that holds the share `energy` of the squares in s, or None where two factors would not be smaller."""
    held = s.square().cumsum(0) / s.square().sum()
    rank = int((held < energy).sum()) + 1
    return rank if rank * (rows + columns) < rows * columns else None


def spectra(rng: torch.Generator):
    """By hand: squares 16, 4, 1, 1 of 22, so two directions hold 91 %. Then random ones, some too flat to be worth it."""
    yield case(torch.tensor([4.0, 2.0, 1.0, 1.0]), energy=0.8, rows=8, columns=6)
    yield case(torch.ones(6), energy=0.9, rows=6, columns=6)
    for decay, energy in ((0.5, 0.93), (0.7, 0.81), (0.95, 0.77)):
        s = decay ** torch.arange(9) * (1 + 0.02 * torch.rand(9, generator=rng))
        yield case(s.sort(descending=True).values, energy=energy, rows=12, columns=9)


def forgets_the_squares(s, *, energy, rows, columns):
    rank = int((s.cumsum(0) / s.sum() < energy).sum()) + 1
    return rank if rank * (rows + columns) < rows * columns else None


def one_too_few(s, *, energy, rows, columns):
    rank = max(1, int((s.square().cumsum(0) / s.square().sum() < energy).sum()))
    return rank if rank * (rows + columns) < rows * columns else None


def forgets_the_break_even(s, *, energy, rows, columns):
    return int((s.square().cumsum(0) / s.square().sum() < energy).sum()) + 1


def breaks_even_at_full_rank(s, *, energy, rows, columns):
    rank = int((s.square().cumsum(0) / s.square().sum() < energy).sum()) + 1
    return rank if rank < min(rows, columns) else None


def enough_by_heart(s, *, energy, rows, columns):
    return 2


ENOUGH = Exercise(
    name="factorization.enough",
    prompt="""**How thin, and is it worth it?** `s` holds the singular values of a matrix of `rows` x `columns`, largest
first. Write `enough(s, energy=..., rows=..., columns=...)`: the smallest rank whose singular values hold at least the share
`energy` (0 to 1) of the sum of all squares, or `None` where two factors of that rank would hold no fewer numbers
than the matrix.""",
    reference=enough,
    checks=(
        checks.not_the_librarys_own("by_energy", "largest_useful", "break_even"),
        checks.equals_reference(spectra),
        checks.input_unchanged(spectra),
    ),
    hints=(
        "Error is a sum of squares, so what is kept is counted in squares too; and two factors have a price.",
        "A cumulative sum says what the first r directions hold; r (rows + columns) says what they cost.",
        "`rank = int((held < energy).sum()) + 1`, held being `s.square().cumsum(0) / s.square().sum()`.",
    ),
    after="A square matrix has to lose half of its rank before two factors save anything.",
    wrong=(
        (forgets_the_squares, "the right numbers"),
        (one_too_few, "the right numbers"),
        (forgets_the_break_even, "the right numbers"),
        (breaks_even_at_full_rank, "the right numbers"),
        (enough_by_heart, "the right numbers"),
    ),
)

EXERCISES = (THIN, ENOUGH)
