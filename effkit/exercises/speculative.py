"""Exercises of chapter 08: what is accepted and what is drawn instead, how many tokens a pass gives, how many to propose, and
who sees whom in a tree of proposals."""

import operator
from numbers import Real

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
    """By hand; both ends of alpha; no proposal at all; and some between."""
    yield case(0.5, 2)
    yield case(1.0, 4)
    yield case(0.0, 3)
    yield case(0.6, 0)
    for _ in range(4):
        yield case(torch.rand((), generator=rng).item(), int(torch.randint(1, 9, (), generator=rng)))


def a_number(answer, given):
    """Whole or not: where all is accepted, gamma + 1 is right."""
    fine = isinstance(answer, Real) or (isinstance(answer, Tensor) and answer.numel() == 1)
    return None if fine else (answer, "a number, which the function returns")


def within_reach(answer, given):
    gamma = given.args[1]
    return None if 1 - 1e-9 <= answer <= gamma + 1 + 1e-9 else (answer, f"1 to {gamma + 1} tokens" if gamma else "1 token")


def forgets_the_bonus(alpha, gamma):
    return float(sum(alpha**i for i in range(gamma)))


def as_if_rejections_did_not_end_it(alpha, gamma):
    return 1 + alpha * gamma


def accepted_only(alpha, gamma):
    return float(sum(alpha**i for i in range(1, gamma + 1)))


def proposes_at_least_once(alpha, gamma):
    tokens, reach = 1.0, alpha
    while True:
        tokens, gamma = tokens + reach, gamma - 1
        if gamma <= 0:
            return tokens
        reach *= alpha


def forgets_to_return(alpha, gamma):
    tokens = 0.0
    for i in range(gamma + 1):
        tokens += alpha**i


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
        checks.holds("a number", rates, a_number),
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
        (forgets_the_bonus, "no fewer than 1"),
        (as_if_rejections_did_not_end_it, "the right numbers"),
        (accepted_only, "no fewer than 1"),
        (proposes_at_least_once, "no fewer than 1"),
        (forgets_to_return, "a number"),
        (tokens_by_heart, "no fewer than 1"),
    ),
)


def accepted(p: Tensor, q: Tensor, tokens: Tensor, coins: Tensor) -> int:
    """How many of the proposed tokens stay: those before the first that is rejected."""
    places = torch.arange(len(tokens))
    stays = coins < p[places, tokens] / q[places, tokens]
    return int(stays.long().cumprod(0).sum())


def proposals(rng: torch.Generator):
    """By hand: the second is rejected, though the third would pass; all are accepted; a token that the target never writes,
    with a coin of 0; then longer ones."""
    p = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    q = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.3, 0.7]])
    yield case(p, q, torch.tensor([0, 0, 0]), torch.tensor([0.9, 0.6, 0.5]))
    yield case(p, q, torch.tensor([1, 1, 0]), torch.tensor([0.9, 0.6, 0.5]))
    never = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.3, 0.7]])
    yield case(never, torch.tensor([[0.4, 0.4, 0.2], [0.5, 0.1, 0.4]]), torch.tensor([0, 0]), torch.tensor([0.7, 0.0]))
    for gamma, sharp in ((4, 0.3), (5, 1.0), (3, 2.0), (6, 0.1)):
        p, q = (sharp * torch.randn(2, gamma, 5, generator=rng)).softmax(-1)
        tokens = torch.multinomial(q, 1, generator=rng)[:, 0]
        yield case(p, q, tokens, 0.9 * torch.rand(gamma, generator=rng))


def counts_all_that_pass(p, q, tokens, coins):
    places = torch.arange(len(tokens))
    return int((coins < p[places, tokens] / q[places, tokens]).sum())


def forgets_the_draft(p, q, tokens, coins):
    places = torch.arange(len(tokens))
    return int((coins < p[places, tokens]).long().cumprod(0).sum())


def upside_down(p, q, tokens, coins):
    places = torch.arange(len(tokens))
    return int((coins < q[places, tokens] / p[places, tokens]).long().cumprod(0).sum())


def greedy(p, q, tokens, coins):
    return int((tokens == p.argmax(-1)).long().cumprod(0).sum())


def lets_the_impossible_pass(p, q, tokens, coins):
    places = torch.arange(len(tokens))
    return int((coins <= p[places, tokens] / q[places, tokens]).long().cumprod(0).sum())


def the_first_that_is_rejected(p, q, tokens, coins):
    places = torch.arange(len(tokens))
    return int((coins < p[places, tokens] / q[places, tokens]).long().argmin())  # 0 where there is none


def accepted_by_heart(p, q, tokens, coins):
    return 1


