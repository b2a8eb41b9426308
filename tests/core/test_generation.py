"""From logits to text: the sampler's distributions, the loop, rotary positions, and what every cache must hold to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import effkit
from effkit.core.generation import ConcatCache, NoCache, Rope, Sampler, attention, generate, sample
from tests.caching.decoders import assert_equal_logits, chunked, decoder, text

GREEDY = Sampler(temperature=0.0)
logits = st.lists(st.floats(-8, 8), min_size=2, max_size=12).map(lambda x: torch.tensor(x, dtype=torch.float64))
temperatures = st.floats(0.1, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# the sampler


@given(logits, temperatures)
def test_probabilities_are_the_softmax_of_scaled_logits(x, t):
    p = Sampler(temperature=t).probabilities(x)
    assert p.dtype == torch.float64 and torch.allclose(p, (x / t).softmax(-1)) and float(p.sum()) == pytest.approx(1)


@given(logits)
def test_temperature_zero_is_the_limit_of_small_ones(x):
    top = x.topk(2).values
    greedy = GREEDY.probabilities(x)
    assert sorted(greedy.tolist())[-1] == 1 and greedy.sum() == 1 and greedy.argmax() == x.argmax()
    if top[0] - top[1] > 0.1:
        assert torch.allclose(Sampler(temperature=1e-3).probabilities(x), greedy)


@given(logits, st.integers(1, 15))
def test_top_k_keeps_the_k_most_probable_in_proportion(x, k):
    plain, p = Sampler().probabilities(x), Sampler(top_k=k).probabilities(x)
    kept = p > 0
    assert min(k, len(x)) <= kept.sum() or (plain > 0).sum() < k  # ties stay together
    assert plain[kept].min() >= plain[~kept].max() if (~kept).any() else True
    assert torch.allclose(p, torch.where(kept, plain, 0.0) / plain[kept].sum())


@given(logits, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_with_that_mass(x, top_p):
    plain, p = Sampler().probabilities(x), Sampler(top_p=top_p).probabilities(x)
    kept = p > 0
    assert float(p.sum()) == pytest.approx(1)
    assert plain[kept].sum() >= top_p - 1e-9
    assert kept.sum() == 1 or plain[kept].sum() - plain[kept].min() < top_p + 1e-9
    assert torch.allclose(p[kept], plain[kept] / plain[kept].sum())


def test_top_p_by_hand():
    x = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert Sampler(top_p=0.7).probabilities(x).tolist() == pytest.approx([0.625, 0.375, 0, 0])


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.5), Sampler(top_k=3), Sampler(top_p=0.8)])
def test_draws_follow_the_probabilities(sampler):
    x = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)
    p = sampler.probabilities(x)
    drawn = torch.bincount(sampler.draw(x.expand(20_000, 5), seeded()), minlength=5)
    possible = p > 0
    assert drawn[~possible].sum() == 0
    wanted = p[possible].double()
    assert chisquare(drawn[possible], 20_000 * wanted / wanted.sum()).pvalue > 1e-3


def test_sample_keeps_the_shape_of_what_it_draws_from():
    assert sample(torch.ones(2, 3, 5) / 5, seeded()).shape == (2, 3)
    assert sample(torch.ones(5) / 5, seeded()).shape == ()


@pytest.mark.parametrize(
    "bad, said",
    [
        (dict(temperature=-0.1), r"temperature must be a number in \[0.0, inf\), got -0.1: 0 is greedy"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(top_k=0), "top_k must be a whole number, at least 1"),
        (dict(top_p=0.0), r"top_p must be a number in \(0.0, 1.0\]"),
        (dict(top_p=1.5), "top_p must be"),
    ],
)
def test_impossible_samplers_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        Sampler(**bad)


# the loop


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_greedy_text_is_the_most_probable_token_again_and_again(dtype):
    model, ids = decoder(dtype=dtype), text(5, rows=2)
    made = generate(model, ids, 10, sampler=GREEDY)
    assert torch.equal(made[:, :5], ids)
    for end in range(5, 15):
        cache = model.new_cache(capacity=end)  # in bfloat16 a block and single tokens round differently
        with torch.no_grad():
            chunks = [model(made[:, a:b], cache) for a, b in [(0, 5), *((i, i + 1) for i in range(5, end))]]
        assert torch.equal(made[:, end], chunks[-1][:, -1].argmax(-1))


def test_two_tokens_are_distributed_as_the_chain_rule_says():
    model, ids = decoder(vocab_size=3), text(2, vocab=3)
    with torch.no_grad():
        first = model(ids)[0, -1].softmax(-1)
        second = torch.stack([model(torch.cat((ids, torch.tensor([[x]])), 1))[0, -1].softmax(-1) for x in range(3)])
    wanted = (first[:, None] * second).flatten()
    made = generate(model, ids.expand(4000, -1), 2, rng=seeded())[:, 2:]
    counts = torch.bincount(made[:, 0] * 3 + made[:, 1], minlength=9)
    assert chisquare(counts, 4000 * wanted).pvalue > 1e-3


def test_same_generator_same_text_and_greedy_draws_nothing():
    model, ids = decoder(), text(4)
    assert torch.equal(generate(model, ids, 12, rng=seeded(5)), generate(model, ids, 12, rng=seeded(5)))
    assert not torch.equal(generate(model, ids, 12, rng=seeded(5)), generate(model, ids, 12, rng=seeded(6)))
    before = torch.get_rng_state()
    generate(model, ids, 12, sampler=GREEDY)
    assert torch.equal(before, torch.get_rng_state())


def test_a_stop_token_ends_a_row_and_all_together_end_the_text():
    model, ids = decoder(), text(4, rows=3)
    free = generate(model, ids, 20, sampler=GREEDY)
    stop = {int(free[0, 7]), int(free[1, 9])}
    made = generate(model, ids, 20, sampler=GREEDY, stop=stop)
    for row, whole in zip(made, free, strict=True):
        hits = [i for i in range(4, 24) if int(whole[i]) in stop]
        end = hits[0] + 1 if hits else 24
        assert torch.equal(row[: min(end, len(row))], whole[: min(end, len(row))])
        assert (row[end:] == whole[end - 1]).all()
    one = generate(model, ids[:1], 20, sampler=GREEDY, stop=int(free[0, 7]))
    assert one[0, -1] == free[0, 7] and int((one[0, 4:] == free[0, 7]).sum()) == 1


@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens_are_as_many_as_asked_for(n):
    assert generate(decoder(), text(3), n).shape == (1, 3 + n)


@pytest.mark.parametrize(
    "ids, new, said",
    [
        (torch.zeros(1, 0, dtype=torch.long), 3, "at least one token, got"),
        (torch.zeros(4, dtype=torch.long), 3, r"\(batch, tokens\)"),
        (text(120), 9, "120 tokens and 9 new ones exceed the model's context of 128; shorten"),
        (text(3), -1, "max_new_tokens must be a whole number, at least 0"),
        (text(3), 2.5, "max_new_tokens must be a whole number"),
    ],
)
def test_impossible_prompts_are_refused(ids, new, said):
    with pytest.raises(ValueError, match=said):
        generate(decoder(), ids, new)


# positions and attention


@given(st.integers(0, 2000), st.integers(0, 60), st.sampled_from([10_000.0, 100_000.0, 500.0]))
def test_rotated_products_depend_on_the_distance_alone(start, distance, theta):
    rope, (q, k) = Rope(16, theta), torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=seeded())

    def score(at_q: int, at_k: int) -> float:
        tables = [rope.tables(torch.tensor([at]), torch.float64) for at in (at_q, at_k)]
        return float((rope(q, tables[0]) * rope(k, tables[1])).sum())

    assert score(start + distance, start) == pytest.approx(score(distance, 0), abs=1e-9)


def test_angles_survive_bfloat16():
    cos, _ = Rope(16).tables(torch.tensor([1001]), torch.bfloat16)
    assert float(cos[0, 0]) == pytest.approx(float(torch.tensor(1001.0).cos()), abs=0.004)


@settings(max_examples=30)
@given(n=st.integers(1, 6), past=st.integers(0, 6), groups=st.sampled_from([1, 2, 4]))
def test_attention_is_the_textbook_s(n, past, groups):
    """softmax(q k^T / sqrt(d)) v over the keys up to each query's own; query head h reads key head h * groups // 4."""
    rng, m = seeded(), n + past
    q = torch.randn(2, 4, n, 8, dtype=torch.float64, generator=rng)
    k, v = torch.randn(2, 2, groups, m, 8, dtype=torch.float64, generator=rng)
    scores = q @ k.repeat_interleave(4 // groups, 1).mT / 8**0.5
    later = torch.arange(m)[None] > past + torch.arange(n)[:, None]
    wanted = scores.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(4 // groups, 1)
    assert torch.allclose(attention(q, k, v), wanted, atol=1e-12)


# caches that core brings; those of chapter 07 are held to the same in tests/caching


@pytest.mark.parametrize("kind", [NoCache, ConcatCache])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pass_is_fed_what_its_cache_lacks(kind, dtype):
    model, ids = decoder(dtype=dtype), text(9)
    cache = kind(model.rope)
    with torch.no_grad():
        for end in (4, 5, 9):
            seen = model(ids[:, cache.length : end], cache)
            assert_equal_logits(seen[:, -1], model(ids[:, :end])[:, -1])
    assert cache.length == (0 if kind is NoCache else 9)
    assert (cache.nbytes() == 0) == (kind is NoCache)


def test_concatenation_holds_what_was_fed_and_no_more():
    model = decoder()
    cache = model.new_cache(capacity=99)
    chunked(model, cache, text(10), [3])
    assert cache.nbytes() == 2 * 2 * 2 * 4 * 10 * 8  # k and v, layers, heads, head_dim, tokens, bytes
    cache.truncate(4)
    assert cache.length == 4


def test_the_model_generates_by_its_decoding():
    model, ids = decoder(), text(4)
    assert torch.equal(model.generate(ids, 6, sampler=GREEDY), effkit.generate(model, ids, 6, sampler=GREEDY))


def test_a_samplers_settings_may_be_said_directly():
    model, ids = decoder(), text(4)
    drawn = lambda **settings: model.generate(ids, 8, rng=torch.Generator().manual_seed(5), **settings)  # noqa: E731
    assert torch.equal(model.generate(ids, 8, temperature=0), model.generate(ids, 8, sampler=GREEDY))
    assert torch.equal(drawn(temperature=0.5, top_k=3), drawn(sampler=Sampler(0.5, top_k=3)))
    assert torch.equal(drawn(top_p=0.3, sampler=Sampler(0.5, top_k=3)), drawn(sampler=Sampler(0.5, 3, 0.3)))
    assert not torch.equal(drawn(temperature=0.5), drawn(temperature=2.0))
    with pytest.raises(ValueError, match="temperature must be.*0 is greedy"):
        model.generate(ids, 8, temperature=-1.0)
    with pytest.raises(TypeError, match="do_sample"):
        model.generate(ids, 8, do_sample=True)


# planted bugs


def test_a_sampler_that_keeps_too_many_is_noticed(monkeypatch):
    def generous(p, top_p):
        ordered, index = p.sort(dim=-1, descending=True)
        kept = torch.where(ordered.cumsum(-1) - ordered < min(1.0, top_p + 0.2), ordered, 0.0)
        kept = torch.zeros_like(p).scatter(-1, index, kept)
        return kept / kept.sum(-1, keepdim=True)

    monkeypatch.setattr("effkit.core.generation.nucleus", generous)
    with pytest.raises(AssertionError):
        test_top_p_by_hand()


def test_forgotten_tokens_are_noticed(monkeypatch):
    monkeypatch.setattr(
        ConcatCache,
        "attend",
        lambda self, layer, q, k, v: attention(self.rope(q, self.tables), self.rope(k, self.tables), v),
    )
    with pytest.raises(AssertionError):
        test_a_pass_is_fed_what_its_cache_lacks(ConcatCache, torch.float64)
