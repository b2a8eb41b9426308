"""Grids that are not uniform: a table of levels, and each weight the number of a level.

Problem   Weights crowd around zero, and a uniform grid spends most of its codes where few of them are.
Idea      w ~ scale * levels[code], the levels wherever they serve best:
            KMeans  fitted to the layer: each level the mean of the weights nearest to it (Lloyd), no scales
            NF4     fitted to the normal distribution: quantiles, so that each code is about equally frequent
            FP8     E4M3: as many levels to each power of two, so that the relative error is the same everywhere
            MXFP4   E2M1: the same in 4 bits, with a power of two as the scale of 32 weights
Cost      A look-up a weight: slower than arithmetic on codes where nothing is compiled for it, as here.
Law       Whatever the levels, each weight gets the nearest one; k-means is never worse than the grid it starts from.
Limit     Quantiles make codes equally frequent, which is not what least squared error asks for (Lloyd-Max), and equally
          spaced levels followed by an entropy code come within 1.53 dB of what any code can do (`entropy`).
          Zero is a level of NF4, FP8 and MXFP4; of KMeans only where zeros stand apart, as they do after pruning by size.
Left out  Huffman coding of the codes, and training the levels on (Han et al., sec. 3.1 and 4); FP8 products in hardware, and
          inputs in these formats. Doubly quantized scales are E4M3; bitsandbytes has a table of its own for them.
Source    Han et al. 2015, arXiv:1510.00149; Dettmers et al. 2023, arXiv:2305.14314; Micikevicius et al. 2022,
          arXiv:2209.05433; Rouhani et al. 2023, arXiv:2310.10537; Max 1960, doi:10.1109/TIT.1960.1057548.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from effkit.core.calibration import Statistics
from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.technique import Paper
from effkit.quantization.affine import grouped, pack, storable, ungrouped, unpack
from effkit.quantization.layers import WeightOnly, WeightStore

# Levels


def nearest(x: Float[Tensor, "*s"], levels: Float[Tensor, "k"]) -> UInt8[Tensor, "*s"]:
    """The number of the nearest of at most 256 sorted levels. Half way between two, the one an even number of levels away
    from zero: where the levels are floats, that is their ties-to-even."""
    halves = (levels[1:] + levels[:-1]) / 2
    low, high = (torch.bucketize(x.contiguous(), halves, out_int32=True, right=right) for right in (False, True))
    return torch.where((low - levels.abs().argmin()) % 2 == 0, low, high).to(torch.uint8)


def minifloat(exponent: int, mantissa: int, *, largest: float) -> Float[Tensor, "k"]:
    """All finite values, sorted, of a float of so many bits and a sign: (1 + m / 2^M) 2^(e - bias), and without the 1, one
    exponent higher, for e = 0; bias = 2^(E - 1) - 1. What exceeds `largest` stands for no number."""
    e, m = torch.arange(2**exponent)[:, None], torch.arange(2**mantissa) / 2**mantissa
    size = ((e > 0) + m) * 2.0 ** (e.clamp(min=1) - 2 ** (exponent - 1) + 1)
    size = size[size <= largest]  # in order, from 0 on
    return torch.cat((-size[1:].flip(0), size))


def normal_float() -> Float[Tensor, "16"]:
    """NF4: quantiles of the normal distribution, half of them below zero and half above, each half evenly spaced in
    probability from 1/2 on to what the outermost of 15 and of 16 codes would stand for, on average; over the largest."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64))
    below = torch.special.ndtri(torch.linspace(0.5, end, 8, dtype=torch.float64))
    return (torch.cat((-below[1:].flip(0), above)) / above[-1]).float()


E4M3, E2M1, NORMAL = minifloat(4, 3, largest=448.0), minifloat(2, 1, largest=6.0), normal_float()


def lloyd(x: Float[Tensor, "n"], levels: Float[Tensor, "k"], *, iterations: int) -> Float[Tensor, "k"]:
    """Levels, sorted as they came, that are the means of the numbers nearest to them, or on their way there.

    Sorted numbers fall into runs, one a level, and a running sum has the sum of each: an iteration looks for the k - 1
    boundaries and never at the n numbers. A level that nothing is near to stays."""
    ordered = x.flatten().float().sort().values.double()
    sums = torch.cat((ordered.new_zeros(1), ordered.cumsum(0)))
    levels, ends = levels.double(), torch.tensor([0, len(ordered)], device=x.device)
    for _ in range(iterations):
        cuts = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2, right=True)
        cuts = torch.cat((ends[:1], cuts, ends[1:]))
        held, moved = cuts.diff(), sums[cuts].diff()
        means = torch.where(held > 0, moved / held.clamp(min=1), levels)
        if torch.equal(means, levels):
            break
        levels = means
    return levels.float()


