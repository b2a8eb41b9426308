"""The law of speculation against its sums, its limits, and a world in which its assumption holds."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effkit.core.generation import Sampler
from effkit.speculative import law
from effkit.speculative.law import Pass, best_gamma, expected_tokens, speedup, statistics
from effkit.speculative.speculate import DraftModel, speculate
from effkit.speculative.verify import overlap
from tests.speculative.worlds import Table

alphas, gammas, costs = st.floats(0, 1), st.integers(0, 12), st.floats(0, 2)


@pytest.mark.parametrize("chances, gamma, match", [([0.5], -1, "gamma"), ([0.5, 1.5], 2, "chances"), ([float("nan")], 2, "chances")])
def test_passes_of_what_is_no_chance_are_refused(chances, gamma, match):
    with pytest.raises(ValueError, match=match):
        law.expected_passes(chances, gamma)


@given(alphas, gammas)
def test_expected_tokens_is_the_closed_form(alpha, gamma):
    closed = gamma + 1 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
    assert expected_tokens(alpha, gamma) == pytest.approx(closed, rel=1e-6)


@given(alphas, gammas)
def test_expected_tokens_is_the_mean_of_the_coins(alpha, gamma):
    """n tokens with probability alpha^(n - 1) (1 - alpha), gamma + 1 with alpha^gamma."""
    mean = sum(n * alpha ** (n - 1) * (1 - alpha) for n in range(1, gamma + 1)) + (gamma + 1) * alpha**gamma
    assert expected_tokens(alpha, gamma) == pytest.approx(mean, rel=1e-9)


def test_by_hand():
    assert expected_tokens(0.8, 4) == pytest.approx(3.3616)
    assert speedup(0.8, 4, 0.1) == pytest.approx(3.3616 / 1.4)
    assert speedup(0.8, 4, 0.1, lambda gamma: 1 + 0.1 * gamma) == pytest.approx(3.3616 / 1.8)


@given(alphas, costs)
def test_best_gamma_is_the_best(alpha, cost):
    best = best_gamma(alpha, cost)
    reached = speedup(alpha, best, cost) if best else 1.0
    assert reached >= max(1.0, *(speedup(alpha, g, cost) for g in range(1, 17))) - 1e-12


@given(alphas, st.floats(0.001, 0.999))
def test_it_pays_where_acceptance_exceeds_the_draft_s_cost(alpha, cost):
    """Corollary 3.9 of Leviathan et al.: if alpha > c, gamma = 1 alone gives (1 + alpha) / (1 + c); else none helps."""
    assert speedup(alpha, 1, cost) == pytest.approx((1 + alpha) / (1 + cost))
    assert (best_gamma(alpha, cost) > 0) == (alpha > cost) or math.isclose(alpha, cost, rel_tol=1e-9)


def test_where_verification_costs_as_much_as_writing_nothing_pays():
    assert best_gamma(0.9, 0.05, lambda gamma: gamma + 1.0) == 0


@pytest.mark.parametrize("chances, gamma", [([0.5, 0.2, 0.9], 1), ([0.3, 0.8, 0.6, 0.5, 0.1], 2), ([0.7] * 6, 4), ([0.0, 1.0, 0.0, 1.0], 3)])
def test_passes_of_a_text_are_those_of_all_its_coins(chances, gamma):
    """By enumeration: every way in which the tokens may be heads or tails, and the passes that it makes."""
    wanted = 0.0
    for coins in itertools.product((True, False), repeat=len(chances)):
        chance = math.prod(c if heads else 1 - c for heads, c in zip(coins, chances, strict=True))
        at = passes = 0
        while at < len(chances):
            passes, end = passes + 1, min(at + gamma, len(chances) - 1)
            while at < end and coins[at]:
                at += 1
            at += 1  # the one that replaced a guess, or the bonus
        wanted += chance * passes
    assert law.expected_passes(chances, gamma) == pytest.approx(wanted)


def test_passes_by_hand():
    assert law.expected_passes([1.0] * 10, 4) == 2 and law.expected_passes([0.0] * 10, 4) == 10 and law.expected_passes([], 3) == 0


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_that_is_no_probability_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be a number in"):
        expected_tokens(alpha, 3)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1, 3])
def test_tokens_a_pass_follow_the_law_where_acceptance_is_independent(gamma):
    """p and q that do not depend on the text: every proposal is accepted with the same probability."""
    rng = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, dtype=torch.float64, generator=rng)
    target, draft, alpha = Table(p.expand(6, 6)), Table(q.expand(6, 6)), float(overlap(p.softmax(-1), q.softmax(-1)))
    propose = DraftModel(draft, capacity=4000)
    made = statistics(speculate(target, propose, torch.tensor([[0]]), 3000, gamma=gamma, sampler=Sampler(), rng=rng))
    error = 4 * (alpha * (1 - alpha) / made.tested) ** 0.5
    assert made.acceptance == pytest.approx(alpha, abs=error)
    assert made.tokens_per_pass == pytest.approx(expected_tokens(alpha, gamma), abs=4 * gamma / made.passes**0.5)


def test_untested_tokens_do_not_count_as_refused():
    tokens = torch.zeros(9, dtype=torch.long)
    made = statistics([Pass(4, 4, tokens[:5]), Pass(4, 1, tokens[:2]), Pass(4, 0, tokens[:1]), Pass(0, 0, tokens[:1])])
    assert (made.passes, made.proposed, made.tested, made.accepted, made.tokens) == (4, 12, 4 + 2 + 1, 5, 9)
    assert made.acceptance == pytest.approx(5 / 7) and made.tokens_per_pass == pytest.approx(9 / 4)


def test_no_passes_give_no_rates():
    assert math.isnan(statistics([]).acceptance) and math.isnan(statistics([]).tokens_per_pass)


@pytest.mark.slow
def test_a_law_off_by_one_is_noticed(monkeypatch):
    monkeypatch.setattr(__name__ + ".expected_tokens", lambda alpha, gamma: sum(alpha**i for i in range(gamma)))
    with pytest.raises(AssertionError):
        test_tokens_a_pass_follow_the_law_where_acceptance_is_independent(1)


# gamma that adapts


def passes(proposed, accepted):
    return Pass(proposed, accepted, torch.zeros(accepted + 1, dtype=torch.long))


def test_gamma_follows_acceptance_up_and_down():
    adaptive = law.Adaptive(8, cost=0.1)
    begun = adaptive.choose()
    assert adaptive.alpha == 0.5 and begun == law.best_gamma(0.5, 0.1, most=8)
    for _ in range(30):
        n = adaptive.choose()
        adaptive.observe(passes(n, n))
    assert adaptive.choose() == 8
    for _ in range(30):
        adaptive.observe(passes(adaptive.choose(), 0))
    assert adaptive.choose() <= 1


def test_what_never_pays_is_tried_again_after_a_while():
    """Where nothing is proposed nothing is learned, so alpha goes back to 1/2."""
    adaptive, chosen = law.Adaptive(8, cost=0.4), []
    for _ in range(200):
        chosen.append(adaptive.choose())
        adaptive.observe(passes(chosen[-1], 0))
    assert chosen[-1] in (0, 1) and 0 in chosen and 1 in chosen[20:]
    assert sum(chosen) < 60


def test_what_was_learned_is_forgotten_where_nothing_is_proposed():
    adaptive = law.Adaptive(8, cost=0.4)
    for _ in range(5):
        adaptive.observe(passes(4, 0))
    low = adaptive.alpha
    for _ in range(60):
        adaptive.observe(passes(0, 0))
    assert low < 0.3 and adaptive.alpha == pytest.approx(0.5, abs=0.01)


def test_what_a_proposal_adds_to_a_pass_makes_it_propose_less():
    assert [law.linear(0.5)(gamma) for gamma in (0, 1, 4)] == [1, 1.5, 3]
    proposed = []
    for extra in (0.0, 0.1, 0.3):
        adaptive = law.Adaptive(8, 0.1, law.linear(extra))
        for _ in range(20):
            adaptive.observe(passes(4, 3))
        proposed.append(adaptive.choose())
    assert proposed[0] > proposed[1] > proposed[2]


def test_an_expensive_draft_is_tried_now_and_then_and_kept_where_it_is_right():
    """From a cost of 1/2 on, nothing known says: don't. Whoever obeys never learns."""

    def chosen(right: bool, cost: float) -> list[int]:
        adaptive, made = law.Adaptive(8, cost=cost), []
        for _ in range(200):
            made.append(adaptive.choose())
            adaptive.observe(passes(made[-1], made[-1] * right))
        return made

    for cost in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert min(chosen(True, cost)) >= 1 and (cost > 0.6 or chosen(True, cost)[-1] == 8)
        assert sum(chosen(False, cost)) == 200 // 16 + 1 and max(chosen(False, cost)) == 1
    assert sum(chosen(False, 0.4)) <= 20 and sum(chosen(False, 0.3)) <= 40


def test_its_estimate_is_the_rate():
    adaptive, rng = law.Adaptive(4, cost=0.1, memory=0.999), torch.Generator().manual_seed(0)
    for _ in range(4000):
        heads = (torch.rand(4, generator=rng) < 0.7).long().cumprod(0).sum().item()
        adaptive.observe(passes(4, heads))
    assert adaptive.alpha == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("bad", [dict(most=0), dict(cost=-0.1), dict(memory=1.0), dict(memory=-1)])
def test_settings_that_adapt_to_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        law.Adaptive(**({"most": 4, "cost": 0.1} | bad))
