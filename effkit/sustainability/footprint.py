"""Footprint: grams of CO2e of a computation, its electricity and its share in the machine.

Problem   Electricity is only what comes through the wire. The building draws more than its computers do, and the
          computer emitted before it was ever switched on.
Idea      operational = kWh * PUE * intensity of the grid; embodied = the machine's making, spread evenly over the hours
          in which it will have been busy. The cleaner the grid, the more the second part weighs.
Left out  Water, minerals, transport, and disposal; what the computation displaces; the hour of the day.
Source    Gupta et al. 2022, doi:10.1145/3470496.3527408, eq. 1 (T / LT of the embodied part); Luccioni et al. 2022,
          arXiv:2211.02001, section 4.1 (utilization); Lannelongue et al. 2021, doi:10.1002/advs.202100707 (PUE).
"""

from dataclasses import dataclass, replace

from effkit.core.checks import require_float
from effkit.core.report import Reading
from effkit.measure import carbon

HOURS_A_YEAR = 365 * 24


def electricity(hours: float, *, watts: float, devices: int = 1, pue: float = 1.0) -> float:
    """kWh of so many devices that draw so many watts each, and of the building around them."""
    return hours * devices * watts / 1000 * pue


def operational(kwh: float, *, intensity: float) -> float:
    """Grams of CO2e; intensity in gCO2e/kWh."""
    return kwh * intensity


def embodied(total: float, *, hours: float, years: float, utilization: float) -> float:
    """The share of `total` that falls on so many busy hours of a machine that lives `years`, busy that fraction of them.

    Over all its busy hours the shares add up to the total, so an idle machine makes each busy hour dearer.
    """
    return total * hours / (years * HOURS_A_YEAR * utilization)


@dataclass(frozen=True)
class Machine:
    """What making a machine emitted, in kg of CO2e, and how it will be used; ask its maker for the first."""

    kg: float
    years: float = 4.0
    utilization: float = 0.5

    def __post_init__(self):
        require_float("kg", self.kg, 0.0)
        require_float("years", self.years, 0.0, open_low=True)
        require_float("utilization", self.utilization, 0.0, 1.0, open_low=True, hint="the fraction of its life it is busy")


@dataclass(frozen=True)
class Footprint:
    """Grams of CO2e of one piece of work, in two parts."""

    operational: Reading
    embodied: Reading

    total = property(lambda self: self.operational + self.embodied)

    @property
    def embodied_share(self) -> float:
        """The part of the total that no cleaner grid can take away; 0 where nothing was emitted at all."""
        return self.embodied.value / self.total.value if self.total.value else 0.0

    def __str__(self) -> str:
        return f"{self.total}: {self.operational} operational, {self.embodied} embodied ({self.embodied_share:.0%})"


def footprint(
    joules: Reading, seconds: Reading, machine: Machine, *, place: str = "world", pue: float = 1.0
) -> Footprint:
    """Of work that takes this energy and keeps the machine busy this long. The embodied part rests on a stated life
    of the machine, so it is an estimate whatever the clock says."""
    if seconds.unit != "s":
        raise ValueError(f"seconds must be a time, got a reading in {seconds.unit}; pass latency, not throughput")
    per_second = embodied(1000 * machine.kg, hours=1 / 3600, years=machine.years, utilization=machine.utilization)
    share = replace(seconds * per_second, unit="gCO2e", provenance="estimated", better="lower", note=str(machine))
    return Footprint(carbon(joules, place, pue=pue), share)
