"""What lossy caches cost on both models, every token predicted through the cache. Recorded: `python -m effkit study caching`.

A cell is one model and one cache: the bits that each token of some held-out windows costs, as the mean of each window, once
over all its tokens and once over the last quarter alone, behind a prompt that was read in one pass, for SnapKV acts on
prompts. gpt-small is given fewer key heads, too.
"""

import math
from functools import cache, partial

import torch
from torch import Tensor, nn

from effkit import zoo
from effkit.caching import H2O, GroupHeads, QuantizedKV, SnapKV, Window
from effkit.caching.lossy import Through
from effkit.core.recipe import to_json
from effkit.core.technique import Identity, Technique, evaluating
from effkit.studies.study import Cells, Study

WINDOWS = {"gpt-small": 8, "smollm2": 3}
LENGTH, PROMPT = 1023, 768  # tokens that are fed
RECENT = 16  # of a budget that is chosen by attention


def recipes() -> dict[str, Technique]:
    """Cell's name, without its model -> the technique."""
    found: dict[str, Technique] = {"everything": Identity()}
    for seen in (64, 256):
        found |= {f"{sinks} sinks, {seen}": Window(seen - sinks, sinks) for sinks in (0, 1, 4)}
        found |= {f"H2O by {score}, {seen}": H2O(seen, RECENT, score) for score in ("sum", "mean")}
        found |= {f"SnapKV, {seen}": SnapKV(seen, RECENT), f"SnapKV unsmoothed, {seen}": SnapKV(seen, RECENT, kernel=1)}
    for bits in (8, 4, 2):
        found |= {f"{bits} bits, keys by {keys}": QuantizedKV(bits, keys) for keys in ("channel", "token")}
    return found


def grouped() -> dict[str, Technique]:
    return {f"{heads} key heads, {steps} steps": GroupHeads(heads, steps) for heads in (2, 1) for steps in (0, 100)}


loaded = cache(zoo.load)


@torch.no_grad()
def bits(model: nn.Module, ids: Tensor, first: int | None) -> Tensor:
    """What each token costs, in bits, read in one pass or behind a prompt of `first` tokens."""
    chances = Through(model, first)(ids[None, :-1])[0].float().log_softmax(-1)
    return -chances.gather(1, ids[1:, None])[:, 0] / math.log(2)


def cell(name: str, technique: Technique) -> dict:
    model, task = loaded(name)
    changed, prompt = technique(model, task), PROMPT if isinstance(technique, SnapKV) else None
    text, each = task.test.ids, []  # type: ignore[union-attr]
    with evaluating(changed):
        for start in range(0, WINDOWS[name] * LENGTH, LENGTH):
            each.append(bits(changed, text[start : start + LENGTH + 1], prompt))
    every, late = ([round(b[at:].mean().item(), 5) for b in each] for at in (0, PROMPT))
    return {"bits": every, "bits behind the prompt": late}


def cells() -> Cells:
    each = {f"{model}: {name}": (model, technique) for model in WINDOWS for name, technique in recipes().items()}
    each |= {f"gpt-small: {name}": ("gpt-small", technique) for name, technique in grouped().items()}
    return {name: partial(cell, *what) for name, what in each.items()}


def settings() -> dict:
    return {"windows": WINDOWS, "length": LENGTH, "prompt": PROMPT, "recipes": {n: to_json(t) for n, t in (recipes() | grouped()).items()}}


STUDY = Study("caching", settings, cells)


def added(study: dict, model: str, name: str, what: str = "bits") -> tuple[float, float]:
    """Bits that the cache adds to a token, and the standard error over the windows."""
    ours, whole = (torch.tensor(study["cells"][f"{model}: {key}"][what]) for key in (name, "everything"))
    gap = ours - whole
    return gap.mean().item(), (gap.std() / len(gap) ** 0.5).item()