ACCEPTED = Exercise(
    name="speculative.accepted",
    prompt="""**How far does a proposal go?** A draft proposed `tokens`, a vector of gamma token numbers, each drawn from its row of
`q`; the target's distributions at the same places are the rows of `p`, both (gamma, vocabulary). Token i is accepted where
`coins[i]`, a number drawn from [0, 1), is below p(token) / q(token); the first that is rejected ends the pass, and what comes after it
is not looked at. Write `accepted(p, q, tokens, coins)`: how many tokens are accepted.""",
    reference=accepted,
    checks=(
        checks.not_the_librarys_own("verify", "judge"),
        checks.same_shape_and_dtype(proposals),
        checks.equals_reference(proposals),
        checks.input_unchanged(proposals),
    ),
    hints=(
        "A ratio above 1 needs no special case: every coin is below it.",
        "`p[torch.arange(len(tokens)), tokens]` are the target's probabilities of the proposed tokens.",
        "`(coins < ratio).long().cumprod(0)` is 1 up to the first rejection and 0 from there on.",
    ),
    after="A token that the draft thinks likelier than the target does is refused just often enough to make up for it.",
    wrong=(
        (counts_all_that_pass, "the right numbers"),
        (forgets_the_draft, "the right numbers"),
        (upside_down, "the right numbers"),
        (greedy, "the right numbers"),
        (lets_the_impossible_pass, "the right numbers"),
        (the_first_that_is_rejected, "the right numbers"),
        (accepted_by_heart, "the right numbers"),
    ),
)


def best_gamma(alpha: float, cost: float, *, most: int) -> int:
    """How many tokens to propose, 0 to most, for the most tokens in the time of one pass of the target."""
    speed = [sum(alpha**i for i in range(gamma + 1)) / (gamma * cost + 1) for gamma in range(most + 1)]
    return speed.index(max(speed))


def drafts(rng: torch.Generator):
    """By hand: a good cheap draft, one that costs more than it gives, one for free, one that is never right; then others."""
    yield case(0.8, 0.1, most=8)
    yield case(0.3, 0.5, most=8)
    yield case(0.7, 0.0, most=6)
    yield case(0.0, 0.1, most=4)
    for _ in range(5):
        alpha, cost = torch.rand(2, generator=rng).tolist()
        yield case(0.1 + 0.85 * alpha, 0.02 + 0.4 * cost, most=10)


def as_fast_as_the_best(answer, given):
    (alpha, cost), most = given.args, given.settings["most"]
    try:
        answer = operator.index(answer)  # NumPy's and torch's whole numbers are whole numbers, too
    except TypeError:
        return answer, f"a whole number from 0 to {most}"
    if not 0 <= answer <= most:
        return answer, f"a whole number from 0 to {most}"
    speed = lambda g: sum(alpha**i for i in range(g + 1)) / (g * cost + 1)  # noqa: E731
    best = max(range(most + 1), key=speed)
    return None if speed(answer) >= 0.9999 * speed(best) else (f"{answer}, {speed(answer):.3f} times as fast", f"{best}, {speed(best):.3f} times as fast")


def always_the_most(alpha, cost, *, most):
    return most


def forgets_the_target(alpha, cost, *, most):
    speed = [0.0] + [sum(alpha**i for i in range(g + 1)) / (g * cost) for g in range(1, most + 1)]
    return speed.index(max(speed))


def at_least_one(alpha, cost, *, most):
    speed = [sum(alpha**i for i in range(g + 1)) / (g * cost + 1) for g in range(1, most + 1)]
    return 1 + speed.index(max(speed))


def forgets_the_bonus_token(alpha, cost, *, most):
    speed = [sum(alpha**i for i in range(1, g + 1)) / (g * cost + 1) for g in range(most + 1)]
    return speed.index(max(speed))


def while_likely(alpha, cost, *, most):
    return next((g for g in range(most) if alpha ** (g + 1) < 0.5), most)


def nothing_for_nothing(alpha, cost, *, most):
    return best_gamma(alpha, cost, most=most) if cost else 0


def gamma_by_heart(alpha, cost, *, most):
    return 5


