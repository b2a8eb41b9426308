"""Hard limits: what a model must keep to be of any use where it goes.

Problem   A phone offers 2 MB and 10 ms; a model that needs more is not a little worse, it is none.
Idea      A limit is kept or missed, and a miss has a size: the share of the limit by which it is missed, so that bytes,
          seconds and scores can be compared. The search is drawn towards small misses; the answer has none.
Margin    A measured time varies from run to run. It must keep its limit with a margin, 10 % unless told otherwise:
          latency * (1 + margin) <= max_latency. Bytes and scores come out the same each time and need none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from effkit.core.checks import require_float, require_int
from effkit.core.report import Reading
from effkit.core.task import Score

BYTES, LATENCY = "bytes on disk", "latency"


@dataclass(frozen=True)
class Constraints:
    """Limits on the written file (bytes), on one unit of the workload (seconds), and on the score: the least accuracy,
    say, or, where less is better, the most bits per byte. None: no limit."""

    max_bytes: int | None = None
    max_latency: float | None = None
    min_score: float | None = None
    margin: float = 0.1

    def __post_init__(self):
        if self.max_bytes is not None:
            require_int("max_bytes", self.max_bytes, 1, hint="bytes of the file")
        if self.max_latency is not None:
            require_float("max_latency", self.max_latency, 0.0, open_low=True, hint="seconds")
        if self.min_score is not None:
            require_float("min_score", self.min_score, -1e30, 1e30, hint="in the unit of the task's score")
        require_float("margin", self.margin, 0.0, hint="the share by which a latency must stay below its limit")

    @property
    def count(self) -> int:
        """How many limits there are."""
        return sum(limit is not None for limit in (self.max_bytes, self.max_latency, self.min_score))

    def misses(self, readings: Mapping[str, Reading], score: Score) -> dict[str, float]:
        """Reading -> by what share of its limit it misses it; zero or less: kept. Only what has a limit, in order."""
        found = {}
        if self.max_bytes is not None:
            found[BYTES] = readings[BYTES].value / self.max_bytes - 1
        if self.max_latency is not None:
            found[LATENCY] = readings[LATENCY].value * (1 + self.margin) / self.max_latency - 1
        if self.min_score is not None:
            worse = (self.min_score - readings[score.name].value) * (1 if score.better == "higher" else -1)
            found[score.name] = worse / (abs(self.min_score) or 1.0)
        return found

    def describe(self, score: Score) -> str:
        """The limits in words."""
        at = "at least" if score.better == "higher" else "at most"
        size = f"at most {self.max_bytes:,} bytes on disk" if self.max_bytes is not None else ""
        time = f"at most {1e3 * self.max_latency:.4g} ms (with {self.margin:.0%} in hand)" if self.max_latency else ""
        least = f"{score.name} {at} {self.min_score:g}" if self.min_score is not None else ""
        return ", ".join(filter(None, (size, time, least))) or "no limits"
