"""How fast each model writes, by each cache and each way to guess: `python -m effkit study decoding`, on an idle machine.

Drafts    A cell is one model and one draft. For each kind of text and temperature it holds tokens a pass, how many proposals
          were accepted, and the seconds of the same texts with the draft and without, in turns, both by the fused kernels
          of chapter 07, and of reading the prompts by the target, which is in both. Where transformers knows
          the draft, too, it continues the same prompts greedily in the same turns, with its own cache and settings. How
          many greedy texts part from ours is counted.
          Of a draft model, the tokens a pass are also foretold: from sum min(p, q) by the law, and place by place, on
          texts that the target wrote alone.
Texts     Held-out ones continued, and code edited: a held-out function and, as an example, the same under another name,
          then another function, and the head of its copy.
Caches    A cell is one model in one precision: greedy texts by every cache and by transformers with each of its own.
Batches   Several texts at once, with the best draft and without.
Serving   Tokens a second at the fastest arrivals at which 95 % of the answers come within one bound, by each policy; and
          percentiles of the seconds to an answer at the same arrivals.
Passes    Some passes over so many tokens, in one row.
Agreement Of what drafts made of SmolLM2 draw, how much it accepts, without the clock.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effkit import zoo
from effkit.caching import Fused, Preallocated, Recompute, Window
from effkit.caching.batching import POLICIES, serve, throughput_at_latency
from effkit.caching.streams import paced, stream
from effkit.core.generation import Sampler
from effkit.core.recipe import to_json
from effkit.core.task import Task
from effkit.core.technique import Identity, Pipeline, Technique
from effkit.distillation import Distill
from effkit.measure.latency import median_interval, samples
from effkit.pruning import Magnitude
from effkit.quantization import GPTQ, RTN
from effkit.speculative import Eagle, EarlyExit, Jacobi, Lookahead, Medusa, PromptLookup, SkipLayers, Speculative
from effkit.speculative.batch import speculative_batch
from effkit.speculative.law import expected_passes, expected_tokens, statistics
from effkit.speculative.speculate import SpeculativeDecoding
from effkit.speculative.tree import SpeculativeTree
from effkit.speculative.verify import overlap
from effkit.studies.study import Cells, Study
from effkit.zoo.data import stdlib_text
from effkit.zoo.use import Use

FLOAT, HALF = torch.float32, torch.bfloat16
MODELS = {"smollm2": HALF, "gpt-small": FLOAT, "gpt-target in bfloat16": HALF, "gpt-target": FLOAT}
KINDS, TEMPERATURES = ("held out", "edits"), (0.0, 0.8)
TRIALS, FEW = {"held out": 8, "edits": 3}, 2  # texts of each kind; few where a token takes long:
SLOW = "a copy without half of its weights"  # whose masks stay, so that no fused kernel runs it
PROMPT, NEW, ROUNDS = 64, 64, 6  # tokens of a held-out text to begin with, new ones, times that each is timed
PEERS = 4  # proposed at a time by those draft models that transformers races, too
LONG = 16  # texts by which tokens a pass are foretold
LESSONS = 400_000  # tokens of the training text that a draft may learn from
BATCHES = (1, 2, 4, 8, 16, 32)  # texts at once
REQUESTS, RATES, PERCENT = 60, (0.5, 1.0, 2.0, 4.0), (50, 95, 99)  # of the stream that is served; that come in a second; of the seconds
SIZES, HELD, OFTEN = (1, 2, 3, 4, 5, 7, 9, 17, 32), 128, 4  # tokens of a pass, after so many; passes in a row, as where a text is written
AGREEING: dict[str, Technique] = {
    "the first 25 of 30 blocks": EarlyExit(5 / 6), "the first 15": EarlyExit(0.5),
    "4 bits": RTN(bits=4, group_size=64), "3 bits": RTN(bits=3, group_size=64),
}  # fmt: skip
CACHES = {"recomputed": Recompute(), "concatenated": Identity(), "preallocated": Preallocated(), "fused": Fused(), "a window of 256": Window(252, 4)}
STATIC = {"cache_implementation": "static"}
THEIRS: dict[str, dict] = {"dynamic": {}, "static": STATIC, "static, compiled": STATIC | {"compiled": True}}


def drafts(model: str) -> dict[str, Technique]:
    """In words -> the technique: nearly all of them for gpt-target, some that need no training for gpt-small, for which chapter 08 has all, and
    few where a token takes long: `effkit study eagle` races more on SmolLM2."""
    lookup: dict[str, Technique] = {"prompt lookup": PromptLookup()}
    eight: dict[str, Technique] = {"prompt lookup, 8 at a time": PromptLookup(gamma=8)}
    alone: dict[str, Technique] = {"Jacobi": Jacobi(), "lookahead": Lookahead()}
    if model == "smollm2":
        return eight | alone | {name: made()[name] for name in ["a copy in 4 bits"]}
    if model == "gpt-target in bfloat16":
        best = ("gpt-draft-distilled, 2 in a line", "lookup, else gpt-draft-distilled")
        return lookup | {name: brought()[name] for name in best}
    return lookup | eight | alone | (brought() | made() if model == "gpt-target" else {}) | {
        "half of the blocks": Speculative(EarlyExit(0.5)), "five sixths of the blocks": Speculative(EarlyExit(5 / 6)),
        "five sixths of the blocks, the others missed least": Speculative(SkipLayers(1 / 6, examples=4)),
    }  # fmt: skip


def made() -> dict[str, Technique]:
    """Drafts that are made of the target: its copies, and what learns from it."""
    return {
        "a copy in 4 bits": Speculative(Pipeline((RTN(bits=4, group_size=64), Fused())), gamma=3),
        "a copy in 3 bits": Speculative(Pipeline((GPTQ(bits=3, group_size=64), Fused())), gamma=3),
        SLOW: Speculative(Magnitude(0.5)),
        "a third of the blocks, distilled": Speculative(Distill(EarlyExit(1 / 3), temperature=1.0, epochs=2)),
        "Medusa": Medusa(steps=300, lr=1e-2, nodes=12), "EAGLE": Eagle(steps=300),
    }  # fmt: skip


def brought() -> dict[str, Technique]:
    """Drafts of the target's family, in words. Taught a little more: by what the target thinks, in two ways, or by the text."""
    found: dict[str, Technique] = {}
    for name, gamma in product(("gpt-small", "gpt-draft", "gpt-draft-distilled"), (2, 4)):
        found[f"{name}, {gamma} in a line"] = Speculative(named := Pipeline((Use(name), Fused())), gamma=gamma)
    found["gpt-draft-distilled, a tree"] = SpeculativeTree(named)
    found["gpt-draft-distilled, gamma adapts"] = Speculative(named, gamma=8, cost=0.15, extra=0.06)
    found["prompt lookup, 6 at a time"] = PromptLookup(gamma=6)
    found["lookup, else gpt-draft-distilled"] = PromptLookup(gamma=6, shortest=2, otherwise=Speculative(named, gamma=2))
    taught = Distill(Use("gpt-draft"), alpha=0.0, temperature=1.0)
    for how, school in {"forward KL": taught, "reverse KL": replace(taught, divergence="reverse"), "the text": replace(taught, alpha=1.0)}.items():
        found[f"gpt-draft, taught by {how}"] = Speculative(Pipeline((school, Fused())), gamma=2)
    return found


