"""Pages: nothing leaks, nothing is written while it is shared, waste stays under its bound, and the logits are the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit.caching import paged
from effkit.caching.cost import kv_bytes
from effkit.caching.paged import Paged, PagedCache, PagesExhausted, Pool, Table, pages_for, reserve, waste
from effkit.caching.prefix import Node, PrefixCache
from effkit.caching.streams import stream
from effkit.core.generation import Cache, ConcatCache, Sampler
from tests.caching import laws, pages
from tests.caching.decoders import assert_equal_logits, chunked, decoder, text

GREEDY = Sampler(temperature=0.0)


def cache_of(model, page_size=4, pages=None) -> PagedCache:
    return PagedCache(model.rope, Pool(page_size=page_size, pages=pages))


@pytest.mark.parametrize("examples", [15, pytest.param(120, marks=pytest.mark.slow)])
def test_texts_in_pages_are_what_a_dictionary_of_tensors_says(examples):
    pages.run(examples=examples)


# planted bugs: each must turn the machine red


def fork_that_counts_nobody(self):
    return Table(self.pool, list(self.pages), self.length)


def match_that_counts_nobody(self, ids, match=PrefixCache.match):
    table = match(self, ids)
    for page in table.pages:
        self.pool.references[page] -= 1
    return table


def truncate_that_keeps_the_pages(self, n):
    self.length = min(max(n, 0), self.length)
    self.pages = self.pages[: pages_for(self.length, self.pool.page_size)]


def truncate_that_gives_all_back(self, n):
    self.length = min(max(n, 0), self.length)
    gone, self.pages = self.pages[self.length // self.pool.page_size :], self.pages[: pages_for(self.length, 3)]
    self.pool.release(gone)


def copy_that_forgets_the_page(self, page):
    if self.references[page] == 1:
        return page
    (mine,) = self.take(1)
    self.release([page])
    return mine


def move_in_the_first_layer_alone(self, start, index, move=PagedCache.move):
    layers, self.pool.layers = self.pool.layers, self.pool.layers[:1]
    move(self, start, index)
    self.pool.layers = layers


def keep_that_gives_no_page_back(self, index, keep=Cache.keep):
    keep(self, index)
    for table in self.rows:
        table.length = self.length


def evict_what_is_read(self, n):
    leaf = next((node for node in self.root.all() if node.pages and not node.children), None)
    if leaf is None or not n:
        return 0
    leaf.edge.pop()
    self.pool.references[page := leaf.pages.pop()] = 0
    self.pool.free.append(page)
    return 1




def needed_that_looks_at_no_path(self, references):
    return sum(references[page] > 1 for node in self.all() for page in node.pages)


def insert_that_lets_both_keep_their_copies(self, ids, table, insert=PrefixCache.insert):
    insert(self, ids, table.fork())


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, name, bug",
    [
        (Table, "fork", fork_that_counts_nobody),
        (PrefixCache, "match", match_that_counts_nobody),
        (Pool, "share", lambda self, pages: None),
        (Pool, "own", lambda self, page: page),
        (Pool, "own", copy_that_forgets_the_page),
        (Pool, "release", lambda self, pages: None),
        (Table, "truncate", truncate_that_keeps_the_pages),
        (Table, "truncate", truncate_that_gives_all_back),
        (PrefixCache, "evict", evict_what_is_read),
        (PagedCache, "move", move_in_the_first_layer_alone),
        (PagedCache, "keep", keep_that_gives_no_page_back),
    ],
)
def test_the_machine_notices(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        pages.run()


def forks_of_twins():
    """Two texts that begin alike, each computed on its own, the second forked before it was inserted: its fork reads the
    end of the tree's branch behind its own copy of the beginning, which must stay though no text reads it."""
    machine = pages.Pages()
    for row, n in ((1, 3), (2, 6)):
        machine.allocate()
        machine.feed({row: [0] * n}, n)
    machine.tree.insert(machine.texts[1], machine.tables[1])
    machine.add(machine.texts[2], machine.tables[2].fork())
    machine.tree.insert(machine.texts[2], machine.tables[2])
    assert machine.tables[2].pages[0] == machine.tables[1].pages[0] != machine.tables[3].pages[0]
    for row, idle in ((1, 0), (2, 0), (3, 2)):
        del machine.tables[row], machine.texts[row]
        assert machine.idle() == idle
        for n in (3, 2, 1):
            machine.evict(n)
        machine.no_page_leaks()


@pytest.mark.parametrize(
    "where, name, bug",
    [
        (PrefixCache, "insert", insert_that_lets_both_keep_their_copies),
        (Node, "needed", needed_that_looks_at_no_path),
        (Node, "needed", lambda self, references: 0),
    ],
)
def test_forks_of_twins(monkeypatch, where, name, bug):
    forks_of_twins()
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, ValueError)):
        forks_of_twins()


