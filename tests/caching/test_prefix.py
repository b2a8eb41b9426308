"""The radix tree finds what is known and nothing else; LRU, FIFO and Belady against brute force; a stream is its seed's."""

import hashlib
import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit.caching import prefix, streams
from effkit.caching.paged import PagedCache, Pool, Table, reserve
from effkit.caching.prefix import Node, PrefixCache, blocks, chains, hit_rate, hits, reuse_distances
from effkit.caching.streams import Request, paced, passage, stream
from tests.caching.decoders import assert_equal_logits, decoder, text

prompts = st.lists(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=9).map(tuple), min_size=1, max_size=12)
policies = st.sampled_from(["lru", "fifo"])


def remembered(tree: PrefixCache, ids) -> Table:
    """A request: takes what is known, reserves the rest, is remembered and goes."""
    table = tree.match(ids)
    reserve([table], len(ids) - table.length)
    tree.insert(ids, table)
    return table


# the tree


@given(texts=prompts, asked=st.lists(st.sampled_from([0, 0, 0, 1]), max_size=12), size=st.integers(1, 4))
def test_the_longest_known_prefix_of_whole_pages_is_found(texts, asked, size):
    tree = PrefixCache(Pool(page_size=size))
    for ids in texts:
        remembered(tree, ids)
    common = [next((i for i, (a, b) in enumerate(zip(ids, asked, strict=False)) if a != b), min(len(ids), len(asked))) for ids in texts]
    assert tree.match(asked).length == max(common) // size * size


@given(texts=prompts, size=st.integers(1, 4))
def test_a_page_is_held_once_however_many_texts_begin_with_it(texts, size):
    tree = PrefixCache(Pool(page_size=size))
    for ids in texts:
        remembered(tree, ids)
    different = {tuple(ids[: i + size]) for ids in texts for i in range(0, len(ids) - size + 1, size)}
    assert tree.pages() == len(different) == sum(tree.pool.references)
    nodes = list(tree.root.all())[1:]
    assert all(len(node.edge) == len(node.pages) > 0 and node.parent.children[node.edge[0]] is node for node in nodes)


@torch.no_grad()
def test_what_was_found_gives_the_same_logits():
    model, pool = decoder(), Pool(page_size=4, pages=30)
    tree, first, second = PrefixCache(pool), text(14), text(17, seed=1)
    second[:, :11] = first[:, :11]
    table = Table(pool)
    model(first, PagedCache(model.rope, pool, [table]))
    tree.insert(first[0], table)  # tensors are as good as lists
    found = tree.match(second[0, :-1].tolist())
    assert found.length == 8 and found.pages == table.pages[:2]
    cache = PagedCache(model.rope, pool, [found])
    assert_equal_logits(model(second[:, cache.length :], cache), model(second)[:, 8:])
    assert_equal_logits(model(first[:, :1], PagedCache(model.rope, pool, [table])), model(torch.cat((first, first[:, :1]), 1))[:, -1:])


def test_the_leaf_not_used_for_longest_goes_first_and_from_its_end():
    tree = PrefixCache(Pool(page_size=1, pages=7))
    for ids in ((1, 2, 3), (1, 2, 4), (5,)):
        remembered(tree, ids)
    tree.match((1, 2, 3))
    assert tree.evict(1) == 1 and tree.match((1, 2, 4)).length == 2
    assert tree.evict(1) == 1 and tree.match((5,)).length == 0
    assert tree.evict(2) == 2 and tree.match((1, 2, 3)).length == 1


def test_of_an_edge_that_is_used_in_part_the_rest_is_as_old_as_it_was():
    tree = PrefixCache(Pool(page_size=1, pages=9))
    remembered(tree, (1, 2, 3, 4)), remembered(tree, (9,))
    assert tree.match((1, 2, 7)).length == 2
    assert tree.evict(2) == 2 and tree.match((9,)).length == 1 and tree.match((1, 2, 3, 4)).length == 2


