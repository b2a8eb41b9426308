"""Several texts in one pass: each as if it were written alone, token for token, and independent of the others, by enumeration
and by chi-square; rows that end early; caches that hold rows of unequal length, and those that do not."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit.caching import Fused, Paged, Preallocated, Recompute
from effkit.core import generation, native
from effkit.core.generation import Sampler, generate
from effkit.speculative import EarlyExit, batch
from effkit.speculative import speculate as guessing
from effkit.speculative.batch import batch_passes, speculative_batch
from effkit.speculative.law import statistics
from effkit.speculative.speculate import DraftModel, speculate
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned
from tests.speculative.worlds import enumerated, goodness, joint, largest_gap

GREEDY = Sampler(temperature=0.0)
SAMPLERS = {"plain": Sampler(), "cold": Sampler(temperature=0.4), "top-k": Sampler(top_k=2), "nucleus": Sampler(temperature=1.3, top_p=0.8)}
CACHES = {"preallocated": Preallocated(), "fused": Fused(), "paged": Paged(page_size=4)}


def tiny(seed: int, sharpness: float = 10.0):
    small = decoder(seed, sharpness=sharpness, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8)
    return Preallocated()(small)


def alone(model, prompt, new, stop=None):
    return generate(model, prompt[None], new, sampler=GREEDY, stop=stop)[0]


def assert_as_alone(model, draft, prompts, new, gamma=4, stop=None):
    made = speculative_batch(model, draft, prompts, new, gamma=gamma, sampler=GREEDY, stop=stop)
    assert len(made) == len(prompts)
    for row, prompt in zip(made, prompts, strict=True):
        assert torch.equal(row, alone(model, prompt, new, stop))


# greedy


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]), cache=st.sampled_from(list(CACHES)))
def test_every_text_is_what_it_is_alone(data, dtype, cache):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    prompts = [text(n, seed=seed)[0] for seed, n in enumerate(lengths)]
    model = CACHES[cache](decoder(0, dtype))
    draft = data.draw(st.sampled_from([model, EarlyExit(0.5)(model), Preallocated()(decoder(1, dtype)), Preallocated()(decoder(0, dtype, 6.0))]))
    new, gamma = data.draw(st.integers(0, 16)), data.draw(st.integers(1, 8))
    words = torch.cat([alone(model, prompt, new) for prompt in prompts]).tolist()
    assert_as_alone(model, draft, prompts, new, gamma, data.draw(st.sampled_from([None, *words])))


@pytest.mark.slow
@pytest.mark.parametrize("gamma", range(1, 9))
@pytest.mark.parametrize("cache", CACHES)
def test_rows_of_one_length_that_accept_different_numbers_of_tokens(gamma, cache):
    model = CACHES[cache](decoder(11, sharpness=20.0))
    draft, ids = Preallocated()(decoder(11, sharpness=19.0)), text(4, rows=4)
    assert_as_alone(model, draft, ids, 30, gamma)
    given = [{row: len(step.tokens) for row, step in each.items()} for each in batch_passes(model, draft, ids, 30, gamma=gamma, sampler=GREEDY)]
    assert any(len(set(each.values())) > 1 for each in given)


def test_it_needs_as_many_passes_as_the_slowest_text_alone():
    model = Preallocated()(decoder(11, sharpness=20.0))
    draft, ids = Preallocated()(decoder(11, sharpness=19.0)), text(4, rows=4)
    together = list(batch_passes(model, draft, ids, 30, sampler=GREEDY))
    for row in range(4):
        steps = list(speculate(model, DraftModel(draft, capacity=34), ids[row : row + 1], 30, sampler=GREEDY))
        assert statistics(steps) == statistics(each[row] for each in together if row in each)
    assert len(together) == max(sum(row in each for each in together) for row in range(4))


def test_as_in_generate_but_for_what_follows_a_stop():
    model, ids = Preallocated()(learned(torch.float64)), torch.stack([cyclic(30)[i : i + 6] for i in (0, 3, 9)])
    stop = int(generate(model, ids, 20, sampler=GREEDY)[1, 15])
    whole = generate(model, ids, 20, sampler=GREEDY, stop=stop)
    made = speculative_batch(model, EarlyExit(0.5)(model), ids, 20, sampler=GREEDY, stop=stop)
    assert len({len(row) for row in made}) > 1, "rows end at different times"
    for row, wanted in zip(made, whole, strict=True):
        assert torch.equal(row, wanted[: len(row)]) and (wanted[len(row) :] == stop).all()


def test_nothing_is_fed_beyond_the_end_of_the_context():
    """To the last place of the context, with rows that end far apart, and proposals as long as they may be."""
    model, fed = Preallocated()(decoder(context=24)), []
    draft = Preallocated()(decoder(1, context=24))
    for part in (model, draft):
        part.register_forward_hook(lambda module, inputs, output: fed.append(int(inputs[1].positions.max())))
    prompts = [text(n, seed=n)[0] for n in (12, 2, 7)]
    made = speculative_batch(model, draft, prompts, 12, gamma=8, sampler=GREEDY)
    assert max(fed) <= 23 and [len(row) for row in made] == [24, 14, 19]
    for row, prompt in zip(made, prompts, strict=True):
        assert torch.equal(row, alone(model, prompt, 12))


# sampling


def gap(sampler=SAMPLERS["plain"], new=2, gamma=2, lengths=(3, 3), stop=None) -> float:
    """Of the joint distribution of two texts from the product of what each is alone."""
    target, draft = tiny(0), tiny(1)
    prompts = [text(n, vocab=3, seed=n)[0] for n in lengths]

    def program() -> tuple:
        made = speculative_batch(target, draft, prompts, new, gamma=gamma, sampler=sampler, stop=stop)
        return tuple(tuple(row[len(prompt) :].tolist()) for row, prompt in zip(made, prompts, strict=True))

    outcome = enumerated(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    one, two = (joint(target, prompt[None], new, sampler, stop) for prompt in prompts)
    return largest_gap(outcome, {(a, b): p * q for a, p in one.items() for b, q in two.items()})


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["plain", "top-k"])
def test_the_joint_of_two_texts_is_the_product_of_theirs_by_enumeration(sampler):
    assert gap(SAMPLERS[sampler]) < 1e-9


@pytest.mark.slow
def test_with_prompts_of_unequal_length_and_a_stop():
    assert gap(SAMPLERS["top-k"], lengths=(1, 4)) < 1e-9 and gap(SAMPLERS["cold"], gamma=1, lengths=(2, 3), stop=1) < 1e-9


def p_value(n=400, seed=0) -> float:
    """Of two texts at once: 81 pairs of two tokens each."""
    target, draft = tiny(0, 5.0), tiny(1, 5.0)
    prompts, rng, sampler = text(3, vocab=3, rows=2), torch.Generator().manual_seed(seed), Sampler(temperature=1.5)
    made = Counter()
    for _ in range(n):
        rows = speculative_batch(target, draft, prompts, 2, gamma=2, sampler=sampler, rng=rng)
        made[tuple(torch.cat([row[3:] for row in rows]).tolist())] += 1
    one, two = (joint(target, prompt[None], 2, sampler) for prompt in prompts)
    return goodness(made, {(*a, *b): p * q for a, p in one.items() for b, q in two.items()}, n)


@pytest.mark.slow
def test_the_joint_of_two_texts_is_the_product_of_theirs_by_chi_square():
    assert p_value() > 1e-3


def shared_draws(p, rng):
    """The rows' draws from one random number, as a batch with one seed a row would have them."""
    u = torch.rand(1, generator=rng, dtype=p.dtype)
    return (p.cumsum(-1) < u).sum(-1).clamp(max=p.shape[-1] - 1)


