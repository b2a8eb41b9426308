"""Exercises of chapter 07: attention over a half-filled buffer, what a cache weighs, what is thrown away, and who may write."""

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
    """By hand first; then a score whose exponential overflows, and buffers whose last rows hold what was left there, NaN at last."""
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    yield case(torch.tensor([2.0, 0.0]), half, half, length=2)
    yield case(torch.tensor([200.0, 0.0]), half, half, length=2)
    for capacity, length, d in ((6, 1, 4), (8, 5, 4), (12, 12, 8)):
        keys, values = 2 * torch.randn(2, capacity, d, generator=rng)
        yield case(torch.randn(d, generator=rng), keys, values, length=length)
    left = torch.cat((half[:2], torch.full((2, 2), torch.nan)))
    yield case(torch.randn(2, generator=rng), left, left, length=2)


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


def masks_the_rest(q, keys, values, *, length):
    """The weights of the rest are 0, and 0 times NaN is NaN."""
    scores = keys @ q / q.shape[0] ** 0.5
    return scores.masked_fill(torch.arange(len(keys)) >= length, -torch.inf).softmax(dim=0) @ values


def overflows(q, keys, values, *, length):
    """The softmax as it is written, without the largest score taken off first."""
    shares = (keys[:length] @ q / q.shape[0] ** 0.5).exp()
    return shares / shares.sum() @ values[:length]


def attend_by_heart(q, keys, values, *, length):
    return torch.tensor([0.8044, 0.1956])


ATTEND_LAST = Exercise(
    name="caching.attend_last",
    prompt="""**One row of attention.** A cache has reserved `keys` and `values`, both of shape (capacity, d), for one
head; only the first `length` rows are filled, the newest token's own row included. Beyond them stands whatever was in
memory, even NaN. Write `attend_last(q, keys, values, length=...)`: the output, of shape (d,), for the newest token's query `q`, of
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
        (masks_the_rest, "an average of the filled rows"),
        (overflows, "an average of the filled rows"),
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


def seen(tokens: int, *, window: int, sinks: int) -> Tensor:
    """Which keys each query of a text sees, (tokens, tokens), True where it does: the newest ones, and the first."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    near = (key <= query) & (key > query - window)
    return near | ((key < sinks) & (key <= query))


def windows(rng: torch.Generator):
    """By hand; then texts shorter and longer than the window."""
    yield case(5, window=2, sinks=1)
    for _ in range(4):
        tokens, window, sinks = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((6, 14), (1, 6), (0, 4)))
        yield case(tokens, window=window, sinks=sinks)
    yield case(4, window=9, sinks=2)


def never_the_future(answer, given):
    late = answer.bool().triu(1)
    return None if not late.any() else (f"query {int(late.any(1).int().argmax())} looking ahead", "keys up to its own only")


def itself_and_so_many(answer, given):
    """A query sees itself, and no more keys than window + sinks."""
    most, counts = given.settings["window"] + given.settings["sinks"], answer.long().sum(1)
    if not answer.bool().diagonal().all():
        return "a query that does not see its own key", "each seeing itself"
    return None if counts.max() <= most else (f"a query that sees {int(counts.max())} keys", f"at most window + sinks = {most}")


def one_too_many(tokens, *, window, sinks):
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    return ((key <= query) & (key >= query - window)) | ((key < sinks) & (key <= query))


def sinks_for_all(tokens, *, window, sinks):
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    return ((key <= query) & (key > query - window)) | (key < sinks).expand(tokens, tokens)


def no_sinks(tokens, *, window, sinks):
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (key <= query) & (key > query - window)


def window_of_the_last(tokens, *, window, sinks):
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (key <= query) & ((key >= tokens - window) | (key < sinks))


def seen_by_heart(tokens, *, window, sinks):
    return torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]).bool()


SEEN = Exercise(
    name="caching.seen",
    prompt="""**A window with sinks.** A cache keeps the keys of the newest `window` tokens, the query's own among them, and of
the first `sinks` tokens of the text, however long ago these were. Write `seen(tokens, window=..., sinks=...)`: a tensor of
booleans of shape (tokens, tokens), True where the query of the row sees the key of the column.""",
    reference=seen,
    checks=(
        checks.not_the_librarys_own("Window", "WindowCache"),
        checks.same_shape_and_dtype(windows),
        checks.holds("no query looks ahead", windows, never_the_future),
        checks.holds("itself, and no more than are kept", windows, itself_and_so_many),
        checks.equals_reference(windows),
    ),
    hints=(
        "Two reasons to see a key: it is near, or it is one of the first. Neither allows a look ahead.",
        "With `query = torch.arange(tokens)[:, None]` and `key = torch.arange(tokens)`, comparisons give the whole table.",
        "Near is `(key <= query) & (key > query - window)`; a sink is `(key < sinks) & (key <= query)`.",
    ),
    after="Without the sinks a real model breaks: its first token takes up to half of all attention, whatever it says.",
    wrong=(
        (one_too_many, "itself, and no more than are kept"),
        (sinks_for_all, "no query looks ahead"),
        (no_sinks, "the right numbers"),
        (window_of_the_last, "itself, and no more than are kept"),
        (seen_by_heart, "shape and dtype"),
    ),
)