def test_what_a_text_reads_is_not_evicted_and_a_half_eviction_does_not_happen():
    tree = PrefixCache(Pool(page_size=1, pages=5))
    remembered(tree, (1, 2, 3)), remembered(tree, (1, 9))
    reader = tree.match((1, 2))
    assert tree.evict(3) == 0 and tree.pages() == 4
    assert tree.evict(2) == 2 and tree.pages() == 2 and tree.match((1, 2, 3)).length == 2
    del reader
    assert tree.evict(2) == 2 and tree.pages() == 0 and len(tree.pool.free) == 5


def test_a_chat_of_two_thousand_turns_is_a_tree_two_thousand_deep():
    root = leaf = Node(None, [], [], 0)
    for i in range(2000):
        node = Node(leaf, [(i,)], [i], i)
        leaf.children[(i,)] = node
        leaf = node
    assert leaf.path() == list(range(2000)) and len([*root.all()]) == 2001
    references = [1] * 2000
    references[1499] = 2
    assert root.needed(references) == 1500


def test_of_two_that_computed_the_same_one_gives_its_copies_back():
    """Else the same page would be held twice for as long as the second text is read."""
    tree = PrefixCache(Pool(page_size=1, pages=9))
    first, second = Table(tree.pool), Table(tree.pool)
    reserve([first], 3), reserve([second], 4)
    tree.insert((1, 2, 3), first), tree.insert((1, 2, 3, 4), second)
    assert second.pages[:3] == first.pages and len(tree.pool.free) == 5
    del first
    assert tree.evict(1) == 0 and tree.pages() == 4
    second.truncate(2)
    assert tree.evict(3) == 0 and tree.evict(2) == 2


def test_a_pool_without_room_takes_from_its_prefix_cache():
    tree = PrefixCache(Pool(page_size=2, pages=4))
    remembered(tree, range(8))
    assert not tree.pool.free
    table = Table(tree.pool)
    reserve([table], 5)
    assert tree.match(range(8)).length == 2 and tree.pages() == 1


# what goes: the tree against the simulation, the simulation against Mattson and against all there is


@settings(max_examples=60)
@given(texts=prompts, size=st.integers(1, 3), pages=st.integers(0, 9), policy=policies)
def test_the_tree_finds_what_the_simulation_says(texts, size, pages, policy):
    tree, found = PrefixCache(Pool(page_size=size), policy=policy), 0
    for ids in texts:
        found += tree.match(ids[:-1]).length // size
        remembered(tree, ids[:-1])
        tree.evict(max(0, tree.pages() - pages))
    assert found == hits(chains(texts, page_size=size), pages, policy=policy)


@given(texts=prompts, size=st.integers(1, 3))
def test_reuse_distances_give_lru_of_every_size_at_once(texts, size):
    requests = chains(texts, page_size=size)
    distances = reuse_distances(requests)
    assert len(distances) == sum(map(len, requests))
    for pages in range(12):
        assert hits(requests, pages, policy="lru") == sum(d <= pages for d in distances)


def best(requests, pages: int, closed: bool) -> int:
    """The most pages that can be found whatever is kept, by trying everything; closed: no page without its beginning."""
    before = {page: parent for request in requests for page, parent in zip(request, [-1, *request], strict=False)}
    found = {frozenset(): 0}
    for request in requests:
        after: dict[frozenset, int] = {}
        for kept, n in found.items():
            n += len(kept & set(request))
            there = kept | set(request)
            for few in range(min(pages, len(there)) + 1):
                for some in combinations(sorted(there), few):
                    if not closed or all(before[page] in (-1, *some) for page in some):
                        after[frozenset(some)] = max(after.get(frozenset(some), 0), n)
        found = after
    return max(found.values())


few_prompts = st.lists(st.lists(st.integers(0, 1), max_size=4).map(tuple), min_size=1, max_size=5)


@settings(max_examples=40)
@given(texts=few_prompts, pages=st.integers(0, 4))
def test_nothing_beats_belady_not_even_what_keeps_pages_without_their_beginnings(texts, pages):
    requests = chains(texts, page_size=1)
    optimum = hits(requests, pages, policy="belady")
    assert optimum == best(requests, pages, closed=True) == best(requests, pages, closed=False)
    assert optimum >= max(hits(requests, pages, policy=p) for p in ("lru", "fifo"))


