"""The text is the target's: the distribution over whole texts by exact enumeration, by chi-square, and greedily token
for token. Three well-known bugs are planted; each must be refused by the same tests."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import effkit
from effkit import zoo
from effkit.caching import Fused
from effkit.core.generation import ConcatCache, Sampler, generate
from effkit.core.paths import data_dir
from effkit.speculative import EarlyExit, Speculative, SpeculativeTree, speculate, speculative_generate, verify
from effkit.speculative.law import Pass
from effkit.speculative.speculate import DraftModel
from effkit.speculative.verify import Proposal, overlap, residual, sample
from effkit.zoo.gpt import GPT
from tests.caching.decoders import decoder, text
from tests.speculative.worlds import enumerated, fit, goodness, joint, largest_gap, table
from tests.subjects import gpt, mlp

GREEDY, COLD = Sampler(temperature=0.0), Sampler(temperature=0.4)
SAMPLERS = {
    "plain": Sampler(),
    "cold": COLD,
    "top-k": Sampler(top_k=2),
    "nucleus": Sampler(temperature=1.3, top_p=0.8),
}


def tiny(seed: int, **numbers):
    return decoder(seed, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8, **numbers)


def gap(gamma: int = 2, new: int = 3, sampler: Sampler = SAMPLERS["plain"], stop: int | None = None) -> float:
    """How far the algorithm's exact distribution over texts is from the target's. Real decoders with real caches, so
    that a rollback which forgets too little or too much shows."""
    target, draft, ids = tiny(0), tiny(1), text(3, vocab=3)

    def program() -> tuple:
        settings = dict(gamma=gamma, sampler=sampler, stop=stop)
        return tuple(speculative_generate(target, draft, ids, new, **settings)[0, 3:].tolist())

    outcome = enumerated(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9), "some outcomes were lost, or counted twice"
    return largest_gap(outcome, joint(target, ids, new, sampler, stop))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_joint_distribution_is_the_target_s_by_enumeration(sampler):
    assert gap(sampler=sampler) < 1e-9


@pytest.mark.parametrize("gamma, new", [(1, 1), (1, 3), (2, 2), (3, 3), (5, 2)])
def test_for_every_gamma_and_length(gamma, new):
    assert gap(gamma, new, SAMPLERS["plain" if new < 3 else "top-k"]) < 1e-9


@pytest.mark.slow
def test_a_stop_token_inside_a_block_ends_the_text():
    assert gap(gamma=3, new=3, stop=1) < 1e-9


def p_value(n: int = 700, gamma: int = 2, sampler: Sampler = COLD) -> float:
    return fit(table(7), table(8), torch.tensor([[0]]), 3, gamma, sampler, n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gamma, sampler", [(1, Sampler()), (2, Sampler(0.7)), (4, Sampler(1.5)), (2, Sampler(top_p=0.8))]
)
def test_joint_distribution_is_the_target_s_by_chi_square(gamma, sampler):
    assert p_value(gamma=gamma, sampler=sampler) > 1e-3


def trained(name="gpt-small"):
    path = data_dir() / f"{name}.safetensors"  # zoo.load would also read the whole standard library
    if not path.exists():
        pytest.skip(f"{name} is not here: effkit train {name}")
    return Fused()(effkit.load(path).float())


REAL = {"top-k": Sampler(temperature=0.7, top_k=20), "nucleus": Sampler(temperature=0.7, top_p=0.8)}
WAYS = {"a line of 1": Speculative(EarlyExit(0.5), gamma=1), "a line of 2": Speculative(EarlyExit(0.5), gamma=2),
        "a tree": SpeculativeTree(EarlyExit(0.5), branching=(2, 2))}  # fmt: skip
PAIRS = {"its own first half": ("gpt-small", None), "the shipped pair": ("gpt-target", "gpt-draft-distilled")}


@torch.no_grad()
def real_p_value(
    n: int = 500, way: str = "a line of 1", sampler: Sampler = REAL["top-k"], new: int = 2, pair: str = "its own first half"
) -> float:
    """Of texts after a prompt of held-out kind."""
    (name, helper), rng = PAIRS[pair], torch.Generator().manual_seed(0)
    target, ids = trained(name), torch.tensor([zoo.tokenizer("gpt-small").encode("import os\n\ndef main(").ids])
    guessing = WAYS[way](target)
    if helper:
        guessing.decoding.draft = trained(helper)
    made = Counter(tuple(guessing.generate(ids, new, sampler=sampler, rng=rng)[0, ids.shape[1] :].tolist()) for _ in range(n))
    return goodness(made, joint(target, ids, new, sampler), n)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", REAL)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_real_pair_writes_as_its_target_does(way, sampler, pair):
    assert real_p_value(way=way, sampler=REAL[sampler], pair=pair) > 1e-3


# the planted bugs


def bonus_after_a_rejection_in_the_last_slot(proposal, p, q, rng):
    places = torch.arange(len(proposal))
    n = verify.accepted(p[places, proposal] / q[places, proposal], rng)
    last = p[len(proposal)] if n >= len(proposal) - 1 else residual(p[n], q[n])
    return torch.cat((proposal[:n], verify.sample(last, rng)[None]))


def not_renormalized(p, q):
    """What sampling by cumulated sums makes of a residual whose sum is less than one: the last token takes the rest."""
    left = (p - q).clamp(min=0)
    left[-1] += 1 - left.sum()
    return left


class OneSided(DraftModel):
    """Draws with the temperature, and reports the distribution without it."""

    def __call__(self, ids, most, sampler, rng):
        tokens = super().__call__(ids, most, sampler, rng).tokens
        self.cache.truncate(ids.shape[1] - 1)
        whole = torch.cat((ids, tokens[None]), dim=1)
        logits = self.draft(whole[:, self.cache.length :], self.cache)
        return Proposal(tokens, Sampler().probabilities(logits[0, -most - 1 : -1]) if most else None)


BUGS = {
    "bonus token after a rejection": (verify, "verify", bonus_after_a_rejection_in_the_last_slot),
    "residual not renormalized": (verify, "residual", not_renormalized),
    "residual forgotten": (verify, "residual", lambda p, q: p),
    "temperature on one side": (speculate, "DraftModel", OneSided),
}
planted = pytest.mark.parametrize("where, name, bug", BUGS.values(), ids=BUGS.keys())


@planted
def test_enumeration_refuses(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    assert gap(2, 2, COLD) > 1e-3


@pytest.mark.slow
@planted
def test_chi_square_refuses(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug)
    assert p_value() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_chi_square_on_the_real_pair_refuses_the_bonus_token(monkeypatch, pair):
    monkeypatch.setattr(verify, "verify", bonus_after_a_rejection_in_the_last_slot)
    assert real_p_value(pair=pair) < 1e-6


class Late(ConcatCache):
    """Counts one position too many once something was taken back; masks, keys and lengths are right."""

    late = 0

    def truncate(self, n):
        self.late = self.late or int(n < self.length)
        super().truncate(n)

    def advance(self, n, parents=None, *, device=None, dtype=torch.float32):
        positions = super().advance(n, parents, device=device, dtype=dtype) + self.late
        self.tables = self.rope.tables(positions, dtype)
        return positions


def test_positions_off_by_one_after_a_rollback_are_refused(monkeypatch):
    """By what a whole text costs: the draft is rejected now and then, and from then on the text is another."""
    test_for_every_gamma_and_length(2, 2)
    monkeypatch.setattr(GPT, "new_cache", lambda self, *, capacity: Late(self.rope))
    with pytest.raises(AssertionError):
        test_for_every_gamma_and_length(2, 3)


@pytest.mark.slow
def test_chi_square_on_the_real_pair_refuses_the_temperature_on_one_side(monkeypatch):
    monkeypatch.setattr(speculate, "DraftModel", OneSided)
    assert real_p_value(pair="the shipped pair") < 1e-6


@pytest.mark.slow
def test_chi_square_on_the_real_pair_refuses_positions_off_by_one(monkeypatch):
    monkeypatch.setattr(GPT, "new_cache", lambda self, *, capacity: Late(self.rope))
    assert real_p_value(new=3) < 1e-6


def test_forgotten_rollback_is_refused(monkeypatch):
    def half(self, n):  # the position goes back, the keys stay
        self.length = min(self.length, n)

    monkeypatch.setattr(ConcatCache, "truncate", half)
    with pytest.raises((AssertionError, RuntimeError)):
        test_for_every_gamma_and_length(2, 2)


# greedy


def adversary(target):
    """Proposes what the target thinks least likely."""
    draft = decoder(0, target.embedding.weight.dtype, tied=False)
    draft.load_state_dict(target.state_dict(), strict=False)
    draft.head.weight.data = -target.embedding.weight.data
    return draft


DRAFTS = {
    "itself": lambda target: target,
    "random": lambda target: decoder(9, target.embedding.weight.dtype),
    "smaller and random": lambda target: decoder(
        8, target.embedding.weight.dtype, layers=1, heads=2, kv_heads=1, d_model=8
    ),
    "its first half": EarlyExit(0.5),
    "adversarial": adversary,
    "in another precision": lambda target: decoder(0, torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_text_is_token_for_token_the_target_s(kind, dtype):
    target, ids = decoder(0, dtype), text(5)
    draft, wanted = DRAFTS[kind](target), generate(target, ids, 19, sampler=GREEDY)
    for gamma in range(1, 9):
        assert torch.equal(speculative_generate(target, draft, ids, 19, gamma=gamma, sampler=GREEDY), wanted), gamma


@pytest.mark.parametrize("new", range(7))
def test_lengths_that_end_inside_a_block(new):
    target, draft, ids = decoder(0), EarlyExit(0.5)(decoder(0)), text(4)
    made = speculative_generate(target, draft, ids, new, gamma=4, sampler=GREEDY)
    assert torch.equal(made, generate(target, ids, new, sampler=GREEDY))
    assert speculative_generate(target, draft, ids, new, gamma=4).shape == (1, 4 + new)


@pytest.mark.parametrize("at", range(4, 14))
def test_stop_tokens_anywhere_in_a_block(at):
    target, ids = decoder(0), text(4)
    stop = int(generate(target, ids, 10, sampler=GREEDY)[0, at])
    wanted = generate(target, ids, 10, sampler=GREEDY, stop=stop)
    for draft in (target, decoder(9)):
        assert torch.equal(speculative_generate(target, draft, ids, 10, gamma=4, sampler=GREEDY, stop=stop), wanted)
        several = speculative_generate(target, draft, ids, 10, gamma=3, sampler=GREEDY, stop=[stop, 99])
        assert torch.equal(several, wanted)


# acceptance


def test_acceptance_is_one_minus_total_variation():
    target, draft, ids = tiny(0), tiny(1), text(3, vocab=3)
    with torch.no_grad():
        p, q = (m(ids)[0, -1].softmax(-1) for m in (target, draft))

    def program() -> int:
        return next(first_pass(target, draft, ids)).accepted

    accepted = enumerated(program).get(1, 0.0)
    assert accepted == pytest.approx(float(overlap(p, q)), abs=1e-9)
    assert accepted == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=1e-9)


def first_pass(target, draft, ids):
    return speculate.speculate(target, DraftModel(draft, capacity=9), ids, 2, gamma=1, sampler=Sampler())


def test_a_copy_as_draft_is_always_accepted():
    target, ids = decoder(0), text(4)
    steps = list(
        speculate.speculate(
            target, DraftModel(target, capacity=64), ids, 30, gamma=4, rng=torch.Generator().manual_seed(0)
        )
    )
    assert [s.accepted for s in steps] == [s.proposed for s in steps]
    assert [len(s.tokens) for s in steps] == [5] * 6


def test_proposals_behind_a_stop_token_were_accepted_all_the_same():
    target, ids = decoder(0), text(4)
    stop = generate(target, ids, 2, sampler=GREEDY)[0, -1:]
    [step] = speculate.speculate(target, DraftModel(target, capacity=64), ids, 30, gamma=4, sampler=GREEDY, stop=stop.tolist())
    assert (step.proposed, step.accepted, len(step.tokens)) == (4, 4, 2)


def test_a_draft_that_is_never_right_gives_one_token_a_pass():
    target, ids = decoder(0), text(4)
    steps = list(
        speculate.speculate(target, DraftModel(adversary(target), capacity=64), ids, 12, gamma=3, sampler=GREEDY)
    )
    assert steps[0].accepted == 0 and all(isinstance(s, Pass) for s in steps)
    assert [len(s.tokens) for s in steps] == [1] * 12


def test_coins_in_a_row():
    """P(n heads, then tails) = c_1 ... c_n (1 - c_(n+1)); ratios of 1 and more are certain, of 0 impossible."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([verify.accepted(torch.tensor([0.8, 0.5]), rng) for _ in range(4000)]), minlength=3
    )
    assert chisquare(counts, [800, 1600, 1600]).pvalue > 1e-3
    for chances, wanted in (([], 0), ([0.0], 0), ([1.0], 1), ([7.0, 1.0], 2), ([3.0, 0.0, 1.0], 1)):
        assert {verify.accepted(torch.tensor(chances), rng) for _ in range(50)} == {wanted}


