"""Energy: joules of a piece of work, from a counter where there is one.

Problem   Few machines let a program read their energy counters, and a number multiplied from a data sheet looks just
          like a measurement.
Idea      With a counter (RAPL on Intel and AMD under Linux, NVML on NVIDIA GPUs), run the work for a second and take
          differences: measured. Without one, latency times a stated power with an interval: estimated. Such an
          estimate holds no evidence beyond the latency; it only translates it.
Limits    RAPL counts the whole package, idle power and other programs included, and only root may read it unless
          allowed (sudo chmod a+r /sys/class/powercap/*/energy_uj). It is renewed every millisecond and wraps around
          after some 65 or 262 kJ, minutes to an hour of full load; a call that may have lasted longer is estimated.
Source    Khan et al. 2018, doi:10.1145/3177754 (RAPL); Lannelongue et al. 2021, doi:10.1002/advs.202100707 (Power).
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import trange

from effkit.core.checks import require_float
from effkit.core.report import Reading
from effkit.measure.latency import latency, summary, synchronize, threads

POWERCAP = Path("/sys/class/powercap")
Result = TypeVar("Result")
WINDOWS = 5  # differences taken, so that there is a spread
MOST_WATTS = 400  # of one package at full load: a counter that could wrap twice between two looks is not believed


class Rapl:
    """The processor's counters: its packages, and the memory where that has a counter of its own. Cores and graphics
    are parts of a package, psys contains all, and intel-rapl-mmio is the same once more: none of them is added."""

    def __init__(self, root: Path = POWERCAP):
        self.zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _adds_up(zone)]
        self.name = "RAPL " + ", ".join((zone / "name").read_text().strip() for zone in self.zones)
        self._last = self._read()
        self._total = 0

    def joules(self) -> float:
        """Since this object was made. A counter that is lower than before has wrapped around."""
        now = self._read()
        self._total += sum((n - last) % reach for (n, reach), (last, _) in zip(now, self._last, strict=True))
        self._last = now
        return self._total / 1e6

    @property
    def seconds(self) -> float:
        """How long one may look away without missing a wrap."""
        return min((reach / 1e6 / MOST_WATTS for _, reach in self._last), default=math.inf)

    def _read(self) -> list[tuple[int, int]]:
        """(microjoules, where they begin anew) of each zone."""
        return [tuple(int((z / f).read_text()) for f in ("energy_uj", "max_energy_range_uj")) for z in self.zones]  # type: ignore[misc]


def _adds_up(zone: Path) -> bool:
    energy, name = zone / "energy_uj", zone / "name"
    readable = energy.exists() and os.access(energy, os.R_OK) and name.exists()
    return readable and name.read_text().strip().startswith(("package", "dram"))


class Nvml:
    """The current NVIDIA GPU's counter, millijoules since its driver was loaded. Needs the library pynvml."""

    def __init__(self):
        self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._handle = self._nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        self.name, self.seconds = "NVML", math.inf
        self.joules()  # older GPUs have no counter, and say so here

    def joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


def counters(root: Path = POWERCAP) -> list[Rapl | Nvml]:
    """The counters that this process may read; none where a GPU is in use that has none, for its part would be missing."""
    rapl = Rapl(root)
    found: list[Rapl | Nvml] = [rapl] if rapl.zones else []
    if torch.cuda.is_initialized():
        try:
            found.append(Nvml())
        except Exception:  # noqa: BLE001 (no pynvml, no driver, no counter: its own types of error come with it)
            return []
    return found


@dataclass(frozen=True)
class Power:
    """Watts of one busy core, and the range it may lie in.

    12 W is what Green Algorithms takes for an unknown processor; 4 to 24 W is the range of thermal design power per
    core in its table, from servers with 64 cores to old desktops. Memory, board and power supply are left out.
    """

    core: float = 12.0
    low: float = 4.0
    high: float = 24.0

    def __post_init__(self):
        require_float("low", self.low, 0.0)
        require_float("core", self.core, self.low, self.high, hint="it lies between low and high")

    def reading(self) -> Reading:
        """Watts with as many cores busy as torch has threads; the spread is half the interval's width."""
        n = torch.get_num_threads()
        return Reading(n * self.core, "W", "estimated", n * (self.high - self.low) / 2)


def energy(
    function: Callable[[], object], *, seconds: Reading | None = None, power: Power = Power(),
    meters: Sequence[Rapl | Nvml] | None = None, budget_s: float = 1.0,
) -> Reading:  # fmt: skip
    """Joules a call: measured by counters where they move, else estimated as latency times power.

    seconds  latency of the function, if known;  meters   counters to read; those of this machine by default
    """
    seconds = latency(function, budget_s=budget_s) if seconds is None else seconds
    meters = counters() if meters is None else meters
    if meters:
        counted = _counted(function, meters, max(1, math.ceil(budget_s / WINDOWS / seconds.value)))
        if counted.value > 0:  # virtual machines may show counters that stand still
            return counted
    return _estimated(seconds, power)


def once(function: Callable[[], Result], *, power: Power = Power()) -> tuple[Result, Reading, Reading]:
    """What a single call returns, its seconds, and its joules: for work too dear to repeat. One sample has no spread,
    but an assumed power keeps its own."""
    meters = counters()
    before, start = sum(meter.joules() for meter in meters), time.perf_counter()
    result = function()
    synchronize()
    seconds = Reading(time.perf_counter() - start, "s", "measured", better="lower", note=f"n = 1, {threads()}")
    used = sum(meter.joules() for meter in meters) - before
    name = " and ".join(meter.name for meter in meters)
    counted = Reading(used, "J", "measured", better="lower", note=f"n = 1, {name}")
    seen = used > 0 and seconds.value < min(meter.seconds for meter in meters)
    return result, seconds, counted if seen else _estimated(seconds, power)


def _estimated(seconds: Reading, power: Power) -> Reading:
    note = f"{seconds.value:.3g} s times {power.core:g} W a core ({power.low:g} to {power.high:g}), {threads()}, all busy"
    note += "; the GPU is not in it" if torch.cuda.is_initialized() else ""
    return replace(seconds * power.reading(), unit="J", better="lower", note=note)


def _counted(function: Callable[[], object], meters: Sequence[Rapl | Nvml], calls: int) -> Reading:
    """Median and interquartile range of joules a call over some windows of several calls."""
    taken = []
    for _ in trange(WINDOWS, desc="energy", leave=False, delay=2):
        before = sum(meter.joules() for meter in meters)
        for _ in range(calls):
            function()
        synchronize()
        taken.append((sum(meter.joules() for meter in meters) - before) / calls)
    return summary(torch.tensor(taken, dtype=torch.float64), "J", " and ".join(meter.name for meter in meters))
