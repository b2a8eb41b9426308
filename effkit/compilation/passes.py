"""Passes: graph -> graph, each preserving what the graph computes.

Problem   A captured graph repeats itself, recomputes what never changes, and copies what is already there.
Idea      Small rewrites, each with one reason to be right, composed by name. Since nodes are in single assignment and
          nothing is written in place, a value may be replaced by any equal value.
Cost      The order matters: convolutions absorb their normalization while its numbers still stand in the graph; equal
          expressions of weights are no longer seen to be equal once they are folded; folding leaves dead nodes behind;
          fusion wants to see what is left.
Care      A caller may write into what it gets. So memory that escapes is never merged with other memory.
Source    Aho, Lam, Sethi & Ullman 2006, Compilers, ch. 9; conv-bn: Jacob et al. 2017, arXiv:1712.05877, eq. 14.
"""

import operator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from effkit.compilation.ir import Graph, Node, Ref, Type, refs, substitute

aten = torch.ops.aten
SMALL = 2**20  # bytes: what is made from nothing (positions, masks) is folded up to this size


def dce(graph: Graph) -> Graph:
    """Dead code elimination: only what the outputs need stays; inputs stay, being the interface."""
    needed = set(refs(graph.outputs))
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.uses)
    return graph.rebuilt(node for node in graph.nodes if node.name in needed or node.op == "input")


@torch.no_grad()
def fold(graph: Graph) -> Graph:
    """Constant folding: what depends on weights only is computed now, unless the result would take more memory than
    what it is made of: unpacking 4-bit weights for good would undo their purpose."""
    values = dict(graph.values)
    nodes, from_nothing = [], set[str]()
    for node in graph.nodes:
        if node.computes and node.op is not operator.getitem and values.keys() >= set(node.uses):
            args, kwargs = substitute((node.args, node.kwargs), values.__getitem__)
            value, free = node.op(*args, **kwargs), from_nothing >= set(node.uses)
            if isinstance(value, Tensor) and value.nbytes <= (
                SMALL if free else sum(values[name].nbytes for name in node.uses)
            ):
                values[node.name] = value
                from_nothing |= {node.name} if free else set()
                node = Node(node.name, "weight", type=Type.of(value))
        nodes.append(node)
    return graph.rebuilt(nodes, values=values)


def cse(graph: Graph) -> Graph:
    """Common subexpressions: of two nodes that do the same to the same, the second becomes the first."""
    first: dict[Any, str] = {}
    renamed: dict[str, str] = {}
    kept, escaping = [], graph.escaping()
    for node in graph.nodes:
        args, kwargs = substitute((node.args, node.kwargs), lambda name: Ref(renamed.get(name, name)))
        key = (node.op, _hashable(args), _hashable(kwargs), node.type)
        if node.computes and graph.root(node.name) not in escaping:
            twin = first.setdefault(key, node.name)
            if twin != node.name:
                renamed[node.name] = twin
                continue
        kept.append(node)
    return graph.rebuilt(kept, renamed)


def _hashable(value: Any) -> Any:
    """1, 1.0 and True are equal in Python and different here, so that numbers carry their type; -0.0 is not 0.0."""
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return (type(value), repr(value)) if isinstance(value, bool | int | float) else value


def algebra(graph: Graph) -> Graph:
    """x + 0, x - 0, x * 1, x / 1, -(-x), casts to the same type, and views of views."""
    renamed: dict[str, str] = {}
    kept, escaping = [], graph.escaping()
    known = dict(graph.by_name)
    for node in graph.nodes:
        args = substitute(node.args, lambda name: Ref(renamed.get(name, name)))
        node = replace(node, args=args, base=renamed.get(node.base, node.base))
        if graph.root(node.name) not in escaping:
            node = _shorter_view(node, known)
            same = _same_as(node, known)
            if same and known[same].type == node.type:
                renamed[node.name] = same
                continue
        known[node.name] = node
        kept.append(node)
    return graph.rebuilt(kept, renamed)


