"""Readings: numbers that say where they come from.

Problem   "1.8x faster" means nothing without how it was obtained and how much it varies.
Idea      A Reading carries value, unit, provenance and spread; arithmetic hands on the weakest provenance.
Source    Propagation of spread: to first order, spread times derivative, in quadrature (JCGM 100:2008, eq. 10).
"""

import html
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

#: weakest first; a ratio of a measurement and an estimate is an estimate
PROVENANCES = ("estimated", "recorded", "measured", "counted")
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


@dataclass(frozen=True)
class Reading:
    """One number. `spread` is in the same unit: half the interquartile range of a time, the standard
    error of a mean, half the interval of an estimate: always a half-width.

    `better` is "lower", "higher" or "" and says which way an improvement points.
    """

    value: float
    unit: str
    provenance: str
    spread: float | None = None
    better: str = ""
    note: str = ""

    def __post_init__(self):
        if self.provenance not in PROVENANCES:
            raise ValueError(f"provenance must be one of {', '.join(PROVENANCES)}, got {self.provenance!r}")

    def __truediv__(self, other: "Reading | float") -> "Reading":
        b, same = _value(other), isinstance(other, Reading) and other.unit == self.unit
        unit = "x" if same else self._unit_with(other, "/")
        return self._combine(other, self.value / b, unit, 1 / b, -self.value / b**2)

    def __mul__(self, other: "Reading | float") -> "Reading":
        return self._combine(other, self.value * _value(other), self._unit_with(other, "*"), _value(other), self.value)

    def __sub__(self, other: "Reading | float") -> "Reading":
        return self._combine(other, self.value - _value(other), self._same_unit(other), 1, -1)

    def __add__(self, other: "Reading | float") -> "Reading":
        return self._combine(other, self.value + _value(other), self._same_unit(other), 1, 1)

    def _unit_with(self, other, sign: str) -> str:
        return f"{self.unit}{sign}{other.unit}" if isinstance(other, Reading) else self.unit

    def _same_unit(self, other) -> str:
        if isinstance(other, Reading) and other.unit != self.unit:
            raise ValueError(f"cannot add {self.unit} and {other.unit}: convert one of them first")
        return self.unit

    def _combine(self, other, value: float, unit: str, by_self: float, by_other: float) -> "Reading":
        """by_self, by_other: derivatives of the value. `better` survives where like meets like: sums, differences, ratios."""
        if not isinstance(other, Reading):
            spread = None if self.spread is None else abs(by_self) * self.spread
            return replace(self, value=value, unit=unit, spread=spread)
        spreads = [slope * r.spread for r, slope in ((self, by_self), (other, by_other)) if r.spread is not None]
        weakest = min(self.provenance, other.provenance, key=PROVENANCES.index)
        alike = self.unit == other.unit and other.better in ("", self.better) and unit in (self.unit, "x")
        return Reading(value, unit, weakest, math.hypot(*spreads) if spreads else None, self.better if alike else "")

    @property
    def unsteady(self) -> bool:
        """True where the spread exceeds a tenth of the value: measure again before believing."""
        timed = self.provenance == "measured" and self.unit == "s"
        return timed and (self.spread or 0.0) > 0.1 * abs(self.value)

    def to_json(self) -> dict:
        return {"value": self.value, "unit": self.unit, "provenance": self.provenance, "spread": self.spread}

    def __str__(self) -> str:
        scale, unit = _scaled(self.value, self.unit)
        spread = "" if self.spread is None else f" ±{_digits(self.spread / scale)}"
        text = f"{_digits(self.value / scale)}{spread} {unit}".rstrip()
        return "~" * (self.provenance == "estimated") + text + " (!)" * self.unsteady


def _value(other) -> float:
    return other.value if isinstance(other, Reading) else float(other)


def _scaled(value: float, unit: str) -> tuple[float, str]:
    """The prefix that leaves 1 to 999 before the point: 0.0021 s is 2.1 ms, 2,097,152 B is 2 MiB."""
    size = abs(value)
    if unit == "s":
        return next(((s, u) for s, u in _TIMES if size >= s), _TIMES[-1] if size else (1.0, "s"))
    if unit == "B":
        return next(((s, u) for s, u in _BINARY if size >= s), (1.0, "B"))
    if unit in ("", "params", "macs", "flops", "nonzeros"):
        return next(((s, f"{p} {unit}".strip()) for s, p in _PREFIXES if size >= 10 * s), (1.0, unit))
    return 1.0, unit


