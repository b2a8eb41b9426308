"""Texts that come, grow, fork, shrink and go, in pages and beside them in a dictionary of plain tensors."""

import zlib
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from effkit.caching.paged import PagedCache, PagesExhausted, Pool, Table, pages_for
from effkit.caching.prefix import PrefixCache
from effkit.core.generation import Rope, attention
from tests.caching.laws import branches

ROPE = Rope(4)
HEADS, GROUPS, LAYERS = 4, 2, (0, 1)
tokens = st.sampled_from([0, 0, 0, 1])


def drawn(ids, heads: int, layer: int) -> torch.Tensor:
    """(heads, 4) numbers that depend on a token and all before it, as keys and values do."""
    seed = zlib.crc32(bytes(ids)) + heads + 1000 * layer
    return torch.randn(heads, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(ids, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a whole text, (1, heads, n, 4), not rotated."""
    return split([ids[: i + 1] for i in range(len(ids))], layer)


def split(lines, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those of the last tokens of these texts."""
    numbers = torch.stack([drawn(ids, HEADS + 2 * GROUPS, layer) for ids in lines], dim=1)[None]
    return numbers[:, :HEADS], numbers[:, HEADS:-GROUPS], numbers[:, -GROUPS:]


def rotated(x: torch.Tensor) -> torch.Tensor:
    return ROPE(x, ROPE.tables(torch.arange(x.shape[2]), x.dtype))


def attended(ids, n: int, layer: int) -> torch.Tensor:
    """What the last n tokens of a text see, from plain tensors."""
    q, k, v = plain(ids, layer)
    return attention(rotated(q)[:, :, -n:], rotated(k), v)


class Pages(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = Pool(page_size=3, pages=14)
        self.tree = PrefixCache(self.pool)
        self.texts: dict[int, list[int]] = {}
        self.tables: dict[int, Table] = {}
        self.last = 0

    def add(self, ids, table) -> None:
        self.last += 1
        self.texts[self.last], self.tables[self.last] = list(ids), table

    def one(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)), label="text")

    some = precondition(lambda self: self.texts)
    few = precondition(lambda self: len(self.texts) < 6)

    @few
    @rule()
    def allocate(self):
        self.add([], Table(self.pool))

    @some
    @rule(data=st.data(), n=st.integers(1, 6))
    def append(self, data, n):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, unique=True), label="rows")
        self.feed({row: data.draw(st.lists(tokens, min_size=n, max_size=n), label="tokens") for row in rows}, n)

    def feed(self, new, n):
        rows = list(new)
        texts = [self.texts[row] + new[row] for row in rows]
        tables = [self.tables[row] for row in rows]
        fed = [[torch.cat(parts) for parts in zip(*([x[:, :, -n:] for x in plain(t, layer)] for t in texts), strict=True)] for layer in LAYERS]
        cache, before = PagedCache(ROPE, self.pool, tables), [(t.length, list(t.pages)) for t in tables]
        cache.advance(n, dtype=torch.float64)
        try:
            seen = [cache.attend(layer, *fed[layer]) for layer in LAYERS]
        except PagesExhausted:
            assert before == [(t.length, t.pages) for t in tables] and cache.length == max(n for n, _ in before)
            assert len(self.pool.free) < sum(t.missing(t.length + n) + 1 for t in tables)
            return
        self.texts |= dict(zip(rows, texts, strict=True))
        for layer in LAYERS:
            for row, text in zip(seen[layer], texts, strict=True):
                assert torch.allclose(row, attended(text, n, layer)[0], rtol=0, atol=1e-12)

    @some
    @rule(data=st.data(), tree=st.lists(st.tuples(tokens, st.integers(0, 99)), min_size=1, max_size=6))
    def branch(self, data, tree):
        """A tree of tokens is fed, and of it one branch is kept."""
        row, parents = self.one(data), [x % (i + 1) - 1 for i, (_, x) in enumerate(tree)]
        lines = [self.texts[row] + [tree[i][0] for i in way] for way in branches(parents)]
        cache, before = PagedCache(ROPE, self.pool, [self.tables[row]]), self.tables[row].length
        cache.advance(len(tree), torch.tensor(parents), dtype=torch.float64)
        try:
            seen = [cache.attend(layer, *split(lines, layer)) for layer in LAYERS]
        except PagesExhausted:
            assert cache.length == self.tables[row].length == before
            return
        for layer in LAYERS:
            for i, line in enumerate(lines):
                assert torch.allclose(seen[layer][0, :, [i]], attended(line, 1, layer)[0], rtol=0, atol=1e-12)
        way = data.draw(st.sampled_from(branches(parents)), label="way")
        cache.keep(torch.tensor(way))
        self.texts[row] = lines[way[-1]]

    @some
    @few
    @rule(data=st.data(), new=st.lists(tokens, max_size=2), both=st.booleans())
    def fork(self, data, new, both):
        row = self.one(data)
        self.add(self.texts[row], self.tables[row].fork())
        if new:
            self.feed({row: new, self.last: new} if both else {self.last: new}, len(new))

    @some
    @rule(data=st.data(), n=st.integers(0, 12))
    def truncate(self, data, n):
        row = self.one(data)
        self.tables[row].truncate(n)
        self.texts[row] = self.texts[row][:n]

    @some
    @rule(data=st.data())
    def free(self, data):
        row = self.one(data)
        del self.tables[row], self.texts[row]

    @some
    @rule(data=st.data())
    def remember(self, data):
        row = self.one(data)
        self.tree.insert(self.texts[row], self.tables[row])
        with_it = self.tree.match(self.texts[row])
        assert with_it.length == len(self.texts[row]) // 3 * 3

    @some
    @rule(data=st.data(), n=st.integers(3, 9), token=tokens)
    def finish(self, data, n, token):
        """As a request does: read a prompt, remember it, go."""
        row = self.one(data)
        self.feed({row: [token] * n}, n)
        self.tree.insert(self.texts[row], self.tables[row])
        del self.tables[row], self.texts[row]

    @few
    @rule(ids=st.lists(tokens, min_size=3, max_size=12))
    def recall(self, ids):
        table = self.tree.match(ids)
        assert table.length <= len(ids)
        self.add(ids[: table.length], table)

    @rule(n=st.integers(0, 6))
    def evict(self, n):
        free, idle = len(self.pool.free), self.idle()
        given = self.tree.evict(n)
        assert given == (n if n <= idle else 0) and len(self.pool.free) == free + given

    def idle(self) -> int:
        """Pages of the tree that no text reads and behind which none reads one."""
        read = {page for table in self.tables.values() for page in table.pages}
        paths = [node.path() for node in self.tree.root.all()]
        kept = {page for path in paths for i, page in enumerate(path) if read & set(path[i:])}
        return self.tree.pages() - len(kept)

    @invariant()
    def no_page_leaks(self):
        named = Counter(page for table in self.tables.values() for page in table.pages)
        named.update(page for node in self.tree.root.all() for page in node.pages)
        assert [named[page] for page in range(14)] == self.pool.references
        assert sorted(self.pool.free) == [page for page in range(14) if not named[page]]

    @invariant()
    def at_most_a_page_less_one_token_is_wasted(self):
        for row, table in self.tables.items():
            assert table.length == len(self.texts[row]) and len(table.pages) == pages_for(table.length, 3)

    @invariant()
    def every_text_is_what_was_written(self):
        """So none was written while it was shared."""
        for row, ids in self.texts.items():
            for layer in LAYERS if ids else ():
                keys, values = self.pool.layers[layer].flatten(1, 2)[:, [3 * p + i for p in self.tables[row].pages for i in range(3)]]
                _, k, v = plain(ids, layer)
                assert torch.allclose(keys[: len(ids)], rotated(k)[0].transpose(0, 1), rtol=0, atol=1e-12)
                assert torch.equal(values[: len(ids)], v[0].transpose(0, 1))


def run(machine=Pages, examples: int = 120, steps: int = 50) -> None:
    how = settings(max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
                   phases=[Phase.generate], report_multiple_bugs=False,
                   suppress_health_check=list(HealthCheck))  # fmt: skip  (a busy machine is no finding)
    run_state_machine_as_test(machine, settings=how)
