"""Who stays is who the papers say stays, and no more than the budget; the laws of lossy caches are in test_protocol.py."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit import zoo
from effkit.caching import H2O, SnapKV, Window, evict, lossy
from effkit.caching.evict import H2OCache, SnapKVCache, WindowCache, votes
from effkit.caching.kv import Preallocated
from effkit.caching.lossy import BACK, Keeping, Through
from effkit.core.generation import NoCache, Rope
from effkit.core.paths import data_dir
from effkit.speculative import EarlyExit, Speculative
from tests.caching import laws
from tests.caching.decoders import assert_equal_logits, chunked, decoder, text


class Chosen(NoCache):
    """The oracle: one query after another over the tokens that `who` chooses for it, each at the place that `place` gives
    it; nothing is kept, and nothing is shared with the caches under test."""

    def __init__(self, rope, who, place=lambda tokens, query: (tokens, query)):
        super().__init__(rope)
        self.who, self.place = who, place

    def attend(self, layer, q, k, v):
        answer, shared = torch.zeros_like(q), q.shape[1] // k.shape[1]
        chosen = self.who(*(self.rope(t, self.tables) for t in (q, k)))
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                for query in range(q.shape[2]):
                    tokens = chosen(row, head // shared, query)
                    places, own = self.place(tokens, query)
                    key = self._turned(k[row, head // shared, tokens], places)
                    scores = key @ self._turned(q[row, head, query : query + 1], [own])[0] / math.sqrt(q.shape[3])
                    answer[row, head, query] = scores.softmax(0) @ v[row, head // shared, tokens]
        return answer

    def _turned(self, x, places):
        return self.rope(x[None, None], self.rope.tables(torch.tensor(places), x.dtype))[0, 0]


# Window


def as_in_the_paper(window, sinks):
    """The first and the newest, at the places 0, 1, 2 ... that they have in the cache."""

    def who(q, k):
        return lambda row, group, query: [t for t in range(query + 1) if t < sinks or t > query - window]

    return lambda model: Chosen(model.rope, who, lambda tokens, query: (list(range(len(tokens))), len(tokens) - 1))


def window_is_the_paper_s(window=4, sinks=2, length=20, sizes=(1, 6), kv_heads=2):
    model, ids = decoder(kv_heads=kv_heads), text(length)
    with torch.no_grad():
        wanted = model(ids, as_in_the_paper(window, sinks)(model))
    assert_equal_logits(chunked(model, WindowCache(model.rope, window, sinks), ids, sizes), wanted)


@pytest.mark.slow
@settings(max_examples=15)
@given(window=st.integers(1, 9), sinks=st.integers(0, 4), length=st.integers(1, 24), kv_heads=st.sampled_from([1, 2, 4]))
def test_a_window_with_sinks_is_recomputation_with_the_paper_s_places(window, sinks, length, kv_heads):
    window_is_the_paper_s(window, sinks, length, kv_heads=kv_heads)


@pytest.mark.parametrize("layers, window", [(1, 6), (2, 4), (3, 3)])
def test_without_sinks_a_token_knows_of_as_many_as_its_windows_reach_through_all_layers(layers, window):
    """A window of W equals a text cut to its last layers (W - 1) + 1 tokens, and no shorter one."""
    model, ids, reach = decoder(layers=layers), text(40), layers * (window - 1) + 1
    maker = lambda: WindowCache(model.rope, window, 0)  # noqa: E731
    last = chunked(model, maker(), ids, [])[:, -1]
    assert_equal_logits(chunked(model, maker(), ids[:, -reach:], [])[:, -1], last)
    assert (chunked(model, maker(), ids[:, 1 - reach :], [])[:, -1] - last).abs().max() > 1e-3
    if layers == 1:
        assert_equal_logits(model(ids[:, -reach:])[:, -1], last)


@pytest.mark.slow
def test_a_text_without_end_takes_no_more_room_and_its_places_stay_in_range():
    model, ids = decoder(context=32), text(400)
    cache, seen = WindowCache(model.rope, 8, 2), []
    with torch.no_grad():
        for token in ids[0]:
            seen.append(model(token[None, None], cache)[0, 0])
            assert cache.at[:2].tolist() == [0, 1][: len(cache.at)], "a sink has gone"
            assert len(cache.at) <= 2 + 8 + BACK and cache.keys[0].shape[2] == len(cache.at)
    far = cache.rope.tables(torch.tensor([9]), torch.float64)
    assert all(torch.equal(a[-1], b[-1]) for a, b in zip(cache.near, far, strict=True))
    assert_equal_logits(torch.stack(seen)[None], chunked(model, WindowCache(model.rope, 8, 2), ids, [250]))


# H2O


class Unrotated(Rope):
    def forward(self, x, tables):
        return x


def test_heavy_hitters_by_hand():
    """A query gives token j the part a_j of what it sees, a = 1 3 1 4 1 1; two stay, the newest of them whatever it got.

    query  sees    gives              got so far              goes
    2      0 1 2   1/5 3/5 1/5        0: 1.45 1: 1.35         1, for 0 was there from the start
    3      0 2 3   1/6 1/6 4/6        0: 1.62 2: .37          2
    4      0 3 4   1/6 4/6 1/6        0: 1.78 3: 1.33         3, though it is the heaviest of all
    5      0 4 5   1/3 1/3 1/3
    """
    cache, a, seen = H2OCache(Unrotated(1), budget=2, recent=1), [1, 3, 1, 4, 1, 1], []
    for j in range(6):
        cache.advance(1, dtype=torch.float64)
        q, k, v = torch.tensor([[1.0], [math.log(a[j])], [10.0**j]], dtype=torch.float64).reshape(3, 1, 1, 1, 1)
        seen.append(cache.attend(0, q, k, v).item())
    parts = [[1], [1, 3], [1, 3, 1], [1, 0, 1, 4], [1, 0, 0, 4, 1], [1, 0, 0, 0, 1, 1]]
    assert seen == pytest.approx([sum(w * 10**j for j, w in enumerate(p)) / sum(p) for p in parts])


def heavy(budget, recent, score="sum"):
    """Algorithm 1, head by head, with lists."""

    def who(q, k):
        stay = {}
        for row in range(k.shape[0]):
            for group in range(k.shape[1]):
                got: dict[int, float] = {}
                for query in range(k.shape[2]):
                    if len(got) > budget:
                        old = sorted(got)[: len(got) - recent]
                        del got[min(old, key=lambda t: got[t] / (1 if score == "sum" else query - t))]
                    got[query] = 0.0
                    tokens = stay[row, group, query] = sorted(got)
                    shared = q.shape[1] // k.shape[1]
                    for head in range(group * shared, (group + 1) * shared):
                        scores = k[row, group, tokens] @ q[row, head, query] / math.sqrt(q.shape[3])
                        for token, part in zip(tokens, scores.softmax(0).tolist(), strict=True):
                            got[token] += part
        return lambda row, group, query: stay[row, group, query]

    return lambda model: Chosen(model.rope, who)


def h2o_is_the_paper_s(budget=6, recent=2, length=44, sizes=(3, 9, 22), kv_heads=2, score="sum"):
    model, ids = decoder(kv_heads=kv_heads), text(length, rows=2)
    with torch.no_grad():
        wanted = model(ids, heavy(budget, recent, score)(model))
    assert_equal_logits(chunked(model, H2OCache(model.rope, budget, recent, score), ids, sizes), wanted)


@pytest.mark.slow
@settings(max_examples=10)
@given(budget=st.integers(1, 8), recent=st.integers(0, 4), length=st.integers(1, 24), kv_heads=st.sampled_from([1, 2, 4]),
       score=st.sampled_from(["sum", "mean"]))  # fmt: skip
def test_heavy_hitters_are_the_algorithm_s(budget, recent, length, kv_heads, score):
    h2o_is_the_paper_s(budget, min(recent, budget), length, kv_heads=kv_heads, score=score)


def what_was_taken_back_counts_nothing(back=5, score="sum"):
    """Who got how much, and who is there, is as if those had never been fed."""
    model, ids = decoder(), text(40, rows=2)
    one, other = H2OCache(model.rope, 7, 3, score), H2OCache(model.rope, 7, 3, score)
    chunked(model, one, ids, [9, 20, 1])
    one.truncate(40 - back)
    chunked(model, other, ids[:, : 40 - back], [12])
    for layer in range(2):
        lives = [{} for _ in range(2)]
        for cache, life in zip((one, other), lives, strict=True):
            got = cache.got[layer]
            for place in (got.died == evict.NEVER).nonzero().tolist():
                life[(*place[:2], got.born[tuple(place)].item())] = (got.mass + got.given.sum(2))[tuple(place)].item()
        assert lives[0] == pytest.approx(lives[1], abs=1e-9) and len(lives[0]) == 2 * 2 * 8


@pytest.mark.parametrize("back", [0, 1, 5, BACK])
@pytest.mark.parametrize("score", ["sum", "mean"])
def test_what_was_taken_back_counts_nothing(back, score):
    what_was_taken_back_counts_nothing(back, score)


def test_where_all_of_the_budget_is_recent_it_is_a_sliding_window():
    model, ids = decoder(), text(40, rows=2)
    window = chunked(model, WindowCache(model.rope, 8, 0), ids, [7])
    assert_equal_logits(chunked(model, H2OCache(model.rope, 7, 7), ids, [20, 1]), window)


# SnapKV


def snapped(prompt, budget, window, kernel):
    """What the prompt's last tokens vote for, counted one by one."""

    def who(q, k):
        stay, shared = {}, q.shape[1] // k.shape[1]
        for row in range(k.shape[0]):
            for group in range(k.shape[1]):
                got = [0.0] * prompt
                for head in range(group * shared, (group + 1) * shared):
                    for query in range(prompt - window, prompt):
                        scores = k[row, group, : query + 1] @ q[row, head, query] / math.sqrt(q.shape[3])
                        for token, part in enumerate(scores.softmax(0).tolist()):
                            got[token] += part
                rest, half = prompt - window, kernel // 2
                smooth = [sum(got[max(0, t - half) : min(rest, t + half + 1)]) for t in range(rest)]
                best = sorted(range(rest), key=lambda t: -smooth[t])[: budget - window]
                stay[row, group] = sorted([*best, *range(rest, prompt)])
        after = lambda row, group, query: [*stay[row, group], *range(prompt, query + 1)]  # noqa: E731
        return lambda row, group, query: list(range(query + 1)) if query < prompt else after(row, group, query)

    return lambda model: Chosen(model.rope, who)


