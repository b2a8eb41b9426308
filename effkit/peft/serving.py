"""After training: adapters merged into their base, taken off, kept in a file of their own.

merge     W_0 + scale * B A into the base, in place of three products one; the adapters stay beside it, idle
unmerge   the base back, to the rounding of one addition and one subtraction
strip     the plain layers: after `merge` the finished model, without it the base itself, bit by bit
save_adapters, load_adapters   a small file; it says which base it was trained over, by a hash
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from effkit.core.checkpoint import fingerprint, load, save, stored
from effkit.core.surgery import bake, dense_weight, inherit, is_linear_like, note, replace_modules
from effkit.core.technique import clone
from effkit.peft.lora import Adapter, LoRALinear, adapted, insert


def merge(model: nn.Module, *, dense: bool = False) -> nn.Module:
    """A copy in which each base holds the sum. dense: layers that are packed, factorized or masked become plain float
    ones first; without it they are refused, since codes have no room for B A, and zeros would be filled."""
    model = clone(_adapted(model))
    dtype = _dtype(model)
    for path, layer in adapted(model).items():
        plain = type(layer.base) is nn.Linear and not parametrize.is_parametrized(layer.base)
        if not plain and not dense:
            kind = type(layer.base).__name__
            raise ValueError(f"{path or 'the layer'} is a {kind}, which has no room for B A: merge(model, dense=True) makes it a plain float layer first")
        if not plain:
            layer.base = _plain(layer, dtype)
            note(model, path, "its base became a plain float layer", "merge")
        _add(layer, sign=1)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """A copy in which base and adapters are apart again; W_0 comes back to rounding, not to the bit."""
    model = clone(_adapted(model))
    for layer in adapted(model).values():
        _add(layer, sign=-1)
    return model


def strip(model: nn.Module) -> nn.Module:
    """A copy without adapters: the merged layers where they were merged, else the base as it always was."""
    model = clone(_adapted(model))
    layers = adapted(model)
    for path in layers:
        note(model, path, "adapter taken off", "strip")
    return replace_modules(model, {id(layer): inherit(layer.base, layer) for layer in layers.values()})


def _adapted(model: nn.Module) -> nn.Module:
    if not adapted(model):
        raise ValueError("this model has no adapters: LoRA(...)(model, task) puts them in, load_adapters(model, path) brings them")
    return model


@torch.no_grad()
def _add(layer: LoRALinear, *, sign: int) -> None:
    """Adds or takes away the update; twice is once."""
    if layer.merged == (sign > 0):
        return
    weight = layer.base.weight
    weight.copy_(weight.to(layer.adapter.A.dtype) + sign * layer.adapter.delta())  # type: ignore[operator]
    layer.merged = sign > 0
    layer.adapter.requires_grad_(not layer.merged)  # idle: no gradient would reach them


def _plain(layer: LoRALinear, dtype: torch.dtype) -> nn.Linear:
    """A frozen float layer that computes what the base does; what it adds to zero is its bias."""
    weight = dense_weight(bake(layer.base)).detach().to(dtype)
    with torch.no_grad():
        bias = layer.base(weight.new_zeros(1, weight.shape[1]))[0]
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight = nn.Parameter(weight.clone())
    made.bias = nn.Parameter(bias) if bias.any() else None  # type: ignore[assignment]
    return made.requires_grad_(False).train(layer.training)


def _dtype(model: nn.Module) -> torch.dtype:
    """In which precision the model computes: that of its first parameter outside the adapters."""
    inside = {id(p) for layer in adapted(model).values() for p in layer.adapter.parameters()}
    others = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside)
    return next(others, torch.float32)


# files


@stored
class Adapters(nn.Module):
    """What the file holds: the adapters, the paths of the layers they belong to, and a hash of these layers."""

    def __init__(self, paths: tuple[str, ...], base: str):
        super().__init__()
        self.paths, self.base = tuple(paths), base
        self.layers = nn.ModuleList(nn.Identity() for _ in self.paths)


def save_adapters(model: nn.Module, path: str | Path) -> int:
    """Writes the adapters, and nothing else, as a safetensors file; returns its size in bytes."""
    layers = adapted(_adapted(model))
    if any(layer.merged for layer in layers.values()):
        raise ValueError("these adapters are merged into their base, which therefore can't be told apart: unmerge(model) first")
    held = Adapters(tuple(layers), fingerprint(layer.base for layer in layers.values()))
    held.layers = nn.ModuleList(layer.adapter for layer in layers.values())
    return save(held.train(model.training), path)


def load_adapters(model: nn.Module, path: str | Path, *, any_base: bool = False) -> nn.Module:
    """A copy of the base model with the adapters of a file over it, everything else frozen.

    any_base   accept layers of the same shapes but other weights: adapters trained over 4 bits, say, over the float model

    Raises ValueError for another file, a model with adapters, layers that are missing or of another shape, another base.
    """
    held = load(path)
    if not isinstance(held, Adapters):
        raise ValueError(f"{path} holds a {type(held).__name__}, no adapters: write them with save_adapters(model, path)")
    if adapted(model):
        raise ValueError("this model carries adapters already: strip(model) gives its base")
    model = clone(model)
    layers = [(name, _layer(model, name, adapter)) for name, adapter in zip(held.paths, held.layers, strict=True)]  # type: ignore[arg-type]
    if not any_base and fingerprint(layer for _, layer in layers) != held.base:
        raise ValueError(f"{path} was trained over other weights: pass any_base=True to put it over these all the same")
    return insert(model, layers, list(held.layers), by=f"load_adapters({Path(path).name})")  # type: ignore[arg-type]


def _layer(model: nn.Module, path: str, adapter: Adapter) -> nn.Module:
    """The layer that an adapter belongs to."""
    layer = dict(model.named_modules()).get(path)
    if layer is None or not is_linear_like(layer):
        raise ValueError(f"this model has no linear layer {path or '(itself)'}, which the adapters belong to: load the base they were trained over")
    shape, wanted = (layer.out_features, layer.in_features), (adapter.out_features, adapter.in_features)
    if shape != wanted:
        raise ValueError(f"layer {path or '(the model)'} is {shape[0]} x {shape[1]}, the adapter {wanted[0]} x {wanted[1]}: load the base it was trained over")
    return layer
