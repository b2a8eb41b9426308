"""Memory planning: where in one arena each intermediate lies, so that those alive at once never overlap.

Problem   A forward pass needs room for the tensors alive together, not for all that it ever makes. Which address each
          gets is dynamic storage allocation, NP-hard already for two sizes (Garey & Johnson 1979, problem SR2).
Idea      Largest first: put each buffer into the smallest gap, between those placed and alive with it, that holds it.
Bound     No plan is below the most bytes alive at any one time; where a plan reaches that, it is optimal.
Cost      Quadratic in the number of buffers, once, when compiling.
Left out  Sharing an operator's input with its output, recomputing instead of keeping.
Source    Pisarchyk & Lee 2020, arXiv:2001.03288, sec. 5 (greedy by size for offsets).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from effkit.compilation.ir import Graph, Type, refs

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Buffer:
    """Memory that one node owns: bytes, and the first and last position in the graph at which it must be intact."""

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: "Buffer") -> bool:
        """Alive together at some position; a result and what it is computed from are."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """offsets: buffer -> its first byte in the arena; total: bytes of the arena; bound: no plan needs fewer; naive: one
    buffer after another, none used twice."""

    offsets: dict[str, int]
    total: int
    bound: int
    naive: int

    def __str__(self) -> str:
        return f"{len(self.offsets)} buffers in {self.total:,} bytes; at least {self.bound:,}, without reuse {self.naive:,}"


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def nbytes(kind: object) -> int:
    """Bytes of a node's result, each of several in its own memory."""
    if isinstance(kind, tuple):
        return sum(map(nbytes, kind))
    return aligned(kind.nbytes) if isinstance(kind, Type) else 0


def lifetimes(graph: Graph) -> list[Buffer]:
    """The intermediates of a graph. A view keeps its owner alive; what is returned lives to the end."""
    first = {node.name: i for i, node in enumerate(graph.nodes) if node.computes and not node.base}
    last = dict(first)
    for i, node in enumerate(graph.nodes):
        for owner in {graph.root(name) for name in (node.name, *node.uses)} & first.keys():
            last[owner] = i
    for owner in {graph.root(name) for name in refs(graph.outputs)} & first.keys():
        last[owner] = len(graph.nodes)
    return [Buffer(name, nbytes(graph[name].type), first[name], last[name]) for name in first if nbytes(graph[name].type)]


def most_alive(buffers: Sequence[Buffer]) -> int:
    """The most bytes alive at one position: the lower bound of every plan. It is reached where some buffer begins."""
    return max((sum(b.size for b in buffers if b.first <= a.first <= b.last) for a in buffers), default=0)


def best_fit(buffers: Sequence[Buffer]) -> Plan:
    """Largest first, each into the smallest gap that holds it; where none does, behind all that it meets."""
    return _packed(sorted(buffers, key=lambda b: (-b.size, b.first)), min)


def _packed(order: Sequence[Buffer], choose: Callable[[Iterator[tuple[float, int]]], tuple[float, int]]) -> Plan:
    """One buffer after another, each into the gap that `choose` takes of those that hold it."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in order:
        placed.append((choose(_gaps(buffer, placed))[1], buffer))
    total = max((offset + b.size for offset, b in placed), default=0)
    return Plan({b.name: offset for offset, b in placed}, total, most_alive(order), sum(b.size for b in order))


def _gaps(buffer: Buffer, placed: list[tuple[int, Buffer]]) -> Iterator[tuple[float, int]]:
    """(room, offset) of each sufficient gap between the buffers that are alive together with this one, lowest first."""
    end = 0
    for offset, other in sorted((item for item in placed if item[1].meets(buffer)), key=lambda item: item[0]):
        if offset - end >= buffer.size:
            yield offset - end, end
        end = max(end, offset + other.size)
    yield math.inf, end


def optimal(buffers: Sequence[Buffer]) -> Plan:
    """The smallest arena there is, for up to eight buffers. Any plan can be pushed down until nothing moves, and is then
    what putting its buffers in order of offset as low as they fit gives: so the best of all orders is the optimum."""
    greedy = best_fit(buffers)
    if greedy.total == greedy.bound:
        return greedy
    if len(buffers) > 8:
        raise ValueError(f"{len(buffers)} buffers have too many orders to try; at most 8: take a part of the graph")
    return min((_packed(order, next) for order in permutations(buffers)), key=lambda plan: plan.total)


def overlaps(buffers: Sequence[Buffer], plan: Plan) -> list[tuple[str, str]]:
    """Pairs that are alive together and share a byte: a correct plan has none."""
    spans = [(b, plan.offsets[b.name], plan.offsets[b.name] + b.size) for b in buffers]
    return [
        (a.name, b.name)
        for i, (a, s, e) in enumerate(spans)
        for b, t, f in spans[i + 1 :]
        if a.meets(b) and s < f and t < e
    ]