def snapkv_is_the_paper_s(prompt=16, budget=7, window=3, kernel=3, length=24, kv_heads=2):
    model, ids = decoder(kv_heads=kv_heads), text(length, rows=2)
    with torch.no_grad():
        wanted = model(ids, snapped(prompt, budget, window, kernel)(model))
    seen = chunked(model, SnapKVCache(model.rope, budget, window, kernel), ids, [prompt, 3, 1])
    assert_equal_logits(seen, wanted)


@pytest.mark.slow
@settings(max_examples=10)
@given(prompt=st.integers(8, 16), budget=st.integers(3, 7), window=st.integers(1, 2), kernel=st.sampled_from([1, 3, 5]),
       kv_heads=st.sampled_from([1, 2, 4]))  # fmt: skip
def test_a_prompt_keeps_what_its_last_tokens_vote_for(prompt, budget, window, kernel, kv_heads):
    snapkv_is_the_paper_s(prompt, budget, window, kernel, kv_heads=kv_heads)


def test_votes_by_hand():
    """Four tokens with keys log 1, log 2, log 5 and log 2, the last one votes: of ten parts 1, 2 and 5 go to the others."""
    k = torch.tensor([1.0, 2.0, 5.0, 2.0]).log().reshape(1, 1, 4, 1)
    assert votes(torch.ones(1, 1, 1, 1), k, kernel=1).flatten().tolist() == pytest.approx([0.1, 0.2, 0.5])
    assert votes(torch.ones(1, 1, 1, 1), k, kernel=3).flatten().tolist() == pytest.approx([0.1, 0.8 / 3, 0.7 / 3])


