"""GPTQ: rounding that passes its errors on.

Problem   Round to nearest treats each weight as if it stood alone. What counts is the layer's output, and there the
          errors of inputs that rise and fall together can cancel.
Idea      min ||(W - W_hat) X||^2 with W_hat on a grid. Round a column; then move the columns not yet rounded so that
          they make up for it as well as least squares can. With H = X X^T over these columns, an error e in column i is
          answered by -e H^-1[i, :] / H^-1[i, i] in the others: optimal brain surgery, its order fixed in advance. One
          Cholesky factor of H^-1 holds all the rows that this needs, for all outputs at once.
Order     Columns with the largest inputs first, while many are left to make up for them (activation order). Their
          groups and grids are those of the original weights, so what is stored is what RTN stores.
Cost      A pass over the calibration examples; in^3 / 3 macs for the factor and out * in^2 / 2 for the updates a layer.
Left out  Earlier layers' errors: all inputs are those of the unrounded model. GPTQ's authors quantize block after block.
          Zeros: a pruned weight is moved like any other, and may come back.
Source    Frantar et al. 2022, arXiv:2210.17323, algorithm 1; Hassibi & Stork 1993, NIPS 5 (optimal brain surgeon).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from effkit.core.calibration import Statistics
from effkit.core.checks import require_float, require_int
from effkit.core.task import Task
from effkit.core.technique import Paper
from effkit.quantization.affine import dequantize, grouped, quantize, ungrouped
from effkit.quantization.layers import look
from effkit.quantization.observers import OBSERVERS, REAL_ZERO
from effkit.quantization.packed import RTN, PackedWeight

BLOCK = 32  # columns after which the rest is brought up to date at once: one large product instead of many small ones


def inverse_factor(gram: Float[Tensor, "n n"], *, damping: float) -> Float[Tensor, "n n"]:
    """Upper triangular U with U^T U = (G + damping * mean(diagonal of G) * I)^-1.

    U[i, i:] / U[i, i] is row i of the inverse of what is left of G once the columns before i are fixed, over its
    diagonal element."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    damp = damping * mean if mean > 0 else torch.ones_like(mean)  # no input ever: rounding to nearest
    lower = torch.linalg.cholesky(gram + damp * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def feed_back(
    w: Float[Tensor, "out n"], factor: Float[Tensor, "n n"], scale: Float[Tensor, "out n"], zero_point: Float[Tensor, "out n"],
    *, bits: int,
) -> UInt8[Tensor, "out n"]:  # fmt: skip
    """Codes of the columns, from the first to the last, each column's error answered by those behind it."""
    w, factor, codes = w.clone(), factor.to(w.dtype), torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, w.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, w.shape[1]))
        errors = torch.empty_like(w[:, block])
        for i in range(block.start, block.stop):
            one = slice(i, i + 1)
            codes[:, one] = quantize(w[:, one], scale[:, one], zero_point[:, one], bits=bits)
            off = (w[:, one] - dequantize(codes[:, one], scale[:, one], zero_point[:, one])) / factor[i, i]
            w[:, i + 1 : block.stop] -= off * factor[i, i + 1 : block.stop]
            errors[:, i - start] = off[:, 0]
        w[:, block.stop :] -= errors @ factor[block, block.stop :]
    return codes


@dataclass(frozen=True)
class GPTQ(RTN):
    """RTN whose errors are passed on from column to column; settings as RTN's. Convolutions, and layers that no input
    reaches, are rounded to nearest.

    examples   how many of task.calib are looked at
    order      columns with the largest inputs first; False: from left to right
    damping    added to the inputs' second moments, as a share of their mean
    """

    examples: int = 256
    order: bool = True
    damping: float = 0.01

    paper = Paper("Frantar et al.", 2022,
                  "GPTQ: accurate post-training quantization for generative pre-trained transformers",
                  "arXiv:2210.17323", "algorithm 1")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        require_int("examples", self.examples, 1)
        require_float("damping", self.damping, 0.0, open_low=True, hint="inputs that leave a direction unused make G singular")

    def statistics(self, model: nn.Module, task: Task) -> Mapping[str, Statistics]:
        return look(self, model, task, otherwise="rounded to nearest")

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> PackedWeight:
        if seen is None:
            return super().store(weight, None)
        groups = grouped(weight.float(), self.group_size)
        grid = OBSERVERS[self.search](groups, bits=self.bits, symmetric=self.symmetric)
        scale, zero_point = (ungrouped(part.expand_as(groups), tuple(weight.shape)) for part in grid)
        columns = torch.arange(weight.shape[1], device=weight.device)
        sequence = seen.gram.diagonal().argsort(descending=True, stable=True) if self.order else columns
        factor = inverse_factor(seen.gram[sequence][:, sequence], damping=self.damping)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        codes[:, sequence] = feed_back(
            weight.float()[:, sequence], factor, scale[:, sequence], zero_point[:, sequence], bits=self.bits
        )
        return PackedWeight.from_codes(codes, grid, real_zero=self.search in REAL_ZERO, **self.format())
