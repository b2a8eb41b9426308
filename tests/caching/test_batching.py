"""Whoever is served beside whom, each request gets what it would get alone; and nobody who waits is forgotten."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effkit.caching import batching
from effkit.caching.batching import Engine, Reply, Served, measured, modelled, serve, throughput_at_latency
from effkit.caching.paged import PagedCache, pages_for
from effkit.caching.streams import Request, paced, stream
from effkit.core.generation import Rope, Sampler
from tests.caching.decoders import decoder, text

FLAT = modelled(pass_s=1.0, token_s=0.0)
LINEAR = modelled(pass_s=1.0, token_s=0.02)
PROMPTS = [text(40, seed=i)[0].tolist() for i in range(4)]  # the rows below begin with one of these


class Mute(nn.Module):
    """A decoder that always says 0, in no time."""

    def __init__(self):
        super().__init__()
        self.rope, self.weight = Rope(2), nn.Parameter(torch.zeros(1))

    def forward(self, ids, cache):
        cache.advance(ids.shape[1])
        nothing = torch.zeros(len(ids), 1, ids.shape[1], 2)
        return cache.attend(0, nothing, nothing, nothing)[:, 0]


@st.composite
def asked(draw) -> list[Request]:
    lines = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=9))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 7.0, 40.0]), min_size=len(lines), max_size=len(lines)))
    return [Request(PROMPTS[which][:n], new, sum(gaps[: i + 1])) for i, (which, n, new) in enumerate(lines)]


def alone(model, request: Request) -> tuple[int, ...]:
    ids = torch.tensor([list(request.prompt)])
    return tuple(model.generate(ids, request.new, sampler=Sampler(temperature=0.0))[0, len(request.prompt) :].tolist())


policies = st.sampled_from(["continuous", "static"])


@pytest.mark.slow
@settings(max_examples=60)
@given(requests=asked(), policy=policies, page_size=st.integers(1, 9), spare=st.integers(0, 12), rows=st.integers(1, 5),
       chunk=st.sampled_from([None, 1, 3, 16]), prefix=st.booleans(), dtype=st.sampled_from([torch.float64, torch.float32]))  # fmt: skip
def test_each_request_gets_what_it_gets_alone(requests, policy, page_size, spare, rows, chunk, prefix, dtype):
    """With as few pages as the longest request needs, too: then rows give theirs back and are computed again."""
    model = decoder(dtype=dtype)
    pages = spare + max(pages_for(len(r.prompt) + r.new, page_size) for r in requests)
    served = serve(model, requests, pages=pages, page_size=page_size, most_rows=rows, policy=policy,
                   prefill_chunk=chunk, prefix=prefix, clock=LINEAR)  # fmt: skip
    for request, reply in zip(requests, served.replies, strict=True):
        assert not reply.refused and reply.tokens == alone(model, request)
        if request.new:
            assert request.arrival < reply.first <= reply.done and (reply.first < reply.done) == (request.new > 1)
    assert served.preempted == 0 or policy == "continuous"


def test_rows_that_gave_their_pages_back_are_computed_again():
    model, requests = decoder(), [Request(PROMPTS[i][:6], 20) for i in range(4)]
    served = serve(model, requests, pages=9, page_size=4, most_rows=4, clock=FLAT)
    assert served.preempted > 0 and [r.tokens for r in served.replies] == [alone(model, r) for r in requests]
    assert [r.done for r in served.replies] == sorted(r.done for r in served.replies), "the oldest is never sent away"


@pytest.mark.parametrize("policy", ["continuous", "static"])
@pytest.mark.parametrize("prefix", [False, True])
def test_all_pages_come_back(monkeypatch, policy, prefix):
    engines = []
    monkeypatch.setattr(batching, "Engine", lambda *settings: engines.append(Engine(*settings)) or engines[0])
    requests = [Request(PROMPTS[i % 4][: 5 + i], 3 + i) for i in range(9)]
    serve(decoder(), requests, pages=20, page_size=3, policy=policy, prefix=prefix, clock=FLAT)
    pool = engines[0].pool
    assert len(pool.free) + (engines[0].prefix.pages() if prefix else 0) == 20
    assert sorted(set(pool.references)) == ([0, 1] if prefix else [0])


# time, by hand and by law


def test_a_clock_by_hand():
    """Two rows. At 0 a prompt of 3 and one of 1 token: a pass for the prompt (its first token at 1), one for both (2),
    one more (3), and the first is complete. The third has waited since 1.5 and is read from 3 to 4 ..."""
    requests = [Request([1, 2, 3], 3), Request([4], 4), Request([5, 6], 1, 1.5), Request([7], 1, 50.0)]
    a, b, c, d = serve(decoder(), requests, pages=9, page_size=2, most_rows=2, clock=FLAT).replies
    assert (a.first, a.done) == (1.0, 3.0) and (b.first, b.done) == (2.0, 6.0)
    assert (c.first, c.done) == (4.0, 4.0) and (d.first, d.done) == (51.0, 51.0)


def test_requests_come_in_any_order_and_replies_in_theirs():
    requests = [Request([1, 2], 2, 90.0), Request([3], 1, 0.0), Request([4], 3, 40.0)]
    served = serve(decoder(), requests, pages=9, page_size=2, clock=FLAT)
    assert [r.done for r in served.replies] == [92.0, 1.0, 43.0]
    assert [r.tokens for r in served.replies] == [alone(decoder(), r) for r in requests]


def test_static_batching_by_hand():
    """The third has to wait until the longest of the first two is done, at 5."""
    requests = [Request([1, 2, 3], 3), Request([4], 4), Request([5, 6], 1, 1.5), Request([7], 1, 50.0)]
    served = serve(decoder(), requests, pages=9, page_size=2, most_rows=2, policy="static", clock=FLAT)
    assert [r.done for r in served.replies] == [3.0, 5.0, 6.0, 51.0] and served.passes == 7


@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_a_static_batch_is_computed_whole_until_its_longest_answer_is_done(policy):
    seen = []

    def counting(run, rows, n):
        seen.append(rows)
        return run(), 1.0

    serve(Mute(), [Request([i], n) for i, n in enumerate((2, 5, 3))], pages=9, policy=policy, clock=counting)
    assert seen == ([3] * 5 if policy == "static" else [3, 3, 2, 1, 1])


answers = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=40)
@given(new=answers, rows=st.integers(1, 4))
def test_passes_obey_graham_s_bounds(new, rows):
    passes_obey_graham_s_bounds(new, rows)


def passes_obey_graham_s_bounds(new, rows):
    """All there at the start, prompts of one token: each pass writes a token in each row."""
    requests = [Request([i], n) for i, n in enumerate(new)]
    passes = {p: serve(Mute(), requests, pages=99, most_rows=rows, policy=p, clock=FLAT).passes for p in ("continuous", "static")}
    assert sum(new) / rows <= passes["continuous"] <= sum(new) / rows + max(new) * (1 - 1 / rows)
    assert passes["static"] == sum(max(new[i : i + rows]) for i in range(0, len(new), rows)) >= passes["continuous"]


@settings(max_examples=20)
@given(n=st.integers(1, 9), new=st.integers(1, 6), rows=st.integers(1, 4), policy=policies)
def test_of_equal_requests_both_policies_make_one(n, new, rows, policy):
    requests = [Request([i], new) for i in range(n)]
    served = serve(Mute(), requests, pages=99, most_rows=rows, policy=policy, clock=LINEAR)
    assert served.passes == -(-n // rows) * new


def passes_of(requests, prefill_chunk):
    """Rows and tokens of each pass, and what was served."""
    seen = []

    def watching(run, rows, n):
        seen.append((rows, n))
        return run(), float(rows * n)

    served = serve(decoder(), requests, pages=40, page_size=4, most_rows=3, prefill_chunk=prefill_chunk, clock=watching)
    assert [r.tokens for r in served.replies] == [alone(decoder(), r) for r in requests]
    return seen, served.replies


def test_chunks_of_a_long_prompt_let_others_go_on():
    """Between two of them the other row writes a token."""
    requests = [Request([1], 9), Request(PROMPTS[0], 1, 0.5)]
    (whole, late), (chunks, soon) = (passes_of(requests, chunk) for chunk in (None, 8))
    assert whole == [(1, 1), (1, 40), *[(1, 1)] * 8]
    assert chunks == [(1, 1), *[(1, 8), (1, 1)] * 5, *[(1, 1)] * 3]
    assert late[0].done == soon[0].done == 9 + 40, "a burst of work is the same work"


def test_a_chunk_is_shared_by_all_prompts_that_wait():
    requests = [Request([1], 9), Request(PROMPTS[0][:6], 1, 0.5), Request(PROMPTS[1][:9], 1, 0.5)]
    assert passes_of(requests, 8)[0][:7] == [(1, 1), (1, 6), (1, 2), (1, 1), (1, 7), (1, 1), (1, 1)]


def test_what_a_row_computed_itself_before_it_was_sent_away_is_not_reused_from_others():
    model, requests = decoder(), [Request(PROMPTS[i][:6], 20) for i in range(3)] + [Request(PROMPTS[0][:5], 20)]
    served = serve(model, requests, pages=20, page_size=2, most_rows=4, prefix=True, clock=FLAT)
    assert served.preempted > 0 and [r.tokens for r in served.replies] == [alone(model, r) for r in requests]
    assert [r.reused for r in served.replies] == [0, 0, 0, 4]


def test_those_who_begin_alike_are_computed_once():
    requests = [Request(PROMPTS[0][: 20 + i], 2, arrival) for i, arrival in enumerate((0.0, 0.0, 300.0))]
    model, plain, shared = decoder(), [], []
    for prefix, seen in ((False, plain), (True, shared)):
        served = serve(model, requests, pages=40, page_size=4, prefix=prefix, clock=modelled(pass_s=0.0, token_s=1.0))
        seen += served.replies
    assert [r.reused for r in plain] == [0, 0, 0] and [r.reused for r in shared] == [0, 20, 20]
    assert [r.tokens for r in plain] == [r.tokens for r in shared]
    assert shared[2].first - 300.0 == 2.0 and plain[2].first - 300.0 == 22.0


# percentiles, throughput, and the rate that keeps a promise


def test_latency_and_throughput_by_hand():
    replies = (Reply(1.0, (5, 6), 2.0, 3.0), Reply(2.0, (5,), 6.0, 6.0), Reply(0.0, refused="no"))
    served = Served(replies, passes=3, preempted=0)
    assert served.latency(0) == 2.0 and served.latency(50) == 3.0 and served.latency(100) == 4.0
    assert served.throughput == 3 / 5
    nothing = Served(replies[2:], 0, 0)
    assert math.isnan(nothing.latency(95)) and nothing.throughput == 0.0


TOY = ["".join(chr(97 + (i * i + 7 * (i // 3)) % 26) for i in range(4000))]


def at_rates(policy: str, seed: int, n: int = 40):
    """What the recorded stream, at any pace, gets from a machine on which a pass costs as much as a hundred tokens."""
    requests = stream(seed, n, longest=24, mean_new=12, most_new=48, texts=TOY, encode=str.encode)
    clock = modelled(pass_s=1.0, token_s=0.01)
    return cache(lambda rate: serve(Mute(), paced(requests, rate), pages=400, page_size=4, policy=policy, clock=clock))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_continuous_batching_serves_at_least_as_many_under_every_bound(seed):
    served_by = {policy: at_rates(policy, seed) for policy in ("static", "continuous")}
    for bound in (60.0, 100.0, 200.0):
        rates, through = {}, {}
        for policy, served_at in served_by.items():
            rate, served = throughput_at_latency(served_at, bound_s=bound, slowest=0.01, fastest=10.0, halvings=6)
            assert served.latency(95) <= bound
            rates[policy], through[policy] = rate, served.throughput
        assert rates["continuous"] >= rates["static"] and through["continuous"] >= 0.98 * through["static"]


def served_in(latency_of):
    return lambda rate: Served((Reply(0.0, (1,), latency_of(rate), latency_of(rate)),), 1, 0)


@given(limit=st.floats(0.2, 90.0))
def test_the_largest_rate_is_found(limit):
    rate, served = throughput_at_latency(served_in(lambda r: r), bound_s=limit, slowest=0.1, fastest=100.0, halvings=30)
    assert rate == pytest.approx(limit, rel=1e-4) and rate <= limit and served.latency(95) == rate
    assert throughput_at_latency(served_in(lambda r: 0.0), bound_s=limit, slowest=0.1, fastest=100.0)[0] == 100.0


def test_a_bound_that_is_missed_at_any_rate_is_refused():
    with pytest.raises(ValueError, match="95 % of the answers take up to 9 s at 0.5 requests a second, and 3.0 s are allowed"):
        throughput_at_latency(served_in(lambda r: 9.0), bound_s=3.0, slowest=0.5, fastest=2.0)


def test_passes_can_be_measured():
    served = serve(decoder(), [Request(PROMPTS[0][:9], 3), Request(PROMPTS[1][:5], 2, 1e-4)], pages=9, page_size=4)
    assert served.passes >= 4 and all(0 < r.first - r.arrival < 60 for r in served.replies)
    result, seconds = measured(lambda: torch.ones(2), 1, 1)
    assert seconds > 0 and result.sum() == 2


# bad input


@pytest.mark.parametrize(
    "bad, why",
    [
        (Request([], 3), "at least one token"),
        (Request([1] * 126, 3), "126 tokens and 3 new ones exceed the model's context of 128"),
        (Request([1] * 30, 11), "30 tokens and 11 new ones take 11 pages of 4, and there are 10: ask for less"),
        (Request([1, 32], 3), "tokens must be whole numbers from 0 to 31, got 1 to 32: encode with the model's own tokenizer"),
        (Request([-1, 2], 3), "got -1 to 2"),
        (Request([0.5], 3), "tokens must be whole numbers"),
        (Request([1], -1), "max_new_tokens must be a whole number, at least 0, got -1"),
        (Request([1], 2.5), "max_new_tokens must be a whole number"),
        (Request([1], 2, math.nan), "arrival must be a number"),
        (Request([1], 2, -1.0), "arrival must be a number"),
        (Request(["a"], 2), "str"),
        (Request(None, 2), ""),
    ],
)
@pytest.mark.parametrize("policy", ["continuous", "static"])
def test_a_request_that_cannot_be_served_is_refused_and_the_others_go_on(bad, why, policy):
    model, good = decoder(), [Request(PROMPTS[0][:30], 10), Request(torch.tensor(PROMPTS[1][:7]), 3, 2.0)]
    served = serve(model, [good[0], bad, good[1]], pages=10, page_size=4, policy=policy, clock=FLAT)
    assert why in served.replies[1].refused and served.replies[1].refused and served.replies[1].tokens == ()
    assert [served.replies[i].tokens for i in (0, 2)] == [alone(model, r) for r in good]
    assert len(served.answered) == 2 and served.latency() > 0


def spoiled(token=31):
    """A decoder in which one token's embedding is no number."""
    model = decoder(tied=False)
    with torch.no_grad():
        model.embedding.weight[token] = torch.nan
    return model