def test_the_machine_notices_pages_that_are_taken_before_all_are_there(monkeypatch):
    """A pass that is refused halfway must not have happened."""

    def one_after_another(tables, n):
        for table in tables:
            reserve(table and [table], n)

    monkeypatch.setattr(paged, "reserve", one_after_another)
    with pytest.raises(AssertionError):
        pages.run()


# waste


@given(lengths=st.lists(st.integers(0, 300), min_size=1).filter(any), page_size=st.integers(1, 64))
def test_waste_is_at_most_a_page_less_one_token_a_text(lengths, page_size):
    pool = Pool(page_size=page_size)
    tables = [Table(pool) for _ in lengths]
    for table, n in zip(tables, lengths, strict=True):
        reserve([table], n)
    reserved = (len(pool.references) - len(pool.free)) * page_size
    assert waste(lengths, page_size=page_size) == pytest.approx((reserved - sum(lengths)) / sum(lengths))
    assert reserved - sum(lengths) <= len(lengths) * (page_size - 1)


def test_pages_waste_little_where_reserving_for_the_longest_wastes_more_than_is_used():
    lengths = [len(r.prompt) + r.new for r in stream(0, 200, texts=TEXTS, encode=str.encode)]
    bound = 15 * len(lengths) / sum(lengths)
    assert waste(lengths, page_size=16) <= bound < 0.1
    assert waste(lengths, page_size=max(lengths)) > 0.5
    assert waste([5], page_size=5) == waste([], page_size=16) == 0


