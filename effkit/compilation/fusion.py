"""Fusion: chains of pointwise operators, and row reductions among them, become one kernel.

Problem   relu(a * x + b) reads and writes memory three times to do three operations an element. From a few thousand
          elements on memory is what it waits for, below that the dispatch of each operator.
Idea      Compute all of the chain for one element before going to the next: intermediates live in registers. Where a
          reduction along the last dimension stands in the middle (softmax, RMSNorm), compute row by row: the
          intermediates of one row live in the cache nearest to the processor.
Legal     A node may join its user when everybody who reads it joins too, when it has the elements of the group's
          result or one a row, and when its numbers are float32 or float64 on the processor.
Profit    Every node that joins saves one write, one read and one dispatch. Nothing is computed twice.
Left out  Several results of one kernel, products with their epilogues, tiles.
Source    Chen et al. 2018, arXiv:1802.04799 (TVM), sec. 3: injective and reduction operators, and which may join.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from effkit.compilation import codegen, expressions
from effkit.compilation.ir import Graph, Node, Ref, Type, refs, rename, run
from effkit.core import native

aten = torch.ops.aten
LONGEST_ROW = 16384  # a row's buffers lie on the stack


def fuse(graph: Graph) -> Graph:
    """Every group of two or more operators that may join becomes one call of a C kernel. Without a C compiler the
    graph stays as it is; `native.why_not` says why."""
    for group in groups(graph):
        kernel = Kernel.of(graph, group)
        if kernel.function is not None:
            graph = _replaced(graph, group, kernel)
    return graph


def groups(graph: Graph) -> list[tuple[Node, ...]]:
    """Disjoint groups, each in the graph's order, its last node being the only one that others read."""
    users, outputs = graph.users(), set(refs(graph.outputs))
    taken: set[str] = set()
    found = []
    for i in range(len(graph.nodes) - 1, -1, -1):
        root = graph.nodes[i]
        if root.name not in taken and _legal(root, graph) and _full(root, root.type.shape):
            group = _grown(root, graph.nodes[:i], graph, users, taken | outputs)
            if len(group) > 1:
                found.append(group)
                taken |= {node.name for node in group}
    return found[::-1]


def _grown(
    root: Node, before: tuple[Node, ...], graph: Graph, users: dict[str, set[str]], barred: set[str]
) -> tuple[Node, ...]:
    """The root and all that only it reads, directly or through others; users stand behind what they use, so one walk
    backwards finds everything."""
    names, group = {root.name}, [root]
    for node in reversed(before):
        mine = users[node.name] and users[node.name] <= names and node.name not in barred
        if mine and _legal(node, graph) and _fits(node, root.type, graph):
            names.add(node.name)
            group.append(node)
    return tuple(reversed(group))


def _legal(node: Node, graph: Graph) -> bool:
    """An operator that code can be made for, on operands all of the result's dtype."""
    kind = node.type
    if not node.computes or not isinstance(kind, Type) or kind.dtype not in expressions.C_TYPES or not kind.numel:
        return False
    types = [kind, *(graph[name].type for name in node.uses)]
    same = all(isinstance(t, Type) and t.dtype == kind.dtype and t.device == "cpu" for t in types)
    return same and len(types) > 1 and expressions.supports(node)


def _full(node: Node, shape: tuple[int, ...]) -> bool:
    """Not a reduction, and as large as the group's result."""
    short = node.op is not expressions.SOFTMAX or shape[-1] <= LONGEST_ROW
    return node.type.shape == shape and node.op not in expressions.REDUCTIONS and short


def _fits(node: Node, result: Type, graph: Graph) -> bool:
    """One element for each of the result, or one for each of its rows."""
    shape = result.shape
    if _full(node, shape):
        return True
    a_row = shape and 1 < shape[-1] <= LONGEST_ROW and node.type.shape == (*shape[:-1], 1)
    if node.op not in expressions.REDUCTIONS:
        return bool(a_row)
    return bool(a_row) and graph[node.args[0].name].type.shape == shape


class Kernel:
    """A fused group: called with the tensors it reads, it returns a new tensor, or fills `out`."""

    def __init__(self, graph: Graph):
        self.graph = graph  # the group as a graph of its own: the meaning, and what is printed
        self.type: Type = graph[graph.outputs[0].name].type
        names = (node.op.__name__.split(".")[0].strip("_") for node in graph.operators)
        self.__name__ = "_".join(dict.fromkeys(("fused", *names)))

    @classmethod
    def of(cls, graph: Graph, group: tuple[Node, ...]) -> "Kernel":
        """Reads are numbered, so that equal groups of a model have equal source, and are compiled once."""
        inside = {node.name for node in group}
        reads = tuple(dict.fromkeys(name for node in group for name in node.uses if name not in inside))
        names = {name: f"in{i}" for i, name in enumerate(reads)} | {node.name: f"v{i}" for i, node in enumerate(group)}
        inputs = [Node(names[name], "input", type=graph[name].type) for name in reads]
        body = [replace(rename(node, names), name=names[node.name], base="") for node in group]
        kernel = cls(Graph((*inputs, *body), (Ref(names[group[-1].name]),)))
        kernel.reads = reads
        return kernel

    reads: tuple[str, ...] = ()

    @cached_property
    def source(self) -> str:
        """The kernel in C."""
        return codegen.to_c(self.graph)

    @cached_property
    def function(self) -> Callable | None:
        """The compiled kernel, or None where there is no compiler."""
        library = native.library(self.source)
        if library is None:
            return None
        function = library.kernel
        inputs = len(self.graph.nodes) - len(self.graph.operators)
        function.restype, function.argtypes = None, [ctypes.c_void_p] * (inputs + 1) + [ctypes.c_int]
        return function

    def __call__(self, *inputs: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty_strided(self.type.shape, self.type.stride, dtype=self.type.dtype)
        self.function(*[x.data_ptr() for x in inputs], out.data_ptr(), torch.get_num_threads())  # type: ignore[misc]
        return out

    def eager(self, *inputs: Tensor) -> Tensor:
        """What the kernel computes, operator by operator."""
        return run(self.graph, inputs)[0]


def _replaced(graph: Graph, group: tuple[Node, ...], kernel: Kernel) -> Graph:
    inside, last = {node.name for node in group}, group[-1]
    call = Node(last.name, kernel, tuple(map(Ref, kernel.reads)), type=last.type)
    return graph.rebuilt([call if node is last else node for node in graph.nodes if node is last or node.name not in inside])
