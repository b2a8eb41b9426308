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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    return [
        Buffer(name, nbytes(graph[name].type), first[name], last[name]) for name in first if nbytes(graph[name].type)
    ]


def most_alive(buffers: Sequence[Buffer]) -> int:
    """The most bytes alive at one position: the lower bound of every plan. It is reached where some buffer begins."""
    return max((sum(b.size for b in buffers if b.first <= a.first <= b.last) for a in buffers), default=0)


def best_fit(buffers: Sequence[Buffer]) -> Plan:
    """Largest first, each into the smallest gap that holds it; where none does, behind all that it meets."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        placed.append((_gap(buffer, placed), buffer))
    total = max((offset + b.size for offset, b in placed), default=0)
    return Plan({b.name: offset for offset, b in placed}, total, most_alive(buffers), sum(b.size for b in buffers))


def _gap(buffer: Buffer, placed: list[tuple[int, Buffer]]) -> int:
    """The offset of the smallest sufficient gap between the buffers that are alive together with this one."""
    end, best, smallest = 0, None, None
    for offset, other in sorted((item for item in placed if item[1].meets(buffer)), key=lambda item: item[0]):
        room = offset - end
        if room >= buffer.size and (smallest is None or room < smallest):
            best, smallest = end, room
        end = max(end, offset + other.size)
    return end if best is None else best


def optimal(buffers: Sequence[Buffer], *, seconds: float = 10.0) -> Plan | None:
    """The smallest arena there is; None where `seconds` were not enough to prove it.

    Where best fit reaches the bound, that is the proof. Otherwise by integer programming: minimize z subject to
    offset_i + size_i <= z, and for each pair alive together either offset_i + size_i <= offset_j or the reverse; a
    binary variable each pair says which, and M, the arena we already have, switches the other off.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    greedy = best_fit(buffers)
    if greedy.total == greedy.bound:
        return greedy
    n, pairs = len(buffers), [(i, j) for j in range(len(buffers)) for i in range(j) if buffers[i].meets(buffers[j])]
    unit = math.gcd(*(b.size for b in buffers))  # small numbers: the solver works with tolerances
    sizes, big = np.array([b.size // unit for b in buffers]), greedy.total // unit
    rows, limits = np.zeros((n + 2 * len(pairs), n + 1 + len(pairs))), np.zeros(n + 2 * len(pairs))
    rows[range(n), range(n)], rows[:n, n], limits[:n] = 1, -1, -sizes
    for k, (i, j) in enumerate(pairs):
        above, below = n + 2 * k, n + 2 * k + 1
        rows[above, [i, j, n + 1 + k]], limits[above] = (1, -1, big), big - sizes[i]  # i below j where the binary is 1
        rows[below, [j, i, n + 1 + k]], limits[below] = (1, -1, -big), -sizes[j]
    low, high = np.zeros(n + 1 + len(pairs)), np.ones(n + 1 + len(pairs))
    low[n], high[: n + 1] = greedy.bound // unit, big
    found = milp(np.eye(len(low))[n], constraints=LinearConstraint(rows, ub=limits), bounds=Bounds(low, high),
                 integrality=np.ones(len(low)), options={"time_limit": seconds})  # fmt: skip
    if found.status != 0:
        return None
    offsets = {b.name: round(x) * unit for b, x in zip(buffers, found.x, strict=False)}
    return Plan(offsets, round(found.x[n]) * unit, greedy.bound, greedy.naive)


def overlaps(buffers: Sequence[Buffer], plan: Plan) -> list[tuple[str, str]]:
    """Pairs that are alive together and share a byte: a correct plan has none."""
    spans = [(b, plan.offsets[b.name], plan.offsets[b.name] + b.size) for b in buffers]
    return [
        (a.name, b.name)
        for i, (a, s, e) in enumerate(spans)
        for b, t, f in spans[i + 1 :]
        if a.meets(b) and s < f and t < e
    ]
