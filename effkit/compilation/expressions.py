"""What each operator is in C, and a fused group line by line.

Idea      A pointwise operator is an expression of its operands; a reduction is a start, a way to join one more element,
          and a last step. Everything else about a kernel is loops (codegen.py).
Care      A comparison with NaN is false: where an operator passes NaN on, the expression has to, too.
Softmax   exp(x - max x) / sum exp(x - max x): four lines, two of them reductions (Milakov & Gimelshein 2018,
          arXiv:1805.02867, alg. 2: the safe softmax).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from effkit.compilation.ir import Graph, Node, Ref

aten = torch.ops.aten
SOFTMAX = aten._softmax.default
C_TYPES = {torch.float32: "float", torch.float64: "double"}


def _number(value: float) -> str:
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"(real){float(value)!r}"


def _power(x: str, p: str) -> str:
    known = {2: f"({x} * {x})", 3: f"({x} * {x} * {x})", 0.5: f"SQRT({x})", -0.5: f"((real)1 / SQRT({x}))", -1: f"((real)1 / {x})"}
    return {_number(k): v for k, v in known.items()}.get(p, f"POW({x}, {p})")


def _gelu(x: str, approximate: str = "none") -> str:
    if approximate == "tanh":
        return (f"((real)0.5 * {x} * ((real)1 + TANH((real)0.7978845608028654 * ({x} + (real)0.044715 * {x} * {x} * {x}))))")
    return f"((real)0.5 * {x} * ((real)1 + ERF({x} * (real)0.7071067811865476)))"


def _clamp(x: str, low: str | None = None, high: str | None = None) -> str:
    x = f"({x} < {low} ? {low} : {x})" if low is not None else x  # a comparison with NaN is false: NaN passes
    return f"({x} > {high} ? {high} : {x})" if high is not None else x


ONE = _number(1)


def _scaled(b: str, alpha: str) -> str:
    return b if alpha == ONE else f"{alpha} * {b}"


#: operator -> the C expression of its operands; numbers among them have become literals
POINTWISE: dict[Any, Callable[..., str]] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), lambda a, b, alpha=ONE: f"({a} + {_scaled(b, alpha)})"),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), lambda a, b, alpha=ONE: f"({a} - {_scaled(b, alpha)})"),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), lambda a, b, alpha=ONE: f"({b} - {_scaled(a, alpha)})"),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), lambda a, b: f"({a} * {b})"),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), lambda a, b: f"({a} / {b})"),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default), _clamp),
    aten.clamp_max.default: lambda a, high: _clamp(a, None, high),
    aten.hardtanh.default: lambda a, low="(real)-1.0", high=ONE: _clamp(a, low, high),
    aten.maximum.default: lambda a, b: f"({a} > {b} || {a} != {a} ? {a} : {b})",
    aten.minimum.default: lambda a, b: f"({a} < {b} || {a} != {a} ? {a} : {b})",
    aten.pow.Tensor_Scalar: _power,
    aten.neg.default: lambda a: f"(-{a})",
    aten.abs.default: lambda a: f"FABS({a})",
    aten.rsqrt.default: lambda a: f"((real)1 / SQRT({a}))",
    aten.reciprocal.default: lambda a: f"((real)1 / {a})",
    **{getattr(aten, f).default: f"{f.upper()}({{}})".format for f in ("exp", "log", "sqrt", "sin", "cos", "tanh")},
    aten.relu.default: lambda a: f"({a} < 0 ? 0 : {a})",
    aten.leaky_relu.default: lambda a, slope="(real)0.01": f"({a} > 0 ? {a} : {slope} * {a})",
    aten.sigmoid.default: lambda a: f"((real)1 / ((real)1 + EXP(-{a})))",
    aten.silu.default: lambda a: f"({a} / ((real)1 + EXP(-{a})))",
    aten.gelu.default: _gelu,
}
#: operator -> start, how an element joins, how the sum becomes the result
REDUCTIONS = {
    aten.sum.dim_IntList: ("0", "{s} += {x};", "{s}"),
    aten.mean.dim: ("0", "{s} += {x};", "{s} / {n}"),
    aten.amax.default: ("-INFINITY", "{s} = {x} > {s} || {x} != {x} ? {x} : {s};", "{s}"),
}


def supports(node: Node) -> bool:
    """Pointwise with numbers or tensors as operands, or a reduction of the last dimension that keeps it."""
    if node.op in POINTWISE:
        return all(
            isinstance(a, Ref | int | float | str | None) and not isinstance(a, bool)
            for a in (*node.args, *node.kwargs.values())
        )
    if node.op is SOFTMAX:
        return node.type.shape != () and node.args[1] in (-1, len(node.type.shape) - 1) and not node.args[2]
    if node.op in REDUCTIONS:
        last, keep = (-1,), len(node.args) > 2 and node.args[2]
        return bool(keep) and node.args[1] in (last, (len(node.type.shape) - 1,)) and not node.kwargs
    return False


@dataclass
class Step:
    """One line of the kernel: a pointwise expression, or a reduction. `row`: one value a row instead of one an element."""

    name: str
    expression: str
    operands: tuple[str, ...]
    row: bool
    reduction: tuple[str, str, str] | None = None
    stage: int = 0  # how many walks along the row have to be over before


def steps(graph: Graph) -> list[Step]:
    """The group line by line; softmax falls apart into maximum, exponential, sum and quotient."""
    width = graph[graph.outputs[0].name].type.shape[-1:]
    lines: list[Step] = []
    for node in graph.operators:
        x = node.uses[0]
        if node.op is SOFTMAX:
            m, e, s = (f"{node.name}{part}" for part in "mes")
            lines += [Step(m, x, (x,), True, REDUCTIONS[aten.amax.default]), Step(e, f"EXP({x} - {m})", (x, m), False)]
            lines += [
                Step(s, e, (e,), True, REDUCTIONS[aten.sum.dim_IntList]),
                Step(node.name, f"({e} / {s})", (e, s), False),
            ]
        elif node.op in REDUCTIONS:
            lines.append(Step(node.name, x, (x,), True, REDUCTIONS[node.op]))
        else:
            args, kwargs = [_operand(a) for a in node.args], {k: _operand(a) for k, a in node.kwargs.items()}
            lines.append(Step(node.name, POINTWISE[node.op](*args, **kwargs), node.uses, node.type.shape[-1:] != width))
    return lines


def _operand(value):
    return value.name if isinstance(value, Ref) else _number(value) if isinstance(value, int | float) else value