def write(pages: list[int], references: list[int], free: list[int], *, length: int, page_size: int) -> tuple[list[int], list[int], list[int]]:
    """Makes room for token number `length` of a text; returns its pages, the references of all pages, and the free ones."""
    pages, references, free = list(pages), list(references), list(free)
    if length % page_size == 0:  # the last page is full
        pages.append(free.pop())
        references[pages[-1]] = 1
    elif references[pages[-1]] > 1:  # somebody else reads it: a copy
        references[pages[-1]] -= 1
        pages[-1] = free.pop()
        references[pages[-1]] = 1
    return pages, references, free


def tables(rng: torch.Generator):
    """By hand: a shared page that is half full; then alone, full, and empty ones."""
    yield case([0, 1], [2, 2, 0, 0], [3, 2], length=5, page_size=4)
    yield case([0, 1], [2, 1, 0, 0], [3, 2], length=5, page_size=4)
    yield case([0, 1], [2, 2, 0, 0], [3, 2], length=8, page_size=4)
    yield case([], [0, 0], [1, 0], length=0, page_size=3)
    for _ in range(4):
        size = int(torch.randint(2, 6, (), generator=rng))
        held = int(torch.randint(1, 4, (), generator=rng))
        shared = 1 + torch.randint(0, 3, (held,), generator=rng)
        inside = int(torch.randint(1, size + 1, (), generator=rng))
        order = torch.randperm(held + 3, generator=rng).tolist()
        references = [0] * (held + 3)
        for page, n in zip(order[:held], shared.tolist(), strict=True):
            references[page] = n
        yield case(order[:held], references, order[held:], length=(held - 1) * size + inside, page_size=size)


def nobody_elses_page(answer, given):
    pages, references, free = answer
    if pages and references[pages[-1]] != 1:
        return f"a write into page {pages[-1]}, which {references[pages[-1]]} texts name", "a page that this text alone names"
    lost = [page for page, n in enumerate(references) if (n == 0) != (page in free)]
    return (f"page {lost[0]} with {references[lost[0]]} references, free: {lost[0] in free}", "free exactly where nobody names it") if lost else None


def writes_into_shared(pages, references, free, *, length, page_size):
    pages, references, free = list(pages), list(references), list(free)
    if length % page_size == 0:
        pages.append(free.pop())
        references[pages[-1]] = 1
    return pages, references, free


def copies_always(pages, references, free, *, length, page_size):
    pages, references, free = list(pages), list(references), list(free)
    if length % page_size:
        references[pages[-1]] -= 1
        pages[-1] = free.pop()
    else:
        pages.append(free.pop())
    references[pages[-1]] = 1
    return pages, references, free


def forgets_to_let_go(pages, references, free, *, length, page_size):
    pages, references, free = list(pages), list(references), list(free)
    if length % page_size == 0:
        pages.append(free.pop())
    elif references[pages[-1]] > 1:
        pages[-1] = free.pop()
    references[pages[-1]] = 1
    return pages, references, free


def copies_a_full_page(pages, references, free, *, length, page_size):
    pages, references, free = list(pages), list(references), list(free)
    if pages and references[pages[-1]] > 1:
        references[pages[-1]] -= 1
        pages[-1] = free.pop()
        references[pages[-1]] = 1
    elif length % page_size == 0:
        pages.append(free.pop())
        references[pages[-1]] = 1
    return pages, references, free


def writes_into_the_lists(pages, references, free, *, length, page_size):
    if length % page_size == 0:
        pages.append(free.pop())
    elif references[pages[-1]] > 1:
        references[pages[-1]] -= 1
        pages[-1] = free.pop()
    references[pages[-1]] = 1
    return pages, references, free


def write_by_heart(pages, references, free, *, length, page_size):
    return [0, 2], [2, 1, 1, 0], [3]


