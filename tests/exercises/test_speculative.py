"""The answers of chapter 08's exercises are the library's own mathematics, and other ways to write them pass, too."""

import pytest
import torch
from torch.nn import functional as F

from effkit.core.generation import ancestry
from effkit.exercises import checks, selftest
from effkit.exercises import speculative as asked
from effkit.exercises.base import grade
from effkit.speculative import law
from effkit.speculative.verify import residual

SEEDS = range(5)


def drawn(cases, seed):
    return list(cases(torch.Generator().manual_seed(seed)))


def test_each_has_four_mistakes_or_more_that_are_refused():
    assert all(len(one.wrong) >= 4 for one in asked.EXERCISES)
    assert selftest(asked.EXERCISES) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answers_are_the_library_s(seed):
    for given in drawn(asked.pairs, seed):
        torch.testing.assert_close(asked.left_over(*given.args), residual(*given.args))
    for given in drawn(asked.rates, seed):
        assert asked.tokens_per_pass(*given.args) == law.expected_tokens(*given.args)
    for given in drawn(asked.drafts, seed):
        (alpha, cost), most = given.args, given.settings["most"]
        assert asked.best_gamma(alpha, cost, most=most) == law.best_gamma(alpha, cost, most=most)
    for given in drawn(asked.trees, seed):
        assert torch.equal(asked.sees(*given.args), ancestry(torch.tensor(*given.args)))


def closed_form(alpha, gamma):
    return gamma + 1 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def as_a_tensor(alpha, gamma):
    return torch.tensor([alpha**i for i in range(gamma + 1)]).sum()


def one_after_another(p, q, tokens, coins):
    for i, token in enumerate(tokens):
        if coins[i] >= p[i, token] / q[i, token]:
            return i
    return len(tokens)


def way_to_the_root(parents):
    mask = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for child, seen in enumerate(range(len(parents))):
        while seen >= 0:
            mask[child, seen] = True
            seen = parents[seen]
    return mask


def beyond(p, q):
    return F.normalize(F.relu(p - q), p=1, dim=-1)


OTHERS = [
    (asked.TOKENS_PER_PASS, closed_form), (asked.TOKENS_PER_PASS, as_a_tensor), (asked.ACCEPTED, one_after_another),
    (asked.SEES, way_to_the_root), (asked.LEFT_OVER, beyond),
]  # fmt: skip


@pytest.mark.parametrize("question, answer", OTHERS, ids=[f.__name__ for _, f in OTHERS])
@pytest.mark.parametrize("seed", SEEDS)
def test_another_way_to_write_it_passes(question, answer, seed):
    result = grade(question, answer, seed=seed)
    assert result, result


def test_an_answer_of_nothing_is_said_to_be_none():
    """A law that compares it would stop with an error about its comparison."""
    for question in asked.EXERCISES:
        result = grade(question, lambda *given, **settings: None if given else 0, seed=0)
        assert result.status == "fail" and "None" in result.checks[-1].seen, result


def test_the_case_of_a_coin_of_zero_is_what_refuses_it():
    """Drawn coins are hardly ever equal to a ratio."""
    loose = checks.equals_reference(lambda rng: [one for one in asked.proposals(rng) if one.args[3].all()])
    generator = torch.Generator().manual_seed(0)
    assert loose.look(asked.lets_the_impossible_pass, asked.accepted, generator) is None
    strict = checks.equals_reference(asked.proposals)
    assert strict.look(asked.lets_the_impossible_pass, asked.accepted, generator)
