"""Merged is unmerged, off is as it was, and the file holds the adapters and nothing else."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

from effkit import load, save
from effkit.core.technique import Pipeline
from effkit.factorization import SVD
from effkit.peft import LoRA, load_adapters, merge, save_adapters, serving, strip, unmerge
from effkit.peft.lora import adapted
from effkit.quantization import RTN
from tests.subjects import gpt, image_task, language_task, mlp, outputs


def tuned(*before, steps=3, **settings):
    return Pipeline((*before, LoRA(steps=steps, lr=0.01, **settings)))(gpt(), language_task())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_is_unmerged(dtype, tolerance):
    model, task = tuned().to(dtype), language_task()
    together = merge(model)
    assert_close(outputs(together, task), outputs(model, task), atol=tolerance, rtol=tolerance)
    assert_close(outputs(unmerge(together), task), outputs(model, task), atol=tolerance, rtol=tolerance)
    assert_close(outputs(strip(together), task), outputs(model, task), atol=tolerance, rtol=tolerance)
    for layer, back in zip(adapted(model).values(), adapted(unmerge(together)).values(), strict=True):
        assert_close(back.base.weight, layer.base.weight, atol=tolerance, rtol=tolerance)


def test_merging_copies_and_twice_is_once():
    model, task = tuned(), language_task()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    once = merge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(outputs(merge(once), task), outputs(once, task))
    assert torch.equal(outputs(unmerge(model), task), outputs(model, task))
    assert not any(p.requires_grad for p in once.parameters()) and any(p.requires_grad for p in unmerge(once).parameters())


def test_a_merged_model_is_plain_and_saved_as_such(tmp_path):
    model, task = tuned(), language_task()
    finished = strip(merge(model))
    assert not adapted(finished) and {type(m) for m in finished.modules()} == {type(m) for m in gpt().modules()}
    save(finished, tmp_path / "finished.safetensors")
    assert torch.equal(outputs(load(tmp_path / "finished.safetensors"), task), outputs(finished, task))
    save(merge(model), tmp_path / "merged.safetensors")
    opened = load(tmp_path / "merged.safetensors")
    assert torch.equal(outputs(opened, task), outputs(merge(model), task))
    assert_close(outputs(unmerge(opened), task), outputs(model, task), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("base", [RTN(4, 16), SVD(rank=4)], ids=["4 bits", "two factors"])
def test_a_base_without_room_is_refused_or_made_dense(base):
    model, task = tuned(base), language_task()
    with pytest.raises(ValueError, match="blocks.0.attention.q is a .*merge\\(model, dense=True\\)"):
        merge(model)
    dense = strip(merge(model, dense=True))
    assert all(type(m) is nn.Linear for m in dense.modules() if hasattr(m, "in_features"))
    assert_close(outputs(dense, task), outputs(model, task), atol=1e-5, rtol=1e-4)


def test_a_dense_base_keeps_bias_and_precision():
    model, task = Pipeline((RTN(8), LoRA(steps=2)))(mlp(), image_task()), image_task()
    dense = strip(merge(model, dense=True))
    assert_close(outputs(dense, task), outputs(model, task), atol=1e-5, rtol=1e-4)
    half = Pipeline((RTN(8), LoRA(epochs=0)))(gpt().to(torch.bfloat16))
    assert {p.dtype for p in strip(merge(half, dense=True)).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("before", [(), (RTN(4, 16),)], ids=["float", "4 bits"])
def test_only_the_adapters_are_saved_and_come_back(before, tmp_path):
    model, task = tuned(*before), language_task()
    size = save_adapters(model, tmp_path / "adapters.safetensors")
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 4 * numbers < size < 4 * numbers + 10_000
    with safe_open(tmp_path / "adapters.safetensors", "pt") as file:
        assert {name.rsplit(".", 1)[1] for name in file.keys()} == {"A", "B"}  # noqa: SIM118
    base = Pipeline(before)(gpt())
    again = load_adapters(base, tmp_path / "adapters.safetensors")
    assert torch.equal(outputs(again, task), outputs(model, task))
    assert not adapted(base)
    wanted = [n for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in again.named_parameters() if p.requires_grad] == wanted


def test_another_base_is_refused_unless_asked_for(tmp_path):
    model, task, path = tuned(RTN(8, 16)), language_task(), tmp_path / "adapters.safetensors"
    save_adapters(model, path)
    with pytest.raises(ValueError, match="was trained over other weights: pass any_base=True"):
        load_adapters(gpt(), path)
    assert_close(outputs(load_adapters(gpt(), path, any_base=True), task), outputs(model, task), atol=0.02, rtol=0.1)
    with pytest.raises(ValueError, match="no linear layer blocks.0.attention.q"):
        load_adapters(mlp(), path)
    other = gpt()
    other.blocks[0].attention.q = nn.Linear(32, 16)
    with pytest.raises(ValueError, match="layer blocks.0.attention.q is 16 x 32, the adapter 32 x 32"):
        load_adapters(other, path)


def test_a_fingerprint_tells_apart_what_has_the_same_bytes():
    wide, tall, half = nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 8, bias=False)
    tall.weight.data, half.weight.data = wide.weight.data.reshape(6, 4), wide.weight.data.view(torch.float16).reshape(8, 6)
    assert len({serving.fingerprint([layer]) for layer in (wide, tall, half)}) == 3


def test_files_and_models_that_do_not_fit(tmp_path):
    path = tmp_path / "adapters.safetensors"
    with pytest.raises(ValueError, match="this model has no adapters"):
        save_adapters(gpt(), path)
    with pytest.raises(ValueError, match="this model has no adapters"):
        merge(gpt())
    with pytest.raises(ValueError, match="unmerge\\(model\\) first"):
        save_adapters(merge(tuned()), path)
    save(gpt(), path)
    with pytest.raises(ValueError, match="holds a GPT, no adapters"):
        load_adapters(gpt(), path)
    size = save_adapters(tuned(), path)
    with pytest.raises(ValueError, match="carries adapters already"):
        load_adapters(tuned(), path)
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_adapters(gpt(), path)


def test_a_model_that_is_itself_the_layer(tmp_path):
    layer, x = nn.Linear(8, 6), torch.randn(2, 8)
    model = LoRA(epochs=0)(layer)
    nn.init.normal_(model.adapter.B)
    save_adapters(model, tmp_path / "one.safetensors")
    assert torch.equal(load_adapters(layer, tmp_path / "one.safetensors")(x), model(x))
    assert_close(strip(merge(model))(x), model(x), atol=1e-5, rtol=1e-4)
    assert torch.equal(strip(model)(x), layer(x))


def test_a_merge_that_adds_the_transpose_or_forgets_the_scale_is_caught(monkeypatch):
    """Planted: the update halved on its way into the base."""
    right = serving.Adapter.delta
    monkeypatch.setattr(serving.Adapter, "delta", lambda self: right(self) / 2)
    with pytest.raises(AssertionError):
        test_merged_is_unmerged(torch.float32, 1e-5)


def test_a_fingerprint_that_reads_nothing_is_caught(monkeypatch, tmp_path):
    """Planted: any base passes for the one it was trained over."""
    monkeypatch.setattr(serving, "fingerprint", lambda layers: "")
    with pytest.raises(pytest.fail.Exception):
        test_another_base_is_refused_unless_asked_for(tmp_path)