@torch.no_grad()
@pytest.mark.parametrize("take_back", [lambda cache, n: cache.truncate(n), lambda cache, n: cache.keep(torch.arange(n))])
@pytest.mark.parametrize("stay", [1, 8, 10])
def test_of_a_first_pass_that_is_partly_taken_back_the_rest_stays_whole(take_back, stay):
    model, ids = decoder(), text(30)
    cache = SnapKVCache(model.rope, 6, 2, 3)
    model(ids[:, :11], cache)
    take_back(cache, stay)
    assert_equal_logits(chunked(model, cache, ids, [1, 4]), model(ids)[:, stay:])
    assert cache.least() == 0 and cache.keys[0].shape[2] == 30


@torch.no_grad()
def test_a_first_pass_of_which_all_is_kept_is_a_prompt():
    model, ids = decoder(), text(30)
    cache, wanted = SnapKVCache(model.rope, 6, 2, 3), chunked(model, SnapKVCache(model.rope, 6, 2, 3), ids, [11])
    model(ids[:, :11], cache)
    cache.keep(torch.arange(11)), cache.truncate(11)
    assert_equal_logits(chunked(model, cache, ids, [1, 4]), wanted[:, 11:])
    assert cache.least() == 11 and cache.keys[0].shape[2] == 6 + 19


