"""The law of speculation: how many tokens a pass gives, when that pays, and what passes really gave.

Problem   More proposals give more tokens a pass, but each costs, and the later ones are ever less likely to be used.
Idea      If each proposal is accepted with probability alpha, independently, a pass gives 1 + alpha + ... + alpha^gamma
          tokens. With c the draft's time over the target's, and v that of a pass over gamma + 1 tokens over one token,
          the speed-up is that number over gamma c + v.
Limit     Acceptance is not independent: a text has easy and hard places. v is 1 only where reading weights is all the
          time there is: not for small models, bound by dispatch, nor for batches, bound by arithmetic.
Source    Leviathan et al. 2022, arXiv:2211.17192, eq. 1 and theorem 3.8, which takes v = 1.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from effkit.core.checks import require_float, require_int


def expected_tokens(alpha: float, gamma: int) -> float:
    """(1 - alpha^(gamma + 1)) / (1 - alpha) tokens a pass, which is gamma + 1 where everything is accepted."""
    require_float("alpha", alpha, 0.0, 1.0, hint="it is a probability")
    require_int("gamma", gamma, 0)
    return sum(alpha**i for i in range(gamma + 1))


def expected_passes(chances: Sequence[float], gamma: int) -> float:
    """Passes that write a text of which token i, had it been proposed, would have been accepted with chances[i], which is
    min(1, q / p) at that token. The text being given, these coins are independent, however hard its places are: the coupling
    of Leviathan et al. (2022, algorithm 1), read by what comes out. Raises ValueError for chances outside 0 to 1."""
    require_int("gamma", gamma, 0, hint="it is how many tokens are proposed at a time")
    for chance in chances:
        require_float("chances", chance, 0.0, 1.0, hint="each is the chance that a token is accepted")
    n, passes = len(chances), [0.0] * (len(chances) + 1)  # from each place on
    for i in reversed(range(n)):
        reach, last, passes[i] = 1.0, min(i + gamma, n - 1), 1.0
        for j in range(i, last):  # token j is the first to be replaced
            passes[i] += reach * (1 - chances[j]) * passes[j + 1]
            reach *= chances[j]
        passes[i] += reach * passes[last + 1]  # all were accepted, and one came as a bonus
    return passes[0]


def one(gamma: int) -> float:
    """The ideal: verifying costs what writing one token costs."""
    return 1.0


def linear(extra: float) -> Callable[[int], float]:
    """Each proposal adds so much to a pass of the target over one token: about what is measured as long as reading weights
    takes most of the time."""
    return lambda gamma: 1 + extra * gamma


def speedup(alpha: float, gamma: int, cost: float, verification: Callable[[int], float] = one) -> float:
    """Tokens a second over plain decoding.

    cost           one pass of the draft, in passes of the target over one token: c
    verification   gamma -> one pass of the target over gamma + 1 tokens, in the same unit: v
    """
    require_float("cost", cost, 0.0)
    return expected_tokens(alpha, gamma) / (gamma * cost + verification(gamma))


def best_gamma(alpha: float, cost: float, verification: Callable[[int], float] = one, *, most: int = 16) -> int:
    """The gamma from 0 to `most` with the largest speed-up; 0 says: don't speculate."""
    return max(range(most + 1), key=lambda gamma: (speedup(alpha, gamma, cost, verification) if gamma else 1.0, -gamma))


@dataclass(frozen=True)
class Pass:
    """What one pass of the target gave: how many proposals it saw and accepted, and the text's new tokens.

    more   whether something was proposed behind what was accepted, and so rejected; None: as in a line
    """

    proposed: int
    accepted: int
    tokens: Int[Tensor, " m"]
    more: bool | None = None

    @property
    def tested(self) -> int:
        """Places for which a proposal was looked at: those accepted, and the one at which all were rejected."""
        return self.accepted + (self.accepted < self.proposed if self.more is None else self.more)


EVERY = 16  # passes without a proposal, one of which is tried


class Adaptive:
    """Chooses gamma anew before each pass: the best by the law, for how often proposals were accepted of late. (A server that
    does so for all its texts: Liu et al. 2024, arXiv:2406.14066.)

    most, cost, verification   as in best_gamma;  memory   what a pass still counts after the next one

    Where nothing is proposed nothing is learned, so what was learned is forgotten and alpha goes back to 1/2. Where even
    that does not pay, it tries one proposal all the same, at first and in every 16th pass, and again where that was right.
    """

    def __init__(self, most: int, cost: float, verification: Callable[[int], float] = one, *, memory: float = 0.9):
        require_int("most", most, 1)
        require_float("cost", cost, 0.0)
        require_float("memory", memory, 0.0, 1.0, open_high=True)
        self.most, self.cost, self.verification, self.memory = most, cost, verification, memory
        self.accepted = self.tested = 0.0
        self.idle = EVERY - 1  # passes in a row for which nothing seemed worth proposing; the first one is tried

    @property
    def alpha(self) -> float:
        """The estimated chance of acceptance, beginning at 1/2."""
        return (self.accepted + 1) / (self.tested + 2)

    def choose(self) -> int:
        gamma = best_gamma(self.alpha, self.cost, self.verification, most=self.most)
        self.idle = 0 if gamma else self.idle + 1
        return gamma or int(self.idle % EVERY == 0)

    def observe(self, step: Pass) -> None:
        if 0 < step.proposed == step.accepted:
            self.idle = EVERY - 1
        self.accepted = self.memory * self.accepted + step.accepted
        self.tested = self.memory * self.tested + step.tested


@dataclass(frozen=True)
class Statistics:
    """Sums over passes. Places after a rejection are never tested, so the acceptance rate leaves them out."""

    passes: int
    proposed: int
    tested: int
    accepted: int
    tokens: int

    @property
    def acceptance(self) -> float:
        """Accepted over tested places: in a line the alpha of law.py; NaN where nothing was proposed."""
        return self.accepted / self.tested if self.tested else float("nan")

    tokens_per_pass = property(lambda self: self.tokens / self.passes if self.passes else float("nan"))


def statistics(passes: Iterable[Pass]) -> Statistics:
    """What the passes of one text or of several add up to."""
    each = [(1, p.proposed, p.tested, p.accepted, len(p.tokens)) for p in passes]
    return Statistics(*map(sum, zip(*each, strict=True))) if each else Statistics(0, 0, 0, 0, 0)