@pytest.mark.parametrize("policy", ["continuous", "static"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_request_whose_logits_are_no_numbers_is_refused_and_the_others_go_on(policy, prefix, chunk):
    """In its prompt, beside others and alone; and one that comes to it in the middle of its answer."""
    model, prompts = spoiled(), [[token for token in line if token != 31] for line in PROMPTS]
    good = [Request(prompts[0][:9], 7), Request(prompts[1][:5], 3), Request(prompts[2][:6], 5, 90.0)]
    bad = [Request([*prompts[3][:4], 31, 2], 8), Request([31], 2), Request([31, 1, 2, 3], 2, 50.0)]
    requests = [bad[0], good[0], bad[1], good[1], bad[2], good[2]]
    served = serve(model, requests, pages=30, page_size=4, most_rows=3, policy=policy, prefix=prefix, prefill_chunk=chunk, clock=FLAT)
    assert [served.replies[i].tokens for i in (1, 3, 5)] == [alone(model, r) for r in good]
    for i in (0, 2, 4):
        reply = served.replies[i]
        assert reply.tokens == () and reply.refused.startswith("the model's logits hold NaN for this request: look for NaN or infinity")
        assert reply.done > reply.arrival
    assert len(served.answered) == 3 and served.throughput > 0


def test_an_answer_that_runs_into_no_numbers_is_refused():
    model, line = decoder(tied=False), Request(PROMPTS[1][:5], 9)
    third = alone(model, line)[2]
    with torch.no_grad():
        model.embedding.weight[third] = torch.nan
    other = next(r for r in (Request([i], 6) for i in range(32)) if third not in (r.prompt[0], *alone(decoder(tied=False), r)))
    bad, good = serve(model, [line, other], pages=9, page_size=4, clock=FLAT).replies
    assert third not in line.prompt and bad.refused and bad.tokens == ()
    assert good.tokens == alone(model, other)


def test_no_new_tokens_and_no_requests_take_no_time():
    served = serve(decoder(), [Request([1, 2], 0, 3.0)], pages=4, clock=FLAT)
    assert served.replies[0] == Reply(3.0, done=3.0, first=served.replies[0].first) and served.passes == 0
    assert serve(decoder(), [], pages=4).replies == ()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"policy": "greedy"}, "policy must be one of 'continuous', 'static', got 'greedy'"),
        ({"most_rows": 0}, "most_rows must be"),
        ({"prefill_chunk": 0}, "prefill_chunk must be"),
        ({"pages": 0}, "pages must be"),
        ({"page_size": 0}, "page_size must be"),
    ],
)
def test_settings_that_are_none_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        serve(decoder(), [], **{"pages": 4} | settings)