def test_a_draft_behind_a_single_token_is_taken_back():
    """The first pass is then the token and all that was proposed."""
    model = SnapKV(4, 2)(decoder())
    for seed in range(3):
        wanted = model.generate(text(1, seed=seed), 20, temperature=0.0)
        assert torch.equal(Speculative(EarlyExit(0.5), gamma=8)(model).generate(text(1, seed=seed), 20, temperature=0.0), wanted)


@torch.no_grad()
def test_more_than_may_be_taken_back_is_refused_before_anything_changed():
    model, ids = decoder(), text(60)
    cache, beside = H2OCache(model.rope, 7, 3), H2OCache(model.rope, 7, 3)
    chunked(model, cache, ids[:, :50], [9]), chunked(model, beside, ids[:, :50], [9])
    with pytest.raises(ValueError, match="can be taken back to 34 tokens and not to 11, .*: feed the text to a new one; a draft of up to 16"):
        cache.keep(torch.arange(2))
    assert_equal_logits(chunked(model, cache, ids, [1]), chunked(model, beside, ids, [1]))


# budgets


@pytest.mark.slow
@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=9), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_more_is_held_than_the_budget_and_the_last_pass(sizes, dtype):
    model, last = decoder(dtype=dtype), sizes[-1]
    number = 2 * 2 * 4 * dtype.itemsize  # keys and values, two heads of four numbers
    held = {
        WindowCache(model.rope, 8, 2): 2 + 8 + BACK - 1 + last,
        H2OCache(model.rope, 7, 3): 7 + 1 + BACK + last,
        SnapKVCache(model.rope, 6, 2, 3): (sizes[0] if sizes[0] < 6 else 6) + sum(sizes[1:]),
    }
    for cache, most in held.items():
        chunked(model, cache, text(sum(sizes)), sizes)
        tokens = cache.keys[0].shape[2]
        assert tokens <= most and [k.shape for k in cache.keys + cache.values] == [cache.keys[0].shape] * 4
        own = sum(g.mass.numel() * 20 + g.given.numel() * 4 for g in cache.got.values()) if hasattr(cache, "got") else 0
        assert cache.nbytes() == 2 * tokens * number + own


def test_what_was_thrown_away_is_not_held_on_to():
    """A slice of a large tensor would keep all of it alive."""
    model = decoder()
    for cache in (WindowCache(model.rope, 8, 2), H2OCache(model.rope, 7, 3), SnapKVCache(model.rope, 6, 2, 3)):
        chunked(model, cache, text(90), [80, 5])
        kept = [*cache.keys, *cache.values, *(g.given for g in getattr(cache, "got", {}).values())]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in kept), type(cache).__name__


# a real model


