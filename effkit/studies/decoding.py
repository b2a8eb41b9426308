"""What each way to guess gives, on each model: recorded by `python -m effkit study decoding`, on an idle machine.

A cell is one model and one draft. For each kind of text and temperature it holds tokens a pass, how many proposals were
accepted, and the seconds of the same texts with the draft and without, in turns, both by the fused kernels of chapter 07.
Where transformers knows the draft, too, it writes the same greedy texts in the same turns, with its own cache and settings.
Texts are held-out ones continued, and code edited: a held-out function, and the head of its copy under another name.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effkit import zoo
from effkit.caching import Fused
from effkit.core.generation import Sampler
from effkit.core.recipe import to_json
from effkit.core.task import Task
from effkit.core.technique import Pipeline, Technique
from effkit.distillation import Distill
from effkit.measure.latency import median_interval, samples
from effkit.pruning import Magnitude
from effkit.quantization import RTN
from effkit.speculative import (
    Eagle,
    EarlyExit,
    Jacobi,
    Lookahead,
    Medusa,
    PromptLookup,
    SkipLayers,
    Speculative,
    SpeculativeTree,
)
from effkit.speculative.law import statistics
from effkit.studies.study import Cells, Study
from effkit.zoo.data import stdlib_text
from effkit.zoo.use import Use

MODELS = {"gpt-small": torch.float32, "gpt-target": torch.bfloat16, "smollm2": torch.bfloat16}
KINDS, TEMPERATURES = ("held out", "edits"), (0.0, 0.8)
TRIALS, PROMPT, NEW, ROUNDS = 4, 64, 64, 7  # texts of each kind, tokens of a held-out one to begin with, new ones, times each is timed
LESSONS = 400_000  # tokens of the training text that a draft may learn from


def drafts(model: str) -> dict[str, Technique]:
    """In words -> the technique."""
    found: dict[str, Technique] = {
        "prompt lookup": PromptLookup(), "Jacobi": Jacobi(), "lookahead": Lookahead(),
        "half of the blocks": Speculative(EarlyExit(0.5)),
        "5 of 6 blocks, the least missed one out": Speculative(SkipLayers(1 / 6, examples=4), gamma=2),
        "a copy in 4 bits": Speculative(RTN(bits=4)), "a copy without half of its weights": Speculative(Magnitude(0.5)),
    }  # fmt: skip
    if model != "smollm2":  # effkit study eagle trains for that one
        found["a third of the blocks, distilled"] = Speculative(Distill(EarlyExit(1 / 3), temperature=1.0, epochs=2))
        found |= {"Medusa": Medusa(steps=300, lr=1e-2, nodes=12), "EAGLE": Eagle(steps=300)}
    if model == "gpt-target":
        for name in ("gpt-small", "gpt-draft", "gpt-draft-distilled"):
            found[name] = Speculative(named := Pipeline((Use(name), Fused())))
        found["gpt-draft-distilled, a tree"] = SpeculativeTree(named)
        found["gpt-draft-distilled, gamma adapts"] = Speculative(named, gamma=8, cost=0.25)
    return found


@cache
def loaded(name: str) -> tuple[Any, Task]:
    """The model, and its task with a short training text."""
    model, task = zoo.load(name, MODELS[name])
    if task.train is None:
        return model, task
    return model, replace(task, train=replace(task.train, ids=task.train.ids[:LESSONS]))  # type: ignore[attr-defined, type-var]


def prompts(name: str, kind: str) -> list[Int[Tensor, "1 n"]]:
    """What texts of this kind begin with."""
    if kind == "held out":
        return [loaded(name)[1].val.at(i)[0][:1, :PROMPT] for i in range(TRIALS)]  # type: ignore[union-attr]
    coder, first = zoo.tokenizer(name), (part for text in stdlib_text("val") for part in functions(text)[:1])
    return [torch.tensor([coder.encode(next(first), add_special_tokens=False).ids]) for _ in range(TRIALS)]


def functions(text: str) -> list[str]:
    """Functions of a module, 8 to 15 lines long, each with the head of its copy under another name."""
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and 8 <= len(lines := text.splitlines()[node.lineno - 1 : node.end_lineno]) <= 15:
            found.append("\n".join((*lines, "", "", lines[0].replace(node.name, f"{node.name}_2", 1), "")))
    return found


def raced(
    plain: Any, drafting: Any, begun: Sequence[Tensor], temperature: float, *, new: int, rounds: int, peers: Mapping[str, Callable] = {}
) -> dict:  # fmt: skip
    """What a draft gives, and the seconds that the texts take without it and with it, round by round."""
    sampler = Sampler(temperature=temperature)
    write = lambda decode, model: [list(decode(model, ids, new, sampler=sampler, rng=torch.Generator().manual_seed(i))) for i, ids in enumerate(begun)]  # noqa: E731
    found = statistics(step for steps in write(drafting.decoding.passes, drafting) for step in steps)
    runs = {"plain": partial(write, plain.decoding, plain), "drafting": partial(write, drafting.decoding, drafting), **peers}
    seconds = samples(runs, min_repeats=rounds, budget_s=0.0, warmup=1)
    counted = {"tokens a pass": found.tokens_per_pass, "acceptance": found.acceptance, "proposed a pass": found.proposed / found.passes}
    return counted | {"seconds": {name: [round(s, 4) for s in each.tolist()] for name, each in seconds.items()}}


def ratio(cell: dict, slow: str = "plain", quick: str = "drafting") -> tuple[float, float, float]:
    """Seconds over seconds, round by round: the median and its interval at 95 %."""
    ratios = [one / other for one, other in zip(cell["seconds"][slow], cell["seconds"][quick], strict=True)]
    return (median(ratios), *median_interval(ratios))


def theirs(model: Any, draft: Technique, begun: Sequence[Tensor]) -> dict[str, Callable]:
    """The same greedy texts by transformers' own generation, plainly and with this draft; nothing where it does not know it."""
    how: dict[str, Any] = {}
    if isinstance(draft, PromptLookup):
        how = {"prompt_lookup_num_tokens": draft.gamma, "max_matching_ngram_size": draft.ngram}
    elif isinstance(draft, Speculative) and isinstance(draft.draft, EarlyExit | Pipeline) and draft.cost is None:
        how = {"assistant_model": draft.draft(model).to_hf().eval()}  # type: ignore[operator]
    hf, told = model.to_hf().eval(), {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    write = torch.no_grad()(lambda **how: [hf.generate(ids, attention_mask=torch.ones_like(ids), **told, **how) for ids in begun])
    return {"theirs plain": write, "theirs drafting": partial(write, **how)} if how else {}


def cell(name: str, draft: Technique) -> dict:
    """Of each kind of text and temperature, what the draft gives."""
    model, task = loaded(name)
    plain: nn.Module = Fused()(model)
    drafting, found = draft(plain, task), {}
    for kind, temperature in product(KINDS, TEMPERATURES):
        begun = prompts(name, kind)
        peers = {} if temperature else theirs(model, draft, begun)
        found[f"{kind}; {temperature}"] = raced(plain, drafting, begun, temperature, new=NEW, rounds=ROUNDS, peers=peers)
    return found


def cells() -> Cells:
    return {f"{model}: {name}": partial(cell, model, draft) for model in MODELS for name, draft in drafts(model).items()}


def settings() -> dict:
    numbers = {"trials": TRIALS, "prompt": PROMPT, "new": NEW, "rounds": ROUNDS, "temperatures": list(TEMPERATURES), "lessons": LESSONS}
    precision = {name: str(dtype) for name, dtype in MODELS.items()}
    each = {f"{model}: {name}": to_json(draft) for model in MODELS for name, draft in drafts(model).items()}
    return numbers | {"models": precision, "drafts": each}


STUDY = Study("decoding", settings, cells)
