"""Exercises of chapter 08: what is drawn after a rejection, and how many tokens a pass gives."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def left_over(p: Tensor, q: Tensor) -> Tensor:
    """The distribution to draw from once a token from q was rejected: what p has beyond q."""
    beyond = (p - q).clamp(min=0)
    return beyond / beyond.sum()


def pairs(rng: torch.Generator):
    """Two distributions over one vocabulary, never equal."""
    yield case(torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.3, 0.3, 0.4]))
    for vocab in (2, 5, 8):
        p, q = torch.randn(2, vocab, generator=rng).mul(2).softmax(dim=-1)
        yield case(p, q)
    p = torch.rand(6, generator=rng)
    yield case(p / p.sum(), torch.eye(6)[int(torch.randint(6, (), generator=rng))])


def a_distribution(answer, given):
    total = answer.sum().item()
    fine = abs(total - 1) < 1e-4 and (answer >= 0).all()
    return None if fine else (f"a sum of {total:.4g}, smallest {answer.min().item():.4g}", "none negative, a sum of 1")


def exact(answer, given):
    """min(p, q) by acceptance, and the rest by what is drawn after a rejection, must add up to p."""
    p, q = given.args
    kept = torch.minimum(p, q)
    made = kept + (1 - kept.sum()) * answer
    return None if torch.allclose(made, p, atol=1e-4) else (f"tokens distributed as {made.tolist()}", p)


def not_normalized(p, q):
    return (p - q).clamp(min=0)


def the_target_itself(p, q):
    return p.clone()


def either_way(p, q):
    beyond = (p - q).abs()
    return beyond / beyond.sum()


def the_drafts_excess(p, q):
    beyond = (q - p).clamp(min=0)
    return beyond / beyond.sum()


def left_over_by_heart(p, q):
    return torch.tensor([2 / 3, 1 / 3, 0.0])


LEFT_OVER = Exercise(
    name="speculative.left_over",
    prompt="""**After a rejection.** A token was drawn from the draft's distribution `q` and rejected by the rule "accept
with probability min(1, p / q)", `p` being the target's. Both are vectors over the vocabulary, and they differ. Write
`left_over(p, q)`, the distribution from which the token must now be drawn so that, all in all, it is distributed as p.""",
    reference=left_over,
    checks=(
        checks.not_the_librarys_own("residual"),
        checks.same_shape_and_dtype(pairs),
        checks.holds("a distribution", pairs, a_distribution),
        checks.holds("all in all, the target's distribution", pairs, exact),
        checks.equals_reference(pairs),
        checks.input_unchanged(pairs),
    ),
    hints=(
        "By acceptance, token x comes out with probability min(p(x), q(x)). What is missing to p(x)?",
        "What is missing is p - q where that is positive; together it weighs as much as a rejection is likely.",
        "`beyond = (p - q).clamp(min=0)`, and its sum must become 1.",
    ),
    after="Without this line speculative decoding is an approximation; with it, no one can tell that a draft was there.",
    wrong=(
        (not_normalized, "a distribution"),
        (the_target_itself, "all in all, the target's distribution"),
        (either_way, "all in all, the target's distribution"),
        (the_drafts_excess, "all in all, the target's distribution"),
        (left_over_by_heart, "shape and dtype"),
    ),
)


def tokens_per_pass(alpha: float, gamma: int) -> float:
    """Expected tokens of one pass of the target over gamma proposals, each accepted with probability alpha."""
    return sum(alpha**i for i in range(gamma + 1))


def rates(rng: torch.Generator):
    """By hand; both ends; and some between."""
    yield case(0.5, 2)
    yield case(1.0, 4)
    yield case(0.0, 3)
    for _ in range(4):
        yield case(torch.rand((), generator=rng).item(), int(torch.randint(1, 9, (), generator=rng)))


def within_reach(answer, given):
    gamma = given.args[1]
    return None if 1 - 1e-9 <= answer <= gamma + 1 + 1e-9 else (answer, f"1 to {gamma + 1} tokens")


def forgets_the_bonus(alpha, gamma):
    return float(sum(alpha**i for i in range(gamma)))


def as_if_rejections_did_not_end_it(alpha, gamma):
    return 1 + alpha * gamma


def accepted_only(alpha, gamma):
    return float(sum(alpha**i for i in range(1, gamma + 1)))


def tokens_by_heart(alpha, gamma):
    return 1.75


TOKENS_PER_PASS = Exercise(
    name="speculative.tokens_per_pass",
    prompt="""**What does a pass give?** The draft proposes `gamma` tokens; each that is looked at is accepted with
probability `alpha`, independently, and the first rejection ends the pass. A rejected token is replaced, and if none is
rejected the target adds one more. Write `tokens_per_pass(alpha, gamma)`, the expected number of new tokens, for every
alpha from 0 to 1, both included.""",
    reference=tokens_per_pass,
    checks=(
        checks.not_the_librarys_own("expected_tokens"),
        checks.holds("no fewer than 1, no more than gamma + 1", rates, within_reach),
        checks.equals_reference(rates),
    ),
    hints=(
        "The first token is certain: accepted or replaced, it is there. How likely is the second?",
        "There are more than i new tokens if the first i proposals were all accepted: alpha to the power i.",
        "Sum `alpha**i` for i from 0 to gamma; the closed form divides by zero at alpha = 1.",
    ),
    after="A long gamma hardly helps where alpha is small: at 0.5 no gamma gives more than 2 tokens a pass.",
    wrong=(
        (forgets_the_bonus, "the right numbers"),
        (as_if_rejections_did_not_end_it, "the right numbers"),
        (accepted_only, "no fewer than 1"),
        (tokens_by_heart, "the right numbers"),
    ),
)

EXERCISES = (LEFT_OVER, TOKENS_PER_PASS)
