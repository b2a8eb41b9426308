"""Tucker-2: one convolution becomes three, of which only the small middle one slides.

Problem   A filter bank is a tensor of four modes, out x in x height x width; flattening it to a matrix forgets that
          channels on either side may be redundant independently of each other.
Idea      W ~ core x_1 U_out x_2 U_in: a 1 x 1 convolution U_in^T to fewer channels, the core where the window slides,
          a 1 x 1 convolution U_out back. Height and width are small already and stay.
HOSVD     U_n = leading left singular vectors of W unfolded along mode n: one SVD a mode, at most sqrt(2) off the best.
HOOI      Alternate: U_out is the best for the tensor that U_in has projected, and the other way round. Each step is an
          SVD that maximizes ||core||, and ||W - W_hat||^2 = ||W||^2 - ||core||^2, so the error can only fall.
Cost      in R_in + R_in R_out h w + R_out out weights instead of in out h w; three layers to call instead of one.
Source    Kim et al. 2015, arXiv:1511.06530, sec. 3.1; HOSVD: De Lathauwer et al. 2000a, doi:10.1137/S0895479896305696;
          HOOI: De Lathauwer et al. 2000b, doi:10.1137/S0895479898346995.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_int
from effkit.core.report import Reading
from effkit.core.surgery import find, inherit, note, replace_modules
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import FLOAT_WEIGHTS, UNMASKED
from effkit.factorization.rank import by_energy, require_one
from effkit.factorization.svd import outermost, wide

Factors = tuple[Tensor, Tensor, Tensor]  # U_out (out, R_out), core (R_out, R_in, h, w), U_in (in, R_in)


def unfold(w: Float[Tensor, "..."], mode: int) -> Float[Tensor, "n rest"]:
    """The tensor as a matrix whose rows are the slices along a mode."""
    return w.movedim(mode, 0).flatten(1)


def leading(w: Float[Tensor, "..."], mode: int, rank: int) -> Float[Tensor, "n rank"]:
    """The first left singular vectors of an unfolding: eigenvectors of its Gram matrix, which is small."""
    m = unfold(w, mode).double()
    return torch.linalg.eigh(m @ m.T).eigenvectors.flip(1)[:, :rank].to(w.dtype)


def project(w: Float[Tensor, "o i h w"], u_out: Float[Tensor, "o p"], u_in: Float[Tensor, "i q"]) -> Float[Tensor, "p q h w"]:
    """The coordinates of w in two orthonormal bases: w x_1 U_out^T x_2 U_in^T."""
    return torch.einsum("oihw,op,iq->pqhw", w, u_out, u_in)


def expand(core: Float[Tensor, "p q h w"], u_out: Float[Tensor, "o p"], u_in: Float[Tensor, "i q"]) -> Float[Tensor, "o i h w"]:
    """The tensor that has these coordinates: core x_1 U_out x_2 U_in."""
    return torch.einsum("pqhw,op,iq->oihw", core, u_out, u_in)


def hosvd(w: Float[Tensor, "o i h w"], ranks: tuple[int, int]) -> Factors:
    """Each mode on its own. Raises ValueError unless ranks are two, of the outputs and of the inputs."""
    if not (isinstance(ranks, tuple | list) and len(ranks) == 2):
        raise ValueError(f"ranks must be two whole numbers, (R_out, R_in), got {ranks!r}: one for each mode of channels")
    for name, rank, channels in zip(("R_out", "R_in"), ranks, w.shape, strict=False):
        require_int(name, rank, 1, channels, hint="a mode has no more directions than channels")
    u_out, u_in = (leading(w, mode, rank) for mode, rank in enumerate(ranks))
    return u_out, project(w, u_out, u_in), u_in


def hooi(w: Float[Tensor, "o i h w"], ranks: tuple[int, int], *, rounds: int = 20, tolerance: float = 1e-5) -> Factors:
    """Each mode given the other, from HOSVD on, until ||core|| gains less than `tolerance` of itself in a round."""
    u_out, core, u_in = hosvd(w, ranks)
    for _ in range(rounds):
        before = core.norm()
        u_out = leading(torch.einsum("oihw,iq->oqhw", w, u_in), 0, ranks[0])
        u_in = leading(torch.einsum("oihw,op->pihw", w, u_out), 1, ranks[1])
        core = project(w, u_out, u_in)
        if core.norm() <= before * (1 + tolerance):
            break
    return u_out, core, u_in


@stored
class TuckerConv2d(nn.Module):
    """y = restore(core(reduce(x))): three plain convolutions; the window, its stride and padding are the core's."""

    def __init__(self):
        super().__init__()
        # places for `from_factors`, or for a file, to fill
        self.reduce: nn.Conv2d = nn.Identity()  # type: ignore[assignment]
        self.core: nn.Conv2d = nn.Identity()  # type: ignore[assignment]
        self.restore: nn.Conv2d = nn.Identity()  # type: ignore[assignment]

    @classmethod
    def from_factors(cls, factors: Factors, like: nn.Conv2d) -> "TuckerConv2d":
        """A layer in the place of `like`: its window, dtype and bias, and frozen where its weight was."""
        (u_out, core, u_in), new, weight = factors, cls(), like.weight
        new.reduce = _convolution(u_in.T[:, :, None, None], weight)
        new.core = _convolution(core, weight, **_window(like))
        new.restore = _convolution(u_out[:, :, None, None], weight)
        new.restore.bias = like.bias
        return new

    @property
    def ranks(self) -> tuple[int, int]:
        """Channels after and before the core: R_out, R_in."""
        return self.core.out_channels, self.core.in_channels

    @torch.no_grad()
    def dense(self) -> nn.Conv2d:
        """The single convolution that computes the same."""
        u_out, u_in = wide(self.restore.weight)[:, :, 0, 0], wide(self.reduce.weight)[:, :, 0, 0].T
        one = _convolution(expand(wide(self.core.weight), u_out, u_in), self.core.weight, **_window(self.core))
        one.bias = self.restore.bias
        return one

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o y x"]:
        return self.restore(self.core(self.reduce(x)))


