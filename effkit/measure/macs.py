"""Macs: multiply-accumulates, counted while the model runs. flops = 2 * macs.

Problem   Formulas per layer type miss what a model does between its layers; and an operation count is not a time.
Idea      Listen to the operators that really run (a dispatch mode) and add up the products among them.
Layers    A layer whose kernel is no operator of torch says what it does: see `Counted`. Packed linear layers, those
          with `dense_weight` and nothing but codes, need not: theirs are positions * in * out on any kernel.
Counted   Matrix products, convolutions, attention. Not counted: elementwise arithmetic, norms, softmax, look-ups (an
          embedding is 0), fused recurrent layers. Zeros are multiplied like any number; attention counts the whole
          rectangle of scores, although a causal kernel may skip nearly half.
Peer      torch.utils.flop_counter, the same convention: equal to 2 * macs, except that on a processor it does not
          know the fused attention kernel and counts 0 for it (torch 2.13), that it leaves out products with a single
          vector, and that it overcounts gradients of grouped convolutions.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effkit.core.report import Reading
from effkit.core.technique import evaluating
from effkit.measure.memory import held_bytes
from effkit.measure.size import packed


@runtime_checkable
class Counted(Protocol):
    """A layer that runs a kernel which torch does not see. While its forward runs, operators are not counted; when it
    is done, `macs` of the shapes of its positional tensor arguments is. Where such layers contain each other, the
    outermost speaks. Only forward passes are asked: gradients count as the operators they are."""

    def macs(self, *shapes: torch.Size) -> int: ...


def macs(model: nn.Module, example: tuple[Tensor, ...]) -> Reading:
    """Multiply-accumulates of one forward pass in evaluation mode; the note lists them by operator."""
    model = plain(model)
    with evaluating(model), torch.no_grad():
        return count(lambda: model(*example))


def flops(model: nn.Module, example: tuple[Tensor, ...]) -> Reading:
    """Floating-point operations: a multiplication and an addition for every mac."""
    return replace(macs(model, example) * 2, unit="flops")


def intensity(model: nn.Module, example: tuple[Tensor, ...]) -> Reading:
    """Macs per byte that must be moved at least: all weights, the inputs and the outputs, each once.

    What has to be moved more than once, or not at all (most rows of an embedding), makes the real figure differ.
    """
    with evaluating(model), torch.no_grad():
        outputs = [t for t in tree_leaves(model(*example)) if isinstance(t, Tensor)]
    moved = held_bytes([*model.parameters(), *model.buffers(), *example, *outputs])
    return Reading(macs(model, example).value / moved, "macs/B", "counted", better="higher")


def count(function: Callable[[], object]) -> Reading:
    """Macs of one call of anything: a forward pass, a training step, a text being decoded."""
    listener = _Listener()
    with ExitStack() as undo:
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it runs a whole encoder layer as one operator
        undo.callback(register_module_forward_pre_hook(listener.enter).remove)
        undo.callback(register_module_forward_hook(listener.leave).remove)
        undo.enter_context(listener)
        function()
    note = ", ".join(f"{name} {n:,}" for name, n in listener.total.most_common())
    return Reading(listener.total.total(), "macs", "counted", better="lower", note=note)


def plain(model: nn.Module) -> nn.Module:
    """The module inside a compiled one: compiled code has no operators to listen to."""
    return getattr(model, "_orig_mod", model)


def _product(a: Tensor, b: Tensor) -> int:
    """(m, k) x (k, n), batched or not, and (m, k) x (k)."""
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _convolution(x: Tensor, w: Tensor, y: Tensor, transposed: bool) -> int:
    """Every weight once for every example and position: of the output, or of the input if transposed."""
    return w.numel() * len(x) * prod((x if transposed else y).shape[2:])


def _attention(q: Tensor, k: Tensor, v: Tensor, *, per_key: int = 1, per_value: int = 1) -> int:
    """Scores (h n m d) and the weighted sum (h n m d_v); heads that share keys compute all the same."""
    pairs = q.numel() // q.shape[-1] * k.shape[-2]
    return pairs * (per_key * q.shape[-1] + per_value * v.shape[-1])


#: operator -> macs from its arguments and its result
_FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "_int_mm", "_scaled_mm"), lambda a, y: _product(a[0], a[1])),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), lambda a, y: _product(a[1], a[2])),
    # here the weight lies transposed, one row an output
    **dict.fromkeys(("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"), lambda a, y: a[0].numel() * len(a[1])),
    "convolution": lambda a, y: _convolution(a[0], a[1], y, a[6]),
    # gradients of the input and of the weight cost one forward pass each
    "convolution_backward": lambda a, y: _convolution(a[1], a[2], a[0], a[7]) * sum(a[10][:2]),
}
for _kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    _FORMULAS[f"_scaled_dot_product_{_kernel}"] = lambda a, y: _attention(*a[:3])
    # the scores anew, then gradients: of the scores' weights and v (d_v each), of q and k (d each)
    _FORMULAS[f"_scaled_dot_product_{_kernel}_backward"] = lambda a, y: _attention(*a[1:4], per_key=3, per_value=2)


class _Listener(TorchDispatchMode):
    """Sees every operator that reaches a kernel, and, as a pair of hooks, every module that is called."""

    def __init__(self):
        super().__init__()
        self.total: Counter[str] = Counter()
        self.inside = 0  # layers that speak for themselves
        self.formulas: dict[nn.Module, Callable[..., int] | None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in _FORMULAS and isinstance(func, torch._ops.OpOverload):
            with self:  # under inference_mode composite operators arrive whole: look inside
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if name in _FORMULAS and not self.inside:
            self.total["attention" if "attention" in name else name.strip("_")] += _FORMULAS[name](args, result)
        return result

    def enter(self, module: nn.Module, inputs: tuple) -> None:
        if module not in self.formulas:
            self.formulas[module] = _declared(module)
        self.inside += self.formulas[module] is not None

    def leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        formula = self.formulas.get(module)
        self.inside -= formula is not None
        if formula is not None and not self.inside:
            self.total[type(module).__name__] += formula(*(x.shape for x in inputs if isinstance(x, Tensor)))


def _declared(module: nn.Module) -> Callable[..., int] | None:
    """How a layer's macs follow from the shapes of its inputs, where operators do not tell."""
    if isinstance(module, Counted):
        return module.macs
    if packed(module) and hasattr(module, "in_features"):
        return lambda shape, *_: prod(shape[:-1]) * module.in_features * module.out_features
    return None