def test_belady_by_hand():
    """Two pages; A B, A C, A D, A B: LRU forgets B for C and C for D, the optimum keeps A B throughout."""
    requests = [[0, 1], [0, 2], [0, 3], [0, 1]]
    assert hits(requests, 2, policy="lru") == hits(requests, 2, policy="fifo") == 3
    assert hits(requests, 2, policy="belady") == 4
    assert reuse_distances(requests) == [math.inf, math.inf, 1, math.inf, 1, math.inf, 1, 4]


@given(texts=prompts, pages=st.integers(0, 9))
def test_where_no_prompt_ends_inside_another_fifo_is_lru(texts, pages):
    """A page that is used again then has a follower used with it, and goes right behind that: the tree, not the order of
    use, is what protects the beginnings."""
    unique = [(*ids, 100 + i, 0) for i, ids in enumerate(texts)]
    requests = chains(unique, page_size=1)
    assert hits(requests, pages, policy="fifo") == hits(requests, pages, policy="lru")


def test_fifo_is_not_lru_where_a_prompt_comes_again():
    requests = [[0], [1], [0], [2], [0]]
    assert hits(requests, 2, policy="lru") == 2 and hits(requests, 2, policy="fifo") == 1


@given(texts=prompts, size=st.integers(1, 4))
def test_a_page_s_number_stands_for_all_before_it(texts, size):
    named: dict[int, tuple] = {}
    for ids, chain in zip(texts, chains(texts, page_size=size), strict=True):
        assert len(chain) == max(0, len(ids) - 1) // size
        for i, page in enumerate(chain):
            assert named.setdefault(page, tuple(ids[: (i + 1) * size])) == tuple(ids[: (i + 1) * size])
    assert len(set(named.values())) == len(named)


# planted bugs


def in_the_order_of_the_tree_s_leaves(self, pages, evict=PrefixCache.evict):
    for node in self.root.all():
        node.used = -node.used
    return evict(self, pages)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, name, bug, law",
    [
        (prefix.PrefixCache, "evict", in_the_order_of_the_tree_s_leaves, test_the_tree_finds_what_the_simulation_says),
        (prefix, "blocks", lambda ids, size: [tuple(sorted(b)) for b in blocks(ids, size)], test_the_longest_known_prefix_of_whole_pages_is_found),
        (prefix.Node, "split", lambda self, n: self, test_the_longest_known_prefix_of_whole_pages_is_found),
    ],
)
def test_a_tree_that_errs_is_noticed(monkeypatch, where, name, bug, law):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        law()


@pytest.mark.slow
def test_an_optimum_that_looks_at_the_last_use_is_noticed(monkeypatch):
    def never(requests):
        return [[-float(now)] * len(request) for now, request in enumerate(requests)]

    monkeypatch.setattr(prefix, "next_uses", never)
    with pytest.raises(AssertionError):
        test_nothing_beats_belady_not_even_what_keeps_pages_without_their_beginnings()


@pytest.mark.slow
def test_a_page_known_by_its_own_tokens_alone_is_noticed(monkeypatch):
    def careless(texts, *, page_size):
        numbers: dict = {}
        return [[numbers.setdefault(b, len(numbers)) for b in blocks(ids[:-1], page_size)] for ids in texts]

    monkeypatch.setitem(globals(), "chains", careless)
    with pytest.raises(AssertionError):
        test_a_page_s_number_stands_for_all_before_it()


# bad input


def test_one_prefix_cache_a_pool():
    pool = Pool()
    tree = PrefixCache(pool)
    with pytest.raises(ValueError, match="has a prefix cache already"):
        PrefixCache(pool)
    with pytest.raises(ValueError, match="policy must be one of 'lru', 'fifo', got 'belady': Belady's optimum knows the future"):
        PrefixCache(Pool(), policy="belady")
    with pytest.raises(ValueError, match="holds 0 tokens, and 2 are to be remembered: feed them first"):
        tree.insert([1, 2], Table(pool))
    with pytest.raises(ValueError, match="the table of this pool"):
        tree.insert([], Table(Pool()))


