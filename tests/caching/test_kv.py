"""What is kept equals what would be computed again, for every length, chunking and ratio of heads."""

import pytest
import torch

import effkit
from effkit.caching import SHOWCASE, Preallocated, Recompute, kv
from effkit.caching.cost import kv_bytes
from effkit.caching.kv import PreallocatedCache
from effkit.core.generation import ConcatCache, NoCache, Sampler
from effkit.core.task import Task
from tests.caching.decoders import assert_equal_logits, chunked, decoder, text
from tests.caching.laws import equals_recomputed, rows_of_unequal_length_equal_one_by_one, taken_back_leaves_no_trace

GREEDY = Sampler(temperature=0.0)


def test_truncating_beyond_the_end_changes_nothing():
    model, ids = decoder(), text(6)
    cache = model.new_cache(capacity=8)
    model(ids[:, :5], cache)
    cache.truncate(99)
    assert cache.length == 5
    assert_equal_logits(model(ids[:, 5:], cache), model(ids)[:, 5:])


def test_room_is_reserved_once_and_doubled_where_it_is_short(monkeypatch):
    made = []
    monkeypatch.setattr(
        kv, "_buffer", lambda like, capacity, make=kv._buffer: made.append(capacity) or make(like, capacity)
    )
    model, ids = decoder(layers=1), text(20)
    chunked(model, PreallocatedCache(model.rope, 20), ids, [1] * 20)
    assert made == [20]
    made.clear()
    chunked(model, PreallocatedCache(model.rope, 3), ids, [1] * 20)
    assert made == [3, 6, 12, 24]


def test_a_model_reserves_as_much_room_as_it_is_asked_for():
    model = Preallocated()(decoder(dtype=torch.float32))
    cache, c = model.new_cache(capacity=20), model.config
    model(text(1), cache)
    assert cache.nbytes() == kv_bytes(20, layers=c.layers, kv_heads=c.kv_heads, head_dim=c.head_dim)


def test_it_writes_in_place():
    model, ids = decoder(), text(10)
    cache = PreallocatedCache(model.rope, 10)
    chunked(model, cache, ids[:, :4], [])
    before = [b.data_ptr() for b in cache.buffers]
    chunked(model, cache, ids, [1] * 6)
    assert [b.data_ptr() for b in cache.buffers] == before and len(before) == len(model.blocks)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_claimed_bytes_are_the_law_s(kv_heads, dtype):
    model = Preallocated()(decoder(dtype=dtype, kv_heads=kv_heads))
    c = model.config
    law = kv_bytes(1, layers=c.layers, kv_heads=kv_heads, head_dim=c.head_dim, bytes_per_number=dtype.itemsize)
    assert Preallocated().claim(model).value == law
    assert Recompute().claim(Recompute()(model)).value == 0


@pytest.mark.parametrize("technique, kind", [(Preallocated(), PreallocatedCache), (Recompute(), NoCache)])
def test_a_technique_changes_which_cache_is_made_and_nothing_else(technique, kind, tmp_path):
    model, ids = decoder(), text(7, rows=2)
    result = technique(model)
    assert type(result.new_cache(capacity=4)) is kind and type(model.new_cache(capacity=4)) is ConcatCache
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), result.parameters(), strict=True))
    assert torch.equal(result.generate(ids, 12, sampler=GREEDY), model.generate(ids, 12, sampler=GREEDY))
    assert "kv" in str(effkit.log(result)) and type(technique).__name__ in str(effkit.log(result))
    assert not any(m.training for m in result.modules())
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert type(opened.new_cache(capacity=4)) is kind
    assert torch.equal(opened.generate(ids, 12, sampler=GREEDY), model.generate(ids, 12, sampler=GREEDY))


def test_sampled_text_does_not_depend_on_the_cache():
    model, ids = decoder(), text(5, rows=2)
    texts = [
        m.generate(ids, 20, rng=torch.Generator().manual_seed(3))
        for m in (model, Preallocated()(model), Recompute()(model))
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_a_cache_from_another_model_is_refused():
    model, other, ids = decoder(), decoder(seed=1), text(4)
    for maker in (model, Preallocated()(model), Recompute()(model)):
        with pytest.raises(ValueError, match="another model; make one with new_cache"):
            other(ids, maker.new_cache(capacity=4))


def test_another_number_of_rows_is_refused():
    model = Preallocated()(decoder())
    cache = model.new_cache(capacity=8)
    model(text(3, rows=2), cache)
    with pytest.raises(ValueError, match="holds 2 rows and got 1: make a new one"):
        model(text(1), cache)


@pytest.mark.parametrize("bad", [0, -1, 2.5])
def test_a_capacity_that_is_no_number_of_tokens_is_refused(bad):
    with pytest.raises(ValueError, match="capacity must be a whole number, at least 1"):
        PreallocatedCache(decoder().rope, bad)


def test_truncating_to_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="n must be a whole number, at least 0, got -1"):
        decoder().new_cache(capacity=4).truncate(-1)


