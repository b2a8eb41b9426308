"""Carbon: grams of CO2-equivalents of the electricity that was used.

Problem   The same joule emits twenty times as much in one country as in another, and more in the evening than at noon.
Idea      grams = kWh * intensity of the grid * PUE; PUE (power usage effectiveness) is all the electricity a data
          centre draws over what its computers use: 1 for a laptop.
Limits    data/grid_intensity.json holds rounded averages of a whole year: they rank places, and say nothing about an
          hour. Making the machine emits too, and is not in here.
Source    Intensities: see the table, each with year and source. The formula: Lannelongue et al. 2021,
          doi:10.1002/advs.202100707, eq. 1.
"""

import json
from dataclasses import replace

from effkit.core.checks import require_choice, require_float
from effkit.core.paths import data_dir
from effkit.core.report import Reading

JOULES_PER_KWH = 3.6e6


def places() -> dict[str, dict]:
    """The dated table: place -> value (gCO2e/kWh), year, source, provenance."""
    return json.loads((data_dir() / "grid_intensity.json").read_text(encoding="utf-8"))["places"]


def grid_intensity(place: str = "world") -> Reading:
    """gCO2e/kWh of a place, averaged over the year that the note names. Raises ValueError listing the places."""
    table = places()
    require_choice("place", place, tuple(table), hint="or multiply kWh by a figure of your own")
    row = table[place]
    return Reading(row["value"], "gCO2e/kWh", row["provenance"], better="lower", note=f"{row['year']}, {row['source']}")


def carbon(joules: Reading, place: str = "world", *, pue: float = 1.0) -> Reading:
    """Grams of CO2-equivalents of this energy at a place; at best as sure as the energy and the intensity are."""
    require_float("pue", pue, 1.0, hint="a data centre draws at least what its computers use")
    if joules.unit != "J":
        raise ValueError(f"carbon takes joules, got a reading in {joules.unit}; effkit.measure.energy gives joules")
    intensity = grid_intensity(place)
    grams = joules * (pue / JOULES_PER_KWH) * intensity
    note = f"{place}, {intensity.value:g} gCO2e/kWh, {intensity.note}"
    return replace(grams, unit="gCO2e", better="lower", note=note)