@cache
def loaded(name: str) -> tuple[Any, Task]:
    """The model, and its task with a short training text."""
    model, task = zoo.load(name.split()[0], MODELS[name])
    if task.train is None:
        return model, task
    windows: Any = task.train
    return model, replace(task, train=replace(windows, ids=windows.ids[:LESSONS]))


def trials(model: str, draft: str) -> dict[str, int]:
    """How many texts of each kind."""
    return {kind: min(some, FEW) if model == "smollm2" or draft == SLOW else some for kind, some in TRIALS.items()}


def prompts(name: str, kind: str, some: int) -> list[Int[Tensor, "1 n"]]:
    """What so many texts of this kind begin with."""
    if kind == "held out":
        return [loaded(name)[1].val.at(i)[0][:1, :PROMPT] for i in range(some)]  # type: ignore[union-attr]
    coder, every = zoo.tokenizer(name.split()[0]), filter(None, map(edit, stdlib_text("val")))
    return [torch.tensor([coder.encode(next(every), add_special_tokens=False).ids]) for _ in range(some)]


def edit(text: str) -> str | None:
    """Of a module's first two functions of 5 to 10 lines: one, the same under another name, the other, and the head of its copy.
    None where there are no two."""
    lines, found = text.splitlines(), list[tuple[str, ...]]()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and 5 <= node.end_lineno - node.lineno + 1 <= 10:  # type: ignore[operator]
            head, *rest = lines[node.lineno - 1 : node.end_lineno]
            found += [(head, *rest), (head.replace(f"def {node.name}", f"def {node.name}_2", 1), *rest)]
    return "\n\n\n".join("\n".join(part) for part in (*found[:3], found[3][:1])) + "\n" if len(found) > 3 else None


