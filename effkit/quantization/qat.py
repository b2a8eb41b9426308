"""Quantization-aware training: let the weights get used to the grid.

Problem   At 2 or 3 bits rounding moves weights further than the loss tolerates, whatever the range.
Idea      Round in the forward pass; in the backward pass pretend that rounding was the identity (straight-through),
          since its true derivative is zero almost everywhere. The range is that of the moment: of the weights, and of
          inputs that are rounded too a moving average.
Cost      A training run; the result is packed like any RTN model.
Ends      `ends` gives the first and the last layer that run another width. In a network of many layers they are few
          weights, and 8 bits there are the custom since Choi et al. 2018, arXiv:1805.06085; in a small MLP the first
          is half of all weights, so the default keeps the promise that `bits` makes.
Norms     A weight near the middle between two codes flips to and fro to the last step, and the averages that a batch norm
          keeps remember the other code. Afterwards they are taken anew (Nagel et al. 2022, arXiv:2203.11086): of three
          trained ResNets of 2-bit weights and inputs one went from 8.4 % errors to 2.4 (500 images), two stayed as they were.
Source    Bengio et al. 2013, arXiv:1308.3432, sec. 4; Jacob et al. 2017, arXiv:1712.05877, sec. 3.
"""

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.checks import require_float, require_int
from effkit.core.report import Reading
from effkit.core.surgery import bake, find, note, swap
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique, evaluating
from effkit.core.training import Schedule, fit
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization.affine import dequantize, grouped, quantize, ungrouped
from effkit.quantization.inputs import InputGrid, RoundedConv2d, RoundedLinear, RunningRange, Seen, watch
from effkit.quantization.layers import QuantizedConv2d, QuantizedLinear, WeightStore
from effkit.quantization.observers import min_max
from effkit.quantization.packed import RTN


def fake_quantize(
    w: Float[Tensor, "rows n"], *, bits: int, group_size: int, symmetric: bool
) -> Float[Tensor, "rows n"]:
    """The nearest grid point, with the gradient of the identity: w + stop_gradient(w_hat - w)."""
    groups = grouped(w.detach().float(), group_size)
    scale, zero_point = min_max(groups, bits=bits, symmetric=symmetric)
    rounded = ungrouped(dequantize(quantize(groups, scale, zero_point, bits=bits), scale, zero_point), tuple(w.shape))
    return w + (rounded.to(w.dtype) - w).detach()


class FakeQuantize(nn.Module):
    """`fake_quantize` as a parametrization of a weight of any shape; a row is one output."""

    def __init__(self, bits: int, group_size: int, symmetric: bool):
        super().__init__()
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    def forward(self, w: Tensor) -> Tensor:
        rounded = fake_quantize(w.flatten(1), bits=self.bits, group_size=self.group_size, symmetric=self.symmetric)
        return rounded.reshape(w.shape)


