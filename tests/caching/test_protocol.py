"""The cache's protocol: lines, trees, rows of unequal length; a new exact cache is one more entry of EXACT, a lossy one of
LOSSY."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit.caching import H2O, QuantizedKV, SnapKV, Window
from effkit.caching.evict import WindowCache
from effkit.caching.kv import PreallocatedCache
from effkit.caching.lossy import BACK, LossyCache
from effkit.caching.paged import PagedCache, Pool
from effkit.core import generation
from effkit.core.generation import ConcatCache, NoCache, Sampler, ancestry
from effkit.speculative import EarlyExit, PromptLookup, Speculative
from tests.caching import laws
from tests.caching.decoders import chunked, decoder, text

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

#: so small that a text of 60 tokens is far beyond them
LOSSY = {
    "window": Window(window=8, sinks=2),
    "sliding": Window(window=5, sinks=0),
    "heavy": H2O(budget=7, recent=3),
    "heavy in the mean": H2O(budget=6, recent=1, score="mean"),
    "prompt": SnapKV(budget=6, window=2, kernel=3),
    "int8": QuantizedKV(bits=8, group=8, residual=1),
    "int2": QuantizedKV(bits=2, group=8, residual=5),
    "by token": QuantizedKV(bits=3, keys="token", group=8, residual=3),
}
#: the same, and larger than any text here
WHOLE = [Window(99, 3), Window(99, 0), H2O(99, 5), H2O(99, 99), SnapKV(99, 4), QuantizedKV(2, residual=99)]
TREELESS = ("H2O",)
#: the first pass, which SnapKV takes for the prompt
FIRST = {"prompt": 11}
lossy = st.sampled_from(sorted(LOSSY))


def lossy_maker(technique):
    """Its caches, for any model."""
    return lambda model, capacity: technique.rewrite_(model, None).new_cache(capacity=capacity)


@pytest.mark.slow
@settings(max_examples=40)
@given(kind=kinds, length=st.integers(1, 40), sizes=chunks, kv_heads=ratios, dtype=dtypes, rows=st.integers(1, 3))
def test_cached_logits_equal_recomputed_ones(kind, length, sizes, kv_heads, dtype, rows):
    laws.equals_recomputed(EXACT[kind], length, sizes, kv_heads, dtype, rows)


@pytest.mark.slow
@settings(max_examples=30)
@given(kind=kinds, length=st.integers(2, 30), keep=st.integers(0, 30), sizes=chunks, dtype=dtypes)
def test_what_was_taken_back_leaves_no_trace(kind, length, keep, sizes, dtype):
    laws.taken_back_leaves_no_trace(EXACT[kind], length, keep, sizes, dtype)


@pytest.mark.slow
@settings(max_examples=25)
@given(kind=kinds, parents=trees, held=st.integers(1, 8), dtype=dtypes, kv_heads=ratios)
def test_a_tree_says_what_its_branches_say(kind, parents, held, dtype, kv_heads):
    laws.a_tree_says_what_its_branches_say(EXACT[kind], parents, held, dtype, kv_heads)


@pytest.mark.parametrize("kind", sorted(EXACT))
def test_a_refused_pass_has_not_happened(kind):
    laws.a_refused_pass_has_not_happened(EXACT[kind])


@pytest.mark.parametrize("kind", sorted(EXACT))
def test_the_first_of_a_line_are_kept_as_if_they_alone_had_been_fed(kind):
    laws.a_line_of_which_the_first_are_kept(EXACT[kind])


@torch.no_grad()
def test_without_a_cache_the_whole_text_is_part_of_the_tree():
    model, line, parents = decoder(), text(6), [-1, 0, 1, 2, 2, 4]
    seen = model(line, NoCache(model.rope), torch.tensor(parents))
    laws.assert_equal_logits(seen[:, [3]], model(line[:, :4])[:, -1:])
    laws.assert_equal_logits(seen[:, [5]], model(line[:, [0, 1, 2, 4, 5]])[:, -1:])


@pytest.mark.slow
@settings(max_examples=25)
@given(kind=st.sampled_from(RAGGED), rows=rows, new=st.integers(1, 5), dtype=dtypes)
def test_rows_of_unequal_length_equal_one_by_one(kind, rows, new, dtype):
    lengths, back = zip(*rows, strict=True)
    laws.rows_of_unequal_length_equal_one_by_one(EXACT[kind], lengths, new, [min(b, new) for b in back], dtype)


# what is lossy


@pytest.mark.slow
@settings(max_examples=40)
@given(kind=lossy, length=st.integers(1, 70), sizes=chunks, kv_heads=ratios, rows=st.integers(1, 3))
def test_what_a_token_sees_does_not_depend_on_passes(kind, length, sizes, kv_heads, rows):
    laws.passes_do_not_matter(lossy_maker(LOSSY[kind]), length, sizes, FIRST.get(kind, 0), kv_heads, rows=rows)


@pytest.mark.parametrize("kind", ["window", "sliding", "prompt", "heavy"])
def test_in_float32_too(kind):
    """Where numbers are rounded, one that lies between two codes may go either way."""
    laws.passes_do_not_matter(lossy_maker(LOSSY[kind]), first=FIRST.get(kind, 0), dtype=torch.float32)


@pytest.mark.slow
@settings(max_examples=40)
@given(kind=lossy, length=st.integers(30, 60), sizes=st.lists(st.integers(1, 4), max_size=4), back=st.integers(0, BACK))
def test_what_a_draft_takes_back_leaves_no_trace(kind, length, sizes, back):
    first = FIRST.get(kind, 0)
    laws.what_a_draft_takes_back_leaves_no_trace(lossy_maker(LOSSY[kind]), length, sizes, min(back, length - first), first)


@pytest.mark.parametrize("kind", sorted(LOSSY))
def test_a_pass_refused_over_what_is_lossy_has_not_happened(kind):
    laws.a_refused_pass_has_not_happened(lossy_maker(LOSSY[kind]), first=FIRST.get(kind, 0))


@pytest.mark.parametrize("kind", sorted(LOSSY))
def test_over_what_is_lossy_too_the_first_of_a_line_are_kept(kind):
    laws.a_line_of_which_the_first_are_kept(lossy_maker(LOSSY[kind]), first=FIRST.get(kind, 0))


@pytest.mark.parametrize("technique", WHOLE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_budget_as_large_as_the_text_is_exact(technique, dtype):
    maker = lossy_maker(technique)
    for sizes in ([40], [1] * 40, [9, 1, 4]):
        laws.equals_recomputed(maker, 40, sizes, dtype=dtype)
    laws.taken_back_leaves_no_trace(maker, 12, 5, dtype=dtype)
    if type(technique).__name__ not in TREELESS:
        laws.a_tree_says_what_its_branches_say(maker, dtype=dtype)


#: of 60 tokens that came one by one: the last found 59, of which BACK may go; a block of 8 that was packed by then goes with none
LEAST = dict.fromkeys(["window", "sliding"], 59 - BACK) | dict.fromkeys(["heavy", "heavy in the mean"], 60 - BACK)
LEAST |= {"prompt": 11, "int8": 40, "int2": 32 + 4, "by token": 40 + 2}


@pytest.mark.parametrize("kind", sorted(LOSSY))
def test_what_is_lossy_is_taken_back_as_far_as_may_be_and_no_further(kind):
    laws.taken_back_as_far_as_may_be(lossy_maker(LOSSY[kind]), LEAST[kind], first=FIRST.get(kind, 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(LOSSY))
@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_greedy_speculation_over_what_is_lossy_is_plain_decoding_over_it(kind, gamma):
    """With its own kind of cache for the draft, and rows one after another."""
    model, ids = LOSSY[kind](decoder(context=256)), text(12, rows=2)
    greedy = Sampler(temperature=0.0)
    plain = model.generate(ids, 50, sampler=greedy)
    assert not torch.equal(plain, decoder(context=256).generate(ids, 50, sampler=greedy)) or kind == "int8"
    for strategy in (PromptLookup(gamma=gamma), Speculative(EarlyExit(0.5), gamma=gamma)):
        assert torch.equal(strategy(model).generate(ids, 50, sampler=greedy), plain)


@pytest.mark.slow
@settings(max_examples=25)
@given(kind=st.sampled_from(["window", "sliding", "prompt", "tree"]), parents=trees, held=st.integers(12, 50))
def test_a_tree_over_what_is_lossy_says_what_its_lines_say(kind, parents, held):
    technique = QuantizedKV(bits=2, group=8, residual=len(parents)) if kind == "tree" else LOSSY[kind]
    laws.a_tree_says_what_its_lines_say(lossy_maker(technique), parents, held, FIRST.get(kind, 0))


@pytest.mark.parametrize("held", range(32, 40))
def test_a_node_that_lies_deeper_than_the_last_sees_the_block_that_ends_between_them(held):
    laws.a_tree_says_what_its_lines_say(lossy_maker(QuantizedKV(bits=2, group=8, residual=5)), (-1, 0, 1, 2, -1), held)


@pytest.mark.parametrize("kind", sorted(LOSSY))
def test_what_is_gone_is_not_asked_for(kind):
    model = LOSSY[kind](decoder())
    cache, ids = model.new_cache(capacity=60), text(60, rows=2)
    chunked(model, cache, ids, [11, 30, 1, 1])
    length, held = cache.length, cache.nbytes()
    with pytest.raises(ValueError, match=r"can be taken back to \d+ tokens and not to 5, what they saw is gone: feed the text"):
        cache.truncate(5)
    with pytest.raises(ValueError, match=r"have one length, got \[50, 51\]: generate row by row"):
        cache.truncate(torch.tensor([50, 51]))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        cache.truncate(-1)
    assert (cache.length, cache.nbytes()) == (length, held)
    cache.truncate(torch.tensor([99, 88]))
    assert cache.length == 60
    cache.truncate(torch.tensor([59, 59]))
    assert cache.length == 59
    with pytest.raises(ValueError, match="holds 2 rows and got 1: make a new one"):
        model(text(1), cache)


def test_a_tree_where_none_can_be_is_refused_before_anything_changed():
    for technique, match in ((H2O(7, 3), "H2O cannot follow the branches"), (QuantizedKV(residual=2), r"a tree of 3 tokens is larger than the 2")):
        model = technique(decoder())
        cache = model.new_cache(capacity=20)
        model(text(9), cache)
        with pytest.raises(ValueError, match=match):
            model(text(3), cache, torch.tensor([-1, 0, 0]))
        assert cache.length == 9


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


@pytest.mark.parametrize("index", [[1], [0, 2], [0, 1, 1], [2, 3], [-4]])
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


def test_a_cousin_at_the_right_depth_is_not_kept():
    """A line in which every token lies as deep as it should, and the last follows another than the one before it."""
    model, cache = filled()
    model(text(4), cache, torch.tensor([-1, -1, 0, 1]))
    with pytest.raises(ValueError, match="a branch of the last pass's tree, root first"):
        cache.keep(torch.tensor([0, 3]))
    cache.keep(torch.tensor([1, 3]))


def test_a_tree_in_rows_of_unequal_length_is_refused():
    model, cache = filled(rows=2)
    cache.truncate(torch.tensor([2, 4]))
    with pytest.raises(ValueError, match="a token tree needs rows of one length"):
        model(text(2, rows=2), cache, torch.tensor([-1, -1]))


def test_unequal_rows_cannot_be_concatenated():
    _, cache = filled("concatenated", rows=2)
    with pytest.raises(ValueError, match=r"rows of \[2, 4\] tokens cannot be concatenated: .* Preallocated"):
        cache.truncate(torch.tensor([2, 4]))
    assert cache.length == 5 and cache.lengths is None and cache.keys[0].shape[2] == 5


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


@pytest.mark.parametrize("where, name, bug", [
    (LossyCache, "move", lambda self, start, index: None),
    (LossyCache, "among", lambda self, n: torch.ones(n, n, dtype=torch.bool).tril()),
    (WindowCache, "move", LossyCache.move),
])  # fmt: skip
def test_a_lossy_tree_that_errs_is_noticed(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        laws.a_tree_says_what_its_lines_say(lossy_maker(LOSSY["window"]))


def test_a_draft_s_cache_that_takes_nothing_back_is_noticed(monkeypatch):
    monkeypatch.setattr(LossyCache, "cut", lambda self, gone: None)
    with pytest.raises((AssertionError, RuntimeError)):
        laws.what_a_draft_takes_back_leaves_no_trace(lossy_maker(LOSSY["int8"]))