def raced(
    plain: Any, drafting: Any, begun: Sequence[Tensor], temperature: float, *, new: int, rounds: int, peers: Mapping[str, Callable] = {}
) -> dict:  # fmt: skip
    """What a draft gives, and the seconds that the texts take without it and with it, round by round."""
    sampler = Sampler(temperature=temperature)
    write = lambda decode, model: [list(decode(model, ids, new, sampler=sampler, rng=torch.Generator().manual_seed(i))) for i, ids in enumerate(begun)]  # noqa: E731
    found = statistics(step for steps in write(drafting.decoding.passes, drafting) for step in steps)
    runs: dict[str, Callable] = {"plain": partial(write, plain.decoding, plain), "drafting": partial(write, drafting.decoding, drafting), **peers}
    reading = {"reading": lambda: [plain.generate(ids, 0) for ids in begun]}
    counted = {"tokens a pass": found.tokens_per_pass, "acceptance": found.acceptance, "proposed a pass": found.proposed / found.passes}
    if temperature == 0:
        ours = runs["plain"]()
        other = lambda run: sum(not torch.equal(a[0], b[0]) for a, b in zip(ours, run(), strict=True))  # noqa: E731
        counted["texts that part"] = {name: other(run) for name, run in runs.items() if name != "plain"}
    return counted | {"seconds": timed(runs | reading, rounds)}