TEXTS = ["".join(chr(97 + (i * i + 7 * i // 3) % 26) for i in range(5000))]


# exactness beyond what test_protocol.py asks: rows that share pages


@settings(max_examples=20)
@given(page_size=st.integers(1, 7), held=st.integers(1, 20), new=st.integers(1, 6), forks=st.integers(1, 3))
@torch.no_grad()
def test_rows_that_were_forked_go_their_own_ways(page_size, held, new, forks):
    model, start = decoder(), text(held)
    cache = cache_of(model, page_size)
    model(start, cache)
    used = sum(n > 0 for n in cache.pool.references)
    assert [cache.fork(0) for _ in range(forks)] == list(range(1, forks + 1))
    assert sum(n > 0 for n in cache.pool.references) == used, "a fork copies nothing"
    line = torch.cat((start.expand(forks + 1, -1), text(new, rows=forks + 1, seed=1)), dim=1)
    assert_equal_logits(chunked(model, cache, line, [1] * new), model(line)[:, held:])
    shared = held // page_size  # pages that were full stay shared
    assert sum(n > 0 for n in cache.pool.references) == shared + (forks + 1) * (pages_for(held + new, page_size) - shared)
    cache.drop(0)
    assert_equal_logits(model(line[1:, :1], cache), model(torch.cat((line[1:], line[1:, :1]), dim=1))[:, -1:])


@torch.no_grad()
def test_what_another_text_left_in_a_page_is_not_seen_even_where_it_is_no_number():
    model, pool = decoder(), Pool(page_size=8, pages=2)
    spoiled = PagedCache(model.rope, pool)
    model(text(16), spoiled)
    for layer in pool.layers:
        layer.fill_(torch.nan)
    del spoiled
    cache, line = PagedCache(model.rope, pool), text(5, rows=2)
    assert_equal_logits(model(line, cache), model(line))
    cache.truncate(torch.tensor([2, 5]))
    seen = model(line[:, :1], cache)
    for row, n in enumerate((2, 5)):
        wanted = torch.cat((line[row : row + 1, :n], line[row : row + 1, :1]), 1)
        assert_equal_logits(seen[row : row + 1], model(wanted)[:, -1:])


@torch.no_grad()
def test_a_short_row_is_filled_up_with_pages_of_its_own():
    model, pool = decoder(), Pool(page_size=2, pages=12)
    spoiled = PagedCache(model.rope, pool)
    model(text(2), spoiled)
    for layer in pool.layers:
        layer[:, spoiled.rows[0].pages] = torch.nan
    cache, line = PagedCache(model.rope, pool), text(8, rows=2)
    model(line, cache)
    cache.truncate(torch.tensor([1, 8]))
    assert_equal_logits(model(line[:, :1], cache)[:1], model(line[:1, [0, 0]])[:, -1:])


# a pool that runs out


@torch.no_grad()
def test_without_a_free_page_the_pass_has_not_happened():
    model, line = decoder(), text(13, rows=2)
    cache = cache_of(model, page_size=4, pages=6)
    model(line[:, :12], cache)
    before = [list(table.pages) for table in cache.rows]
    with pytest.raises(PagesExhausted, match="2 pages are needed, 0 of 6 are free: let other texts end first, or make the pool"):
        model(line[:, 12:], cache)
    assert cache.length == 12 and cache.lengths is None and [t.pages for t in cache.rows] == before
    with pytest.raises(PagesExhausted):
        model(line[:, :9], PagedCache(model.rope, cache.pool))
    cache.truncate(7)
    assert len(cache.pool.free) == 2
    assert_equal_logits(model(line[:, 7:12], cache), model(line[:, :12])[:, 7:])


def test_the_last_page_is_enough_for_the_copies_that_are_really_made():
    """Of two that share half a page and both write, one may keep it; a third reader makes both copy."""
    for readers, free in ((0, 1), (1, 2)):
        pool = Pool(page_size=4, pages=1 + free)
        first = Table(pool)
        reserve([first], 3)
        others = [first.fork() for _ in range(1 + readers)]
        reserve([first, others[0]], 1)
        assert not pool.free and len({t.pages[0] for t in (first, *others)}) == 2 + readers
    with pytest.raises(PagesExhausted):
        reserve([first], 1)
    assert first.length == 4


def test_a_pool_without_a_number_of_pages_doubles():
    model, sizes = decoder(layers=1), []
    cache = cache_of(model, page_size=2)
    for i in range(20):
        chunked(model, cache, text(i + 1), [])
        sizes.append(len(cache.pool.references))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16]
    assert cache.pool.layers[0].shape[1] == 16


# the technique


def test_a_model_s_texts_share_one_pool_and_give_their_pages_back():
    model, ids = Paged(page_size=4)(decoder()), text(6, rows=2)
    first, second = model.new_cache(capacity=6), model.new_cache(capacity=6)
    with torch.no_grad():
        model(ids, first), model(ids, second)
    pool = model.kv.pool
    assert first.pool is second.pool is pool and sum(pool.references) == 8
    del second
    assert sum(pool.references) == 4
    first.truncate(4)
    assert sum(pool.references) == 2
    model.generate(ids, 9)
    assert sum(pool.references) == 2


def test_it_changes_which_cache_is_made_and_nothing_else(tmp_path):
    model, ids = decoder(), text(7, rows=2)
    result = Paged(page_size=3)(model)
    assert type(result.new_cache(capacity=4)) is PagedCache and type(model.new_cache(capacity=4)) is ConcatCache
    wanted = model.generate(ids, 12, sampler=GREEDY)
    assert torch.equal(result.generate(ids, 12, sampler=GREEDY), wanted)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert opened.kv.page_size == 3 and opened.kv.pool.layers == []
    assert torch.equal(opened.generate(ids, 12, sampler=GREEDY), wanted)


def test_a_copy_of_a_model_has_an_empty_pool_of_its_own():
    model = Paged()(decoder())
    cache = model.new_cache(capacity=4)
    with torch.no_grad():
        model(text(4), cache)
    twin = copy.deepcopy(model)
    assert twin.kv.pool is not model.kv.pool and twin.kv.pool.layers == [] and not twin.kv.pool.references
    assert torch.equal(twin.generate(text(4), 5, sampler=GREEDY), model.generate(text(4), 5, sampler=GREEDY))


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_claimed_bytes_are_the_law_s(page_size):
    model = Paged(page_size)(decoder(dtype=torch.float32))
    c = model.config
    assert Paged(page_size).claim(model).value == kv_bytes(1, layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim)


@torch.no_grad()
def test_shared_pages_are_counted_once():
    model = decoder(dtype=torch.float32)
    cache = cache_of(model, page_size=4)
    model(text(8), cache)
    before = cache.nbytes()
    cache.fork(0)
    assert cache.nbytes() == before == 2 * cache.pool.page_bytes() > 0


def test_a_model_of_another_dtype_gets_new_pages_where_no_text_needs_the_old():
    model = Paged(page_size=4)(decoder(dtype=torch.float32))
    ids = text(6)
    held = model.new_cache(capacity=6)
    with torch.no_grad():
        model(ids, held)
        model.double()
        with pytest.raises(ValueError, match=r"holds keys of .*float32.* and got .*float64.*: make a new pool"):
            model(ids, model.new_cache(capacity=6))
        del held
        assert_equal_logits(model(ids, model.new_cache(capacity=6)), model(ids))


# bad input


@torch.no_grad()
def test_a_tree_that_is_refused_leaves_the_last_one_to_be_kept():
    model, ids = decoder(), text(6)
    cache = PagedCache(model.rope, Pool(page_size=4))
    model(ids[:, :3], cache)
    model(ids[:, 3:], cache, torch.tensor([-1, -1, 1]))
    with pytest.raises(ValueError, match="token 1 of the tree has parent 1"):
        model(ids[:, 3:5], cache, torch.tensor([-1, 1]))
    cache.keep(torch.tensor([1, 2]))
    wanted = model(torch.cat((ids[:, :3], ids[:, 4:], ids[:, :1]), 1))[:, -1:]
    assert_equal_logits(model(ids[:, :1], cache), wanted)


def test_tables_of_another_pool_are_refused():
    one, other = Pool(page_size=4), Pool(page_size=4)
    with pytest.raises(ValueError, match="a row's pages lie in another pool than this cache's: make the cache with the pool of its tables"):
        PagedCache(decoder().rope, one, [Table(one), Table(other)])


@torch.no_grad()
def test_pages_that_another_model_filled_are_refused_and_free_ones_are_anybody_s():
    model, other, pool = decoder(), decoder(seed=1), Pool(page_size=4)
    table, tree, ids = Table(pool), PrefixCache(pool), text(6)
    model(ids, PagedCache(model.rope, pool, [table]))
    tree.insert(ids[0].tolist(), table)
    for foreign in (table, table.fork(), tree.match(ids[0].tolist())):
        length = foreign.length
        with pytest.raises(ValueError, match="a row's pages hold keys of another model: give every model tables, and prefix caches, of its own"):
            other(text(2), PagedCache(other.rope, pool, [foreign]))
        assert foreign.length == length > 0
    beside = Table(pool)  # two models may share a pool, each with tables of its own
    assert_equal_logits(other(ids, PagedCache(other.rope, pool, [beside])), other(ids))
    with pytest.raises(ValueError, match="the table holds keys of another model than this prefix cache"):
        tree.insert(ids[0].tolist(), beside)
    assert_equal_logits(model(text(2), PagedCache(model.rope, pool, [table])), model(torch.cat((ids, text(2)), 1))[:, 6:])
    table.truncate(0)
    assert_equal_logits(other(text(2), PagedCache(other.rope, pool, [table])), other(text(2)))


@pytest.mark.parametrize("bad", [0, -1, 2.5, 4096, True])
def test_a_page_size_that_is_none_is_refused(bad):
    for make in (Paged, lambda page_size: Pool(page_size=page_size)):
        with pytest.raises(ValueError, match="page_size must be a whole number from 1 to 1024"):
            make(page_size=bad)


def test_a_pool_without_pages_is_refused():
    with pytest.raises(ValueError, match="pages must be a whole number, at least 1, got 0"):
        Pool(pages=0)


def test_another_number_of_rows_is_refused_and_the_cache_is_as_before():
    model = decoder()
    cache = cache_of(model)
    with torch.no_grad():
        model(text(3, rows=2), cache)
        with pytest.raises(ValueError, match="holds 2 rows and got 1: make a new one"):
            model(text(1), cache)
        assert cache.length == 3
        assert_equal_logits(model(text(3, rows=2), cache), model(text(3, rows=2).repeat(1, 2))[:, 3:])


def test_gradients_are_refused_and_the_cache_is_as_before():
    model = decoder()
    cache = cache_of(model)
    with pytest.raises(ValueError, match="keep no gradients: call the model under torch.no_grad"):
        model(text(3), cache)
    assert cache.length == 0 and not any(cache.pool.references)


# planted bugs in the attention: each must fail the laws of test_protocol.py


def in_order_of_the_pool(self, k, begin=PagedCache._begin):
    slots = begin(self, k)
    self.blocks = self.blocks.sort(dim=1).values
    return slots


def one_slot_late(self, k, begin=PagedCache._begin):
    return begin(self, k).roll(1, dims=1)


@pytest.mark.parametrize("name, bug", [("_begin", in_order_of_the_pool), ("_begin", one_slot_late), ("move", lambda *_: None)])
def test_pages_that_are_read_or_written_in_the_wrong_place_are_noticed(monkeypatch, name, bug):
    monkeypatch.setattr(PagedCache, name, bug)
    with pytest.raises((AssertionError, RuntimeError)):
        laws.equals_recomputed(shuffled)
        laws.a_tree_says_what_its_branches_say(shuffled)


def shuffled(model, capacity):
    """A pool whose free pages lie in no order."""
    pool = Pool(page_size=2, pages=40)
    pool.free = pool.free[::2] + pool.free[1::2][::-1]
    return PagedCache(model.rope, pool)


def test_a_shuffled_pool_is_as_good():
    laws.equals_recomputed(shuffled)
    laws.a_tree_says_what_its_branches_say(shuffled)
    laws.rows_of_unequal_length_equal_one_by_one(shuffled)
