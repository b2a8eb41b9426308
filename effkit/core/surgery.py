"""Surgery: the only code that rewrites a module tree.

Problem   Replacing layers by hand loses hooks, splits shared modules, unties weights, and does nothing in silence.
Idea      Find layers by predicate and path pattern; replace each by identity, once; note what was left alone and why.
"""

import fnmatch
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

#: these read their children's weights directly instead of calling them, so a replaced child would be ignored or break
OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


@runtime_checkable
class LinearLike(Protocol):
    """A layer that computes y = x W^T + b, however it stores W."""

    in_features: int
    out_features: int

    def dense_weight(self) -> Float[Tensor, "out in"]: ...


def is_linear_like(module: nn.Module) -> bool:
    """True for nn.Linear and for every layer that offers `dense_weight`."""
    return isinstance(module, nn.Linear | LinearLike)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight a layer applies, as floating-point numbers, whatever it stores."""
    return layer.dense_weight() if isinstance(layer, LinearLike) else layer.weight  # type: ignore[return-value]


@dataclass(frozen=True)
class Entry:
    """One line of a model's log."""

    path: str
    what: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.path or '(the model)'}: {self.what}" + (f" ({self.why})" if self.why else "")


class Log(list):
    """What was done to a model, in order; prints one line an entry."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "nothing was changed"


def log(model: nn.Module) -> Log:
    """What techniques changed in this model, what they left alone, and why."""
    return Log(model.__dict__.get("effkit_log", ()))


def note(model: nn.Module, path: str, what: str, why: str = "") -> None:
    """Adds a line to the model's log."""
    model.__dict__["effkit_log"] = (*model.__dict__.get("effkit_log", ()), Entry(path, what, why))


Match = type | tuple[type, ...] | Callable[[nn.Module], bool]


def find(model: nn.Module, match: Match, *, layers: str = "*", by: str = "") -> list[tuple[str, nn.Module]]:
    """The layers that a technique may rewrite, each once, by path. What matches but must stay is noted with its reason.

    match    a type, types, or predicate; layers   a glob pattern over paths, "*" for all.
    Raises ValueError listing the candidates when the pattern matches none, or when the model has none.
    """
    kept = []
    chosen = matching(model, match, layers=layers, by=by)
    for path, module in chosen:
        if reason := _must_stay(model, path, module):
            note(model, path, "left alone", reason)
        else:
            kept.append((path, module))
    if not kept:
        why = "; ".join(map(str, log(model)[-len(chosen) :]))
        raise ValueError(f"{by or 'the technique'}: every layer that matches {layers!r} must be left alone: {why}")
    return kept


def matching(model: nn.Module, match: Match, *, layers: str = "*", by: str = "") -> list[tuple[str, nn.Module]]:
    """The layers that a technique may read, those that must stay included. Raises ValueError listing the candidates."""
    wanted = match if callable(match) and not isinstance(match, type) else lambda m: isinstance(m, match)
    candidates = [(path, module) for path, module in model.named_modules() if wanted(module)]
    chosen = [(path, module) for path, module in candidates if fnmatch.fnmatchcase(path, layers)]
    if not chosen:
        names = ", ".join(path or "(the model)" for path, _ in candidates) or "none at all"
        raise ValueError(f"{by or 'the technique'}: the pattern {layers!r} matches no layer it can take; candidates: {names}")
    return chosen


def _must_stay(model: nn.Module, path: str, module: nn.Module) -> str:
    """Why a layer may not be rewritten, or nothing."""
    parts = path.split(".") if path else []
    if any(isinstance(model.get_submodule(".".join(parts[:i])), OPAQUE) for i in range(len(parts))):
        return "its parent reads its weight without calling it"
    if any(p.numel() == 0 for p in module.parameters()):
        return "it has zero elements"
    mine = {id(p) for p in module.parameters()}
    inside = {id(m) for m in module.modules()}
    for other_path, other in model.named_modules():
        if id(other) not in inside and mine & {id(p) for p in other.parameters(recurse=False)}:
            return f"its weight is tied to {other_path or 'the model'}: one tensor serves both"
    return ""


def swap(
    model: nn.Module, match: Match, build: Callable[[Any], nn.Module | None], *, layers: str = "*", by: str = ""
) -> nn.Module:
    """Replaces every layer that `find` yields by `build(layer)`; None leaves it alone. Returns the model (a new root,
    where the model is itself the layer). Hooks, mode and requires_grad carry over; a layer used twice is replaced once."""
    built = {}
    for path, layer in tqdm(find(model, match, layers=layers, by=by), desc=by, leave=False, delay=2):
        new = build(layer)
        if new is None:
            note(model, path, "left alone", f"{by} has no replacement for this {type(layer).__name__}")
        else:
            built[id(layer)] = inherit(new, layer)
            note(model, path, f"{type(layer).__name__} -> {type(new).__name__}", by)
    return replace_modules(model, built)


def replace_modules(model: nn.Module, built: dict[int, nn.Module]) -> nn.Module:
    """Puts built[id(old)] wherever old stands."""
    if id(model) in built:
        root = built[id(model)]
        root.__dict__["effkit_log"] = log(model)
        return root
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in built:
                parent._modules[name] = built[id(child)]
    return model


def inherit(new: nn.Module, old: nn.Module) -> nn.Module:
    """Gives the replacement its predecessor's hooks, mode, and requires_grad of equally named parameters.

    A wrapper, which has its predecessor inside, takes the hooks over: left on both, they would run twice a pass."""
    wraps = any(module is old for module in new.modules())
    for name in _HOOKS:
        if getattr(old, name, None):
            setattr(new, name, getattr(old, name))
            if wraps:
                setattr(old, name, OrderedDict())
    frozen = {name for name, p in old.named_parameters() if not p.requires_grad}
    for name, parameter in new.named_parameters():
        if name in frozen and parameter.is_floating_point():
            parameter.requires_grad_(False)
    return new.train(old.training)


def bake(module: nn.Module) -> nn.Module:
    """Makes parametrized tensors plain again, with the values they had: what a mask or a weight norm computed stays."""
    if parametrize.is_parametrized(module):  # copies share the class that holds the computed tensors, and would lose them
        shared = type(module)
        own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)
    for name in list(getattr(module, "parametrizations", {})):
        learned = [p.requires_grad for p in module.parametrizations[name].parameters()]  # type: ignore[index, union-attr]
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        if learned and name in module._buffers:  # what torch makes of several tensors that are frozen, or under no_grad
            module._parameters[name] = nn.Parameter(module._buffers.pop(name).detach(), any(learned))  # type: ignore[union-attr]
    return module
