"""Training through the rounding, width by width: learned steps or extremes? Recorded: `python -m effkit study qat`.

A cell is one model, one way to find the grids of weights and inputs, one width, one learning rate, and one order of the
training images: the share of held-out images that it gets wrong, and the cross-entropy. Both ways have one grid a layer,
start from the shipped model, and pass over the same images as often. Each has a twin without training: trained at a rate that
moves no code, so that batch norms are estimated anew all the same.

The ResNet takes 20 seconds a pass, so it is rounded to 2 bits alone; its first and last layer have 8, as in Esser et al. 2019.
"""

import math
from dataclasses import replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch

from effkit import zoo
from effkit.core.recipe import to_json
from effkit.core.technique import Identity, Technique, evaluating
from effkit.quantization import LSQ, QAT
from effkit.studies.study import Cells, Study

SEEDS = (0, 1, 2)  # of the order in which images are trained on
RATES = (1e-3, 3e-3)  # each way takes the better one, by its validation images
STILL = 1e-9  # a learning rate that moves no code
WIDTHS = {"mlp": (4, 3, 2), "resnet": (2,)}
TRAINING: dict[str, Any] = {"mlp": dict(epochs=6), "resnet": dict(epochs=2, ends=8)}


def recipes(model: str) -> dict[str, Technique]:
    """Cell's name, without its model and seed -> the technique."""
    found: dict[str, Technique] = {"float": Identity()}
    for bits in WIDTHS[model]:
        both = dict(group_size=0, activation_bits=bits, **TRAINING[model])
        for way, technique in (("min-max", QAT(bits, **both)), ("LSQ", LSQ(bits, **both))):
            found[f"{way}, {bits} bits, untrained"] = replace(technique, lr=STILL, epochs=1)
            found |= {f"{way}, {bits} bits, {rate:g}": replace(technique, lr=rate) for rate in RATES}
    return found


loaded = cache(zoo.load)


def cell(name: str, technique: Technique, seed: int) -> dict:
    """The share of validation and of test images that the model gets wrong, and the cross-entropy of the latter, in nats."""
    model, task = loaded(name)
    changed: Any = technique(model, replace(task, train=replace(task.train, seed=seed)))  # type: ignore[type-var]
    with evaluating(changed), torch.no_grad():
        wrong = [round(1 - task.per_example(changed, images).mean().item(), 6) for images in (task.val, task.test)]  # type: ignore[misc, arg-type]
        loss = fmean(task.loss(changed(x), (x, y)).item() for x, y in task.test)  # type: ignore[misc, union-attr]
    return {"wrong in validation": wrong[0], "wrong": wrong[1], "loss": loss}


def cells() -> Cells:
    return {
        f"{model}: {name}, seed {seed}": partial(cell, model, technique, seed)
        for model in WIDTHS
        for name, technique in recipes(model).items()
        for seed in (SEEDS if getattr(technique, "lr", STILL) > STILL else SEEDS[:1])
    }


def settings() -> dict:
    return {"seeds": list(SEEDS), "recipes": {m: {name: to_json(t) for name, t in recipes(m).items()} for m in WIDTHS}}


STUDY = Study("qat", settings, cells)


def each_seed(study: dict, model: str, name: str, what: str = "wrong") -> list[float]:
    """One number a seed: the share of test images that are wrong, or another reading of a cell."""
    found = [cell[what] for key, cell in study["cells"].items() if key.startswith(f"{model}: {name}, seed ")]
    if not found:
        raise KeyError(f"no cell {name!r} of {model} in the study")
    return found


def trained(study: dict, model: str, way: str, bits: int) -> str:
    """The name of the cells of the learning rate that gets fewest validation images wrong."""
    names = [f"{way}, {bits} bits, {rate:g}" for rate in RATES]
    return min(names, key=lambda name: fmean(each_seed(study, model, name, "wrong in validation")))


def recovered(study: dict, model: str, way: str, bits: int, what: str = "wrong") -> float:
    """The share of what rounding without training costs that training brings back; NaN where it costs nothing."""
    mean = lambda name: fmean(each_seed(study, model, name, what))  # noqa: E731
    after, floats = mean(f"{way}, {bits} bits, untrained"), mean("float")
    return (after - mean(trained(study, model, way, bits))) / (after - floats) if after > floats else math.nan
