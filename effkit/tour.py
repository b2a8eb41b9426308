"""The tour: every paradigm once, on the shipped models, with one table and one sentence of verdict each.

A row is an exhibit of a chapter's SHOWCASE, measured beside its baseline at its own workload. The verdicts are written
from the readings alone, so that on another machine, or with other numbers, they say something else.
"""

import html
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from effkit import plots, zoo
from effkit.catalog import PARADIGMS
from effkit.core import native
from effkit.core.paths import write_atomically
from effkit.core.report import Reading, Report, Table
from effkit.core.showcase import Exhibit, Showcase
from effkit.core.task import Task
from effkit.core.technique import Technique
from effkit.measure import Decode, Forward, Paired, TrainStep, Work, compare, processor
from effkit.measure.quality import contrast, scores, summary_of

Loader = Callable[[str], tuple[nn.Module, Task]]
_REPEATS, _BUDGET = 5, 1.0
_FASTER = 1.05  # a ratio nearer to 1 than this is no difference, whatever the spreads say


@dataclass(frozen=True)
class Stop:
    """One station: what was shown, the name of its task's score, its baseline's readings and its own, and the change
    of the score, example by example."""

    paradigm: str
    model: str
    score: str
    baseline: Report
    result: Report
    change: Paired

    @property
    def verdict(self) -> str:
        """One sentence from the numbers: smaller or not, faster or not and why, and what it costs in quality."""
        before, after = self.baseline, self.result
        smaller, faster = ratio(before, after, "bytes on disk") > _FASTER, speedup(before, after) > _FASTER
        joined = ", and " if smaller == faster else ", but "
        slower = 1 / speedup(before, after)
        how = f"{slower:.2f}x slower" if slower > _FASTER else "not faster"
        gain = f"{speedup(before, after):.2f}x faster here, because {_gain(before, after)}"
        speed = gain if faster else f"{how} here, because {_loss(before, after)}"
        return f"{after.name}: {_size(before, after)}{joined}{speed}{_training(self)}; {_score(self)}."


def tour(load: Loader = zoo.load, *, everything: bool = False) -> list[Stop]:
    """The first exhibit of each paradigm, or all of them; scores are of the whole held-out set."""
    load = cache(load)
    seen: dict[tuple[str, str], Tensor] = {}
    stations = [(s.paradigm, e) for s in showcases() for e in (s.exhibits if everything else s.exhibits[:1])]
    bar = tqdm(stations, desc="tour", unit="technique")
    stops = []
    for paradigm, exhibit in bar:
        bar.set_postfix_str(f"{paradigm} of {exhibit.model}")
        stops.append(visit(paradigm, exhibit, *load(exhibit.model), seen))
    return stops


def showcases() -> Iterator[Showcase]:
    """What each chapter shows of itself, in the order of the course."""
    return (import_module(f"effkit.{paradigm}").SHOWCASE for paradigm in PARADIGMS)


def visit(
    paradigm: str, exhibit: Exhibit, model: nn.Module, task: Task, seen: dict[tuple[str, str], Tensor]
) -> Stop:
    """Applies the technique and measures it beside its baseline, in turns. `seen` keeps scores for the next stop."""
    before, after = exhibit.baseline(), exhibit.technique()
    models = {title(before): before(model, task), title(after): after(model, task)}
    table = compare(models, task, workload(exhibit), quality=False, min_repeats=_REPEATS, budget_s=_BUDGET)
    reports: list[Report] = []
    values: list[Tensor] = []
    for technique, (name, made) in zip((before, after), models.items(), strict=True):
        key = (exhibit.model, repr(technique))
        if key not in seen:
            seen[key] = scores(made, task)
        values.append(seen[key])
        trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
        extra = {task.score.name: summary_of(seen[key], task), "trainable": Reading(trained, "params", "counted")}
        reports.append(replace(table[name], readings=extra | table[name].readings))
    return Stop(paradigm, exhibit.model, task.score.name, reports[0], reports[1], contrast(values[0], values[1], task))


def workload(exhibit: Exhibit) -> Work:
    works: dict[str, Work] = {"forward": Forward(exhibit.batch), "decode": Decode(prompt=64, new=64), "train": TrainStep(exhibit.batch)}
    return works[exhibit.work]


def title(technique: Technique) -> str:
    """A technique's name with the settings that its class does not set by default."""
    settings = [(f.name, getattr(technique, f.name), f.default) for f in fields(technique)]  # type: ignore[arg-type]
    return f"{type(technique).__name__}({', '.join(f'{n}={_short(v)}' for n, v, default in settings if v != default)})"


def _short(value: object) -> str:
    return title(value) if isinstance(value, Technique) else repr(value)


def ratio(before: Report, after: Report, reading: str) -> float:
    """before / after: over 1 where the technique needs less."""
    if reading not in before or reading not in after or not after[reading].value:
        return 1.0
    return before[reading].value / after[reading].value


def speedup(before: Report, after: Report) -> float:
    """The ratio of the latencies; 1 where the medians differ by no more than the wider spread."""
    old, new = before["latency"], after["latency"]
    apart = abs(old.value - new.value) > max(old.spread or 0.0, new.spread or 0.0)
    return ratio(before, after, "latency") if apart else 1.0


