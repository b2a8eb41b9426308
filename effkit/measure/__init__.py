"""Measuring: numbers that say what they are of, where they come from and how much they vary.

    print(measure(model, task, Forward(batch=8)))
    print(compare({"float32": model, "4 bits": small}, task, Decode()))  # timed in turns; the first is the baseline

workload   what the model does meanwhile: Forward, Decode, TrainStep
latency    seconds, in fair races, with an interval for the median        quality    scores with standard errors, paired
size       parameters, nonzeros, the file that is written                 memory     held, and at the peak
macs       multiply-accumulates, counted as they run                      roofline   what the machine can do at best
energy     joules, from counters or estimated                             carbon     grams of CO2e
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from torch import nn

from effkit.core.report import Reading, Report, Table
from effkit.core.task import Task
from effkit.core.technique import evaluating
from effkit.measure.carbon import carbon, grid_intensity, places
from effkit.measure.energy import Power, energy, once
from effkit.measure.latency import interleaved, latency, median_interval, rate, samples
from effkit.measure.macs import Counted, count, flops, intensity, macs, plain
from effkit.measure.memory import peak, resident
from effkit.measure.quality import Paired, mcnemar, paired, quality
from effkit.measure.roofline import Processor, Roofline, processor, roofline
from effkit.measure.size import disk_bytes, nonzeros, parameters
from effkit.measure.workload import Decode, Forward, TrainStep, Work

FORWARD = Forward()
score = quality  # `quality` is also the name of a switch below


def measure(
    model: nn.Module, task: Task, work: Work = FORWARD, *,
    quality: bool = True, name: str = "model", min_repeats: int = 7, budget_s: float = 1.0,
) -> Report:  # fmt: skip
    """Readings of one model: its score on the test split, sizes, macs, latency, throughput and energy of the work.

    quality    False leaves out the score, which needs the task's per_example and test
    min_repeats, budget_s   how many blocks at least, and how many seconds, go into the latency
    """
    return compare({name: model}, task, work, quality=quality, min_repeats=min_repeats, budget_s=budget_s)[name]


def compare(
    models: Mapping[str, nn.Module], task: Task, work: Work = FORWARD, *,
    quality: bool = True, title: str = "", min_repeats: int = 7, budget_s: float = 1.0,
) -> Table:  # fmt: skip
    """One row a model, the first being the baseline; latencies are taken in turns, budget_s seconds a model."""
    if not models:
        raise ValueError("compare got no models; pass {name: model}, the baseline first")
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        runs = {name: work.prepare(model, task) for name, model in models.items()}
        seconds = interleaved(runs, min_repeats=min_repeats, budget_s=budget_s)
        table = Table(title=title)
        for name, model in models.items():
            readings = {task.score.name: score(model, task)} if quality else {}
            readings |= _held(model, task, work)
            readings |= _used(runs[name], seconds[name], work.items(task), budget_s)
            table.add(Report(name, readings, str(work)))
    return table


def _held(model: nn.Module, task: Task, work: Work) -> dict[str, Reading]:
    """What does not depend on the clock."""
    eager, held = plain(model), resident(model)
    most = peak(lambda: work.prepare(model, task)())
    most = most if work.copies else replace(most + held, better="lower", note="weights and the most alive at once")
    return {
        "bytes on disk": disk_bytes(eager),
        "resident memory": held,
        "peak memory": most,
        "parameters": parameters(eager),
        "nonzeros": nonzeros(eager),
        "macs": count(work.prepare(eager, task)),
    }


def _used(run: Callable[[], object], seconds: Reading, items: tuple[int, str], budget_s: float) -> dict[str, Reading]:
    """Time and energy of one unit of work, and how much gets done in a second."""
    return {
        "latency": seconds,
        "throughput": rate(items[0], seconds, f"{items[1]}/s"),
        "energy": energy(run, seconds=seconds, budget_s=budget_s),
    }


__all__ = [
    "Counted", "Decode", "Forward", "Paired", "Power", "Processor", "Roofline", "TrainStep", "Work",
    "carbon", "compare", "count", "disk_bytes", "energy", "flops", "grid_intensity", "intensity", "interleaved",
    "latency", "macs", "mcnemar", "measure", "median_interval", "nonzeros", "once", "paired", "parameters", "peak", "places",
    "processor", "quality", "resident", "roofline", "samples",
]  # fmt: skip
