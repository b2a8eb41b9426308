"""Bits per byte: all bits over all bytes, however long the windows are; and what the shipped recipes train on."""

import math

import pytest
import torch
from torch.nn import functional as F

from effkit.zoo.data import Windows
from effkit.zoo.tasks import BitsPerByte
from tests.subjects import gpt


@pytest.mark.parametrize("length", [1, 100, 128, 129, 300])
def test_windows_of_any_length_are_scored_to_the_last_token(length):
    rng = torch.Generator().manual_seed(0)
    data = Windows(torch.randint(64, (4 * length + 1,), generator=rng), length=length, size=3)
    bytes_of = torch.randint(1, 5, (64,), generator=rng)
    model = gpt()
    seen = BitsPerByte(bytes_of)(model, data)
    with torch.no_grad():
        bits = sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in data) / math.log(2)
    assert len(seen) == 4
    torch.testing.assert_close(seen.mean(), bits / sum(bytes_of[y].sum() for _, y in data))


@pytest.mark.parametrize("length", [256, 1024])
def test_a_step_of_gpt_small_reads_as_many_tokens_whatever_the_window(monkeypatch, length):
    from effkit.studies import recipes

    monkeypatch.setattr(recipes, "stdlib_text", lambda split: ("x = 1\n" * 20_000,))
    monkeypatch.setattr(recipes, "stdlib_tests", lambda: ())
    run = recipes.RECIPES["gpt-small"]
    run = run if length == 1024 else run.first
    ids, targets = run.task().train.at(0)
    assert ids.shape == targets.shape == (4096 // length, length)
