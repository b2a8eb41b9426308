"""Energy for something useful: a token, a correct answer.

Problem   "Half the energy an inference" can be bought with wrong answers, and with shorter ones.
Idea      Divide by what the user came for. A model that answers right with probability a spends E / a for each right
          answer: the wrong ones were paid for as well.
Left out  That a wrong answer may cost more than the energy of asking again.
Source    Schwartz et al. 2019, arXiv:1907.10597 (report cost with quality); the quotient is elementary.
"""

from dataclasses import replace

from effkit.core.checks import require_int
from effkit.core.report import Reading


def per_token(joules: Reading, tokens: int) -> Reading:
    """J a token, from the energy of a text of so many tokens."""
    require_int("tokens", tokens, 1)
    return replace(joules / tokens, unit="J/token", better="lower")


def per_correct(joules: Reading, accuracy: Reading) -> Reading:
    """J a correct answer, from the energy of one answer and the share of right ones; infinite where none is right."""
    if not 0 <= accuracy.value <= 1:
        raise ValueError(f"accuracy must be a fraction from 0 to 1, got {accuracy.value!r}: divide percent by 100")
    if accuracy.value == 0:
        return replace(joules, value=float("inf"), spread=None, unit="J/correct answer", better="lower")
    return replace(joules / accuracy, unit="J/correct answer", better="lower")
