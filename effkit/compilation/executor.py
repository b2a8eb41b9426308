"""Running a graph: Python without decisions, and an arena.

Problem   An interpreter that looks up names and arguments costs more than small operators do.
Idea      Write the graph as one Python function, a line a node, each value forgotten after its last use. Kernels that
          can write where they are told write into one arena, at the offsets of the plan, into views made beforehand.
Honest    Many of PyTorch's kernels (convolution, attention, embedding) take memory for themselves: their results lie
          outside the arena, and the report says how many of each there are. What is returned is never in the arena.
"""

import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from effkit.compilation.fusion import Kernel
from effkit.compilation.ir import Graph, Ref, Type, refs
from effkit.compilation.plan import Buffer, Plan, best_fit, lifetimes

aten = torch.ops.aten
#: operators whose kernels really write into `out`, instead of computing elsewhere and copying
OUT = {op: op.overloadpacket.out for op in (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.cat.default, aten.mean.dim, aten.add.Tensor,
    aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.silu.default, aten.gelu.default, aten.tanh.default,
    aten.sigmoid.default, aten._softmax.default)}  # fmt: skip
#: what repr writes of numbers, dtypes and devices
WORDS = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}


class Executor:
    """A graph made ready: `executor(*inputs)` returns what the graph returns. One call at a time; `busy` says so."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.buffers = [b for b in lifetimes(graph) if goes_into_arena(graph, b.name)]
        self.plan: Plan = best_fit(self.buffers)
        self.outside: list[Buffer] = [b for b in lifetimes(graph) if b.name not in self.plan.offsets]
        self.arena = torch.empty(self.plan.total, dtype=torch.uint8)
        self.source, self._known = self._write()
        exec(compile(self.source, "<effkit graph>", "exec"), self._known)
        self._function = self._known["forward"]
        self.busy = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*inputs)
        leaves, spec = self._function(*inputs), self.graph.spec
        if spec is None:
            return leaves
        return leaves[0] if spec.is_leaf() else tree_unflatten(leaves, spec)

    def _write(self) -> tuple[str, dict[str, Any]]:
        """The Python source of the graph, and what its names stand for."""
        known = WORDS | dict(self.graph.values) | {f"m_{name}": self._view(name) for name in self.plan.offsets}
        lines, last = [], _last_uses(self.graph)
        for node in self.graph.operators:
            into = [f"out=m_{node.name}"] if node.name in self.plan.offsets else []
            known[f"f_{node.name}"] = OUT.get(node.op, node.op) if into else node.op
            args = [*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items()), *into]
            lines.append(f"{node.name} = f_{node.name}({', '.join(args)})")
            seen = dict.fromkeys((*node.uses, node.name))
            dead = [name for name in seen if last.get(name) == node.name and self.graph[name].computes]
            lines += [f"del {', '.join(dead)}"] if dead else []
        inputs = ", ".join(node.name for node in self.graph.nodes if node.op == "input")
        results = ", ".join(_result(value, self.graph) for value in self.graph.outputs)
        return "\n    ".join([f"def forward({inputs}):", *lines, f"return [{results}]"]) + "\n", known

    def _view(self, name: str) -> Tensor:
        """The buffer as a tensor of its type: a window onto the arena."""
        kind, start = self.graph[name].type, self.plan.offsets[name]
        return self.arena[start : start + kind.nbytes].view(kind.dtype).as_strided(kind.shape, kind.stride)


def goes_into_arena(graph: Graph, name: str) -> bool:
    """Owned by a kernel that writes where it is told, on the processor, and never seen by the caller."""
    node = graph[name]
    writes = isinstance(node.op, Kernel) or node.op in OUT
    return writes and isinstance(node.type, Type) and node.type.device == "cpu" and name not in graph.escaping()


def _last_uses(graph: Graph) -> dict[str, str]:
    """value -> the node after which nobody needs it; what is returned has none."""
    last = {name: node.name for node in graph.nodes for name in (node.name, *node.uses)}
    return {name: where for name, where in last.items() if name not in set(refs(graph.outputs))}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' * (len(value) == 1)})"
    return value.name if isinstance(value, Ref) else repr(value)


def _result(value: Any, graph: Graph) -> str:
    """A weight is copied on its way out: the caller may write into what it gets."""
    if not isinstance(value, Ref):
        return repr(value)
    return f"{value.name}.clone()" if graph[graph.root(value.name)].op == "weight" else value.name
