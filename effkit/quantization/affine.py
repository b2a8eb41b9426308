"""The affine map: integers that stand for real numbers.

Problem   A weight of 32 bits carries far more precision than the model needs; memory and bandwidth pay for it.
Idea      x ~ scale * (q - zero_point): q a code of a few bits, one scale and one zero point a group of numbers.
          The zero point is itself a code, so that the real number 0 is represented exactly.
Cost      |error| <= scale / 2 inside the range.
Relation  Written x ~ q * s + z with a real offset z, z = -scale * zero_point: an integer zero point restricts z to
          multiples of the scale, and buys exact zeros and integer arithmetic.
Source    Jacob et al. 2017, arXiv:1712.05877, eq. 1.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

#: scales are kept in bfloat16: half the bytes of float32 and the same range, so that the scale of tiny weights cannot underflow
SCALE_DTYPE = torch.bfloat16
#: of scales: the smallest number of bfloat16 and float32 that has all its digits
FLOOR = 2.0**-126


def grouped(w: Float[Tensor, "rows n"], group_size: int) -> Float[Tensor, "rows groups size"]:
    """Consecutive numbers of a row that share a scale. group_size -1: a whole row; 0: the whole tensor is one group.

    The last group is filled with zeros, which cost nothing: every range contains 0 and 0 is exact."""
    if group_size == 0:
        return w.reshape(1, 1, -1)
    size = w.shape[1] if group_size == -1 else min(group_size, w.shape[1])
    return F.pad(w, (0, -w.shape[1] % size)).unflatten(1, (-1, size))


def ungrouped(g: Float[Tensor, "rows groups size"], shape: tuple[int, ...]) -> Float[Tensor, "rows n"]:
    """The inverse of `grouped`."""
    return g.reshape(shape) if g.shape[:2] == (1, 1) else g.flatten(1)[:, : shape[1]]


def grid(
    low: Float[Tensor, "*g 1"], high: Float[Tensor, "*g 1"], *, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a grid that covers [low, high] and 0. A group of zeros gets scale 1.

    Returns scale (bfloat16 values) and zero_point (a code in 0 ... 2^bits - 1), both float32 of shape (*g, 1)."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero_point = (-low / scale.clamp(min=FLOOR)).round().clamp(0, top)
    return storable(scale), zero_point


def storable(scale: Float[Tensor, "*g 1"]) -> Float[Tensor, "*g 1"]:
    """The next bfloat16 value from above: rounding down would push the largest weights off the grid."""
    scale = torch.where(scale > 0, scale.clamp(min=FLOOR), 1.0)
    short = scale.to(SCALE_DTYPE)
    return torch.where(short.float() < scale, torch.nextafter(short, short.new_tensor(torch.inf)), short).float()


def quantize(
    x: Float[Tensor, "*g n"], scale: Float[Tensor, "*g 1"], zero_point: Float[Tensor, "*g 1"], *, bits: int
) -> UInt8[Tensor, "*g n"]:
    """q = clamp(round(x / scale + zero_point)); ties to even, as everywhere in IEEE arithmetic.

    The whole part of the zero point is added after rounding: before, it would cost digits, and turn ties to odd."""
    whole = zero_point.round()
    return ((x.float() / scale + (zero_point - whole)).round() + whole).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(
    q: UInt8[Tensor, "*g n"], scale: Float[Tensor, "*g 1"], zero_point: Float[Tensor, "*g 1"]
) -> Float[Tensor, "*g n"]:
    """x ~ scale * (q - zero_point)."""
    return scale * (q.float() - zero_point)


def pack(q: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows m"]:
    """Eight codes of b bits in b bytes, first code in the lowest bits; rows are filled up with zeros."""
    words = F.pad(q, (0, -q.shape[1] % 8)).unflatten(1, (-1, 8)).long()
    words = (words << (torch.arange(8, device=q.device) * bits)).sum(-1, keepdim=True)
    return ((words >> (torch.arange(bits, device=q.device) * 8)) & 255).to(torch.uint8).flatten(1)


def unpack(packed: UInt8[Tensor, "rows m"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The inverse of `pack`; the two usual widths have a shorter way."""
    if bits == 8:
        return packed[:, :n]
    if bits == 4:
        halves = packed[..., None] >> torch.tensor((0, 4), dtype=torch.uint8, device=packed.device)
        return (halves & 15).flatten(1)[:, :n]
    words = packed.unflatten(1, (-1, bits)).long()
    words = (words << (torch.arange(bits, device=packed.device) * 8)).sum(-1, keepdim=True)
    return ((words >> (torch.arange(8, device=packed.device) * bits)) & (2**bits - 1)).to(torch.uint8).flatten(1)[:, :n]
