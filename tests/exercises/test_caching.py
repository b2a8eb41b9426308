"""The answers of chapter 07's exercises are the library's own mathematics, and what crashes is no pass."""

import pytest
import torch

from effkit.caching import cost
from effkit.caching.evict import WindowCache
from effkit.caching.paged import Pool, Table, reserve
from effkit.caching.prefix import hits
from effkit.core.generation import Rope, attention
from effkit.exercises import caching as asked
from effkit.exercises.base import grade


def test_each_has_four_mistakes_or_more_that_are_refused():
    assert len(asked.EXERCISES) == 5 and all(len(one.wrong) >= 4 for one in asked.EXERCISES)


def test_one_row_of_attention_is_the_decoder_s():
    q, keys, values = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    wanted = attention(q[None, None, :1], keys[None, None, :5], values[None, None, :5])
    torch.testing.assert_close(asked.attend_last(q[0], keys, values, length=5), wanted[0, 0, 0])


def test_bytes_are_those_that_a_cache_takes():
    wanted = cost.kv_bytes(7, layers=3, kv_heads=2, head_dim=4, bytes_per_number=2)
    assert asked.cache_bytes(7, layers=3, heads=6, kv_heads=2, d_model=24, bytes_per_number=2) == wanted


@pytest.mark.parametrize("tokens, window, sinks", [(9, 3, 2), (9, 1, 0), (4, 9, 2)])
def test_what_is_seen_is_the_window_s_mask(tokens, window, sinks):
    cache = WindowCache(Rope(4, 10_000.0), window, sinks)
    cache.advance(tokens)
    assert torch.equal(asked.seen(tokens, window=window, sinks=sinks), cache.mask)


@pytest.mark.parametrize("length", [5, 8])
def test_who_writes_takes_the_pages_that_a_pool_gives(length):
    pool = Pool(page_size=4, pages=5)
    one = Table(pool)
    reserve([one], length)
    two = one.fork()
    given = [list(one.pages), list(pool.references), list(pool.free)]
    reserve([one], 1)
    assert asked.write(*given, length=length, page_size=4) == (one.pages, pool.references, pool.free)
    assert two.length == length


@pytest.mark.parametrize("seed", range(5))
def test_the_farthest_page_finds_as_many_as_the_library_s_optimum(seed):
    stream = torch.randint(0, 8, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    held, found = [], 0
    for now, page in enumerate(stream):
        found += page in held
        held = list(dict.fromkeys((*held, page)))
        if len(held) > 3:
            held.remove(asked.farthest(held, stream[now + 1 :]))
    assert found == hits([[page] for page in stream], 3, policy="belady")


def test_an_answer_that_never_ends_its_search_is_an_error():
    """As the planted one that uses up the stream, but on a copy."""
    result = grade(asked.FARTHEST, lambda held, coming: asked.uses_up_the_stream(held, list(coming)))
    assert result.status == "error" and "IndexError" in result.message