def _digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


@dataclass(frozen=True)
class Report:
    """The readings of one model under one workload; a mapping from the reading's name."""

    name: str
    readings: dict[str, Reading]
    workload: str = ""

    def __getitem__(self, key: str) -> Reading:
        if key not in self.readings:
            raise KeyError(f"{self.name} has no reading {key!r}; it has {', '.join(self.readings)}")
        return self.readings[key]

    def __contains__(self, key: str) -> bool:
        return key in self.readings

    def __iter__(self) -> Iterator[str]:
        return iter(self.readings)

    def to_json(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return str(Table([self]))

    def _repr_html_(self) -> str:
        return Table([self])._repr_html_()

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(str(self))


@dataclass
class Table:
    """Reports side by side, the first being the baseline; text in a terminal, HTML in a notebook."""

    reports: list[Report] = field(default_factory=list)
    title: str = ""

    def add(self, report: Report) -> "Table":
        self.reports.append(report)
        return self

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for report in self.reports for name in report))

    def __getitem__(self, name: str) -> Report:
        for report in self.reports:
            if report.name == name:
                return report
        raise KeyError(f"no row {name!r}; there are {', '.join(r.name for r in self.reports)}")

    def __iter__(self) -> Iterator[Report]:
        return iter(self.reports)

    def __len__(self) -> int:
        return len(self.reports)

    def cells(self) -> list[list[str]]:
        """Header and rows as text; a reading that a row lacks is a dash; one that comes from elsewhere than most of its
        column, which the footnote names, says so itself."""
        whence = self.provenances()
        return [["", *whence], *([r.name, *(_cell(r.readings.get(c), most) for c, most in whence.items())] for r in self)]

    def provenances(self) -> dict[str, str]:
        """Column -> where most of its readings come from."""
        held = {c: [r[c].provenance for r in self if c in r] for c in self.columns}
        return {column: max(found, key=found.count) for column, found in held.items()}

    def to_json(self) -> str:
        return json.dumps([report.to_json() for report in self.reports], indent=1)

    def __str__(self) -> str:
        lines = _aligned(self.cells())
        return "\n".join(filter(None, [self.title, *lines, self.footnote()]))

    def footnote(self) -> str:
        """Says where each column's figures come from, what the marks mean, for those that occur, and what was timed."""
        readings, whence = [r for report in self.reports for r in report.readings.values()], self.provenances()
        marks = [f"workload: {w}" for w in dict.fromkeys(r.workload for r in self.reports) if w]
        marks += [f"{p}: {', '.join(c for c in whence if whence[c] == p)}" for p in PROVENANCES[1:] if p in whence.values()]
        marks += ["~ estimated"] if any(r.provenance == "estimated" for r in readings) else []
        widths = "± half the interquartile range of times, the standard error of scores"
        marks += [widths] if any(r.spread is not None for r in readings) else []
        busy = "(!) spread over 10 % of the median: the machine was busy"
        marks += [busy] if any(r.unsteady for r in readings) else []
        return "; ".join(marks)

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """What a notebook keeps beside the HTML, for whoever reads it as text."""
        printer.text(str(self))

    def _repr_html_(self) -> str:
        head, *rows = self.cells()
        th = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in head)
        cells = ["".join(f"<td>{html.escape(c)}</td>" for c in row[1:]) for row in rows]
        body = "".join(f"<tr><th scope='row'>{html.escape(r[0])}</th>{c}</tr>" for r, c in zip(rows, cells, strict=True))
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{th}</tr></thead><tbody>{body}</tbody></table><p><small>{html.escape(self.footnote())}</small></p>"


def _cell(reading: Reading | None, most: str) -> str:
    marked = reading is None or reading.provenance in (most, "estimated")  # an estimate has its ~
    return "-" if reading is None else str(reading) if marked else f"{reading} ({reading.provenance})"


def _aligned(rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]