class TrainRounded(Technique, ABC):
    """Base of the techniques that round in training and pack what was trained. A subclass has these fields, and says
    how weights are rounded (`begin`), how inputs are (`input_rounding`), and how to store the former (`pack`)."""

    bits: int
    activation_bits: int | None
    ends: int | None
    epochs: int
    lr: float
    layers: str

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})

    def __post_init__(self) -> None:
        for name in ("bits", "activation_bits", "ends"):
            if (value := getattr(self, name)) is not None or name == "bits":
                require_int(
                    name, value, 2, 8, hint="codes are packed into bytes; more than 8 bits gain nothing over bfloat16"
                )
        require_int("epochs", self.epochs, 1)
        require_float("lr", self.lr, 0.0, open_low=True)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        looks = self.activation_bits is not None or self.ends is not None
        task.require("train", "loss", *(("calib",) if looks else ()), by=self)
        name, kinds = type(self).__name__, (nn.Linear, nn.Conv2d)
        layers = {layer: path for path, layer in find(model, kinds, layers=self.layers, by=name) if zero_padded(layer)}
        seen = watch(model, task.calib, layers) if looks else {}  # type: ignore[arg-type]
        outermost = {next(iter(seen)), [*seen][-1]} if self.ends is not None and seen else set()
        each = {layer: self.at_the_ends() if layer in outermost else self for layer in layers}
        with ExitStack() as hooks:
            for layer, own in each.items():
                own.begin(layer)
                if self.activation_bits is not None and layer in seen:
                    layer.add_module("input_rounding", own.input_rounding(seen[layer]))
                    hooks.callback(layer.register_forward_pre_hook(_round_inputs).remove)
                elif self.activation_bits is not None:
                    note(model, layers[layer], "inputs stay float", "no calibration input reached it")
            fit(model, task, Schedule(self.epochs * len(task.train), self.lr), label=name)  # type: ignore[arg-type]
            estimate_norms_(model, task)
        pack = lambda layer: each[layer].replacement(layer) if layer in each else None  # noqa: E731
        return swap(model, kinds, pack, layers=self.layers, by=name)

    def at_the_ends(self) -> "TrainRounded":
        """The settings of the first and the last layer."""
        return replace(self, bits=self.ends, activation_bits=self.activation_bits and self.ends)  # type: ignore[type-var]

    @abstractmethod
    def begin(self, layer: nn.Module) -> None:
        """Lets the layer round its weight in the forward pass."""

    @abstractmethod
    def input_rounding(self, seen: Seen) -> nn.Module:
        """What rounds a layer's inputs while it is trained; its `grid` is what they are rounded to afterwards."""

    @abstractmethod
    def pack(self, layer: nn.Module) -> WeightStore:
        """The trained weight, on the grid that it was trained on."""

    def replacement(self, layer: Any) -> nn.Module:
        """The trained layer, packed; with its input's grid, where it has one."""
        rounding, conv = layer._modules.pop("input_rounding", None), isinstance(layer, nn.Conv2d)
        kinds: Any = (QuantizedLinear, QuantizedConv2d) if rounding is None else (RoundedLinear, RoundedConv2d)
        new = kinds[conv].from_float(layer, self.pack(layer))
        if rounding is not None:
            new.input_grid = InputGrid.from_grid(rounding.bits, rounding.grid())
        return new

    def claim(self, model: nn.Module) -> Reading:
        """Bits per weight of the packed layers, everything that a store holds included."""
        return RTN().claim(model)


@torch.no_grad()
def estimate_norms_(model: nn.Module, task: Task, *, batches: int = 20) -> None:
    """Batch norms' statistics anew, each the mean over some batches of task.train."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # all batches count alike
            norm.train()
        for step in range(min(batches, len(task.train)) if norms else 0):  # type: ignore[arg-type]
            model(task.train.at(step)[0])  # type: ignore[union-attr]
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def zero_padded(layer: nn.Module) -> bool:
    """Whether a packed twin can stand in: those of convolutions pad with zeros."""
    return getattr(layer, "padding_mode", "zeros") == "zeros"


def _round_inputs(layer: Any, args: tuple) -> tuple:
    return (layer.input_rounding(args[0]), *args[1:])


@dataclass(frozen=True)
class QAT(TrainRounded):
    """Train with rounded weights, then pack them: `epochs` passes over task.train.

    activation_bits  inputs of the layers are rounded too, to this width; None: they stay float
    ends             bits of the first and the last layer that run, their inputs included; None: as the others
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    epochs: int = 1
    lr: float = 1e-3
    layers: str = "*"
    activation_bits: int | None = None
    ends: int | None = None

    paper = Paper("Bengio et al.", 2013, "Estimating or propagating gradients through stochastic neurons",
                  "arXiv:1308.3432", "sec. 4")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rounding()

    def rounding(self) -> RTN:
        """The post-training twin, which packs the trained weights on the very grid they were trained on."""
        return RTN(self.bits, self.group_size, self.symmetric, layers=self.layers)

    def begin(self, layer: nn.Module) -> None:
        rounded = FakeQuantize(self.bits, self.group_size, self.symmetric)
        parametrize.register_parametrization(bake(layer), "weight", rounded)

    def end(self, layer: nn.Module) -> None:
        """Makes the weight plain again, as it was trained: not rounded yet."""
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    def input_rounding(self, seen: Seen) -> nn.Module:
        return RunningRange(self.activation_bits, seen.low, seen.high)  # type: ignore[arg-type]

    def pack(self, layer: nn.Module) -> WeightStore:
        self.end(layer)
        return self.rounding().store(layer.get_parameter("weight").detach().flatten(1), None)