@pytest.mark.slow
def test_rows_that_share_their_coins_are_refused(monkeypatch):
    """Each text alone is right; together they are not independent. Where every proposal is accepted, draws are all there is."""
    target = tiny(0, 5.0)
    prompts, rng, made = text(3, vocab=3).repeat(2, 1), torch.Generator().manual_seed(0), Counter()
    monkeypatch.setattr(guessing, "sample", shared_draws)
    for _ in range(300):
        rows = speculative_batch(target, target, prompts, 2, gamma=1, rng=rng)
        made[tuple(int(row[3]) for row in rows)] += 1
    one = joint(target, prompts[:1], 1, Sampler())
    assert goodness(made, {(*a, *b): p * q for a, p in one.items() for b, q in one.items()}, 300) < 1e-6


# planted bugs


right_truncate = generation.Cache.truncate
right_read = batch.read


def back_to_the_shortest(self, n):
    right_truncate(self, int(n.min()) if isinstance(n, torch.Tensor) and self.length > 6 else n)


PLANTED = {
    "rows taken back as far as the shortest": (generation.Cache, "truncate", back_to_the_shortest),
    "places of the longest row for all": (generation, "visible", lambda positions, held, ancestors=None: None),
    "nothing taken back": (generation.Cache, "truncate", lambda self, n: None if self.length > 6 else right_truncate(self, n)),
}