_NEUTRAL = {aten.add.Tensor: 0, aten.add.Scalar: 0, aten.sub.Tensor: 0, aten.sub.Scalar: 0,
            aten.mul.Tensor: 1, aten.mul.Scalar: 1, aten.div.Tensor: 1, aten.div.Scalar: 1}  # fmt: skip
_COPIES = (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.expand.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def _same_as(node: Node, known: dict[str, Node]) -> str:
    """The node whose value this one repeats, or nothing."""
    if not node.args or not isinstance(node.args[0], Ref):
        return ""
    x = node.args[0].name
    if node.op in _COPIES or node.op in _VIEWS:
        return x
    if node.op in _NEUTRAL and not isinstance(node.args[1], Ref | bool) and node.args[1] == _NEUTRAL[node.op]:
        return x
    inner = known[x]
    return inner.args[0].name if node.op is aten.neg.default and inner.op is aten.neg.default else ""


def _shorter_view(node: Node, known: dict[str, Node]) -> Node:
    """view(view(x)) is view(x) where x lies contiguous: then any shape can be read off it directly."""
    inner = known[node.args[0].name] if node.op in _VIEWS else None
    while inner is not None and inner.op in _VIEWS and _contiguous(known[inner.args[0].name].type):
        node = replace(node, op=aten.view.default, args=(inner.args[0], *node.args[1:]))
        inner = known[inner.args[0].name]
    return node


def _contiguous(kind: Type) -> bool:
    return torch.empty_strided(kind.shape, kind.stride, device="meta").is_contiguous()


def scaled_filters(
    w: Float[Tensor, "d c i j"],
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Float[Tensor, "d c i j"], Float[Tensor, " d"]]:
    """W' = W gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta: a normalization with fixed
    statistics is an affine map of each channel, and so is part of the convolution before it."""
    scale = torch.rsqrt(var.double() + eps) * (1 if gamma is None else gamma.double())
    shift = ((0 if bias is None else bias.double()) - mean.double()) * scale + (0 if beta is None else beta.double())
    return (w.double() * scale.reshape(-1, *[1] * (w.dim() - 1))).to(w.dtype), shift.to(w.dtype)


@torch.no_grad()
def conv_bn(graph: Graph) -> Graph:
    """A convolution followed by nothing but its normalization becomes one convolution with scaled filters."""
    graph = dce(graph)
    users, values, renamed = graph.users(), dict(graph.values), {}
    nodes = graph.by_name.copy()
    for node in graph.nodes:
        conv = _convolution_before(node, graph, users)
        if conv is None:
            continue
        x, w, b, *settings = conv.args
        tensors = [None if a is None else values[a.name] for a in (w, b, *node.args[1:5])]
        filters = scaled_filters(*tensors, node.args[-1])  # type: ignore[arg-type, call-arg]
        names = f"{conv.name}_filters", f"{conv.name}_shift"
        for name, value in zip(names, filters, strict=True):
            values[name], nodes[name] = value, Node(name, "weight", type=Type.of(value))
        nodes[conv.name] = replace(conv, args=(x, Ref(names[0]), Ref(names[1]), *settings))
        (result,) = users[node.name]
        renamed[result] = conv.name
        del nodes[node.name], nodes[result]
    # weights first: those made here come after their users in the dictionary
    return dce(graph.rebuilt(sorted(nodes.values(), key=lambda n: n.computes), renamed, values))


_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def _convolution_before(node: Node, graph: Graph, users: dict[str, set[str]]) -> Node | None:
    """The convolution that a normalization with fixed statistics can move into."""
    if node.op not in _NORMS or (node.op is _NORMS[0] and node.args[5]):
        return None
    conv = graph[node.args[0].name]
    if conv.op is not aten.convolution.default or conv.args[6] or conv.name in refs(graph.outputs):  # 6: transposed
        return None
    alone = users[conv.name] == {node.name} and [graph[u].args[1] for u in users[node.name]] == [0]
    fixed = all(a is None or a.name in graph.values for a in (*conv.args[1:3], *node.args[1:5]))
    return conv if alone and fixed and None not in node.args[3:5] else None