def test_residual_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.2])
    assert residual(p, q).tolist() == pytest.approx([1, 0, 0])
    assert residual(torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.3, 0.3, 0.4])).tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0]
    )
    assert torch.equal(residual(p, p), p)


# the caller's random state


def test_same_generator_same_text_and_greedy_draws_nothing():
    target, draft, ids = decoder(0), decoder(9), text(4)
    made = [speculative_generate(target, draft, ids, 12, rng=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*made)
    rng = torch.Generator().manual_seed(1)
    states = torch.get_rng_state(), rng.get_state()
    speculative_generate(target, draft, ids, 12, sampler=GREEDY)
    speculative_generate(target, draft, ids, 12, sampler=GREEDY, rng=rng)
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], rng.get_state())


def test_sample_is_core_s():
    from effkit.core import generation

    assert sample is generation.sample


# bad input


@pytest.mark.parametrize("gamma", [0, -1, 2.5, True])
def test_gamma_that_proposes_nothing_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must be a whole number, at least 1, got .*: it is how many tokens"):
        speculative_generate(decoder(), decoder(1), text(3), 4, gamma=gamma)


def test_whole_numbers_of_numpy_are_whole_numbers():
    model, ids = decoder(), text(3)
    own = generate(model, ids, 8, sampler=GREEDY)
    made = speculative_generate(model, decoder(1), ids, np.int64(8), gamma=np.int64(3), sampler=GREEDY, stop=np.int64(own[0, 5]))
    assert torch.equal(made, generate(model, ids, 8, sampler=GREEDY, stop=int(own[0, 5])))
    assert torch.equal(Speculative(gamma=np.int64(2))(model).generate(ids, 8, sampler=GREEDY), own)


