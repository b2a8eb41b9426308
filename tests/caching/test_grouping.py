"""Fewer key-value heads: the mean of neighbours, as many bytes fewer, and what a short training brings back."""


import pytest
import torch

import effkit
from effkit.caching import GroupHeads, Preallocated, grouping
from effkit.caching.cost import kv_bytes
from effkit.caching.grouping import pooled
from effkit.core.task import Task
from effkit.measure import quality
from effkit.peft import LoRA
from effkit.pruning import Magnitude
from effkit.quantization import RTN
from effkit.speculative import EarlyExit, Speculative
from tests.caching.decoders import assert_equal_logits, decoder, text
from tests.subjects import language_task


def test_the_mean_of_neighbouring_heads_by_hand():
    """Four heads of two rows, one column: 1 2 | 3 4 | 5 6 | 7 9."""
    weight = torch.tensor([[1.0], [2], [3], [4], [5], [6], [7], [9]])
    assert pooled(weight, head_dim=2, kv_heads=2).flatten().tolist() == [2, 3, 6, 7.5]
    assert pooled(weight, head_dim=2, kv_heads=1).flatten().tolist() == [4, 5.25]
    assert torch.equal(pooled(weight, head_dim=2, kv_heads=4), weight)


def equal_heads_are_one_head(left=2, heads=8, kv_heads=4):
    """Neighbours that are alike lose nothing when they become one; the groups differ from each other."""
    model = decoder(heads=heads, kv_heads=kv_heads, d_model=32)
    d = model.config.head_dim
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attention.k, block.attention.v):
                one = layer.weight.unflatten(0, (left, -1, d))[:, :1]
                layer.weight.copy_(one.expand(-1, kv_heads // left, -1, -1).flatten(0, 2))
    result, ids = GroupHeads(left, steps=0)(model), text(20, rows=2)
    assert_equal_logits(result(ids), model(ids))
    assert torch.equal(result.generate(ids, 9, temperature=0.0), model.generate(ids, 9, temperature=0.0))


@pytest.mark.parametrize("left", [1, 2])
def test_heads_that_are_alike_lose_nothing(left):
    equal_heads_are_one_head(left)


def test_as_many_heads_as_there_are_is_the_model_itself():
    model, ids = decoder(kv_heads=2), text(9)
    assert torch.equal(GroupHeads(2)(model)(ids), model(ids))  # and asks for no task


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_bytes_of_a_token_fall_in_proportion(kv_heads):
    model = decoder(heads=4, kv_heads=4, dtype=torch.float32)
    technique = GroupHeads(kv_heads, steps=0)
    result, c = technique(model), model.config
    law = kv_bytes(1, layers=c.layers, kv_heads=kv_heads, head_dim=c.head_dim)
    assert technique.claim(result).value == technique.claim(Preallocated()(result)).value == law
    assert result.config.kv_heads == kv_heads and model.config.kv_heads == 4
    assert [b.attention.k.out_features for b in result.blocks] == [kv_heads * c.head_dim] * c.layers
    assert all(torch.equal(a.attention.q.weight, b.attention.q.weight) for a, b in zip(result.blocks, model.blocks, strict=True))


@pytest.mark.slow
def test_it_trains_for_as_long_as_it_is_told():
    model, task = decoder(heads=4, kv_heads=4, vocab_size=64, dtype=torch.float32, sharpness=3.0), language_task()
    after = [quality(GroupHeads(1, steps=n, lr=3e-3)(model, task), task, "val").value for n in (0, 40)]
    assert after[1] < after[0] - 0.1
    whole = GroupHeads(1, lr=3e-3)(model, task)
    counted = GroupHeads(1, steps=len(task.train), lr=3e-3)(model, task)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), counted.parameters(), strict=True))
    assert all(p.grad is None for p in whole.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_opens(dtype, tmp_path):
    result, ids = GroupHeads(1, steps=0)(decoder(dtype=dtype)), text(9)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert torch.equal(opened(ids), result(ids)) and opened.config == result.config


@pytest.mark.slow
@pytest.mark.peers("transformers")
def test_transformers_takes_it():
    result, ids = GroupHeads(2, steps=0)(decoder(kv_heads=4, dtype=torch.float32)), text(24)
    with torch.no_grad():
        assert (result.to_hf()(ids).logits - result(ids)).abs().max() < 1e-4


def test_factors_and_adapters_come_in_by_what_they_compute():
    model, ids = decoder(dtype=torch.float32, kv_heads=2), text(9)
    adapted = LoRA(epochs=0)(model)
    with torch.no_grad():
        adapted.blocks[0].attention.k.adapter.B.normal_()
    dense = decoder(dtype=torch.float32, kv_heads=2)
    dense.blocks[0].attention.k.weight.data = adapted.blocks[0].attention.k.dense_weight().detach()
    assert_equal_logits(GroupHeads(1, steps=0)(adapted)(ids), GroupHeads(1, steps=0)(dense)(ids))


def test_a_draft_inside_is_left_alone():
    model = Speculative(EarlyExit(0.5))(decoder())
    result = GroupHeads(1, steps=0)(model)
    assert result.decoding.draft.config.kv_heads == 2 and result.decoding.draft.blocks[0].attention.k.out_features == 8
    greedy = GroupHeads(1, steps=0)(decoder()).generate(text(9), 20, temperature=0.0)
    assert torch.equal(result.generate(text(9), 20, temperature=0.0), greedy)


# bad input


def test_what_it_cannot_group_is_refused_with_the_way_out():
    model = decoder(kv_heads=4)
    with pytest.raises(ValueError, match=r"kv_heads must divide the model's \[4\], got 3: take 1, 2"):
        GroupHeads(3, steps=0)(model)
    with pytest.raises(ValueError, match=r"kv_heads must divide the model's \[4\], got 8: take 1, 2"):
        GroupHeads(8, steps=0)(model)
    with pytest.raises(ValueError, match="kv_heads must be a whole number, at least 1, got 0"):
        GroupHeads(0)
    with pytest.raises(ValueError, match=r"reads task.train, loss, which this task lacks; pass Task\(train="):
        GroupHeads(1)(model, Task())
    with pytest.raises(ValueError, match="needs float weights"):
        GroupHeads(1, steps=0)(RTN(4)(model))
    with pytest.raises(ValueError, match="needs plain weights"):
        GroupHeads(1, steps=0)(Magnitude(0.5)(model))
    with pytest.raises(ValueError, match="needs a decoder"):
        GroupHeads(1)(torch.nn.Linear(3, 3))


# planted bugs


def strided(heads, *, head_dim, kv_heads):
    return heads.unflatten(0, (-1, kv_heads, head_dim)).mean(0).flatten(0, 1)


def summed(heads, *, head_dim, kv_heads):
    return heads.unflatten(0, (kv_heads, -1, head_dim)).sum(1).flatten(0, 1)


@pytest.mark.parametrize("bug", [strided, summed])
def test_other_groups_are_noticed(monkeypatch, bug):
    monkeypatch.setattr(grouping, "pooled", bug)
    with pytest.raises(AssertionError):
        equal_heads_are_one_head()
