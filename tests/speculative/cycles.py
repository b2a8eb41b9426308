"""A tiny decoder that has learned something, so that a draft can learn it from it: which token follows which, round and
round a cycle, with now and then a leap."""

import copy
from functools import cache

import torch

from effkit.core.task import Task
from effkit.core.training import Schedule, fit
from effkit.zoo.data import Windows
from effkit.zoo.gpt import GPT
from effkit.zoo.tasks import language_loss

VOCAB = 16


def cyclic(tokens: int, leaps: float = 0.3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    after, leap = torch.randperm(VOCAB, generator=rng), torch.rand(tokens, generator=rng) < leaps
    order = {int(after[i]): int(after[(i + 1) % VOCAB]) for i in range(VOCAB)}
    ids = [0]
    while len(ids) < tokens:
        ids.append(int(torch.randint(VOCAB, (), generator=rng)) if leap[len(ids)] else order[ids[-1]])
    return torch.tensor(ids)


def windows(length: int = 16) -> Task:
    text = Windows(cyclic(3000), length=length, size=16, shuffle=True)
    return Task(train=text, calib=text.first(32), loss=language_loss)


@cache
def _learned() -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(vocab_size=VOCAB, d_model=32, layers=2, heads=4, kv_heads=2, d_ff=48, context=128)
        fit(model, windows(), Schedule(120, 1e-2, warmup=10))
    return model.eval()


def learned(dtype: torch.dtype = torch.float32) -> GPT:
    return copy.deepcopy(_learned()).to(dtype)
