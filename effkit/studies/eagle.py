"""Does a real model get faster by a draft of one block? SmolLM2, on this machine's processor: `python -m effkit study eagle`.

The block learns from what SmolLM2 writes itself, 0.3 million tokens that answer made-up requests; so do their states, which are
computed once. Both are kept under results/eagle until the training, which goes on after an interruption, is done; then the
block stands in data/eagle-smollm2.safetensors, for Eagle(head="eagle-smollm2").

A cell is one draft, one kind of text and one temperature: tokens a pass, how many proposals were accepted, and the seconds of
the same generation with the draft and without, in turns. Texts are answers to requests about other topics, and the reference
topics of pydoc continued, English that the block has not learned from.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from effkit import zoo
from effkit.caching import Fused
from effkit.core.checkpoint import SCHEMA, read_tensors, save, write_tensors
from effkit.core.paths import data_dir
from effkit.core.recipe import to_json
from effkit.core.task import Batches, Task
from effkit.core.technique import Technique
from effkit.core.training import Schedule
from effkit.speculative import Eagle, EarlyExit, PromptLookup, Speculative
from effkit.speculative.eagle import eagle_loss, fresh_head
from effkit.speculative.heads import train_beside
from effkit.studies.decoding import raced
from effkit.studies.study import Cells, Study

HEAD = "eagle-smollm2"
REQUESTS = (
    "Explain {} to a child.", "Write a short story about {}.", "Give me ten tips on {}.", "What are common mistakes with {}?",
    "Write a letter to a friend about {}.", "Tell me the history of {}.", "What are the pros and cons of {}?", "Write a Python program about {}.",
)  # fmt: skip
LEARNED = ("gardens", "the sea", "old trains", "cooking rice", "chess", "the moon", "bees", "saving money", "music", "rain", "bridges",
           "sleep", "bicycles", "paper", "sorting numbers", "dogs")  # fmt: skip
HELD_OUT = ("volcanoes", "bread", "learning Spanish", "prime numbers")
ROWS, TOKENS, WARMTH = 8, 256, 0.8  # texts of each request about a topic, their length, the temperature they are written at
SCHEDULE, BATCH, FREQUENT = Schedule(steps=2400, lr=1e-3, warmup=50), 4, 8192
WIDTH = 512  # of the block's feed-forward; a third of the target's own, so that all shipped files stay under 45 MB
TRIALS, PROMPT, NEW, ROUNDS = 4, 48, 64, 6  # texts of each kind, tokens of pydoc before them, new ones, times each is timed
TEMPERATURES = (0.0, 0.8)
DRAFTS: dict[str, Technique] = {
    **{f"EAGLE, {gamma} in a line": Eagle(gamma=gamma, head=HEAD) for gamma in (1, 2, 3, 4)},
    "EAGLE, a tree of 3, 2 and 1": Eagle(gamma=3, branching=(3, 2, 1), head=HEAD),
    "5 of 6 blocks": Speculative(EarlyExit(5 / 6), gamma=2),
    "prompt lookup": PromptLookup(),
    "lookup, else EAGLE": PromptLookup(gamma=6, shortest=2, otherwise=Eagle(gamma=2, head=HEAD)),
}


@cache
def loaded() -> tuple[Any, Any]:
    """The model as it is fastest here, and its task."""
    model, task = zoo.load("smollm2", torch.bfloat16)
    return Fused()(model), task


def asked(topics: tuple[str, ...]) -> list[Int[Tensor, "1 n"]]:
    """Each request about each topic, as its chat begins."""
    coder = zoo.tokenizer("smollm2")
    chats = [f"<|im_start|>user\n{request.format(topic)}<|im_end|>\n<|im_start|>assistant\n" for topic in topics for request in REQUESTS]
    return [torch.tensor([coder.encode(chat).ids]) for chat in chats]


@torch.no_grad()
def written(path: Path, prompt: Int[Tensor, "1 n"], seed: int) -> dict[str, Tensor]:
    """Texts that the model wrote, and its state at each of their tokens, from a file, which is made where there is none.
    Raises ValueError where it was made with other settings."""
    made = {"prompt": prompt[0].tolist(), "rows": ROWS, "tokens": TOKENS, "temperature": WARMTH, "seed": seed}
    if not path.exists():
        model, rng = loaded()[0], torch.Generator().manual_seed(seed)
        ids = model.generate(prompt.expand(ROWS, -1), TOKENS - prompt.shape[1], temperature=WARMTH, rng=rng)
        write_tensors(path, {"schema": SCHEMA, "made": made}, {"ids": ids, "states": model.features(ids)})
    header, tensors = read_tensors(path, "delete it to make it again")
    if header["made"] != made:
        raise ValueError(f"{path} was made with {header['made']}, not {made}: delete its folder to start over")
    return tensors


def training() -> dict:
    """Writes the texts, trains the block, and puts it into data/."""
    folder, model = Path("results") / "eagle", loaded()[0]
    parts = [written(folder / f"{i}.safetensors", prompt, i) for i, prompt in enumerate(tqdm(asked(LEARNED), desc="texts"))]
    ids, states = (torch.cat([part[name] for part in parts]) for name in ("ids", "states"))
    head = fresh_head(model, [(ids, ids)], frequent=FREQUENT, seed=0, d_ff=WIDTH)
    task = Task(train=Batches(ids, states, size=BATCH, shuffle=True))
    loss = lambda head, batch: eagle_loss(model, head, *batch)  # noqa: E731
    curve = train_beside(model, head, task, SCHEDULE, loss, seed=0, label=HEAD, resume=folder / "training.safetensors")
    size = save(head, data_dir() / f"{HEAD}.safetensors")
    known = torch.isin(ids, head.tokens).float().mean().item()  # type: ignore[arg-type]
    few = max(1, len(curve) // 20)
    ends = {"first loss": fmean(curve[:few]), "last loss": fmean(curve[-few:])}
    return {"tokens": ids.numel(), "share of frequent tokens": known, "bytes on disk": size, **ends}


def prompts(kind: str) -> list[Int[Tensor, "1 n"]]:
    """What texts of this kind begin with."""
    if kind == "requests":
        every = asked(HELD_OUT)
        return every[:: max(1, len(every) // TRIALS)][:TRIALS]
    return [loaded()[1].val.at(i)[0][:1, :PROMPT] for i in range(TRIALS)]


def cell(draft: Technique, kind: str, temperature: float) -> dict:
    """What a draft gives, and the seconds that the texts take without it and with it, round by round."""
    plain = loaded()[0]
    return raced(plain, draft(plain), prompts(kind), temperature, new=NEW, rounds=ROUNDS)


def cells() -> Cells:
    """The training first: the others read what it makes."""
    found: dict[str, Callable[[], dict]] = {"training": training}
    for kind, temperature, (name, draft) in product(("requests", "pydoc"), TEMPERATURES, DRAFTS.items()):
        found[f"{name}; {kind}; {temperature}"] = partial(cell, draft, kind, temperature)
    return found


def settings() -> dict:
    asked_for = {"requests": list(REQUESTS), "learned": list(LEARNED), "held out": list(HELD_OUT)}
    numbers = {"rows": ROWS, "tokens": TOKENS, "warmth": WARMTH, "schedule": asdict(SCHEDULE), "batch": BATCH, "frequent": FREQUENT, "width": WIDTH}
    trials = {"trials": TRIALS, "prompt": PROMPT, "new": NEW, "rounds": ROUNDS, "temperatures": list(TEMPERATURES)}
    return asked_for | numbers | trials | {"drafts": {name: to_json(draft) for name, draft in DRAFTS.items()}}


STUDY = Study("eagle", settings, cells)