def _window(layer: nn.Conv2d) -> dict:
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}


def _convolution(w: Float[Tensor, "o i h w"], like: Tensor, **window) -> nn.Conv2d:
    """A convolution with this weight, of the dtype and trainability of another's."""
    made = nn.Conv2d(w.shape[1], w.shape[0], (w.shape[2], w.shape[3]), bias=False, device="meta", **window)
    made.weight = nn.Parameter(w.to(like.dtype).contiguous(), requires_grad=like.requires_grad)
    return made


@dataclass(frozen=True)
class Tucker2(Technique):
    """Every convolution as three, found by HOOI; one that would grow (1 x 1 windows, few channels) is left alone.

    One of three says how thin; `fraction` = 0.5 where none is given:
    rank       channels around the core, on either side; a layer with fewer keeps what it has
    fraction   of the channels on either side
    energy     of the squared singular values of either unfolding, the share that its rank has to hold
    """

    rank: int | None = None
    fraction: float | None = None
    energy: float | None = None
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS, UNMASKED})
    paper = Paper("Kim et al.", 2015,
                  "Compression of deep convolutional neural networks for fast and low power mobile applications",
                  "arXiv:1511.06530", "sec. 3.1")  # fmt: skip

    def __post_init__(self):
        require_one(self, "rank", "fraction", "energy")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        built = {}
        for path, layer in find(model, outermost(model, nn.Conv2d, TuckerConv2d), layers=self.layers, by="Tucker2"):
            dense: nn.Conv2d = layer.dense() if isinstance(layer, TuckerConv2d) else layer  # type: ignore[assignment]
            weight = wide(dense.weight)
            ranks = self.ranks(weight)
            if dense.groups != 1 or size(weight.shape, ranks) >= weight.numel():
                grouped = f"its {dense.groups} groups of channels do not mix"
                grows = f"three layers of ranks {ranks} would hold no fewer numbers"
                note(model, path, "left alone", grouped if dense.groups != 1 else grows)
                continue
            built[id(layer)] = inherit(TuckerConv2d.from_factors(hooi(weight, ranks), dense), layer)
            note(model, path, f"{type(layer).__name__} -> TuckerConv2d of ranks {ranks}", "Tucker2")
        if self.rank is not None and not built:
            raise ValueError(f"rank must be smaller here, got {self.rank}: with it every convolution grows; try fraction=0.5")
        return replace_modules(model, built)

    def ranks(self, w: Float[Tensor, "o i h w"]) -> tuple[int, int]:
        """R_out and R_in of one layer."""
        channels = w.shape[:2]
        if self.energy is not None:
            o, i = (by_energy(torch.linalg.svdvals(unfold(w, mode)), self.energy) for mode in (0, 1))
            return o, i
        part = 0.5 if self.fraction is None else self.fraction
        o, i = (min(n, self.rank) if self.rank is not None else max(1, round(part * n)) for n in channels)
        return o, i

    def claim(self, model: nn.Module) -> Reading:
        """What the factorized convolutions hold, as a share of what they held before."""
        layers = [m for m in model.modules() if isinstance(m, TuckerConv2d)]
        shapes = [(m.restore.out_channels, m.reduce.in_channels, *m.core.kernel_size) for m in layers]
        held = sum(size(shape, m.ranks) for shape, m in zip(shapes, layers, strict=True))
        dense = sum(math.prod(shape) for shape in shapes)
        return Reading(held / dense if layers else 1.0, "of the factorized weights", "counted", better="lower")


def size(shape: Sequence[int], ranks: tuple[int, int]) -> int:
    """Numbers in the three layers: in R_in + R_in R_out h w + R_out out."""
    (o, i, h, w), (p, q) = shape, ranks
    return i * q + p * q * h * w + p * o
