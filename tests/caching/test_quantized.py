"""Codes say what they should to half a step, take the bytes that are claimed, and who sees what rounded is a matter of places;
the laws of lossy caches are in test_protocol.py."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit import zoo
from effkit.caching import Preallocated, QuantizedKV, quantized
from effkit.caching.lossy import BACK, Through
from effkit.caching.quantized import Format, QuantizedCache
from effkit.core.generation import NoCache, attention
from effkit.core.paths import data_dir
from effkit.measure import quality
from tests.caching import laws
from tests.caching.decoders import assert_equal_logits, chunked, decoder, text

formats = st.builds(Format, bits=st.integers(2, 8), group=st.sampled_from([8, 16]), by=st.sampled_from(["channel", "token"]))


def numbers(blocks=2, group=8, d=4, seed=0, rows=2, heads=3, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, heads, blocks * group, d, generator=rng) * torch.rand(d, generator=rng) * 9
    return (x + torch.randn(d, generator=rng)).to(dtype)


def grids(x, form):
    """The numbers in groups that share a grid, by loops: (numbers, their places)."""
    for row in range(x.shape[0]):
        for head in range(x.shape[1]):
            for start in range(0, x.shape[2], form.group):
                block = x[row, head, start : start + form.group]
                if form.by == "channel":
                    yield from block.t()
                else:
                    for token in block:
                        yield from token.split(form.size(x.shape[3]))


def off_by_half_a_step(form=Format(4, 8, "channel"), d=12, seed=0):  # noqa: B008
    x = numbers(group=form.group, d=d, seed=seed)
    y = form.unpack(form.pack(x), d)
    assert y.shape == x.shape
    for before, after in zip(grids(x, form), grids(y, form), strict=True):
        low, high = min(before.min().item(), 0), max(before.max().item(), 0)
        step = (high - low) / (2**form.bits - 1) if form.bits < 8 else max(high, -low) / 127
        limit = step * 1.01  # half a step, and half for the zero point where the other end is cut
        inside = 0.51 if form.bits == 8 else 1.0
        assert (before - after).abs().max() <= limit * inside + 1e-6, form
        assert len(after.unique()) <= 2**form.bits


@settings(max_examples=25)
@given(form=formats, d=st.sampled_from([4, 8, 12, 16]), seed=st.integers(0, 99))
def test_each_number_is_off_by_half_a_step_of_its_own_grid(form, d, seed):
    off_by_half_a_step(form, d, seed)


def test_a_wide_channel_spoils_the_others_by_token_and_not_by_channel():
    x = numbers(d=8)
    x[..., 3] *= 100
    error = {by: (Format(4, 8, by).unpack(Format(4, 8, by).pack(x), 8) - x)[..., [0, 1, 2, 4, 5, 6, 7]].abs().mean() for by in ("channel", "token")}
    assert error["channel"] < error["token"] / 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_take_the_bits_they_are_said_to(bits):
    packed = Format(bits, 8, "channel").pack(numbers())
    assert packed[0].nbytes == numbers().numel() * bits / 8 and packed[0].dtype == torch.uint8
    assert [len(packed), packed[1].dtype] == [2 if bits == 8 else 3, torch.bfloat16]


class Rounded(NoCache):
    """The oracle: one query after another; it sees tokens of whole blocks that end before the residual rounded."""

    def __init__(self, rope, technique):
        super().__init__(rope)
        self.t = technique

    def attend(self, layer, q, k, v):
        q, k = self.rope(q, self.tables), self.rope(k, self.tables)
        answers = []
        for query in range(q.shape[2]):
            sees = [k[:, :, : query + 1].clone(), v[:, :, : query + 1].clone()]
            for t, by in zip(sees, (self.t.keys, "token"), strict=True):
                form = Format(self.t.bits, self.t.group, by)
                for end in range(self.t.group, query + 2 - self.t.residual, self.t.group):
                    block = slice(end - self.t.group, end)
                    t[:, :, block] = form.unpack(form.pack(t[:, :, block]), t.shape[3]).to(t.dtype)
            answers.append(attention(q[:, :, [query]], *sees))
        return torch.cat(answers, dim=2)


def who_sees_what_is_a_matter_of_places(bits=3, keys="channel", group=8, residual=3, length=60, sizes=(20, 1, 9), kv_heads=2):
    technique = QuantizedKV(bits, keys, group, residual)
    model, ids = decoder(kv_heads=kv_heads), text(length, rows=2)
    with torch.no_grad():
        wanted = model(ids, Rounded(model.rope, technique))
    assert_equal_logits(chunked(model, technique(model).kv.new(model, capacity=1), ids, sizes), wanted)


@pytest.mark.slow
@settings(max_examples=15)
@given(bits=st.integers(2, 8), keys=st.sampled_from(["channel", "token"]), group=st.sampled_from([8, 16]),
       residual=st.integers(1, 20), length=st.integers(1, 60), kv_heads=st.sampled_from([1, 2, 4]))  # fmt: skip
def test_a_query_sees_whole_blocks_rounded_that_end_before_the_residual(bits, keys, group, residual, length, kv_heads):
    who_sees_what_is_a_matter_of_places(bits, keys, group, residual, length, kv_heads=kv_heads)


@pytest.mark.slow
@settings(max_examples=15)
@given(bits=st.sampled_from([2, 4, 8]), sizes=st.lists(st.integers(1, 30), min_size=2, max_size=9), residual=st.integers(1, 20),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_bytes_are_codes_and_scales_and_what_is_not_packed_yet(bits, sizes, residual, dtype):
    """Whole blocks of all but the last pass, the residual and the tokens that a draft may take back."""
    model = decoder(dtype=dtype)
    cache = QuantizedKV(bits, "channel", 8, residual)(model).kv.new(model, capacity=1)
    chunked(model, cache, text(sum(sizes)), sizes)
    packed = max(0, (sum(sizes[:-1]) - BACK + 1 - residual) // 8 * 8)
    own = {8: 16, 4: 24, 2: 24}[bits] / 8  # of each grid: of 8 numbers for keys, of the 4 of a token for values
    per_token = 2 * 2 * 4 * (2 * bits / 8 + own / 8 + own / 4)  # layers, heads, head_dim
    assert cache.nbytes() == packed * per_token + (sum(sizes) - packed) * 2 * 2 * 2 * 4 * dtype.itemsize
    assert cache.nbytes() == sum(t.untyped_storage().nbytes() for layer in cache.packed for p in layer for t in p) + sum(
        t.untyped_storage().nbytes() for t in (*cache.keys, *cache.values)
    )


@pytest.mark.parametrize("bits, group, claimed", [(8, 32, 8 + 16 / 32), (4, 32, 4 + 24 / 32), (2, 32, 2 + 24 / 32), (4, 64, 4 + 12 / 64 + 12 / 32)])
def test_a_claim_counts_scales_and_zero_points(bits, group, claimed):
    technique = QuantizedKV(bits, group=group)
    assert technique.claim(technique(decoder(d_model=128, dtype=torch.float32))).value == pytest.approx(claimed)


@pytest.mark.slow
def test_eight_bits_halve_the_cache_of_bfloat16():
    """At most .55 of its bytes from a thousand tokens on, what is not packed included."""
    model = decoder(d_model=128, dtype=torch.bfloat16, context=2048)
    ratios = {}
    for technique in (QuantizedKV(residual=1), QuantizedKV(), QuantizedKV(4), QuantizedKV(2)):
        cache, exact = technique(model).kv.new(model, capacity=1), Preallocated()(model).kv.new(model, capacity=1024)
        ids = text(1024)
        for each in (cache, exact):
            chunked(model, each, ids, [1023])
        ratios[technique] = cache.nbytes() / exact.nbytes()
    assert all(ratio < most for ratio, most in zip(ratios.values(), (0.55, 0.57, 0.35, 0.23), strict=True)), ratios
    assert min(ratios.values()) > 0.2, ratios


def bits_per_byte(name, windows, *techniques) -> list[float]:
    """Of every token predicted through the cache, over what it is through an exact one."""
    model, task = zoo.load(name)
    task = replace(task, val=task.val.first(windows))
    return [quality(Through(t(model)), task, "val").value / quality(model, task, "val").value for t in techniques]


def costs_bits(name, windows):
    each = [QuantizedKV(residual=1), *(QuantizedKV(bits, keys, residual=1) for bits in (4, 2) for keys in ("channel", "token"))]
    eight, four, four_token, two, two_token = bits_per_byte(name, windows, *each)
    assert abs(eight - 1) < 0.005 and abs(four - 1) < 0.01, (eight, four, four_token, two, two_token)
    assert 1.01 < two < two_token and four_token < two, (eight, four, four_token, two, two_token)


@pytest.mark.slow
def test_eight_bits_cost_nothing_and_two_cost_more_by_token():
    if not (data_dir() / "gpt-small.safetensors").exists():
        pytest.skip("gpt-small is not here: effkit train gpt-small")
    costs_bits("gpt-small", 16)


@pytest.mark.real
@pytest.mark.slow
def test_so_on_a_real_model():
    """The eight bits whose bytes are counted above: in full precision only the newest token."""
    costs_bits("smollm2", 1)


def test_a_technique_sets_the_cache_and_a_file_remembers(tmp_path):
    model, ids = decoder(), text(40)
    result = QuantizedKV(2, "token", 8, 3)(model)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    cache = opened.new_cache(capacity=1)
    assert type(cache) is QuantizedCache and cache.formats == (Format(2, 8, "token"),) * 2 and cache.residual == 3
    assert torch.equal(opened.generate(ids, 20, temperature=0.0), result.generate(ids, 20, temperature=0.0))


@pytest.mark.parametrize("bad, match", [
    (dict(bits=1), "bits must be a whole number from 2 to 8, got 1"),
    (dict(keys="head"), "keys must be one of 'channel', 'token', got 'head'"),
    (dict(group=12), "group must be a multiple of 8, got 12: codes of a block fill whole bytes; take 16"),
    (dict(residual=0), "residual must be a whole number, at least 1, got 0: a token sees itself as it is"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_with_the_way_out(bad, match):
    with pytest.raises(ValueError, match=match):
        QuantizedKV(**bad)


# planted bugs


def rounded_one_later(self, position):
    return (position - self.residual) // self.group * self.group


def of_the_last_query(self, n, parents=None, *, device=None, dtype=torch.float32, right=QuantizedCache.advance):
    positions = right(self, n, parents, device=device, dtype=dtype)
    self.mask = self.mask & self.mask[-1:]
    return positions


def packed_too_early(self, low, right=QuantizedCache.settle):
    right(self, self.rounded(self.length))


@pytest.mark.slow
@pytest.mark.parametrize("name, bug, law", [
    ("rounded", rounded_one_later, who_sees_what_is_a_matter_of_places),
    ("advance", of_the_last_query, who_sees_what_is_a_matter_of_places),
    ("settle", packed_too_early, lambda: laws.what_a_draft_takes_back_leaves_no_trace(
        lambda model, capacity: QuantizedKV(2, group=8, residual=1)(model).kv.new(model, capacity=1), back=9)),
])  # fmt: skip
def test_a_cache_that_rounds_others_is_noticed(monkeypatch, name, bug, law):
    monkeypatch.setattr(QuantizedCache, name, bug)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        law()


def test_a_zero_point_that_is_lost_is_noticed(monkeypatch):
    right = quantized.dequantize
    monkeypatch.setattr(quantized, "dequantize", lambda q, scale, zero: right(q, scale, zero.clamp(min=3)))
    with pytest.raises(AssertionError):
        off_by_half_a_step()