WRITE = Exercise(
    name="caching.copy_on_write",
    prompt="""**Who may write here?** A text's keys lie in `pages`, a list of page numbers; a page has room for `page_size`
tokens. `references[page]` says how many texts name a page, and `free` lists those that none does. The text has `length`
tokens and is about to write one more. Write `write(pages, references, free, length=..., page_size=...)`, which returns the three
lists as they are then, new ones: a full last page calls for another; a last page that others name must not be written into, so
the text takes a page of its own in its place. Pages are taken from the end of `free`.""",
    reference=write,
    checks=(
        checks.not_the_librarys_own("reserve", "Pool", "Table"),
        checks.holds("no page that others read, none lost", tables, nobody_elses_page),
        checks.equals_reference(tables),
        checks.input_unchanged(tables),
    ),
    hints=(
        "Three cases: the last page is full; it has room but is shared; it has room and is the text's own.",
        "It is full where `length % page_size == 0`, and then it does not matter who else reads it.",
        "For a copy: one reference fewer on the old page, `free.pop()` in its place, with one reference.",
    ),
    after="A hundred chats with one system prompt hold it once, and none of them can tell.",
    wrong=(
        (writes_into_shared, "no page that others read"),
        (copies_always, "no page that others read"),
        (forgets_to_let_go, "the right numbers"),
        (copies_a_full_page, "the right numbers"),
        (writes_into_the_lists, "its input unchanged"),
        (write_by_heart, "the right numbers"),
    ),
)


def farthest(held: list[int], coming: list[int]) -> int:
    """Which of the pages that are held to throw away: the one that is asked for last, or never again."""
    wait = [coming.index(page) if page in coming else len(coming) for page in held]
    return held[wait.index(max(wait))]


def requests(rng: torch.Generator):
    """By hand; then streams in which one page never comes again, one where all do, one where two never do, and the end of all."""
    yield case([3, 1, 2], [1, 3, 1, 2])
    for _ in range(4):
        names = torch.randperm(9, generator=rng).tolist()
        held, never = names[:4], names[0]
        rest = [p for p in held if p != never]
        order = [rest[i] for i in torch.randint(0, 3, (8,), generator=rng).tolist()]
        yield case([held[i] for i in torch.randperm(4, generator=rng).tolist()], [*order, *rest])
    yield case(names[:3], [names[2], names[2], names[0], names[1], names[0]])
    yield case(names[:4], [names[1], names[3], names[1]])
    yield case(names[:3], [])


def costs_least(answer, given):
    held, coming = given.args
    if answer not in held:
        return answer, f"one of the pages that are held, {held}"
    wait = lambda page: coming.index(page) if page in coming else len(coming)  # noqa: E731
    longest = max(map(wait, held))
    return None if wait(answer) == longest else (f"page {answer}, asked for in {wait(answer)} requests", f"one that waits for {longest}")


def next_one(held, coming):
    return min(held, key=lambda page: coming.index(page) if page in coming else len(coming))


def rarest(held, coming):
    return min(held, key=lambda page: (coming.count(page), held.index(page)))


def last_asked(held, coming):
    return max(held, key=lambda page: max((i for i, p in enumerate(coming) if p == page), default=-1))


def the_oldest(held, coming):
    return held[0]


def uses_up_the_stream(held, coming):
    """Eats the caller's list, and finds no end where two pages never come again."""
    left = set(held)
    while len(left) > 1:
        left.discard(coming.pop(0))
    return left.pop()


def only_those_that_come(held, coming):
    return max(held, key=lambda page: coming.index(page) if page in coming else -1)


def farthest_by_heart(held, coming):
    return 2


FARTHEST = Exercise(
    name="caching.belady",
    prompt="""**The best page to lose.** A cache is full, and room is needed. `held` lists the pages in it, `coming` all requests
that are still to come, in order, as only a stream that was recorded can tell. Belady's rule throws away the page whose next
request lies farthest ahead; one that never comes again is farther than all. Write `farthest(held, coming)`: that page. Where several never
come again, any of them will do.""",
    reference=farthest,
    checks=(
        checks.not_the_librarys_own("hits", "hit_rate", "next_uses"),
        checks.input_unchanged(requests),
        checks.holds("no other waits longer", requests, costs_least),
    ),
    hints=(
        "For each page that is held: how many requests pass until it is asked for?",
        "`coming.index(page)` finds the next request; it raises an error for a page that never comes.",
        "`len(coming)` serves for those; then take the page with the largest number.",
    ),
    after="No cache can do better, and none can do this: it knows the future. It is what LRU is measured against.",
    wrong=(
        (next_one, "no other waits longer"),
        (rarest, "no other waits longer"),
        (last_asked, "no other waits longer"),
        (the_oldest, "no other waits longer"),
        (uses_up_the_stream, "its input unchanged"),
        (only_those_that_come, "no other waits longer"),
        (farthest_by_heart, "no other waits longer"),
    ),
)

EXERCISES = (ATTEND_LAST, CACHE_BYTES, SEEN, WRITE, FARTHEST)
