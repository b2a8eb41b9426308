"""Three published accounts, from their own inputs, to within rounding.

Problem   A figure such as "GPT-3 emitted 552 t" travels without its inputs. Which of them could you check?
Idea      Each line of these accounts is a product and quotient of a few published inputs. An input printed as 3.1 lies
          between 3.05 and 3.15; carry that through, and the published result must overlap what comes out.
Limits    Agreement shows that the arithmetic is sound, not that the inputs are true: BLOOM's energy is hours times the
          power on the data sheet, Strubell's a short sample multiplied up, and both say so.
Source    Luccioni et al. 2022, arXiv:2211.02001; Strubell et al. 2019, arXiv:1906.02243, eq. 1, 2 and table 3;
          Patterson et al. 2021, arXiv:2104.10350, table 4.
"""

import math
from dataclasses import dataclass

from effkit.core.report import Reading

Number = float | str  # a float is exact; a text is rounded to the digits that it shows


def span(number: Number) -> tuple[float, float]:
    """The interval that a printed number stands for: "3.1" is 3.05 to 3.15, "1,287" is 1286.5 to 1287.5."""
    if not isinstance(number, str):
        return number, number
    digits = number.replace(",", "")
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    return float(digits) - half, float(digits) + half


def value(number: Number) -> float:
    return float(number.replace(",", "")) if isinstance(number, str) else number


@dataclass(frozen=True)
class Line:
    """One published figure: `inputs` multiplied, `over` divided by, each with its name."""

    what: str
    unit: str
    published: str
    inputs: dict[str, Number]
    over: dict[str, Number]
    source: str

    def computed(self) -> Reading:
        """From the inputs alone; the spread is half the interval that their rounding leaves open."""
        low, high = self.bounds()
        middle = math.prod(map(value, self.inputs.values())) / math.prod(map(value, self.over.values()))
        return Reading(middle, self.unit, "recorded", (high - low) / 2, "lower", self.source)

    def bounds(self) -> tuple[float, float]:
        tops, bottoms = (list(map(span, numbers.values())) for numbers in (self.inputs, self.over))
        low = math.prod(t[0] for t in tops) / math.prod(b[1] for b in bottoms)
        return low, math.prod(t[1] for t in tops) / math.prod(b[0] for b in bottoms)

    @property
    def agrees(self) -> bool:
        """The published figure, as rounded, overlaps what the inputs, as rounded, allow."""
        (low, high), (least, most) = self.bounds(), span(self.published)
        return low <= most * (1 + 1e-12) and least <= high * (1 + 1e-12)


def _line(what, unit, published, source, inputs, over=None) -> Line:
    return Line(what, unit, published, inputs, over or {}, source)


_LUCCIONI = "arXiv:2211.02001"
_GPU_HOURS = {"GPU hours": 1_082_990.0}
# a server 2,500 kg and a GPU 150 kg, eight of them in a server: 2500 / 8 + 150
_LIFE = {"years": 6.0, "hours a year": 8760.0, "share of it busy": 0.85, "kg a tonne": 1000.0}
_FRANCE = {"gCO2e/kWh": 57.0, "t a g": 1e-6}

#: of the final training run of the 176-billion-parameter model
BLOOM = (
    _line("BLOOM, dynamic energy", "kWh", "433,196", _LUCCIONI, _GPU_HOURS | {"kW, data sheet": 0.4}),
    _line("BLOOM, dynamic", "t", "24.7", _LUCCIONI, {"kWh": "433,196"} | _FRANCE),
    _line("BLOOM, idle and network", "t", "14.6", _LUCCIONI, {"kWh": "256,646"} | _FRANCE),
    _line("BLOOM, making the machines", "t", "11.2", _LUCCIONI, _GPU_HOURS | {"kg a GPU and 1/8 server": 462.5}, _LIFE),
)

#: what the lines of BLOOM in tonnes add up to, as published
BLOOM_TOTAL = "50.5"


def bloom_total() -> float:
    """Tonnes of CO2e: electricity that computed, electricity that waited, and the machines."""
    return sum(line.computed().value for line in BLOOM if line.unit == "t")


def _strubell(model: str, watts: str, hours: Number, kwh: str, pounds: str) -> tuple[Line, Line]:
    """p = 1.58 t (p_c + p_r + g p_g) / 1000, and CO2e = 0.954 p, in pounds."""
    source = "arXiv:1906.02243, table 3"
    energy = {"PUE": "1.58", "hours": hours, "W, all GPUs and host": watts, "kW a W": 1e-3}
    emitted = energy | {"lb/kWh": "0.954"}
    return _line(f"{model}, energy", "kWh", kwh, source, energy), _line(model, "lb", pounds, source, emitted)


STRUBELL = (
    *_strubell("Transformer base", "1415.78", "12", "27", "26"),
    *_strubell("Transformer big", "1515.43", "84", "201", "192"),
    *_strubell("ELMo", "517.66", "336", "275", "262"),
    *_strubell("BERT base", "12041.51", "79", "1507", "1438"),
    *_strubell("architecture search", "1515.43", "274,120", "656,347", "626,155"),
)


def _patterson(
    model: str, chips: int, days: str, watts: str, pue: str, mwh: str, intensity: str, tonnes: str
) -> tuple[Line, Line]:
    source = "arXiv:2104.10350, table 4"
    energy = {"chips": float(chips), "days": days, "hours a day": 24.0, "W a chip": watts, "PUE": pue, "MW a W": 1e-6}
    carbon = {"MWh": mwh, "t/MWh": intensity}
    return _line(f"{model}, energy", "MWh", mwh, source, energy), _line(model, "t", tonnes, source, carbon)


#: gross emissions, before the operator's own purchases of clean energy
PATTERSON = (
    *_patterson("T5", 512, "20", "310", "1.12", "85.7", "0.545", "46.7"),
    *_patterson("Meena", 1024, "30", "289", "1.09", "232", "0.415", "96.4"),
    *_patterson("GShard-600B", 1024, "3.1", "288", "1.09", "24.1", "0.201", "4.8"),
    *_patterson("Switch Transformer", 1024, "27", "245", "1.10", "179", "0.403", "72.2"),
    *_patterson("GPT-3", 10_000, "14.8", "330", "1.10", "1,287", "0.429", "552.1"),
)

ACCOUNTS: dict[str, tuple[Line, ...]] = {
    "Luccioni et al. 2022": BLOOM,
    "Strubell et al. 2019": STRUBELL,
    "Patterson et al. 2021": PATTERSON,
}