def test_a_draft_of_another_vocabulary_is_refused():
    for draft in (decoder(1, vocab_size=31), decoder(1, vocab_size=64), table(0, vocab=5)):
        with pytest.raises(ValueError, match="the draft has a vocabulary of .* and the target one of 32: p and q"):
            speculative_generate(decoder(), draft, text(3), 4)


def test_several_rows_are_refused():
    with pytest.raises(ValueError, match="one text at a time, got 2 rows: .* use speculative_batch, or model.generate"):
        speculative_generate(decoder(), decoder(1), text(3, rows=2), 4)


def test_a_draft_of_too_short_a_context_is_refused():
    with pytest.raises(ValueError, match="the draft reads at most 16 tokens and this text may have 20"):
        speculative_generate(decoder(), decoder(1, context=16), text(10), 10)


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)])
def test_impossible_prompts_are_refused(ids):
    with pytest.raises(ValueError, match="at least one token"):
        speculative_generate(decoder(), decoder(1), ids, 4)


def test_temperature_below_zero_is_refused():
    with pytest.raises(ValueError, match="temperature must be a number"):
        speculative_generate(decoder(), decoder(1), text(3), 4, sampler=Sampler(temperature=-1.0))


def test_what_is_no_decoder_is_refused_on_either_side():
    decoder, other, ids = gpt(), mlp(), torch.zeros(1, 3, dtype=torch.long)
    for target, draft, who in ((decoder, other, "draft"), (other, decoder, "target")):
        with pytest.raises(ValueError, match=f"the {who} must be a decoder, got MLP, which generates nothing: take a model"):
            speculative_generate(target, draft, ids, 4)


def test_a_chance_that_is_no_number_is_none():
    """0 / 0: a token that neither would draw."""
    assert [verify.accepted(torch.tensor([1.0, chance]), None) for chance in (torch.nan, 0.0, 1.0)] == [1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("gamma, dtype", [(31, torch.bfloat16), (40, torch.float32)])
def test_as_many_proposals_as_the_kernels_take_and_more_change_no_text(gamma, dtype):
    model = Fused()(decoder(dtype=dtype, sharpness=3.0))
    wanted = generate(model, text(6), 110, sampler=Sampler(0.0))
    hostile = Fused()(decoder(dtype=dtype, seed=1))
    for draft in (hostile, model):
        propose, passes = DraftModel(draft, capacity=128), []
        for step in speculate.speculate(model, propose, text(6), 110, gamma=gamma, sampler=Sampler(0.0)):
            passes.append(step)
        assert torch.equal(torch.cat([step.tokens for step in passes]), wanted[0, 6:])
        assert max(step.proposed for step in passes) == gamma