BEST_GAMMA = Exercise(
    name="speculative.best_gamma",
    prompt="""**How many to propose?** A pass of the target takes time 1, whatever the number of tokens; the draft takes `cost` for each
that it proposes. Proposals are accepted with probability `alpha` each, until the first rejection, so gamma of them give
$1 + \\alpha + \\dots + \\alpha^\\gamma$ tokens. Write `best_gamma(alpha, cost, most=...)`: the gamma from 0 to `most` that gives the most
tokens a unit of time. 0 means: don't speculate.""",
    reference=best_gamma,
    checks=(
        checks.not_the_librarys_own("speedup", "expected_tokens"),
        checks.holds("as fast as any", drafts, as_fast_as_the_best),
    ),
    hints=(
        "Nothing to derive: there are only most + 1 answers. Compute the speed of each.",
        "Speed is tokens over time: the sum of alpha**i for i from 0 to gamma, over gamma * cost + 1.",
        "`speed.index(max(speed))` with `speed` a list that begins with gamma 0, whose speed is 1.",
    ),
    after="The gain is flat around its best, so a gamma that is off by one costs little; one that never stops costs a lot.",
    wrong=(
        (always_the_most, "as fast as any"),
        (forgets_the_target, "as fast as any"),
        (at_least_one, "as fast as any"),
        (forgets_the_bonus_token, "as fast as any"),
        (while_likely, "as fast as any"),
        (nothing_for_nothing, "as fast as any"),
        (gamma_by_heart, "as fast as any"),
    ),
)


def sees(parents: list[int]) -> Tensor:
    """Of each proposed token (row), which of the proposed tokens (columns) it follows, itself among them."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for child, parent in enumerate(parents):
        if parent >= 0:
            mask[child] |= mask[parent]
    return mask


def trees(rng: torch.Generator):
    """By hand: two first tokens, one with two children; a line of 8; then trees grown at random, and a deep one."""
    yield case([-1, -1, 0, 0])
    yield case(list(range(-1, 7)))
    for n in (6, 8, 9):
        yield case([int(torch.randint(-1, max(i, 1), (), generator=rng)) if i else -1 for i in range(n)])
    yield case([-1, 0, 1, 2, 1, 4])


def itself_its_parent_no_sibling(answer, given):
    (parents,) = given.args
    for child, parent in enumerate(parents):
        if not answer[child, child]:
            return f"token {child} not seeing itself", "each seeing itself"
        if parent >= 0 and not answer[child, parent]:
            return f"token {child} not seeing its parent {parent}", "each seeing its parent"
        twins = [i for i, p in enumerate(parents) if p == parent and i != child and answer[child, i]]
        if twins:
            return f"token {child} seeing its sibling {twins[0]}", "siblings, which stand at the same place, not seeing each other"
    return None


def a_line(parents):
    return torch.ones(len(parents), len(parents)).tril().bool()


def only_the_parent(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for child, parent in enumerate(parents):
        if parent >= 0:
            mask[child, parent] = True
    return mask


def three_levels_up(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for child, parent in enumerate(parents):
        for _ in range(3):
            if parent >= 0:
                mask[child, parent], parent = True, parents[parent]
    return mask


def looks_down(parents):
    return sees(parents).T


def not_itself(parents):
    return sees(parents) & ~torch.eye(len(parents), dtype=torch.bool)


def last_for_first(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for child, parent in enumerate(parents):
        mask[child] |= mask[parent]  # -1 is the last row
    return mask


def sees_by_heart(parents):
    return torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]).bool()


SEES = Exercise(
    name="speculative.sees",
    prompt="""**Who sees whom in a tree?** Several proposals for the same place are looked at in one pass. `parents[i]` says after which
proposed token the i-th stands, -1 for those that follow the text at once; parents come before their children. For each to be judged as if it
stood in its own text, it must see the text, itself, and the proposed tokens on its way from the text, and no others. Write `sees(parents)`: booleans of
shape (n, n), True where the token of the row sees the proposed token of the column.""",
    reference=sees,
    checks=(
        checks.not_the_librarys_own("ancestry", "visible"),
        checks.same_shape_and_dtype(trees),
        checks.holds("itself, its parent, no sibling", trees, itself_its_parent_no_sibling),
        checks.equals_reference(trees),
        checks.input_unchanged(trees),
    ),
    hints=(
        "What a token sees is itself and all that its parent sees.",
        "Begin with the identity and go through the tokens in order: the parent's row is complete by then.",
        "`mask[child] |= mask[parent]` where `parent >= 0`; mind that -1 would be the last row.",
    ),
    after="The number of tokens on the way is also its place in the text, which its position must follow.",
    wrong=(
        (a_line, "itself, its parent, no sibling"),
        (only_the_parent, "the right numbers"),
        (three_levels_up, "the right numbers"),
        (looks_down, "itself, its parent, no sibling"),
        (not_itself, "itself, its parent, no sibling"),
        (last_for_first, "itself, its parent, no sibling"),
        (sees_by_heart, "shape and dtype"),
    ),
)

EXERCISES = (LEFT_OVER, TOKENS_PER_PASS, ACCEPTED, BEST_GAMMA, SEES)
