"""The roofline: what this machine can do at best, measured.

Problem   Whether fewer operations or fewer bytes make a model faster depends on the machine; data sheets promise peaks
          that no matrix product reaches.
Idea      Work of intensity I (macs per byte moved) runs at min(peak, I * bandwidth) macs per second at most: below the
          ridge, peak / bandwidth, memory limits it, above it arithmetic. There are two memory roofs, in and out of
          cache, and a floor: a small operator costs its dispatch, however little it does.
Cost      About five seconds, and memory of twice the last-level cache (a quarter to one GiB).
Left out  GPUs; other instruction mixes than one large matrix product and one sum.
Source    Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from effkit.core.checks import require_choice
from effkit.core.report import Reading
from effkit.measure.latency import latency, rate

MIB = 2**20
SIZES = (256, 512, 1024, 2048)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
BUDGET_S = 1.5  # for one dtype; where it has no instructions for it, a processor may be hundreds of times slower
#: what speed hangs on, as Linux spells it
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16", "sve")


@dataclass(frozen=True)
class Processor:
    """Print it beside every figure: ratios of speeds do not carry over from one processor to the next."""

    name: str
    cores: int
    threads: int  # that torch uses
    features: tuple[str, ...]
    cache: int  # bytes of the last level, 0 where unknown

    def __str__(self) -> str:
        size = f", {self.cache / MIB:.0f} MiB cache" if self.cache else ""
        features = " ".join(self.features) or "features unknown"
        return f"{self.name}, {self.cores} cores, {self.threads} thread{'s' * (self.threads != 1)}, {features}{size}"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """This machine's processor; Linux names its features, elsewhere the name must do."""
    told = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", told)
    name = model[1] if model else platform.processor() or platform.machine()
    features = tuple(f for f in FEATURES if f in told.split())
    return Processor(name, os.cpu_count() or 1, torch.get_num_threads(), features, _last_level_cache())


@dataclass(frozen=True)
class Roofline:
    """rates: dtype -> side of the square matrices -> macs/s. reads: bytes -> B/s. dispatch: seconds an operator."""

    processor: Processor
    rates: dict[str, dict[int, Reading]]
    reads: dict[int, Reading]
    dispatch: Reading

    @property
    def peaks(self) -> dict[str, Reading]:
        """The best rate of each dtype, macs/s; twice that is flop/s."""
        return {dtype: _ranked(sweep)[-1] for dtype, sweep in self.rates.items()}

    @property
    def bandwidth(self) -> Reading:
        """Reading from memory, B/s: the largest array, which fits no cache."""
        return self.reads[max(self.reads)]

    @property
    def cache_bandwidth(self) -> Reading:
        """Reading from the caches, B/s: the best of the smaller arrays."""
        return _ranked({size: r for size, r in self.reads.items() if size < max(self.reads)})[-1]

    def attainable(self, intensity: float | Reading, dtype: str = "float32", *, cached: bool = False) -> Reading:
        """The most macs/s that work of this intensity (macs/B) can reach."""
        require_choice("dtype", dtype, tuple(self.rates), hint="what this machine could run was measured")
        value = intensity.value if isinstance(intensity, Reading) else intensity
        memory = (self.cache_bandwidth if cached else self.bandwidth) * value
        lower = min(self.peaks[dtype], memory, key=lambda r: r.value)
        return replace(lower, unit="macs/s", better="higher", note=str(self.processor))

    def bound(
        self, intensity: float | Reading, dtype: str = "float32", *, macs: float | None = None, cached: bool = False
    ) -> str:
        """What limits the work: "memory", "compute", or "dispatch".

        macs   how much one operator does; where that takes less time than calling it, dispatch is the limit
        """
        roof = self.attainable(intensity, dtype, cached=cached).value
        if macs is not None and macs / roof < self.dispatch.value:
            return "dispatch"
        return "compute" if roof >= self.peaks[dtype].value else "memory"

    def __str__(self) -> str:
        peaks = [f"{dtype}: at best {1e-9 * best.value:,.1f} Gmacs/s" for dtype, best in self.peaks.items()]
        out, inside = (r.value / 1e9 for r in (self.bandwidth, self.cache_bandwidth))
        reads = f"reading: {out:.1f} GB/s from memory, {inside:.1f} from cache"
        return "\n".join([str(self.processor), *peaks, reads, f"dispatch: {self.dispatch} an operator"])


def roofline(*, sizes: Sequence[int] = SIZES, largest: int | None = None) -> Roofline:
    """Measures this machine. largest: bytes of the array that fits no cache."""
    machine = processor()
    largest = largest or min(max(256 * MIB, 2 * machine.cache), 1024 * MIB)
    rates = {dtype: _sweep(dtype, sizes) for dtype in tqdm(DTYPES, desc="roofline", leave=False, delay=2)}
    one = torch.ones(1)
    dispatch = latency(lambda: one.add_(1.0), budget_s=0.1)
    return Roofline(machine, {d: s for d, s in rates.items() if s}, _reads(largest), dispatch)


def _sweep(dtype: str, sizes: Sequence[int]) -> dict[int, Reading]:
    """Rates of n x n matrix products; ends early where the next size would take too long or the machine cannot."""
    rates: dict[int, Reading] = {}
    deadline = time.perf_counter() + BUDGET_S
    for n in sorted(sizes):
        try:
            seconds = latency(_matrix_product(dtype, n), min_repeats=3, budget_s=BUDGET_S / 10, warmup=2)
        except (RuntimeError, NotImplementedError):  # this build has no such kernel
            break
        rates[n] = rate(n**3, seconds, "macs/s")
        if time.perf_counter() + 5 * 8 * seconds.value > deadline:  # twice the side is 8 times the work, done 5 times
            break
    return rates


def _matrix_product(dtype: str, n: int) -> Callable[[], torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, (n, n), generator=rng).to(DTYPES[dtype]) for _ in range(2))
    return lambda: torch._int_mm(a, b) if dtype == "int8" else torch.mm(a, b)


def _reads(largest: int) -> dict[int, Reading]:
    """Bytes per second of summing arrays of growing size."""
    whole = torch.ones(largest // 4)
    sizes = [s for s in (MIB // 4, MIB, 4 * MIB, 16 * MIB) if s < largest / 4] + [whole.numel() * 4]
    return {s: rate(s, latency(whole[: s // 4].sum, min_repeats=5, budget_s=0.15), "B/s") for s in sizes}


def _ranked(rates: dict[int, Reading]) -> list[Reading]:
    """Slowest first."""
    return sorted(rates.values(), key=lambda r: r.value)


def _last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the largest cache that Linux lists, 0 where it lists none."""
    told = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) for path in folder.glob("index*/size")]
    return max((int(m[1]) * (1024 if m[2] == "K" else MIB) for m in told if m), default=0)
