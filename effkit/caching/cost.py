"""What a token costs: macs, bytes, and macs a byte, with and without a cache.

Problem   To write token n + 1, a decoder needs the keys and values of all n before it. Computing them anew costs a pass
          over the whole text, for each token again.
Idea      They never change, since attention looks only backwards: keep them. A token then costs one row of every matrix
          product, and attention over what was kept.
Cost      Memory that grows with the text, 2 * layers * kv_heads * head_dim numbers a token; and every token reads all
          of it once, at about one mac a number, where a pass over n tokens would have reused each number n times.
Source    Shazeer 2019, arXiv:1911.02150, section 2.4; Ainslie et al. 2023, arXiv:2305.13245 (grouped queries).
"""

import math
from collections.abc import Sequence
from statistics import linear_regression


def kv_bytes(tokens: int, *, layers: int, kv_heads: int, head_dim: int, bytes_per_number: int = 4) -> int:
    """Bytes of the keys and values of so many tokens; heads of queries do not occur, so fewer kv_heads save memory."""
    return 2 * layers * kv_heads * head_dim * bytes_per_number * tokens


def cached_macs(length: int, *, weights: int, layers: int, heads: int, head_dim: int) -> int:
    """Macs of one more token, the text then being `length` tokens long: constant in it but for attention.

    weights   numbers in all matrices that a token is multiplied by, the output layer included
    """
    return weights + 2 * layers * heads * head_dim * length


def recomputed_macs(length: int, *, weights: int, layers: int, heads: int, head_dim: int) -> int:
    """The same without a cache: each of the `length` tokens passes again. All length^2 scores are counted, those too
    that a causal kernel may skip."""
    return length * cached_macs(length, weights=weights, layers=layers, heads=heads, head_dim=head_dim)


def attention_intensity(
    queries: int, keys: int, *, heads: int, kv_heads: int, head_dim: int, bytes_per_number: int = 4
) -> float:
    """Macs a byte of one layer's attention: scores and weighted sum, over queries and outputs, keys and values, each
    moved once. For one query and many keys it tends to heads / kv_heads / bytes_per_number, whatever the model."""
    macs = 2 * queries * keys * heads * head_dim
    moved = 2 * queries * heads * head_dim + 2 * keys * kv_heads * head_dim
    return macs / (moved * bytes_per_number)


def copied_tokens(length: int, *, capacity: int | None = None) -> int:
    """How many tokens' keys and values are moved while a cache grows to `length`, one token at a time.

    capacity   None: concatenation, which copies everything at every token, length (length - 1) / 2; a number: a
               buffer of that size that doubles when it is full, less than 2 * length; nothing where it is large enough
    """
    if capacity is None:
        return length * (length - 1) // 2
    doublings = max(0, math.ceil(math.log2(length / capacity))) if length else 0
    return capacity * (2**doublings - 1)


def growth_exponent(lengths: Sequence[float], costs: Sequence[float]) -> float:
    """k of the power law cost ~ length^k that fits best in the logarithms: 0 is flat, 1 linear, 2 quadratic."""
    return linear_regression([math.log(n) for n in lengths], [math.log(c) for c in costs]).slope
