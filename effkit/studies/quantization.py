"""What does each way of rounding cost? On two models, recorded: `python -m effkit study quantization`.

A cell is one recipe on one model: the cross-entropy of each held-out window, what a weight takes, the file's bytes. What
looks at calibration texts is run on three of them, so that their luck can be told. gpt-small reads Python's standard
library, SmolLM2 English; the latter's weights had been rounded to 4 bits in blocks of 32 before they were shipped, so that
4 bits in groups of 32 are left out there.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from statistics import fmean

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from effkit import zoo
from effkit.core.recipe import to_json
from effkit.core.task import Task
from effkit.core.technique import Identity, Technique
from effkit.measure import disk_bytes
from effkit.quantization import AWQ, FP8, GPTQ, MXFP4, NF4, RTN, W8A8, KMeans, MixedPrecision, SmoothQuant
from effkit.quantization.rescale import outliers_put_in
from effkit.studies.pairs import losses
from effkit.studies.study import Cells, Study

WINDOWS = {"gpt-small": 64, "smollm2": 24}  # of the test split: 256 tokens each, and 511
CALIBRATIONS = {"gpt-small": (0, 1, 2), "smollm2": (0,)}
EXAMPLES = {"gpt-small": 256, "smollm2": 72}
FORMATS = {
    "gpt-small": tuple((bits, size) for bits in (4, 3, 2) for size in (32, 64, 128, -1)),
    "smollm2": ((4, 64), (4, 128), (3, 32), (3, 64), (3, 128)),
}
#: one word apart: what rounds to a format of so many bits and weights a group
ROUNDING: dict[str, Callable[[int, int], Technique]] = {
    "RTN": lambda bits, size: RTN(bits, size),
    "least squares": lambda bits, size: RTN(bits, size, search="least-squares"),
    "AWQ": lambda bits, size: AWQ(bits, size),
    "GPTQ, left to right": lambda bits, size: GPTQ(bits, size, order=False),
    "GPTQ": lambda bits, size: GPTQ(bits, size),
    "GPTQ, least squares": lambda bits, size: GPTQ(bits, size, search="least-squares"),
}
OBSERVED = ("percentile", "kl", "real-zero", "hqq")
#: other grids than uniform ones; and widths that differ
OTHERS: dict[str, Technique] = {
    **{f"{search}, {bits} bits, groups of 32": RTN(bits, 32, search=search) for bits in (4, 3) for search in OBSERVED},  # type: ignore[arg-type]
    "symmetric, 4 bits, groups of 64": RTN(4, 64, symmetric=True),
    **{f"KMeans, {bits} bits": KMeans(bits=bits) for bits in (4, 3, 2)},
    "NF4": NF4(double=False),
    "NF4, double": NF4(),
    "MXFP4": MXFP4(),
    "FP8": FP8(),
    **{f"mixed, {bits} bits, {method}": MixedPrecision(bits, method=method) for bits in (3.0, 3.75) for method in ("exact", "greedy")},
    "mixed, 3.0 bits, exact, GPTQ": MixedPrecision(3.0, rounding=GPTQ()),
}
INTEGER: dict[str, Technique] = {
    "W8A8": W8A8(),
    "W8A8, outliers in float": W8A8(outliers=6.0),
    "SmoothQuant": SmoothQuant(),
    "W8A8, static": W8A8(activations="tensor"),
    "SmoothQuant, static": SmoothQuant(activations="tensor"),
    "SmoothQuant, static, searched": SmoothQuant(activations="tensor", alpha="search"),
}


def looks_at_texts(technique: Technique) -> bool:
    return hasattr(technique, "examples")


def luck_counts(technique: Technique) -> bool:
    """Whether it is run on each calibration text; sensitivities take many passes, and are measured once."""
    return looks_at_texts(technique) and not isinstance(technique, MixedPrecision)


def recipes(model: str) -> dict[str, Technique]:
    """Cell's name, without its model -> the technique."""
    formats = {f"{way}, {bits} bits, {words(size)}": make(bits, size) for bits, size in FORMATS[model] for way, make in ROUNDING.items()}
    found = {"unchanged": Identity(), **formats, **(OTHERS if model == "gpt-small" else {}), **INTEGER}
    return {name: replace(t, examples=EXAMPLES[model]) if luck_counts(t) else t for name, t in found.items()}  # type: ignore[type-var]


