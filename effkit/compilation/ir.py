"""Capture: from a model that runs to a graph that can be read, checked and rewritten.

Problem   Eager PyTorch sees one operator at a time: nobody knows that a result is used once, or a weight never changes.
Idea      Run the model once on fake tensors and write down every ATen operator that arrives. What comes out is a
          straight-line program in static single assignment: each node has one name, one operator, one type.
Cost      Python's branches are gone: the graph is right for this shape, dtype and mode only, so whoever runs it must
          check. A branch on a tensor's value, or a kernel that torch cannot see, cannot be captured and is refused.
Left out  Symbolic shapes (one graph for many sizes), control flow as operators, several graphs joined by Python.
Source    Reed et al. 2021, arXiv:2112.08429 (torch.fx); static single assignment after Cytron et al. 1991,
          doi:10.1145/115372.115320.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from effkit.core.technique import evaluating


class CannotCompile(ValueError):
    """Why a model has no graph, in one sentence."""


@dataclass(frozen=True)
class Type:
    """What is known of a tensor before it exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str = "cpu"

    @classmethod
    def of(cls, value: Any) -> Any:
        """Of a tensor its type, of several a tuple, of anything else None."""
        if isinstance(value, Tensor):
            return cls(value.dtype, tuple(value.shape), tuple(value.stride()), value.device.type)
        return tuple(map(cls.of, value)) if isinstance(value, tuple | list) else None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that a tensor of this type spans."""
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.numel else 0
        return reach * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Ref:
    """The use of a node's value as an argument."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Node:
    """name = op(*args, **kwargs). `base` names the node whose memory this one only shows in another way, or is empty."""

    name: str
    op: Any  # "input", "weight", or something to call: an ATen operator, operator.getitem, a fused kernel
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    type: Any = None
    base: str = ""

    @property
    def computes(self) -> bool:
        return not isinstance(self.op, str)

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the nodes it reads, each once."""
        return tuple(dict.fromkeys(refs((self.args, self.kwargs))))

    def __str__(self) -> str:
        shown = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        kind = ", ".join(map(str, self.type)) if isinstance(self.type, tuple) else str(self.type)
        return f"%{self.name}: {kind} = {op_name(self.op)}" + (f"({', '.join(shown)})" if self.computes else "")


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which they can run, what is returned, and the values of the weights among them."""

    nodes: tuple[Node, ...]
    outputs: tuple
    values: Mapping[str, Tensor] = field(default_factory=dict)
    spec: TreeSpec | None = None

    def __getitem__(self, name: str) -> Node:
        return self.by_name[name]

    @property
    def by_name(self) -> dict[str, Node]:
        if "_by_name" not in self.__dict__:
            self.__dict__["_by_name"] = {node.name: node for node in self.nodes}
        return self.__dict__["_by_name"]

    @property
    def operators(self) -> tuple[Node, ...]:
        """The nodes that cost a call; a view or the choice of one of several results costs one too."""
        return tuple(node for node in self.nodes if node.computes)

    def users(self) -> dict[str, set[str]]:
        """node -> the nodes that read it."""
        found: dict[str, set[str]] = {node.name: set() for node in self.nodes}
        for node in self.nodes:
            for name in node.uses:
                found[name].add(node.name)
        return found

    def root(self, name: str) -> str:
        """The node that owns the memory behind a name."""
        while self[name].base:
            name = self[name].base
        return name

    def escaping(self) -> set[str]:
        """Owners of memory that the caller gets to see: it must not be reused, nor shared with anything new."""
        return {self.root(name) for name in refs(self.outputs)}

    def rebuilt(self, nodes: Iterable[Node], renamed: Mapping[str, str] | None = None, values: Mapping[str, Tensor] | None = None) -> "Graph":
        """Other nodes, with uses of renamed ones following; weights' values only for those that are left."""
        names = renamed or {}
        kept = tuple(rename(node, names) for node in nodes)
        known = self.values if values is None else values
        left = {node.name for node in kept}
        return Graph(kept, map_refs(self.outputs, names), {k: v for k, v in known.items() if k in left}, self.spec)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.nodes), f"return {', '.join(map(repr, self.outputs))}"])


def op_name(op: Any) -> str:
    """add.Tensor, getitem, input."""
    return op if isinstance(op, str) else str(getattr(op, "__name__", op)).removesuffix(".default")


def refs(value: Any) -> Iterable[str]:
    """Names of all Refs within tuples, lists and dicts."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from refs(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from refs(part)


def substitute(value: Any, get: Callable[[str], Any]) -> Any:
    """Every Ref replaced by get(its name); lists become tuples, so that what results can be compared and hashed."""
    if isinstance(value, Ref):
        return get(value.name)
    if isinstance(value, Mapping):
        return {k: substitute(v, get) for k, v in value.items()}
    return tuple(substitute(v, get) for v in value) if isinstance(value, tuple | list) else value


def map_refs(value: Any, names: Mapping[str, str]) -> Any:
    """Uses renamed; what `names` lacks stays."""
    return substitute(value, lambda name: Ref(names.get(name, name)))


def rename(node: Node, names: Mapping[str, str]) -> Node:
    if not names or not any(name in names for name in (*node.uses, node.base)):
        return node
    args, kwargs = map_refs(node.args, names), map_refs(node.kwargs, names)
    return replace(node, args=args, kwargs=kwargs, base=names.get(node.base, node.base))


@torch.no_grad()
def run(graph: Graph, inputs: Iterable[Tensor], observe: Callable[[Node, Any], None] | None = None) -> Any:
    """Interprets the graph, one node after another: the meaning that every pass has to preserve."""
    feed, known = iter(inputs), dict(graph.values)
    for node in graph.nodes:
        if node.op == "input":
            known[node.name] = next(feed)
        elif node.computes:
            args, kwargs = substitute((node.args, node.kwargs), known.__getitem__)
            known[node.name] = node.op(*args, **kwargs)
        if observe is not None:
            observe(node, known[node.name])
    outputs = substitute(graph.outputs, known.__getitem__)
    return tree_unflatten(list(outputs), graph.spec) if graph.spec is not None else outputs


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
            names[fx.name] = f"p_{path.replace('.', '_')}"
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