def _size(before: Report, after: Report) -> str:
    smaller = ratio(before, after, "bytes on disk")
    said = f"{_smaller(smaller)} on disk"
    if smaller > _FASTER and "parameters" in before:
        sixteen = 2 * before["parameters"].value / after["bytes on disk"].value
        said += f" than the float32 file ({_smaller(sixteen)} than 16 bits a weight)"
    return said


def _smaller(times: float) -> str:
    if 1 / _FASTER <= times <= _FASTER:
        return "no smaller"
    return f"{times:.1f}x smaller" if times > 1 else f"{1 / times:.1f}x larger"


def _training(stop: Stop) -> str:
    """Said where a technique trains what it adds, not where it merely has fewer, nor where packed codes can't be trained."""
    before, after = stop.baseline, stop.result
    fewer, added = ratio(before, after, "trainable"), ratio(before, after, "parameters") < 1
    untrained = " (none is trained yet: this is about a step)" * (before[stop.score].value == after[stop.score].value)
    return f", with {fewer:.0f}x fewer parameters to train{untrained}" if added and fewer > 2 else ""


def _gain(before: Report, after: Report) -> str:
    if (fewer := ratio(before, after, "macs")) > _FASTER:
        return f"it does {fewer:.1f}x fewer multiplications"
    if fewer < 1 / _FASTER:
        return f"it does {1 / fewer:.1f}x more multiplications, but in fewer passes over the weights"
    if (less := ratio(before, after, "resident memory")) > _FASTER:
        return f"it reads {less:.1f}x fewer bytes for the same multiplications"
    return "the same weights and multiplications are used with less work around them"


def _loss(before: Report, after: Report) -> str:
    if (fewer := ratio(before, after, "macs")) > _FASTER:
        return f"the {fewer:.1f}x fewer multiplications are not what takes the time at this size"
    if fewer < 1 / _FASTER:
        return f"it does {1 / fewer:.1f}x more multiplications"
    if ratio(before, after, "resident memory") > _FASTER:
        return "the bytes it saves cost more to unpack than a model of this size waits for them"
    return "it does the same multiplications on the same numbers"


def _score(stop: Stop) -> str:
    """How the score moved; noise is what the interval of the paired difference cannot tell from nothing."""
    name, old, new = stop.score, stop.baseline[stop.score], stop.result[stop.score]
    gain = (1 if new.better == "higher" else -1) * (new.value - old.value)
    if gain == 0:
        return f"{name} is the same, {new.value:.4g}"
    word = "better" if gain > 0 else "worse"
    low, high = stop.change.interval
    noise = " (within the noise)" if low <= 0 <= high else ""
    return f"{name} {word} by {abs(gain):.2g}, from {old.value:.4g} to {new.value:.4g}{noise}"


_SHOWN = ("bytes on disk", "latency", "macs")


def summary(stops: list[Stop]) -> Table:
    """One table: quality, bytes and latency of each baseline and each technique; its title says where kernels are missing."""
    rows = []
    for stop in stops:
        for report, role in ((stop.baseline, "baseline"), (stop.result, stop.paradigm)):
            quality = {"quality": replace(report[stop.score], unit=report[stop.score].unit or stop.score)}
            shown = quality | {k: report[k] for k in _SHOWN if k in report}
            rows.append(Report(f"{role}: {stop.model} {report.name}", shown))
    why = native.why_not("int probe;")
    return Table(rows, f"without native kernels: they run in PyTorch, slower, because {why}" if why else "")


def rows(stops: list[Stop]) -> list[dict]:
    """What tour.json holds: for each station its baseline's readings, then the technique's."""
    both = [(stop, report) for stop in stops for report in (stop.baseline, stop.result)]
    return [{"paradigm": s.paradigm, "technique": r.name, "model": s.model, **r.to_json()} for s, r in both]


def write(stops: list[Stop], folder: Path) -> None:
    """tour.json and a self-contained tour.html, each whole or not at all. Raises OSError naming a folder that can't be
    written."""
    write_atomically(folder / "tour.json", json.dumps(rows(stops), indent=1).encode())
    write_atomically(folder / "tour.html", page(stops).encode())


def page(stops: list[Stop]) -> str:
    """The table, the verdicts and a plot in one file that opens anywhere."""
    verdicts = "".join(f"<li><b>{html.escape(s.paradigm)}</b>: {html.escape(s.verdict)}</li>" for s in stops)
    picture = b64encode(plots.to_png(chart(stops))).decode()
    alt = "; ".join(f"{s.paradigm}: {ratio(s.baseline, s.result, 'latency'):.2f} times as fast" for s in stops)
    style = "body{font:16px/1.5 system-ui;max-width:72em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em;text-align:right}th[scope=row]{text-align:left}"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>The effkit tour</title><style>{style}</style><h1>The effkit tour</h1>"
        f"<p>{html.escape(str(processor()))}; torch {torch.__version__}.</p>{summary(stops)._repr_html_()}"
        f"<h2>Verdicts</h2><ul>{verdicts}</ul><img src='data:image/png;base64,{picture}' alt='{html.escape(alt)}'></html>"
    )


def chart(stops: list[Stop]):
    """How many times faster, one bar a paradigm: 1 is no gain."""
    gains = {f"{s.paradigm} ({s.model})": s.baseline["latency"] / s.result["latency"] for s in stops}
    label = "baseline's latency over the technique's (1 = no gain)"
    return plots.bars(gains, title="Which paradigm is faster here?", xlabel=label, ylabel="paradigm")