@pytest.mark.parametrize("where, name, bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_is_noticed(monkeypatch, where, name, bug):
    model = Preallocated()(decoder(11, sharpness=20.0))
    draft, ids = Preallocated()(decoder(11, sharpness=19.0)), text(4, rows=4)
    wanted = [alone(model, prompt, 30) for prompt in ids]
    monkeypatch.setattr(where, name, bug)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        for row, right in zip(speculative_batch(model, draft, ids, 30, sampler=GREEDY), wanted, strict=True):
            assert torch.equal(row, right)


def test_a_draft_that_has_not_read_what_was_accepted_gives_fewer_tokens(monkeypatch):
    """Its own cache: the text is right whatever the draft says, so it shows in the number of passes."""
    model, ids = Preallocated()(decoder(11, sharpness=20.0)), text(4, rows=2)

    def count() -> int:
        return len(list(batch_passes(model, model, ids, 40, sampler=GREEDY)))

    assert count() == 8
    monkeypatch.setattr(batch, "read", lambda model, texts, tail, tokens, cache: right_read(model, texts, 1, tokens, cache))
    assert count() > 8


@pytest.mark.skipif(native.compiler() is None, reason="there is no C compiler")
def test_in_bfloat16_fused_rows_are_what_each_would_be_alone():
    """Rows fall apart in length, and each is summed up as if it were alone: the same bits, so the same greedy text."""
    model = Fused()(decoder(0, torch.bfloat16, sharpness=4.0))
    prompts = [text(n, seed=n)[0] for n in (3, 9, 5)]
    made = speculative_batch(model, Fused()(decoder(1, torch.bfloat16)), prompts, 20, gamma=3, sampler=GREEDY)
    assert all(torch.equal(one, generate(model, ids[None], 20, sampler=GREEDY)[0]) for one, ids in zip(made, prompts, strict=True))


# refused


REFUSED = {
    "gamma must be a whole number, at least 1, got 0": lambda m: speculative_batch(m, m, text(3, rows=2), 4, gamma=0),
    "prompts must be at least one text, got none": lambda m: speculative_batch(m, m, [], 4),
    r"prompt 1 \(counted from 0\): ids must be .* with at least one token": lambda m: speculative_batch(m, m, [text(3)[0], text(3)[0, :0]], 4),
    "exceed the model's context of 128": lambda m: speculative_batch(m, m, [text(3)[0], text(126)[0]], 4),
    "the draft has a vocabulary of 16 tokens and the target one of 32": lambda m: speculative_batch(m, Preallocated()(learned()), text(3), 4),
    "the draft reads at most 6 tokens and this text may have 7": lambda m: speculative_batch(m, Preallocated()(decoder(context=6)), text(3), 4),
    r"the target's ConcatCache does not hold .*: give it one that does, such as Preallocated\(\)\(model\)": (
        lambda m: speculative_batch(decoder(), m, text(3, rows=2), 4)
    ),
    "the draft's ConcatCache does not hold rows of unequal length": lambda m: speculative_batch(m, decoder(), text(3, rows=2), 4),
    r"the target's NoCache does not hold rows of unequal length: .*\(it keeps nothing\)": lambda m: speculative_batch(Recompute()(m), m, text(3, rows=2), 4),
}


@pytest.mark.parametrize("message, made", REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_before_anything_is_written(message, made):
    with pytest.raises(ValueError, match=message):
        made(Preallocated()(decoder()))


def test_no_new_tokens_are_the_prompts():
    model = Preallocated()(decoder())
    assert torch.equal(torch.stack(speculative_batch(model, model, text(3, rows=2), 0)), text(3, rows=2))
