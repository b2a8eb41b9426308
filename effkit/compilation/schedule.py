"""Scheduling: the order of the nodes decides how much is alive at once.

Problem   Any order that respects the arrows computes the same. Which one needs the least memory is NP-hard for graphs
          (Sethi 1975: register allocation with pebbles, doi:10.1137/0204020), although easy for trees.
Idea      Greedy: of all nodes that could run now, run the one after which the least is alive. Keep the result only if
          its peak is lower than that of the order we had.
Optimal   What has run is a set closed under "comes before"; the least peak to reach such a set follows from the least
          to reach the sets with one node fewer. Exponential: a yardstick for graphs of some fifteen nodes.
Source    Sethi & Ullman 1970, doi:10.1145/321607.321620, for trees; the recursion is dynamic programming over downsets.
"""

from collections.abc import Iterator

from effkit.compilation.ir import Graph
from effkit.compilation.plan import lifetimes, most_alive, nbytes


def peak(graph: Graph) -> int:
    """The most bytes of intermediates alive at once, in the order that the graph has."""
    return most_alive(lifetimes(graph))


def schedule(graph: Graph) -> Graph:
    """The greedy order where it lowers the peak, else the graph as it was."""
    candidate = reordered(graph, list(greedy(graph)))
    return candidate if peak(candidate) < peak(graph) else graph


def reordered(graph: Graph, names: list[str]) -> Graph:
    """Inputs and weights first, then the nodes in the order of these names."""
    return graph.rebuilt([*(n for n in graph.nodes if not n.computes), *(graph[name] for name in names)])


def greedy(graph: Graph) -> Iterator[str]:
    """Names in an order that keeps little alive; among equals, the graph's own order."""
    memory = _Memory(graph)
    waiting = {node.name: {u for u in node.uses if graph[u].computes} for node in graph.operators}
    done: set[str] = set()
    while waiting:
        ready = [name for name, uses in waiting.items() if uses <= done]
        chosen = min(ready, key=lambda name: memory.growth(name, done))
        del waiting[chosen]
        done.add(chosen)
        yield chosen


class _Memory:
    """What is alive once a set of nodes has run."""

    def __init__(self, graph: Graph):
        owned = [node for node in graph.operators if not node.base]
        self.size = {node.name: nbytes(node.type) for node in owned}
        self.owner = {node.name: graph.root(node.name) for node in graph.operators}
        self.kept = graph.escaping()
        self.readers: dict[str, set[str]] = {node.name: set() for node in owned}
        self.touched: dict[str, set[str]] = {}
        for node in graph.operators:
            self.touched[node.name] = {graph.root(name) for name in (node.name, *node.uses)} & self.size.keys()
            for owner in self.touched[node.name]:
                self.readers[owner].add(node.name)

    def dies(self, owner: str, done: set[str] | frozenset[str]) -> bool:
        return owner not in self.kept and self.readers[owner] <= done

    def growth(self, name: str, done: set[str]) -> int:
        """Bytes alive after the node minus before."""
        after = done | {name}
        return self.size.get(name, 0) - sum(self.size[o] for o in self.touched[name] if self.dies(o, after))
