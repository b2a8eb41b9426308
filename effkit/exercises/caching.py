"""Exercises of chapter 07: attention over a half-filled buffer, and what a cache weighs."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def attend_last(q: Tensor, keys: Tensor, values: Tensor, *, length: int) -> Tensor:
    """What the newest token reads: softmax(K q / sqrt(d)) V over the rows that are filled."""
    scores = keys[:length] @ q / q.shape[0] ** 0.5
    return scores.softmax(dim=0) @ values[:length]


def buffers(rng: torch.Generator):
    """By hand first; then buffers whose last rows hold what was left there."""
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    yield case(torch.tensor([2.0, 0.0]), half, half, length=2)
    for capacity, length, d in ((6, 1, 4), (8, 5, 4), (12, 12, 8)):
        keys, values = 2 * torch.randn(2, capacity, d, generator=rng)
        yield case(torch.randn(d, generator=rng), keys, values, length=length)


def in_range(answer, given):
    """An average of the filled values lies between the smallest and the largest of them."""
    _, _, values = given.args
    filled = values[: given.settings["length"]]
    fine = (answer >= filled.min(0).values - 1e-4).all() and (answer <= filled.max(0).values + 1e-4).all()
    return None if fine else (answer, f"an average of {given.settings['length']} filled rows")


def reads_the_whole_buffer(q, keys, values, *, length):
    return (keys @ q / q.shape[0] ** 0.5).softmax(dim=0) @ values


def forgets_the_newest(q, keys, values, *, length):
    last = max(1, length - 1)
    return (keys[:last] @ q / q.shape[0] ** 0.5).softmax(dim=0) @ values[:last]


def forgets_to_scale(q, keys, values, *, length):
    return (keys[:length] @ q).softmax(dim=0) @ values[:length]


def forgets_the_softmax(q, keys, values, *, length):
    return (keys[:length] @ q / q.shape[0] ** 0.5) @ values[:length]


def attend_by_heart(q, keys, values, *, length):
    return torch.tensor([0.8044, 0.1956])


ATTEND_LAST = Exercise(
    name="caching.attend_last",
    prompt="""**One row of attention.** A cache has reserved `keys` and `values`, both of shape (capacity, d), for one
head; only the first `length` rows are filled, the newest token's own row included. Beyond them stands whatever was in
memory. Write `attend_last(q, keys, values, length=...)`: the output, of shape (d,), for the newest token's query `q`, of
shape (d,), which is the average of the filled values, weighted by the softmax of $k \\cdot q / \\sqrt d$.""",
    reference=attend_last,
    checks=(
        checks.not_the_librarys_own("attention", "scaled_dot_product_attention"),
        checks.same_shape_and_dtype(buffers),
        checks.holds("an average of the filled rows", buffers, in_range),
        checks.equals_reference(buffers),
        checks.input_unchanged(buffers),
    ),
    hints=(
        "No mask is needed: the newest token may see everything that is there, and nothing else is there.",
        "Slice first: rows from 0 to length, of keys and of values alike. d is `q.shape[0]`.",
        "`scores = keys[:length] @ q / q.shape[0] ** 0.5`, then the softmax over them, times the values.",
    ),
    after="With a cache a step of decoding is this, for each head: one product with the keys, one with the values.",
    wrong=(
        (reads_the_whole_buffer, "an average of the filled rows"),
        (forgets_the_newest, "the right numbers"),
        (forgets_to_scale, "the right numbers"),
        (forgets_the_softmax, "an average of the filled rows"),
        (attend_by_heart, "shape and dtype"),
    ),
)


def cache_bytes(tokens: int, *, layers: int, heads: int, kv_heads: int, d_model: int, bytes_per_number: int) -> int:
    """Bytes of the keys and values that a decoder keeps for a text of so many tokens."""
    head_dim = d_model // heads
    return 2 * layers * kv_heads * head_dim * bytes_per_number * tokens


def decoders(rng: torch.Generator):
    """SmolLM2-135M in bfloat16, then others."""
    yield case(1000, layers=30, heads=9, kv_heads=3, d_model=576, bytes_per_number=2)
    for _ in range(4):
        layers, kv_heads, group, head_dim, tokens = (int(torch.randint(2, 40, (), generator=rng)) for _ in range(5))
        heads = kv_heads * group
        shape = dict(layers=layers, heads=heads, kv_heads=kv_heads, d_model=heads * 8 * head_dim)
        yield case(tokens, **shape, bytes_per_number=int(2 ** torch.randint(0, 3, (), generator=rng)))


def counts_queries(tokens, *, layers, heads, kv_heads, d_model, bytes_per_number):
    return 2 * layers * d_model * bytes_per_number * tokens


def forgets_the_values(tokens, *, layers, heads, kv_heads, d_model, bytes_per_number):
    return layers * kv_heads * (d_model // heads) * bytes_per_number * tokens


def squares_the_text(tokens, *, layers, heads, kv_heads, d_model, bytes_per_number):
    return 2 * layers * kv_heads * (d_model // heads) * bytes_per_number * tokens**2


def cache_bytes_by_heart(tokens, *, layers, heads, kv_heads, d_model, bytes_per_number):
    return 23_040_000


CACHE_BYTES = Exercise(
    name="caching.cache_bytes",
    prompt="""**What does a cache weigh?** Write `cache_bytes(tokens, layers=..., heads=..., kv_heads=..., d_model=...,
bytes_per_number=...)`: the bytes of all keys and values kept for a text of `tokens` tokens. `heads` counts the query
heads, which divide d_model between them; `kv_heads` those of keys and of values, which are as wide as a query head.""",
    reference=cache_bytes,
    checks=(
        checks.not_the_librarys_own("kv_bytes"),
        checks.same_shape_and_dtype(decoders),
        checks.equals_reference(decoders),
    ),
    hints=(
        "Queries are used once and thrown away. What has to stay for later tokens?",
        "For each token and layer: kv_heads keys and kv_heads values, each of d_model // heads numbers.",
        "`2 * layers * kv_heads * (d_model // heads)` numbers a token.",
    ),
    after="Grouped queries divide this by heads / kv_heads, which is why nearly every large model has them.",
    wrong=(
        (counts_queries, "the right numbers"),
        (forgets_the_values, "the right numbers"),
        (squares_the_text, "the right numbers"),
        (cache_bytes_by_heart, "the right numbers"),
    ),
)

EXERCISES = (ATTEND_LAST, CACHE_BYTES)
