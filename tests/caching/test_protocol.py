"""The cache's protocol: lines, trees, rows of unequal length; a new exact cache is one more entry of EXACT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit.caching.kv import PreallocatedCache
from effkit.caching.paged import PagedCache, Pool
from effkit.core import generation
from effkit.core.generation import ConcatCache, NoCache, ancestry
from tests.caching import laws
from tests.caching.decoders import decoder, text

EXACT = {
    "concatenated": lambda model, capacity: ConcatCache(model.rope),
    "preallocated": lambda model, capacity: PreallocatedCache(model.rope, capacity),
    "grown": lambda model, capacity: PreallocatedCache(model.rope, 1),
    "paged": lambda model, capacity: PagedCache(model.rope, Pool(page_size=3)),
}
RAGGED = sorted(set(EXACT) - {"concatenated"})
kinds, dtypes = st.sampled_from(sorted(EXACT)), st.sampled_from([torch.float64, torch.float32])
trees = st.lists(st.integers(0, 99), min_size=1, max_size=9).map(lambda s: [x % (i + 1) - 1 for i, x in enumerate(s)])
chunks, ratios = st.lists(st.integers(1, 9), max_size=6), st.sampled_from([1, 2, 4])
rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=4)


@settings(max_examples=40)
@given(kind=kinds, length=st.integers(1, 40), sizes=chunks, kv_heads=ratios, dtype=dtypes, rows=st.integers(1, 3))
def test_cached_logits_equal_recomputed_ones(kind, length, sizes, kv_heads, dtype, rows):
    laws.equals_recomputed(EXACT[kind], length, sizes, kv_heads, dtype, rows)


@settings(max_examples=30)
@given(kind=kinds, length=st.integers(2, 30), keep=st.integers(0, 30), sizes=chunks, dtype=dtypes)
def test_what_was_taken_back_leaves_no_trace(kind, length, keep, sizes, dtype):
    laws.taken_back_leaves_no_trace(EXACT[kind], length, keep, sizes, dtype)


@settings(max_examples=25)
@given(kind=kinds, parents=trees, held=st.integers(1, 8), dtype=dtypes, kv_heads=ratios)
def test_a_tree_says_what_its_branches_say(kind, parents, held, dtype, kv_heads):
    laws.a_tree_says_what_its_branches_say(EXACT[kind], parents, held, dtype, kv_heads)


@torch.no_grad()
def test_without_a_cache_the_whole_text_is_part_of_the_tree():
    model, line, parents = decoder(), text(6), [-1, 0, 1, 2, 2, 4]
    seen = model(line, NoCache(model.rope), torch.tensor(parents))
    laws.assert_equal_logits(seen[:, [3]], model(line[:, :4])[:, -1:])
    laws.assert_equal_logits(seen[:, [5]], model(line[:, [0, 1, 2, 4, 5]])[:, -1:])


@settings(max_examples=25)
@given(kind=st.sampled_from(RAGGED), rows=rows, new=st.integers(1, 5), dtype=dtypes)
def test_rows_of_unequal_length_equal_one_by_one(kind, rows, new, dtype):
    lengths, back = zip(*rows, strict=True)
    laws.rows_of_unequal_length_equal_one_by_one(EXACT[kind], lengths, new, [min(b, new) for b in back], dtype)


# bad input


def filled(kind="preallocated", n=5, rows=1):
    model = decoder()
    cache = EXACT[kind](model, 16)
    model(text(n, rows=rows), cache)
    return model, cache


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-2], [-1, 0, 3]])
def test_a_parent_that_does_not_come_before_its_child_is_refused(parents):
    with pytest.raises(ValueError, match="must come before it, or be -1"):
        ancestry(torch.tensor(parents))


@pytest.mark.parametrize("index", [[1], [0, 2], [0, 1, 1], [2, 3]])
def test_what_is_no_branch_is_not_kept(index):
    model, cache = filled()
    model(text(4), cache, torch.tensor([-1, 0, 0, 2]))
    before = cache.length
    if index in ([0, 2],):  # a branch
        cache.keep(torch.tensor(index))
        return
    with pytest.raises(ValueError, match="a branch of the last pass's tree, root first"):
        cache.keep(torch.tensor(index))
    assert cache.length == before


def test_a_tree_in_rows_of_unequal_length_is_refused():
    model, cache = filled(rows=2)
    cache.truncate(torch.tensor([2, 4]))
    with pytest.raises(ValueError, match="a token tree needs rows of one length"):
        model(text(2, rows=2), cache, torch.tensor([-1, -1]))


def test_unequal_rows_cannot_be_concatenated():
    _, cache = filled("concatenated", rows=2)
    with pytest.raises(ValueError, match=r"rows of \[2, 4\] tokens cannot be concatenated: .* Preallocated"):
        cache.truncate(torch.tensor([2, 4]))


def test_rows_of_less_than_nothing_are_refused():
    _, cache = filled(rows=2)
    with pytest.raises(ValueError, match="n must be a whole number, at least 0, got -1: it is how many tokens stay in each row"):
        cache.truncate(torch.tensor([-1, 4]))
    assert cache.length == 5 and cache.lengths is None


def test_rows_that_are_equal_again_are_one_length():
    _, cache = filled(rows=2)
    cache.truncate(torch.tensor([2, 4]))
    assert cache.lengths.tolist() == [2, 4] and cache.length == 4
    cache.truncate(2)
    assert cache.lengths is None and cache.length == 2


# planted bugs


def siblings_see_each_other(parents):
    return torch.ones(len(parents), len(parents), dtype=torch.bool).tril()


def the_first_new_token_is_seen_by_all(positions, held, ancestors=None, right=generation.visible):
    mask = right(positions, held, ancestors)
    return mask if mask is None else mask | (torch.arange(mask.shape[-1]) == held)


@pytest.mark.parametrize(
    "name, bug",
    [
        ("ancestry", siblings_see_each_other),
        ("visible", lambda positions, held, ancestors=None: None),
        ("visible", the_first_new_token_is_seen_by_all),
    ],
)
def test_a_leaking_mask_is_noticed(monkeypatch, name, bug):
    monkeypatch.setattr(generation, name, bug)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        laws.a_tree_says_what_its_branches_say(EXACT["preallocated"])


def test_a_mask_that_forgets_the_rows_is_noticed(monkeypatch):
    right = generation.visible
    monkeypatch.setattr(generation, "visible", lambda positions, held, ancestors: right(torch.tensor([held]), held))
    with pytest.raises(AssertionError):
        laws.rows_of_unequal_length_equal_one_by_one(EXACT["preallocated"])


def test_a_branch_that_is_not_moved_is_noticed(monkeypatch):
    monkeypatch.setattr(PreallocatedCache, "move", lambda self, start, index: None)
    with pytest.raises(AssertionError):
        laws.a_tree_says_what_its_branches_say(EXACT["preallocated"])