def words(size: int) -> str:
    return "rows" if size == -1 else f"groups of {size}"


@cache
def loaded(name: str) -> tuple[nn.Module, Task]:
    """A model and its task, cut to the windows that count, on a GPU where there is one; "gpt-small with outliers" is a
    construction."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, task = zoo.load(name.removesuffix(" with outliers"))
    if name.endswith(" with outliers"):
        model = outliers_put_in(model, rng=torch.Generator().manual_seed(0))
    task = replace(task, test=task.test.first(WINDOWS[name.removesuffix(" with outliers")]))  # type: ignore[union-attr]
    return model.to(device), task.to(device)


def calibrated(task: Task, which: int) -> Task:
    """The task with texts from another third of those to calibrate with."""
    ids = task.calib.ids  # type: ignore[union-attr]
    return replace(task, calib=replace(task.calib, ids=ids[which * (len(ids) // 3) :]))  # type: ignore[type-var]


def cell(name: str, technique: Technique, which: int) -> dict:
    model, task = loaded(name)
    changed = technique(model, calibrated(task, which))
    windows = losses(changed, task)
    claim = technique.claim(changed)
    counted = {"bits per weight": claim.value} if claim.unit == "bits per weight" else {}
    return {"loss": fmean(windows), "windows": windows, "bytes on disk": disk_bytes(changed).value, **counted}


def cells() -> Cells:
    """Ordered by calibration text, so that each is looked at once."""
    found = {}
    for model in WINDOWS:
        for which in CALIBRATIONS[model]:
            for name, technique in recipes(model).items():
                if which == 0 or luck_counts(technique):
                    text = f", text {which}" if looks_at_texts(technique) else ""
                    found[f"{model}: {name}{text}"] = partial(cell, model, technique, which)
    constructed = "gpt-small with outliers"
    for name, technique in {"unchanged": Identity(), **INTEGER}.items():
        found[f"{constructed}: {name}" + (", text 0" if looks_at_texts(technique) else "")] = partial(cell, constructed, technique, 0)
    return found


def settings() -> dict:
    made = {model: {name: to_json(technique) for name, technique in recipes(model).items()} for model in WINDOWS}
    return {"windows": WINDOWS, "calibrations": {k: list(v) for k, v in CALIBRATIONS.items()}, "recipes": made}


STUDY = Study("quantization", settings, cells)


def windows(study: dict, model: str, name: str) -> Float64[Tensor, "texts windows"]:
    """The loss of each held-out window, a row a calibration text."""
    cells = study["cells"]
    keys = [key for key in cells if key == f"{model}: {name}" or key.startswith(f"{model}: {name}, text ")]
    if not keys:
        raise KeyError(f"no cell {name!r} of {model} in the study; there are {', '.join(cells)}")
    return torch.tensor([cells[key]["windows"] for key in keys], dtype=torch.float64)


def added(study: dict, model: str, name: str, *, to: str = "unchanged") -> tuple[float, float]:
    """What a recipe adds to the loss of another, in nats a token: the mean, and one standard error. That is of the windows,
    whose luck both share, and where there are several calibration texts, of these as well."""
    losses, base = windows(study, model, name), windows(study, model, to).mean(0)
    gap, texts = losses.mean(0) - base, (losses - base).mean(1)
    luck = texts.var() / len(texts) if len(texts) > 1 else torch.zeros(())
    return gap.mean().item(), (gap.var() / len(gap) + luck).sqrt().item()


def verdict(study: dict, model: str, one: str, other: str) -> str:
    """Whether two recipes can be told apart by two standard errors, in words."""
    mean, error = added(study, model, one, to=other)
    return "can't be told apart from" if abs(mean) <= 2 * error else "loses less than" if mean < 0 else "loses more than"