def entropy(codes: Tensor) -> float:
    """Bits that an ideal code, Huffman's nearly, takes for each of these whole numbers: -sum p log2 p."""
    p = codes.flatten().unique(return_counts=True)[1].double() / codes.numel()
    return -(p * p.log2()).sum().item()


# Scales


def shared_exponent(largest: Float[Tensor, "*g 1"]) -> UInt8[Tensor, "*g 1"]:
    """E8M0: floor(log2 largest) - 2, plus 127; 2 is the exponent of 6, E2M1's largest. What then lies above 6 becomes 6.
    A block of zeros gets 2^0."""
    exponent = torch.frexp(largest).exponent - 1 - 2  # frexp's mantissa is 1/2 to 1
    return torch.where(largest > 0, exponent + 127, 127).clamp(0, 254).to(torch.uint8)


BLOCK = 256  # scales that share a scale of their own, where quantization is double


def double_quantize(scale: Float[Tensor, "rows groups 1"]) -> tuple[UInt8[Tensor, "rows groups"], Tensor, Tensor]:
    """Scales in 8 bits: their mean, which a scale alone would have to span, is taken off; then FP8 in blocks of 256.

    Returns bytes (E4M3), one float32 a block, and the mean: scale ~ E4M3(byte) * block + mean."""
    mean = scale.mean()
    blocks = grouped((scale - mean).reshape(1, -1), BLOCK)
    block = blocks.abs().amax(-1, keepdim=True) / 448
    block = torch.where(block > 0, block, 1.0)
    short = ungrouped(blocks / block, (1, scale.numel())).view(scale.shape[:2]).to(torch.float8_e4m3fn)
    return short.view(torch.uint8), block.flatten(), mean


# The store


