"""Capture: from a model that runs to a graph.

Problem   The program exists only while Python runs it.
Idea      Run the model once on fake tensors, which have a shape but no numbers, and write down every ATen operator
          that arrives; then run what was written once for real, to learn the layouts.
Cost      Python's branches are gone: the graph is right for this shape, dtype and mode only, so whoever runs it must
          check. A branch on a tensor's value, or a kernel that torch cannot see, cannot be captured and is refused.
Left out  Several graphs joined by Python, as torch.compile makes where it has to break one.
Source    Reed et al. 2021, arXiv:2112.08429 (torch.fx); its tracer of ATen operators, make_fx, does the writing.
"""

import copy
import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten

from effkit.compilation.ir import Graph, Node, Ref, Type, map_refs, op_name, rename, run
from effkit.core.technique import evaluating


class CannotCompile(ValueError):
    """Why a model has no graph, in one sentence."""


def capture(model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """The operators of one forward pass in evaluation mode. Weights stay live: their values share memory with the model's.

    Raises CannotCompile where the pass branches on values, writes into its inputs or draws random numbers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with evaluating(model), torch.no_grad():
        traced, spec = _trace(model, tensors, example)
    graph = _from_fx(traced, tensors, spec)
    for node in graph.operators:
        _check(node)
    return typed(graph, example)


def _trace(model: nn.Module, tensors: dict[str, Tensor], example: tuple[Tensor, ...]):
    specs: list[TreeSpec] = []

    # modules are copied, so that nothing fake stays behind in an attribute; their tensors are not
    twin = copy.deepcopy(model, {id(t): t for t in tensors.values()})
    tables = [table for m in twin.modules() for table in (m._parameters, m._buffers)]

    def call(weights, *inputs):
        handed_in = {id(t): weights[name] for name, t in tensors.items()}
        placed = [{key: handed_in.get(id(t), t) for key, t in table.items()} for table in tables]
        for table, new in zip(tables, placed, strict=True):
            table.update(new)
        leaves, spec = tree_flatten(twin(*inputs))
        if any(table.get(key) is not t for table, new in zip(tables, placed, strict=True) for key, t in new.items()):
            raise ValueError("it puts another tensor in the place of a weight or buffer")
        specs.append(spec)
        return leaves

    options = dict(tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        once = make_fx(call, **options)(tensors, *example)  # type: ignore[arg-type]
        # composite operators write in place inside themselves, which functionalize sees only in the second pass
        return make_fx(torch.func.functionalize(once), **options)(tensors, *example), specs[0]  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001  (whatever stops the trace is the reason)
        name, why = type(model).__name__, _first_line(error)
        way_out = "leave it eager, or compile the part that has no branches on values"
        raise CannotCompile(f"the forward pass of {name} cannot be captured: {why}; {way_out}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"


def _from_fx(traced: torch.fx.GraphModule, weights: dict[str, Tensor], spec: TreeSpec) -> Graph:
    """The same nodes in our own form. The first placeholders are the weights, which keep the model's names for them."""
    nodes: list[Node] = []
    values: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    places = iter(weights.items())
    for fx in traced.graph.nodes:
        if fx.op == "output":
            return Graph(tuple(nodes), map_refs(_args(tuple(fx.args[0])), names), values, spec)
        path, held = next(places, ("", None)) if fx.op == "placeholder" else (fx.name, None)
        held = getattr(traced, fx.target) if fx.op == "get_attr" else held
        kind = "weight" if held is not None else "input" if fx.op == "placeholder" else fx.target
        if held is not None:
            name = f"p_{path.replace('.', '_')}"
            while name in values:  # a.b_c and a_b.c are two weights
                name += "_"
            names[fx.name] = name
            values[names[fx.name]] = held.detach()
        elif kind == "input":
            names[fx.name] = f"x{sum(node.op == 'input' for node in nodes)}"
        args, kwargs = (_args(fx.args), _args(fx.kwargs)) if fx.op == "call_function" else ((), {})
        nodes.append(rename(Node(names.get(fx.name, fx.name), kind, args, kwargs), names))
    raise CannotCompile("the trace has no output; this should not happen, please report the model")


def _args(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, Mapping):
        return {k: _args(v) for k, v in value.items()}
    return tuple(map(_args, value)) if isinstance(value, tuple | list) else value


def _check(node: Node) -> None:
    """Refuses what cannot be replayed: operators that write, and dice."""
    if node.op is operator.getitem:
        return
    if not isinstance(node.op, torch._ops.OpOverload):
        raise CannotCompile(f"the graph calls {op_name(node.op)}, which is no ATen operator; leave the model eager")
    if node.op._schema.is_mutable:
        raise CannotCompile(f"{op_name(node.op)} writes into a tensor that the model keeps; make the forward pass pure, or leave the model eager")
    if torch.Tag.nondeterministic_seeded in node.op.tags and _argument(node, "dropout_p") != 0:
        raise CannotCompile(f"{op_name(node.op)} draws random numbers in evaluation mode; leave the model eager")


def _argument(node: Node, name: str) -> Any:
    """What the operator gets under this name, by position, by keyword or by default; None where it has no such."""
    for i, argument in enumerate(node.op._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    return None


def typed(graph: Graph, example: Iterable[Tensor]) -> Graph:
    """Types and bases as they come out when the graph really runs, since fake strides may differ from real ones."""
    found: dict[str, Node] = {}
    memory: dict[int, str] = {}
    alive = []

    def observe(node: Node, value: Any) -> None:
        alive.append(value)  # or an address would be given out twice
        address = _address(value)
        base = memory.setdefault(address, node.name) if address else node.name
        if node.op is operator.getitem:
            base = node.args[0].name
        shown = base if node.computes and base != node.name else ""
        found[node.name] = replace(node, type=Type.of(value), base=shown)

    run(graph, example, observe)
    return Graph(tuple(found[node.name] for node in graph.nodes), graph.outputs, graph.values, graph.spec)


def _address(value: Any) -> int:
    """Where the memory of a tensor, or of the first of several, begins; 0 where there is none."""
    first = next(iter(value), None) if isinstance(value, tuple | list) else value
    return first.untyped_storage().data_ptr() if isinstance(first, Tensor) and first.numel() else 0