def test_what_is_no_decoder_is_refused():
    for technique in (Preallocated(), Recompute()):
        with pytest.raises(ValueError, match="needs a decoder"):
            technique(torch.nn.Linear(3, 3))


def test_the_showcase_can_be_built():
    assert SHOWCASE.paradigm == "caching"
    for exhibit in SHOWCASE.exhibits:
        assert exhibit.technique()(decoder(), Task()).generate(text(3), 2).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.peers("transformers")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_transformers_with_its_own_cache(kv_heads):
    model, ids = Preallocated()(decoder(kv_heads=kv_heads, dtype=torch.float32)), text(24)
    theirs, past, cache = model.to_hf(), None, model.new_cache(capacity=24)
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 24)):
            answer = theirs(ids[:, start:end], past_key_values=past, use_cache=True)
            past = answer.past_key_values
            assert (model(ids[:, start:end], cache) - answer.logits).abs().max() < 1e-4


# Planted bugs: each of these caches must fail the laws that test_protocol.py asks of it.


def preallocated(model, capacity):
    return PreallocatedCache(model.rope, capacity)


def one_row_too_early(self, layer, q, k, v, attend=PreallocatedCache.attend):
    late = self.length > k.shape[2]
    self.length -= late
    answer = attend(self, layer, q, k, v)
    self.length += late
    return answer


def values_for_keys(self, layer, q, k, v, attend=PreallocatedCache.attend):
    return attend(self, layer, q, k, k)


def positions_from_zero(self, n, parents=None, *, device=None, dtype=torch.float32, advance=PreallocatedCache.advance):
    positions = advance(self, n, parents, device=device, dtype=dtype)
    self.tables = self.rope.tables(torch.arange(n), dtype)
    return positions


@pytest.mark.parametrize(
    "where, name, bug",
    [
        (PreallocatedCache, "attend", one_row_too_early),
        (PreallocatedCache, "attend", values_for_keys),
        (PreallocatedCache, "advance", positions_from_zero),
        (PreallocatedCache, "truncate", lambda self, n: None),
    ],
)
def test_a_cache_that_errs_is_noticed(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, RuntimeError)):
        equals_recomputed(preallocated)
        taken_back_leaves_no_trace(preallocated)


def filled_with_nan(self, *size, **settings):
    return self.new_full(size, torch.nan, **settings)


def test_room_that_holds_no_numbers_yet_is_noticed(monkeypatch):
    """What a mask hides is multiplied by 0, and 0 x NaN is NaN: a short row's slots before the longest row's end."""
    monkeypatch.setattr(torch.Tensor, "new_empty", filled_with_nan)
    rows_of_unequal_length_equal_one_by_one(preallocated)
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)
    with pytest.raises(AssertionError):
        rows_of_unequal_length_equal_one_by_one(preallocated)


def test_of_rows_of_unequal_length_none_is_taken_back_to_more_than_it_has():
    model, ids = decoder(), text(9, rows=3)
    cache = PreallocatedCache(model.rope, 9)
    with torch.no_grad():
        model(ids[:, :7], cache)
        cache.truncate(torch.tensor([2, 7, 4]))
        cache.truncate(torch.tensor([3, 6, 5]))
        assert cache.lengths.tolist() == [2, 6, 4] and cache.length == 6
        cache.truncate(5)
        assert cache.lengths.tolist() == [2, 5, 4] and cache.length == 5
        seen = model(ids[:, 7:8], cache)
        for row, n in enumerate((2, 5, 4)):
            assert_equal_logits(seen[[row]], model(torch.cat((ids[[row], :n], ids[[row], 7:8]), 1))[:, -1:])


def test_growth_that_loses_the_old_rows_is_noticed(monkeypatch):
    def forgetful(self, layer, k):
        while self.capacity < self.length:
            self.capacity *= 2
        if layer == len(self.buffers):
            self.buffers.append(kv._buffer(k, self.capacity))
        if self.buffers[layer].shape[3] < self.capacity:
            self.buffers[layer] = kv._buffer(k, self.capacity).zero_()
        return self.buffers[layer]

    monkeypatch.setattr(PreallocatedCache, "_room", forgetful)
    with pytest.raises(AssertionError):
        equals_recomputed(lambda model, capacity: PreallocatedCache(model.rope, 1))


def test_a_technique_that_does_nothing_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(kv, "set_kv", lambda model, made, by: model)
    with pytest.raises(AssertionError):
        test_a_technique_changes_which_cache_is_made_and_nothing_else(Preallocated(), PreallocatedCache, tmp_path)
