"""The intermediate representation: a program that can be read, checked and rewritten.

Problem   Eager PyTorch sees one operator at a time: nobody knows that a result is used once, or a weight never changes.
Idea      A straight-line program in static single assignment: each node has one name, one operator, one type, and
          stands behind what it uses. `run` says what a graph means; whatever rewrites it must not change that.
Views     A node may only show another's memory in another way; `base` says whose. Planning needs to know.
Left out  Symbolic shapes (one graph for many sizes), control flow as operators.
Source    Cytron et al. 1991, doi:10.1145/115372.115320 (static single assignment); Reed et al. 2021,
          arXiv:2112.08429 (torch.fx).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_unflatten


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

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

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

    def rebuilt(
        self,
        nodes: Iterable[Node],
        renamed: Mapping[str, str] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> "Graph":
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


def refs(value: Any) -> list[str]:
    """Names of all Refs within tuples, lists and dicts."""
    return [leaf.name for leaf in tree_leaves(value) if isinstance(leaf, Ref)]


def substitute(value: Any, get: Callable[[str], Any]) -> Any:
    """Every Ref replaced by get(its name)."""
    return tree_map(lambda leaf: get(leaf.name) if isinstance(leaf, Ref) else leaf, value)


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