def test_what_is_no_decoder_is_refused():
    with pytest.raises(ValueError, match="serve needs a decoder that asks a cache for its attention, got Linear: take one that"):
        serve(nn.Linear(2, 2), [], pages=4)


# planted bugs


def whoever_is_preempted_forgets_its_answer(self):
    row = self.rows.pop()
    row.table.truncate(0)
    row.ids = row.ids[: len(row.request.prompt)] + [0] * (len(row.ids) - len(row.request.prompt))
    self.waiting.appendleft(row)


def whoever_is_preempted_is_lost(self):
    self.rows.pop().table.truncate(0)


def everyone_is_let_in(self):
    self.rows += self.waiting
    self.waiting.clear()


def one_token_too_many(self, row, token, write=Engine.write):
    write(self, row, 0 if len(row.ids) > len(row.request.prompt) + 1 else token)


@pytest.mark.parametrize(
    "where, name, bug",
    [
        (Engine, "preempt", whoever_is_preempted_forgets_its_answer),
        (Engine, "preempt", whoever_is_preempted_is_lost),
        (Engine, "write", one_token_too_many),
        (PagedCache, "_count", lambda self: PagedCache.__mro__[1].__init__(self, self.rope)),
    ],
)
def test_an_engine_that_errs_is_noticed(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, RuntimeError)):
        test_rows_that_gave_their_pages_back_are_computed_again()


def test_a_batch_that_is_static_in_name_only_is_noticed(monkeypatch):
    made = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a: made(self, *a[:3], "continuous", *a[4:]))
    with pytest.raises(AssertionError):
        test_static_batching_by_hand()


def test_places_that_stay_empty_are_noticed(monkeypatch):
    """Continuous in name only."""
    admit = Engine.admit
    monkeypatch.setattr(Engine, "admit", lambda self: None if self.rows else admit(self))
    with pytest.raises(AssertionError):
        passes_obey_graham_s_bounds((9, 1, 1, 1, 9, 1, 1, 1), 4)