@stored
class Codebook(WeightStore):
    """A matrix as packed codes, levels, and scales of one of the kinds "" (none), "float32", "bfloat16", "e8m0" and
    "double"; group_size as in `grouped`.

    size  how many levels there are, at most 2^bits"""

    codes: Tensor
    levels: Tensor
    scale: Tensor | None
    block: Tensor | None
    mean: Tensor | None

    def __init__(self, shape: tuple[int, ...], bits: int, size: int, group_size: int = 0, kind: str = ""):
        super().__init__()
        self.shape, self.bits, self.size, self.group_size, self.kind = tuple(shape), bits, size, group_size, kind
        rows, columns = self.shape
        groups = grouped(torch.empty(self.shape, device="meta"), group_size).shape[:2]
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(kind, torch.uint8)
        double = kind == "double"
        self.register_buffer("codes", torch.zeros(rows, -(-columns // 8) * bits, dtype=torch.uint8))
        self.register_buffer("levels", torch.zeros(size))
        self.register_buffer("scale", torch.zeros(groups, dtype=dtype) if kind else None)
        self.register_buffer("block", torch.zeros(-(-groups.numel() // BLOCK)) if double else None)
        self.register_buffer("mean", torch.zeros(()) if double else None)

    @classmethod
    def from_float(
        cls, weight: Float[Tensor, "rows n"], levels: Float[Tensor, "k"], *, bits: int, group_size: int = 0, kind: str = ""
    ) -> "Codebook":
        """Every weight at the level nearest to it, once divided by its group's scale as that is stored."""
        new = cls(tuple(weight.shape), bits, len(levels), group_size, kind).to(weight.device)
        new.levels = levels.to(weight.device)
        groups = grouped(weight.detach().float(), group_size)
        new.hold(groups.abs().amax(-1, keepdim=True))
        scale = new.scales()
        codes = nearest(groups / torch.where(scale == 0, 1.0, scale), new.levels)
        new.codes = pack(ungrouped(codes, new.shape), bits)
        return new

    def hold(self, largest: Float[Tensor, "rows groups 1"]) -> None:
        """Scales that put the largest weight of each group on the outermost level (E8M0: within a factor of two)."""
        full = largest / self.levels[-1]
        if self.kind == "double":
            self.scale, self.block, self.mean = double_quantize(full)
        elif self.kind == "e8m0":
            self.scale = shared_exponent(largest).squeeze(-1)
        elif self.scale is not None:
            full = storable(full) if self.kind == "bfloat16" else full
            self.scale = full.squeeze(-1).to(self.scale.dtype)

    def scales(self) -> Float[Tensor, "rows groups 1"]:
        """One number a group, as floats."""
        if self.scale is None:
            return torch.ones(1, 1, 1, device=self.levels.device)
        if self.kind == "e8m0":
            return torch.exp2(self.scale.float() - 127)[..., None]
        if self.block is None or self.mean is None:
            return self.scale.float()[..., None]
        blocks = grouped(self.scale.view(torch.float8_e4m3fn).float().reshape(1, -1), BLOCK) * self.block.view(1, -1, 1)
        return ungrouped(blocks, (1, self.scale.numel())).view(*self.scale.shape, 1) + self.mean

    def forward(self) -> Float[Tensor, "rows n"]:
        """The matrix in float32."""
        codes = unpack(self.codes, self.bits, self.shape[1])
        w = self.levels.float().index_select(0, codes.flatten().int()).view(self.shape)
        return w if self.scale is None else ungrouped(grouped(w, self.group_size) * self.scales(), self.shape)


# The techniques


@dataclass(frozen=True)
class KMeans(WeightOnly):
    """2^bits levels a layer, fitted to its weights by Lloyd's iterations from evenly spaced levels."""

    bits: int = 4
    iterations: int = 300
    layers: str = "*"

    paper = Paper("Han et al.", 2015,
                  "Deep compression: compressing deep neural networks with pruning, trained quantization and Huffman coding",
                  "arXiv:1510.00149", "eq. 2")  # fmt: skip

    def __post_init__(self):
        require_int("bits", self.bits, 2, 8, hint="codes are packed into bytes")
        require_int("iterations", self.iterations, 0, hint="0 leaves the levels evenly spaced")

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> Codebook:
        w = weight.float()
        even = torch.lerp(w.min(), w.max(), torch.linspace(0, 1, 2**self.bits, device=w.device))
        return Codebook.from_float(w, lloyd(w, even, iterations=self.iterations), bits=self.bits)


@dataclass(frozen=True)
class NF4(WeightOnly):
    """Normal quantiles times the largest magnitude of a group, which is itself held in 8 bits where `double`."""

    group_size: int = 64
    double: bool = True
    layers: str = "*"

    paper = Paper("Dettmers et al.", 2023, "QLoRA: efficient finetuning of quantized LLMs",
                  "arXiv:2305.14314", "eq. 4, appendix E")  # fmt: skip

    def __post_init__(self):
        require_int("group_size", self.group_size, -1, hint="-1 is a whole row, 0 the whole tensor")

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> Codebook:
        kind = "double" if self.double else "float32"
        return Codebook.from_float(weight, NORMAL, bits=4, group_size=self.group_size, kind=kind)


@dataclass(frozen=True)
class FP8(WeightOnly):
    """E4M3: a sign, 4 bits of exponent and 3 of mantissa; a scale a row, or a group."""

    group_size: int = -1
    layers: str = "*"

    paper = Paper("Micikevicius et al.", 2022, "FP8 formats for deep learning",
                  "arXiv:2209.05433", "table 1")  # fmt: skip

    def __post_init__(self):
        require_int("group_size", self.group_size, -1, hint="-1 is a whole row, 0 the whole tensor")

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> Codebook:
        return Codebook.from_float(weight, E4M3, bits=8, group_size=self.group_size, kind="bfloat16")


@dataclass(frozen=True)
class MXFP4(WeightOnly):
    """Blocks of 32 weights, each weight a sign, 2 bits of exponent and 1 of mantissa, and a power of two a block."""

    layers: str = "*"

    paper = Paper("Rouhani et al.", 2023, "Microscaling data formats for deep learning",
                  "arXiv:2310.10537", "algorithm 1")  # fmt: skip

    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> Codebook:
        return Codebook.from_float(weight, E2M1, bits=4, group_size=32, kind="e8m0")
