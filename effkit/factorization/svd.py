"""Truncated SVD: one linear layer becomes two thin ones.

Problem   A layer of m x n weights costs m n multiplications a token, whether or not its rows say different things.
Idea      W = U diag(s) V^T; keep the r largest singular values: y = U_r sqrt(s_r) (sqrt(s_r) V_r^T x), two layers with
          r (m + n) weights. No matrix of rank r is closer: ||W - W_r||_F^2 = s_{r+1}^2 + s_{r+2}^2 + ...
Split     sqrt(s) on either side: both factors have the same norm, so quantizing or training treats neither worse.
Cost      One SVD a layer, O(m n min(m, n)). Smaller and cheaper only below the break-even rank m n / (m + n); a layer
          that would grow is left alone, with a note. Two small products instead of one: latency may still lose.
Left out  What the inputs look like: weighted_svd.py.
Source    Eckart & Young 1936, doi:10.1007/BF02288367; for networks Denton et al. 2014, arXiv:1404.0736, sec. 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.report import Reading
from effkit.core.surgery import dense_weight, find, inherit, note, replace_modules
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import FLOAT_WEIGHTS, UNMASKED
from effkit.factorization.rank import by_budget, by_energy, largest_useful, require_one


def wide(w: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The numbers in float32 at least: no decomposition exists in half precision."""
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))


def truncate(w: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The two factors whose product is the closest matrix of this rank, each with the roots of the singular values."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]  # products, not slices: a slice would keep all of u alive


@stored
class LowRankLinear(nn.Module):
    """y = up(down(x)), two plain linear layers that later techniques may rewrite; all sizes are read from them."""

    def __init__(self):
        super().__init__()
        # places for `from_factors`, or for a file, to fill
        self.down: nn.Linear = nn.Identity()  # type: ignore[assignment]
        self.up: nn.Linear = nn.Identity()  # type: ignore[assignment]

    @classmethod
    def from_factors(cls, up: Float[Tensor, "out r"], down: Float[Tensor, "r in"], like: nn.Module) -> "LowRankLinear":
        """A layer in the place of `like`: its dtype, its bias, and frozen where its weight was."""
        new, weight, bias = cls(), _last(like).weight, _last(like).bias
        new.down = nn.Linear(down.shape[1], down.shape[0], bias=False, device="meta")
        new.up = nn.Linear(up.shape[1], up.shape[0], bias=bias is not None, device="meta")
        new.down.weight = nn.Parameter(down.to(weight.dtype).contiguous(), requires_grad=weight.requires_grad)
        new.up.weight = nn.Parameter(up.to(weight.dtype).contiguous(), requires_grad=weight.requires_grad)
        new.up.bias = bias
        return new

    in_features = property(lambda self: self.down.in_features)
    out_features = property(lambda self: self.up.out_features)
    rank = property(lambda self: self.down.out_features)

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return dense_weight(self.up) @ dense_weight(self.down)

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        return self.up(self.down(x))


def _last(layer: nn.Module) -> nn.Linear:
    """The plain layer that holds the bias."""
    return _last(layer.up) if isinstance(layer, LowRankLinear) else layer  # type: ignore[return-value]


@dataclass(frozen=True)
class SVD(Technique):
    """Every linear layer as two thin ones; a layer that was factorized before is taken as the product of its factors.

    One of three says how thin; `keep` = 0.5 where none is given:
    rank     the same for all layers
    energy   of a layer's squared singular values, the share that its rank has to hold
    keep     of the weights of all chosen layers together, the share that may remain; ranks are found greedily
    """

    rank: int | None = None
    energy: float | None = None
    keep: float | None = None
    layers: str = "*"

    needs = frozenset({FLOAT_WEIGHTS, UNMASKED})
    paper = Paper("Denton et al.", 2014,
                  "Exploiting linear structure within convolutional networks for efficient evaluation",
                  "arXiv:1404.0736", "sec. 3")  # fmt: skip

    def __post_init__(self):
        require_one(self, "rank", "energy", "keep")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        by = type(self).__name__
        layers = dict(find(model, outermost(model, nn.Linear, LowRankLinear), layers=self.layers, by=by))
        roots = self.input_roots(model, task, layers)
        seen = {path: wide(dense_weight(layer)) for path, layer in layers.items()}
        seen = {path: w @ roots[path].to(w.dtype) if path in roots else w for path, w in seen.items()}
        built = {}
        for (path, layer), rank in zip(layers.items(), self.ranks(list(seen.values())), strict=True):
            if rank is None:
                rows, columns = seen[path].shape
                note(model, path, "left alone", f"two factors would hold no fewer numbers than {rows} x {columns}")
                continue
            up, down = truncate(seen[path], rank)
            if path in roots:  # W S ~ up down, so W ~ up (down S^-1)
                down = torch.linalg.solve_triangular(roots[path].to(down.dtype), down, upper=False, left=False)
            built[id(layer)] = inherit(LowRankLinear.from_factors(up, down, layer), layer)
            note(model, path, f"{type(layer).__name__} -> LowRankLinear of rank {rank}", by)
        return replace_modules(model, built)

    def input_roots(self, model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
        """Path -> S, where distances are to be taken of W S; none here."""
        return {}

    def ranks(self, weights: Sequence[Float[Tensor, "out in"]]) -> list[int | None]:
        """A rank for each layer; None where it has to stay whole."""
        shapes = [(w.shape[0], w.shape[1]) for w in weights]
        useful = [largest_useful(*shape) for shape in shapes]
        if self.rank is not None:
            if self.rank > max(useful):
                raise ValueError(f"rank must be at most {max(useful)} here, got {self.rank}: from there on every layer grows")
            return [self.rank if self.rank <= most else None for most in useful]
        spectra = [torch.linalg.svdvals(w) for w in weights]
        if self.energy is not None:
            found = [by_energy(s, self.energy) for s in spectra]
            return [rank if rank <= most else None for rank, most in zip(found, useful, strict=True)]
        budget = (0.5 if self.keep is None else self.keep) * sum(m * n for m, n in shapes)
        return by_budget([s * self.weight_of(s, *shape) for s, shape in zip(spectra, shapes, strict=True)], shapes, int(budget))

    def weight_of(self, singular: Float[Tensor, " k"], rows: int, columns: int) -> float:
        """What a layer's singular values are multiplied by, to be compared with other layers'."""
        return 1.0

    def claim(self, model: nn.Module) -> Reading:
        """What the factorized layers hold, as a share of what they held before."""
        layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
        held = sum(m.rank * (m.in_features + m.out_features) for m in layers)
        dense = sum(m.in_features * m.out_features for m in layers)
        return Reading(held / dense if layers else 1.0, "of the factorized weights", "counted", better="lower")


def outermost(model: nn.Module, plain: type[nn.Module], product: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Matches plain layers and products of several, but not the factors within a product."""
    inside = {id(m) for whole in model.modules() if isinstance(whole, product) for m in whole.children()}
    return lambda module: isinstance(module, plain | product) and id(module) not in inside
