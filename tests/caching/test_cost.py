"""The formulas against what really runs: counted macs, counted copies, hand-sized cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effkit.caching import Preallocated, Recompute
from effkit.caching.cost import (
    attention_intensity,
    cached_macs,
    copied_tokens,
    growth_exponent,
    kv_bytes,
    recomputed_macs,
)
from effkit.measure import count
from tests.caching.decoders import decoder, text


def sizes(model) -> dict:
    """weights: numbers in all matrices; the tied embedding multiplies as the output layer."""
    c = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return dict(weights=weights, layers=c.layers, heads=c.heads, head_dim=c.head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [2, 7, 30])
def test_macs_of_a_token_are_those_that_run(kv_heads, length):
    model, ids = decoder(kv_heads=kv_heads), text(length)
    for technique, law in ((Preallocated(), cached_macs), (Recompute(), recomputed_macs)):
        made = technique(model)
        cache = made.new_cache(capacity=length)
        with torch.no_grad():
            made(ids[:, :-1], cache)
            counted = count(lambda made=made, cache=cache: made(ids[:, cache.length :], cache)).value
        assert counted == law(length, **sizes(model))


def test_a_token_with_a_cache_is_flat_and_without_one_linear():
    numbers = dict(weights=5_000_000, layers=6, heads=8, head_dim=32)
    lengths = [64, 128, 256, 512, 1024]
    assert growth_exponent(lengths, [cached_macs(n, **numbers) for n in lengths]) < 0.2
    assert 1.0 <= growth_exponent(lengths, [recomputed_macs(n, **numbers) for n in lengths]) < 1.2


@given(k=st.floats(-1, 3), scale=st.floats(1e-6, 1e6))
def test_the_exponent_of_a_power_law_is_found(k, scale):
    lengths = [16, 64, 100, 1000]
    assert growth_exponent(lengths, [scale * n**k for n in lengths]) == pytest.approx(k, abs=1e-6)


def test_bytes_by_hand():
    # SmolLM2-135M in bfloat16: 2 * 30 layers * 3 heads * 64 numbers * 2 bytes
    assert kv_bytes(1, layers=30, kv_heads=3, head_dim=64, bytes_per_number=2) == 23_040


def test_intensity_by_hand():
    # one query, one key, one head of size 2, float32: 4 macs; q, k, v and the output are 8 numbers
    assert attention_intensity(1, 1, heads=1, kv_heads=1, head_dim=2) == 4 / 32


@given(group=st.integers(1, 8), kv_heads=st.integers(1, 8), head_dim=st.sampled_from([16, 64, 128]))
def test_one_query_tends_to_one_mac_a_number_a_query_of_the_group(group, kv_heads, head_dim):
    seen = attention_intensity(
        1, 10**7, heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim, bytes_per_number=2
    )
    assert seen == pytest.approx(group / 2, rel=1e-5)


@given(n=st.integers(2, 2000))
def test_a_whole_text_reuses_each_key_for_many_queries(n):
    shape = dict(heads=4, kv_heads=4, head_dim=32)
    assert attention_intensity(n, n, **shape) == pytest.approx(n * attention_intensity(1, 1, **shape))


@given(length=st.integers(0, 300), capacity=st.none() | st.integers(1, 400))
def test_copies_are_those_that_a_growing_cache_makes(length, capacity):
    copied, room = 0, capacity
    for held in range(length):
        if capacity is None:
            copied += held
        elif held == room:
            copied, room = copied + held, 2 * room
    assert copied_tokens(length, capacity=capacity) == copied
    assert capacity is None or copied_tokens(length, capacity=capacity) <= 2 * length
