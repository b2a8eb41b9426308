"""Layers whose weight stands in a store.

Problem   There are many ways to write a matrix in few bits, and a model should not care which was taken.
Idea      A store knows its matrix: calling it gives the floats. A layer with a store computes as before, with the floats
          of the moment; where a store has a faster way for a few tokens, it says so in `matvec`.
          A technique that only changes how weights are held is then one function, from a weight to its store.
Left out  Activations: they stay in float here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.calibration import Statistics, gather
from effkit.core.checkpoint import numbers, stored
from effkit.core.report import Reading
from effkit.core.surgery import bake, matching, note, swap
from effkit.core.task import Task
from effkit.core.technique import Technique
from effkit.core.traits import FLOAT_WEIGHTS


class WeightStore(nn.Module, ABC):
    """A matrix of `shape` (rows, columns) in some compact form, all of it in buffers."""

    shape: tuple[int, ...]

    @abstractmethod
    def forward(self) -> Float[Tensor, "rows n"]:
        """The matrix in float32."""

    def matvec(self, x: Float[Tensor, "*few n"]) -> Float[Tensor, "*few rows"] | None:
        """The product with one token or a few, where there is a faster way than by the floats."""
        return None

    has_lines: Any = False  # whether it has:

    def lines(self) -> UInt8[Tensor, "rows bytes"]:
        """The matrix as kernels read it that run many layers in one call: lines.py."""
        raise NotImplementedError

    def bits_per_weight(self) -> float:
        """Everything that is held, over the number of weights."""
        held = sum(b.numel() * b.element_size() for b in self.buffers())
        return 8 * held / (self.shape[0] * self.shape[1])


@stored
class QuantizedLinear(nn.Module):
    """y = x W^T + b with W in a store; the bias stays in float."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_store: Any = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_float(cls, layer: Any, store: WeightStore) -> "QuantizedLinear":
        new = cls(layer.in_features, layer.out_features, layer.bias is not None)
        new.weight_store, new.bias = store, layer.bias
        return new

    def dense_weight(self) -> Float[Tensor, "out in"]:
        return self.weight_store()

    @property
    def has_lines(self) -> bool:
        """Whether the lines of its store are all that this layer is."""
        return type(self) is QuantizedLinear and self.bias is None and self.weight_store.has_lines

    def lines(self) -> UInt8[Tensor, "out bytes"]:
        return self.weight_store.lines()

    def forward(self, x: Float[Tensor, "*b in"]) -> Float[Tensor, "*b out"]:
        wanted = torch.is_grad_enabled() and x.requires_grad
        y = Unpacked.apply(x, self.weight_store) if wanted else self.weight_store.matvec(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)  # what comes in decides, however many tokens there are
        if y is None:
            return F.linear(x, self.weight_store().to(x.dtype), bias)
        return y if bias is None else y + bias


class Unpacked(torch.autograd.Function):
    """x W^T that unpacks W once more on the way back; autograd would keep the floats of every layer until then, and
    training adapters over 4 bits would need as much memory as over floats (as QLoRA does: Dettmers et al. 2023,
    arXiv:2305.14314, eq. 5)."""

    @staticmethod
    def forward(ctx, x, store):
        ctx.store = store
        return F.linear(x, store().to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.store().to(gradient.dtype), None


@stored
class QuantizedConv2d(nn.Module):
    """A convolution with its filters in a store; a row is one filter."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size, stride, padding, dilation, groups: int, bias: bool
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight_store: Any = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    @classmethod
    def from_float(cls, layer: Any, store: WeightStore) -> "QuantizedConv2d":
        new = cls(**{name: value for name, value in numbers(layer).items() if name != "padding_mode"})
        new.weight_store, new.bias = store, layer.bias
        return new

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        weight = self.weight_store().reshape(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return F.conv2d(x, weight.to(x.dtype), self.bias, self.stride, self.padding, self.dilation, self.groups)


class WeightOnly(Technique, ABC):
    """Base of the techniques that put the weights of linear and convolution layers into stores. A subclass defines
    `store`, and has `layers`, a glob over paths, among its fields."""

    layers: str
    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})

    @abstractmethod
    def store(self, weight: Float[Tensor, "rows n"], seen: Statistics | None) -> WeightStore:
        """The weight in its compact form; `seen` is what `statistics` holds of its layer."""

    def statistics(self, model: nn.Module, task: Task) -> Mapping[str, Statistics]:
        """What each layer's inputs look like, by path; nothing where a technique looks at weights alone."""
        return {}

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        seen, paths = self.statistics(model, task), {id(m): path for path, m in model.named_modules()}
        by, kinds = type(self).__name__, (nn.Linear, nn.Conv2d)
        return swap(model, kinds, lambda m: self.replacement(m, seen.get(paths[id(m)])), layers=self.layers, by=by)

    def replacement(self, layer: Any, seen: Statistics | None = None) -> nn.Module | None:
        """The twin of the layer with a store; None for a convolution that pads with anything but zeros."""
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            return None
        kind: Any = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        return kind.from_float(layer, self.store(bake(layer).get_parameter("weight").detach().flatten(1), seen))

    def claim(self, model: nn.Module) -> Reading:
        """Bits per weight of the quantized layers, everything that a store holds included."""
        stores = [m for m in model.modules() if isinstance(m, WeightStore)]
        weights = sum(s.shape[0] * s.shape[1] for s in stores)
        held = sum(s.bits_per_weight() * s.shape[0] * s.shape[1] for s in stores)
        return Reading(held / weights, "bits per weight", "counted", better="lower")


def look(
    technique: Any, model: nn.Module, task: Task, *, otherwise: str, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)
) -> Mapping[str, Statistics]:
    """What the first `technique.examples` of task.calib bring to the linear layers among `technique.layers`, by path.
    The others, convolutions and layers that no input reaches, are noted, and what becomes of them otherwise."""
    few = task.few(technique.examples, by=technique)
    layers = matching(model, kinds, layers=technique.layers, by=type(technique).__name__)
    for path in (path for path, layer in layers if isinstance(layer, nn.Conv2d)):
        note(model, path, otherwise, "a convolution's inputs are not gathered")
    if all(isinstance(layer, nn.Conv2d) for _, layer in layers):
        return {}
    seen = gather(model, few, layers=technique.layers)
    for path in seen.unreached:
        note(model, path, otherwise, "no calibration input reached it")
    return seen