def timed(runs: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, in turns."""
    seconds = samples(runs, min_repeats=rounds, budget_s=0.0, warmup=1)
    return {name: [round(s, 4) for s in each.tolist()] for name, each in seconds.items()}


@torch.no_grad()
def foretold(target: Any, drafting: Any, begun: Sequence[Tensor], sampler: Sampler, new: int) -> dict[str, float]:
    """Tokens a pass of a draft model, by the law and place by place, and what its passes then gave on other texts."""
    gamma, places, passes = drafting.decoding.gamma, [], 0.0
    for i, ids in enumerate(begun):
        text = target.generate(ids, new, sampler=sampler, rng=torch.Generator().manual_seed(i))
        p, q = (sampler.probabilities(model(text)[0, ids.shape[1] - 1 : -1]) for model in (target, drafting.decoding.draft))
        chances = (q / p).gather(1, text[0, ids.shape[1] :, None])[:, 0].clamp(max=1)
        places.append(overlap(p, q))
        passes += expected_passes(chances.tolist(), gamma)
    each = (drafting.decoding.passes(drafting, ids, new, sampler=sampler, rng=torch.Generator().manual_seed(100 + i)) for i, ids in enumerate(begun))
    counts = [sum(1 for _ in steps) for steps in each]
    alpha, ran = torch.cat(places).mean().item(), new * len(counts) / sum(counts)
    error = torch.tensor(counts).float().std().item() / len(counts) ** 0.5 * len(counts) / sum(counts)  # of the passes, as a share of them
    return {"sum min(p, q)": alpha, "by the law": expected_tokens(alpha, gamma), "place by place": new * len(begun) / passes,
            "tokens a pass": ran, "standard error": ran * error}  # fmt: skip


def ratio(cell: dict, slow: str = "plain", quick: str = "drafting", *, less: str | None = None) -> tuple[float, float, float]:
    """Seconds over seconds, round by round: the median and its interval at 95 %.
    less="reading": those of writing alone; what a draft model reads of the prompts is still in them."""
    seconds = cell["seconds"]
    taken = seconds[less] if less else [0.0] * len(seconds[slow])
    ratios = [(one - part) / (other - part) for one, other, part in zip(seconds[slow], seconds[quick], taken, strict=True)]
    return (median(ratios), *median_interval(ratios))


def over_one(cell: dict) -> dict[int, float]:
    """Of a cell of passes: what so many tokens cost, in passes over one."""
    return {int(n): ratio(cell, n, "1")[0] for n in cell["seconds"]}


def theirs(model: Any, draft: Technique, begun: Sequence[Tensor]) -> dict[str, Callable]:
    """By transformers, plainly and with this draft; nothing where it does not know it. How many tokens it proposes it decides itself."""
    how: dict[str, Any] = {}
    if isinstance(draft, PromptLookup) and draft.otherwise is None:
        how = {"prompt_lookup_num_tokens": draft.gamma, "max_matching_ngram_size": draft.ngram}
    elif isinstance(draft, Speculative) and isinstance(draft.draft, Pipeline) and draft.gamma == PEERS:
        how = {"assistant_model": draft.draft(model).to_hf().eval()}  # type: ignore[operator]
    return {"theirs plain": by_transformers(model, begun), "theirs drafting": by_transformers(model, begun, **how)} if how else {}


def by_transformers(model: Any, begun: Sequence[Tensor], *, compiled: bool = False, **how) -> Callable[[], list[Tensor]]:
    """Greedy texts by transformers' own generation of the same weights."""
    hf, told = model.to_hf().eval(), {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    if compiled:
        hf.forward = torch.compile(hf.forward)
    return torch.no_grad()(lambda: [hf.generate(ids, attention_mask=torch.ones_like(ids), **told) for ids in begun])


def cell(name: str, draft: Technique, some: Mapping[str, int] = TRIALS) -> dict:
    """Of each kind of text and temperature, what the draft gives."""
    model, task = loaded(name)
    plain: nn.Module = Fused()(model)
    drafting: Any = draft(plain, task)
    found: dict[str, dict] = {}
    for kind, temperature in product(KINDS, TEMPERATURES):
        begun = prompts(name, kind, some[kind])
        peers = {} if temperature or name not in zoo.names() else theirs(model, draft, begun)  # in bfloat16 by SmolLM2 alone: they take minutes
        found[f"{kind}; {temperature}"] = raced(plain, drafting, begun, temperature, new=NEW, rounds=ROUNDS, peers=peers)
    if type(drafting.decoding) is SpeculativeDecoding and drafting.decoding.cost is None:
        found["foretold"] = foretold(plain, drafting, prompts(name, "held out", LONG), Sampler(temperature=TEMPERATURES[-1]), NEW)
    return found


def caches(name: str, dtype: torch.dtype) -> dict:
    """Seconds of the same greedy texts by each cache, and by transformers."""
    model, begun = loaded(name)[0].to(dtype), prompts(name, "held out", 1)
    write = lambda model: [model.generate(ids, NEW, temperature=0.0) for ids in begun]  # noqa: E731
    some = {key: cache for key, cache in CACHES.items() if key != "recomputed" or name != "smollm2"}  # where that takes minutes
    runs: dict[str, Callable] = {key: partial(write, technique(model)) for key, technique in some.items()}
    runs |= {f"transformers, {key}": by_transformers(model, begun, **how) for key, how in THEIRS.items()}
    loaded.cache_clear()  # whose precision has changed
    return {"transformers": version("transformers"), "seconds": timed(runs, ROUNDS)}


def batches(model: str, draft: Any) -> dict:
    """Of so many texts written at once, greedily: seconds with the draft and without."""
    plain: Any = Fused()(loaded(model)[0])
    found: dict[str, dict] = {}
    helper, every = draft.draft(plain), torch.cat(prompts(model, "held out", max(BATCHES)))
    sampler = Sampler(temperature=0.0)
    for rows in BATCHES:
        together = partial(plain.generate, every[:rows], NEW, sampler=sampler)
        guessed = partial(speculative_batch, plain, helper, [*every[:rows]], NEW, gamma=draft.gamma, sampler=sampler)
        found[str(rows)] = {"seconds": timed({"plain": together, "drafting": guessed}, ROUNDS)}
    return found


def serving() -> dict:
    """Within twice the time that 95 % of the answers take at leisure: what each policy writes, three times over."""
    model, requests = Fused()(loaded("gpt-small")[0]), stream(seed=0, n=REQUESTS)
    at = lambda rate, policy: serve(model, paced(requests, rate), pages=800, policy=policy)  # noqa: E731
    at(100.0, "static")  # warm
    bound, found = 2 * at(0.1, "continuous").latency(95), {policy: list[float]() for policy in POLICIES}
    for _, policy in product(range(3), POLICIES):
        most = throughput_at_latency(partial(at, policy=policy), bound_s=bound, slowest=0.1, fastest=200.0, halvings=7)
        found[policy].append(most[1].throughput)
    shares = lambda served: {str(percent): served.latency(percent) for percent in PERCENT}  # noqa: E731
    waits = {policy: {str(rate): shares(at(rate, policy)) for rate in RATES} for policy in POLICIES}
    return {"bound, s": bound, "tokens a second": found, "seconds to an answer": waits}


def passes(name: str) -> dict:
    """Seconds of OFTEN passes over so many tokens."""
    model: Any = Fused()(loaded(name)[0])
    cache, ids = model.new_cache(capacity=HELD + max(SIZES)), loaded(name)[1].val.at(0)[0][:1, : HELD + max(SIZES)]  # type: ignore[union-attr]

    def run(n: int) -> None:
        for _ in range(OFTEN):
            cache.truncate(HELD)
            model(ids[:, HELD : HELD + n], cache)

    with torch.no_grad():
        model(ids[:, :HELD], cache)
        return {"seconds": timed({str(n): partial(run, n) for n in SIZES}, 5 * ROUNDS)}


@torch.no_grad()
def agreement(name: str) -> dict:
    """sum min(p, q) at temperature .8, along texts that the target wrote."""
    (model, task), sampler = loaded(name), Sampler(temperature=TEMPERATURES[-1])
    target: Any = Fused()(model)
    begun = prompts(name, "held out", FEW)
    texts = [target.generate(ids, NEW, sampler=sampler, rng=torch.Generator().manual_seed(i)) for i, ids in enumerate(begun)]
    chances = lambda model: torch.cat([sampler.probabilities(model(text)[0, -NEW - 1 : -1]) for text in texts])  # noqa: E731
    p = chances(target)
    return {"sum min(p, q)": {what: overlap(p, chances(draft(model, task))).mean().item() for what, draft in AGREEING.items()}}


def cells() -> Cells:
    found: dict[str, Callable[[], dict]] = {"gpt-small: serving": serving}
    found["smollm2: agreement"] = partial(agreement, "smollm2")
    found["gpt-target: batches"] = partial(batches, "gpt-target", brought()["gpt-draft-distilled, 2 in a line"])
    for model in MODELS:
        found |= {f"{model}: caches, {str(dtype)[6:]}": partial(caches, model, dtype) for dtype in (FLOAT, HALF) if model == model.split()[0]}
        found |= {f"{model}: passes": partial(passes, model)}
        found |= {f"{model}: {name}": partial(cell, model, draft, trials(model, name)) for name, draft in drafts(model).items()}
    return found


def settings() -> dict:
    numbers = {"trials": TRIALS, "few": FEW, "long": LONG, "prompt": PROMPT, "new": NEW, "rounds": ROUNDS, "batches": list(BATCHES), "requests": REQUESTS}
    more = {"temperatures": list(TEMPERATURES), "lessons": LESSONS, "often": OFTEN, "models": {name: str(dtype) for name, dtype in MODELS.items()}}
    more |= {"rates": list(RATES), "percent": list(PERCENT), "sizes": list(SIZES), "held": HELD, "agreeing": {k: to_json(v) for k, v in AGREEING.items()}}
    each = {f"{model}: {name}": to_json(draft) for model in MODELS for name, draft in drafts(model).items()}
    return numbers | more | {"drafts": each}


STUDY = Study("decoding", settings, cells)