def looked_at(model, ids, budget, score="mean") -> float:
    """The share of its attention, had nothing been thrown away, that a query gives to tokens that stayed; mean over layers,
    heads, and queries that come after the budget."""
    shares = []

    def watch(scores, seen, right=lossy.weights):
        if scores.shape[-2] == 1:
            past = torch.arange(scores.shape[-1]) <= seen.nonzero()[:, -1].max()
            shares.append((right(scores, past) * seen).sum(-1).mean().item())
        return right(scores, seen)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(evict, "weights", watch)
        model(ids, H2OCache(model.rope, budget, budget // 4, score))
    return sum(shares) / len(shares)


def at_random(mass):
    """The control: anybody goes who has not gone yet."""
    return torch.rand(mass.shape).masked_fill(mass.isinf(), 2.0).argmin(-1, keepdim=True)


def trained() -> tuple:
    path = data_dir() / "gpt-small.safetensors"  # zoo.load would also read the whole standard library
    if not path.exists():
        pytest.skip("gpt-small is not here: effkit train gpt-small")
    ids = zoo.tokenizer("gpt-small").encode(Path(evict.__file__).read_text()).ids
    return effkit.load(path).float(), torch.tensor([ids[:400]])


@pytest.mark.slow
def test_heavy_hitters_keep_more_attention_than_chance_does(monkeypatch):
    """In the mean. By their sums they don't on gpt-small: who came first wins, and it looks at what is near."""
    model, ids = trained()
    mean, total = (looked_at(model, ids, 32, score) for score in ("mean", "sum"))
    monkeypatch.setattr(evict, "victim", at_random)
    chance = looked_at(model, ids, 32)
    assert mean > chance + 0.04 and mean > total + 0.04, (mean, total, chance)


@pytest.fixture(scope="module")
def real():
    model, task = zoo.load("smollm2")
    return model, task.test.ids[None, :513]


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_gives_its_first_token_much_of_its_attention(real):
    """In the layers from the twelfth on a quarter to six tenths of it, whatever that token says: a sink."""
    model, ids = real
    cache = H2OCache(model.rope, budget=600, recent=1)  # which counts what each token got, and throws nothing away
    with torch.no_grad():
        model(ids, cache)
    heads = model.config.heads / model.config.kv_heads * ids.shape[1]
    share = [((got.mass[..., 0] + got.given[..., 0].sum(2)).mean() / heads).item() for got in cache.got.values()]
    assert len(share) == 30 and min(share[12:]) > 0.2 and 0.4 < max(share[12:]) < 0.7 and min(share) < 0.05, share


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_misses_the_sinks_alone(real):
    """A window of 256 costs much without them, and with them no more than reading the last 256 tokens anew for every token."""
    model, ids = real
    places = torch.arange(400, 448)
    right = ids[0, places + 1, None]
    nats = lambda logits: -logits.float().log_softmax(-1).gather(1, right)  # noqa: E731
    with torch.no_grad():
        ways = {"exact": model, "sinks": Through(Window(252, 4)(model)), "none": Through(Window(256, 0)(model))}
        lost = {name: nats(way(ids[:, :449])[0, places]) for name, way in ways.items()}
        anew = torch.stack([ids[0, at - 255 : at + 1] for at in places.tolist()])
        lost["anew"] = nats(torch.cat([model(part)[:, -1] for part in anew.split(8)]))
    added = {name: (each - lost["exact"]).mean().item() for name, each in lost.items()}
    assert added["none"] > 0.3 > abs(added["sinks"] - added["anew"]) + 0.15, added


# techniques


@pytest.mark.parametrize("technique", [Window(8, 2), H2O(8, 2), SnapKV(8, 2, 3)], ids=repr)
def test_a_technique_sets_the_cache_and_a_file_remembers(technique, tmp_path):
    model, ids = decoder(), text(40)
    result = technique(model)
    assert type(result.new_cache(capacity=1)) is technique.kind and technique.claim(result).value == 8 + 2 * isinstance(technique, Window)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert torch.equal(opened.generate(ids, 20, temperature=0.0), result.generate(ids, 20, temperature=0.0))
    assert type(Preallocated()(result).new_cache(capacity=1)) is not technique.kind


def test_kinds_are_found_by_name_however_they_descend_and_others_are_refused(monkeypatch):
    monkeypatch.setattr(lossy.LossyCache, "kinds", dict(lossy.LossyCache.kinds))

    class Narrow(WindowCache):
        pass

    model = decoder()
    assert type(Keeping("Narrow", {"window": 8, "sinks": 2}).new(model, capacity=1)) is Narrow
    with pytest.raises(ValueError, match="kind must be one of .*'WindowCache'.*, got 'Wide': import the module that defines it"):
        Keeping("Wide", {}).new(model, capacity=1)


def test_a_text_is_scored_through_the_cache():
    model, ids = decoder(), text(40, rows=2)
    seen = Through(Window(8, 2)(model))(ids)
    assert_equal_logits(seen, chunked(model, WindowCache(model.rope, 8, 2), ids, [1] * 40))
    assert_equal_logits(Through(SnapKV(6, 2)(model), first=30)(ids), chunked(model, SnapKVCache(model.rope, 6, 2, 7), ids, [30, 3]))
    assert_equal_logits(Through(model)(ids), model(ids))
    assert_equal_logits(Through(model, first=99)(ids), model(ids))


@pytest.mark.parametrize("bad, match", [
    (lambda: Window(window=0), "window must be a whole number, at least 1, got 0: a token sees itself"),
    (lambda: Window(sinks=-1), "sinks must be a whole number, at least 0, got -1: 0 is a plain sliding window"),
    (lambda: H2O(budget=4, recent=5), "recent must be a whole number from 0 to 4, got 5: the newest are a part of the budget"),
    (lambda: SnapKV(budget=8, window=8), "window must be a whole number from 1 to 7, got 8"),
    (lambda: SnapKV(kernel=4), "kernel must be odd, got 4: .*; take 5"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_with_the_way_out(bad, match):
    with pytest.raises(ValueError, match=match):
        bad()


# planted bugs


def near_for_all(self, n, parents=None, *, device=None, dtype=torch.float32, right=WindowCache.advance):
    positions = right(self, n, parents, device=device, dtype=dtype)
    self.near = self.tables
    return positions


def one_more_goes(self, n, parents=None, *, device=None, dtype=torch.float32, right=WindowCache.advance):
    self.window -= 1
    positions = right(self, n, parents, device=device, dtype=dtype)
    self.window += 1
    return positions


def by_kept_columns(self, n, parents=None, *, device=None, dtype=torch.float32, right=H2OCache.advance):
    """Positions counted in the cache, where the text's are meant."""
    positions = right(self, n, parents, device=device, dtype=dtype)
    held = self.keys[0].shape[2] if self.keys else 0
    self.tables = self.rope.tables(held + torch.arange(n), dtype)
    return positions


def of_the_first_head(q, k, *, kernel, right=votes):
    return right(q, k, kernel=kernel)[:, :1].expand(-1, k.shape[1], -1)


@pytest.mark.parametrize(
    "where, name, bug, law",
    [
        (WindowCache, "advance", near_for_all, window_is_the_paper_s),
        (WindowCache, "advance", one_more_goes, window_is_the_paper_s),
        (evict, "victim", lambda mass: mass.masked_fill(mass.isinf(), -1.0).argmax(-1, keepdim=True), h2o_is_the_paper_s),
        (evict, "victim", at_random, h2o_is_the_paper_s),
        (H2OCache, "advance", by_kept_columns, h2o_is_the_paper_s),
        (evict, "votes", of_the_first_head, snapkv_is_the_paper_s),
        (evict, "votes", lambda q, k, *, kernel: votes(q[:, :, -1:], k, kernel=kernel)[..., : k.shape[2] - q.shape[2]], snapkv_is_the_paper_s),
    ],
)
def test_a_cache_that_keeps_others_is_noticed(monkeypatch, where, name, bug, law):
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, RuntimeError)):
        law()


def cut_that_forgets_who_came_back(self, gone, right=H2OCache.cut):
    died = {layer: got.died for layer, got in self.got.items()}
    right(self, gone)
    for layer, got in self.got.items():
        got.died = died[layer][..., : got.mass.shape[2]]


def cut_that_keeps_what_was_given(self, gone, right=H2OCache.cut):
    for got in self.got.values():
        got.mass, got.given = got.mass + got.given.sum(2), got.given * 0
    right(self, gone)


@pytest.mark.parametrize("bug", [cut_that_forgets_who_came_back, cut_that_keeps_what_was_given])
def test_heavy_hitters_taken_back_wrongly_are_noticed(monkeypatch, bug):
    monkeypatch.setattr(H2OCache, "cut", bug)
    with pytest.raises(AssertionError):
        what_was_taken_back_counts_nothing()


def test_a_window_taken_back_too_far_is_noticed(monkeypatch):
    monkeypatch.setattr(WindowCache, "least", lambda self: 0)
    with pytest.raises(AssertionError):
        laws.what_a_draft_takes_back_leaves_no_trace(lambda model, capacity: WindowCache(model.rope, 8, 2), back=25)


def test_eviction_inside_a_pass_is_noticed(monkeypatch):
    """What the last query no longer sees, hidden from all of them."""
    right = WindowCache.advance

    def inside(self, n, parents=None, *, device=None, dtype=torch.float32):
        positions = right(self, n, parents, device=device, dtype=dtype)
        self.mask = self.mask & (self.mask[-1:] | (self.at >= self.length - n))
        return positions

    monkeypatch.setattr(WindowCache, "advance", inside)
    with pytest.raises(AssertionError):
        laws.passes_do_not_matter(lambda model, capacity: WindowCache(model.rope, 8, 2))
