"""Latency: how long one call takes, and how sure of that we are.

Problem   One timing is an anecdote. The first call fills caches and allocators, the machine does other things, and a
          clock read around a microsecond of work measures the clock.
Idea      Warm up; time blocks of calls that last a millisecond or more; report the median of the blocks and, as
          spread, half their interquartile range. Functions that are compared take turns, so that drift hits all alike.
Cost      About `budget_s` seconds a function, and never fewer than `min_repeats` blocks.
Left out  Tails: a block averages over its calls, so that its range is narrower than that of single calls.
Source    Hoefler & Belli 2015, doi:10.1145/2807591.2807644 (rules 5 to 8); torch.utils.benchmark blocks alike, but
          runs one function after the other.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from effkit.core.checks import require_float, require_int
from effkit.core.report import Reading

Function = Callable[[], object]
BLOCK_S = 1e-3  # reading the clock costs some 50 ns, waiting for a GPU some 5 us: under 1 % of a block
MOST_BLOCKS = 2000
LEAD_IN_S = 0.05


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """An interval that covers the true median at least at this rate, whatever the distribution.

    Each of n independent samples falls below the median m with probability 1/2, so the number that do is
    B ~ Binomial(n, 1/2). The ordered samples x_(1) <= ... <= x_(n) miss m with [x_(k), x_(n+1-k)] only if B <= k - 1
    or B >= n + 1 - k, that is with probability 2 P(B <= k - 1). We take the largest k that keeps this within
    1 - confidence. Six samples are the fewest for 95 %: 2 / 2^6 = 3.1 %. Samples that drift are not independent, and
    then the interval is too narrow.

    Raises ValueError for too few samples. Source: Le Boudec 2010, Performance Evaluation, theorem 2.1.
    """
    require_float("confidence", confidence, 0.0, 1.0, open_low=True, open_high=True)
    n, tail, k = len(samples), 0, 0
    allowed = Fraction(1 - confidence) / 2 * 2**n  # of the 2^n equally likely patterns below / above, in whole numbers
    while k <= n // 2 and tail + math.comb(n, k) <= allowed:
        tail += math.comb(n, k)
        k += 1
    if k == 0:
        fewest = math.ceil(1 - math.log2(1 - confidence))
        raise ValueError(f"{n} samples cannot bound a median at {confidence:.0%}: take at least {fewest}")
    ordered = sorted(float(x) for x in samples)
    return ordered[k - 1], ordered[n - k]


def latency(function: Function, *, min_repeats: int = 7, budget_s: float = 1.0, warmup: int = 3) -> Reading:
    """Seconds a call: the median block, half the blocks' interquartile range as spread."""
    return interleaved({"": function}, min_repeats=min_repeats, budget_s=budget_s, warmup=warmup)[""]


def interleaved(
    functions: Mapping[str, Function], *, min_repeats: int = 7, budget_s: float = 1.0, warmup: int = 3
) -> dict[str, Reading]:
    """A fair race: seconds a call of each function, all of them timed in turns. budget_s is for each function."""
    timed = samples(functions, min_repeats=min_repeats, budget_s=budget_s, warmup=warmup)
    return {name: summary(seconds, "s", threads()) for name, seconds in timed.items()}


def samples(
    functions: Mapping[str, Function], *, min_repeats: int = 7, budget_s: float = 1.0, warmup: int = 3
) -> dict[str, Float[Tensor, " blocks"]]:
    """Seconds a call, block by block, in the order in which they were taken: block i of all functions is one round.

    warmup   untimed calls of each function before the first round, fewer where these alone exceed the budget; the
             last of them decides how many make a block
    """
    require_int("min_repeats", min_repeats, 1, MOST_BLOCKS)
    require_int("warmup", warmup, 1, hint="a first run is not a run")
    require_float("budget_s", budget_s, 0.0)
    expected = {name: _warmed(function, warmup, budget_s) for name, function in functions.items()}
    calls = {name: max(1, math.ceil(BLOCK_S / seconds)) for name, seconds in expected.items()}
    round_s = sum(max(seconds, BLOCK_S) for seconds in expected.values())
    rounds = min(MOST_BLOCKS, max(min_repeats, int(budget_s * len(functions) / round_s))) if functions else 0
    taken: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + budget_s * len(functions)
    for done in tqdm(range(rounds), desc="timing", leave=False, delay=2):
        if done >= min_repeats and time.perf_counter() > deadline:
            break
        for name, function in functions.items():
            if len(functions) > 1 and expected[name] < LEAD_IN_S:
                _block(function, 1)  # untimed: the others have filled the cache with their weights
            taken[name].append(_block(function, calls[name]))
    return {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in taken.items()}


def summary(values: Float[Tensor, " n"], unit: str, note: str = "") -> Reading:
    """The median of measured values, half their interquartile range as spread; less of them is better."""
    low, median, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return Reading(median, unit, "measured", (high - low) / 2, "lower", ", ".join(filter(None, [f"n = {len(values)}", note])))


def rate(amount: float, seconds: Reading, unit: str) -> Reading:
    """Amount per second, with the same relative spread."""
    value = amount / seconds.value
    return Reading(value, unit, "measured", value * (seconds.spread or 0.0) / seconds.value, "higher", seconds.note)


def threads() -> str:
    """How many threads torch uses, in words."""
    n = torch.get_num_threads()
    return f"{n} thread{'s' * (n != 1)}"


def synchronize() -> None:
    """Waits for the GPU, where one is in use: its calls return before their work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _warmed(function: Function, warmup: int, budget_s: float) -> float:
    """Seconds of the last of the first calls."""
    seconds, deadline = 0.0, time.perf_counter() + budget_s
    for call in range(warmup):
        if call and time.perf_counter() > deadline:
            break
        seconds = _block(function, 1)
    return max(seconds, 1e-9)


def _block(function: Function, calls: int) -> float:
    """Seconds a call over a block of calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) / calls
