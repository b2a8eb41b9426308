"""Small random models: a list of steps, each an operator and which earlier values it reads, so that Hypothesis can shrink them."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effkit.compilation.plan import nbytes

ROWS, COLUMNS = 4, 6


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def product(x, y, w):
    return torch.tanh(x @ w) if x.shape[-1] == COLUMNS else x


STEPS = (
    lambda x, y, w: torch.relu(x),
    lambda x, y, w: torch.tanh(x) * 2 - 1,
    lambda x, y, w: torch.sigmoid(x.neg().neg()),
    lambda x, y, w: F.silu(x) + 0,
    lambda x, y, w: F.gelu(x) * 1,
    lambda x, y, w: torch.exp(x.clamp(-2, 1)).clone(),
    lambda x, y, w: torch.softmax(x, -1),
    lambda x, y, w: rms(x),
    lambda x, y, w: x.abs().amax(-1, keepdim=True),
    lambda x, y, w: torch.tanh(x.sum(-1, keepdim=True)),
    lambda x, y, w: x.t().contiguous().t(),
    lambda x, y, w: x.reshape(-1).reshape(x.shape).view(x.shape),
    lambda x, y, w: torch.tanh(x + y),
    lambda x, y, w: torch.tanh(x) - torch.tanh(y),
    lambda x, y, w: torch.maximum(x, y) / 2,
    lambda x, y, w: torch.tanh(x) * w[0],
    lambda x, y, w: torch.cat((x, y), -1)[..., 1 : 1 + x.shape[-1]],
    lambda x, y, w: product(x, y, w),
    lambda x, y, w: torch.sin(w.sum(0) / 9) * torch.cos(y),
    lambda x, y, w: torch.arange(COLUMNS, dtype=x.dtype) * 0.1 - x.clamp(-3, 3),
)


class Program(nn.Module):
    """Runs the steps; `results` says which values are returned, counted from the last."""

    def __init__(self, steps, results, dtype=torch.float64):
        super().__init__()
        self.steps, self.results = steps, results
        self.weight = nn.Parameter(torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype))

    def forward(self, x, y):
        values = [x, y]
        for step, a, b in self.steps:
            values.append(STEPS[step](values[a % len(values)], values[b % len(values)], self.weight))
        return tuple(values[-1 - r % len(self.steps)] for r in self.results)


def programs(most: int = 12):
    step = st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 99), st.integers(0, 99))
    return st.builds(
        Program, st.lists(step, min_size=1, max_size=most), st.lists(st.integers(0, 99), min_size=1, max_size=3)
    )


def inputs(dtype=torch.float64, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(ROWS, COLUMNS, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))


def close(a, b, tolerance: float = 1e-9) -> bool:
    return all(
        x.shape == y.shape and torch.allclose(x, y, tolerance, tolerance, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def respects(graph, order) -> bool:
    """Every node stands behind all that it uses."""
    seen: set[str] = set()
    for node in order:
        if not set(node.uses) <= seen:
            return False
        seen.add(node.name)
    return True


def best_order(graph) -> tuple[int, list[str]]:
    """The lowest peak of any order, and such an order: for each set of nodes that may have run, the best way there."""
    nodes = graph.operators
    uses = {node.name: {u for u in node.uses if graph[u].computes} for node in nodes}
    best: dict[frozenset[str], tuple[int, list[str]]] = {frozenset(): (0, [])}
    for _ in nodes:
        longer: dict[frozenset[str], tuple[int, list[str]]] = {}
        for done, (height, order) in best.items():
            for node in nodes:
                if node.name not in done and uses[node.name] <= done:
                    reached, now = max(height, alive(graph, node, done)), done | {node.name}
                    if now not in longer or reached < longer[now][0]:
                        longer[now] = reached, [*order, node.name]
        best = longer
    return best[frozenset(uses)]


def alive(graph, node, done) -> int:
    """Bytes alive while the node runs: its result, and what ran before and is still to be read or is returned."""
    readers = {owner.name: set() for owner in graph.operators if not owner.base}
    for reader in graph.operators:
        for name in (reader.name, *reader.uses):
            readers.get(graph.root(name), set()).add(reader.name)
    kept = graph.escaping()
    living = {name for name, of in readers.items() if name in done and (name in kept or not of <= done)}
    return sum(nbytes(graph[name].type) for name in living | ({node.name} & readers.keys()))