@pytest.mark.parametrize("pages, policy", [(-1, "lru"), (2.5, "lru"), (3, "mru")])
def test_a_simulation_of_nothing_is_refused(pages, policy):
    with pytest.raises(ValueError, match="(pages|policy) must be"):
        hits([[0]], pages, policy=policy)


# the stream

TOY = ["".join(chr(97 + (i * i + 7 * (i // 3)) % 26) for i in range(4000))]


def toy(seed=0, n=300, **settings):
    return stream(seed, n, texts=TOY, encode=str.encode, **settings)


def digest(requests) -> str:
    said = [(r.kind, r.new, round(r.arrival, 6), *r.prompt) for r in requests]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def test_a_stream_is_recorded_in_its_seed():
    assert digest(toy()) == digest(toy()) == RECORDED
    assert digest(toy(seed=1)) != RECORDED


RECORDED = "2ba8b239ea2497f4"


def test_a_stream_looks_as_it_is_said_to():
    requests = toy(n=2000, longest=256, mean_new=20, most_new=90, rate=4.0)
    assert all(0 < len(r.prompt) <= 256 and 1 <= r.new <= 90 for r in requests)
    assert min(Counter(r.kind for r in requests).values()) > 2000 / 4
    gaps = torch.tensor([0.0, *(r.arrival for r in requests)]).diff()
    assert (gaps >= 0).all() and gaps.mean() * 4 == pytest.approx(1, abs=0.07) and gaps.std() * 4 == pytest.approx(1, abs=0.1)
    assert sum(r.new for r in requests) / 2000 == pytest.approx(20, abs=2)
    shares = [hit_rate([r.prompt for r in requests], pages=10**6, page_size=p) for p in (1, 16)]
    assert shares[0] > shares[1] > 0.4


def test_beginnings_are_what_is_shared():
    for kind in (streams.chats, streams.few_shot, streams.edits):
        made = kind(lambda most: torch.randint(10**9, (most,)).tolist(), streams.Random(0), 96)
        lines = [next(made) for _ in range(30)]
        assert max(map(len, lines)) <= 96
        assert hit_rate(lines, pages=10**6, page_size=1) > 0.3, kind


def test_a_file_that_is_edited_stays_as_long_as_it_was():
    rng = streams.Random(0)
    made = streams.edits(lambda most: [rng.randrange(10**9) for _ in range(rng.randint(most // 4 + 1, most))], streams.Random(1), 96)
    lines, question = [next(made) for _ in range(400)], 96 // 8
    first, last = (min(map(len, part)) for part in (lines[:50], lines[-50:]))
    assert abs(first - last) < question and max(map(len, lines)) - min(map(len, lines)) < question
    changed = [sum(a != b for a, b in zip(*pair, strict=False)) for pair in zip(lines, lines[1:], strict=False)]
    assert max(changed) <= 8 + question and min(changed) > 0


def test_another_pace_is_the_same_requests():
    slow = toy(n=20)
    fast = paced(slow, 8.0)
    assert [r.prompt for r in fast] == [r.prompt for r in slow]
    assert [r.arrival * 8 for r in fast] == pytest.approx([r.arrival for r in slow])
    assert toy(n=20, rate=8.0) == fast


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"n": -1}, {"longest": 3}, {"again": 1.5}, {"sources": 0}, {"mean_new": 0}])
def test_a_stream_of_nonsense_is_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        toy(**{"n": 3} | bad)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="the texts hold 3 tokens and a passage of 5 was wanted: give more"):
        passage([1, 2, 3], streams.Random(0), 5)


@pytest.mark.slow
def test_the_library_s_own_stream_is_in_tokens_of_the_shipped_tokenizer():
    requests = stream(0, 50)
    assert all(0 <= token < 1024 for r in requests for token in r.prompt) and isinstance(requests[0], Request)
