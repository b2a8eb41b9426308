"""What a chapter shows of itself: the tour and the combining theme walk these, so a new paradigm needs no change there."""

from collections.abc import Callable
from dataclasses import dataclass

from effkit.core.technique import Identity, Technique


@dataclass(frozen=True)
class Exhibit:
    """One row: a technique on an embedded model, with the work it is measured at.

    model      a name that zoo.load knows
    technique  made when needed, since some need other models
    work       "forward", "decode" or "train": which of measure's workloads says whether it pays
    batch      rows of the forward pass or of the training step
    baseline   what it is compared with; the unchanged model unless a chapter says otherwise
    """

    model: str
    technique: Callable[[], Technique]
    work: str = "forward"
    batch: int = 1
    baseline: Callable[[], Technique] = Identity


@dataclass(frozen=True)
class Showcase:
    """A paradigm's rows in the tour, the quick one first."""

    paradigm: str
    exhibits: tuple[Exhibit, ...]
