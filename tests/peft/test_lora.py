"""LoRA: what a fresh adapter changes, what learns and what stays, and Hugging Face's PEFT step by step."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from effkit import log
from effkit.core.surgery import dense_weight
from effkit.core.technique import Pipeline
from effkit.core.training import Schedule, fit
from effkit.factorization import SVD
from effkit.peft import LoRA, lora, strip
from effkit.peft.lora import Adapter, LoRALinear, adapted
from effkit.quantization import RTN, W8A8
from effkit.zoo.tasks import language_loss
from tests.subjects import gpt, image_task, language_task, mlp, outputs, resnet

BASES = {
    "float": lambda: gpt(),
    "4 bits": lambda: RTN(4, 16)(gpt()),
    "two factors": lambda: SVD(rank=4)(gpt()),
    "bfloat16": lambda: gpt().to(torch.bfloat16),
}
every_base = pytest.mark.parametrize("base", BASES)


def filled(layer, seed=0):
    """An adapter that does something."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.adapter.B.copy_(torch.randn(layer.adapter.B.shape, generator=rng))
    return layer


# laws


@every_base
def test_a_fresh_adapter_changes_nothing(base):
    model, task = BASES[base](), language_task()
    fresh = LoRA(epochs=0)(model)
    assert len(adapted(fresh)) == 14
    assert torch.equal(outputs(fresh, task), outputs(model, task))
    assert all(layer.adapter.B.eq(0).all() and layer.adapter.A.std() > 0 for layer in adapted(fresh).values())


@every_base
def test_only_adapters_receive_gradients_and_the_base_stays_bit_by_bit(base):
    model, task = BASES[base](), language_task()
    tuned = LoRA(steps=3, lr=0.01)(model, task)
    assert {n.rsplit(".", 1)[1] for n, p in tuned.named_parameters() if p.requires_grad} == {"A", "B"}
    task.loss(tuned(task.train.at(0)[0]), task.train.at(0)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in tuned.parameters())
    assert all(p.grad.abs().sum() > 0 for p in tuned.parameters() if p.requires_grad), "an adapter learns nothing"
    assert not torch.equal(outputs(tuned, task), outputs(model, task))
    before, after = model.state_dict(), strip(tuned).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_the_layer_is_the_equation():
    layer, x = nn.Linear(6, 4), torch.randn(3, 5, 6)
    tuned = filled(LoRA(rank=2, alpha=3.0, epochs=0)(layer))
    w = layer.weight + 3.0 / 2 * tuned.adapter.B @ tuned.adapter.A
    assert_close(tuned(x), nn.functional.linear(x, w, layer.bias))
    assert_close(tuned.dense_weight(), w)


@pytest.mark.parametrize("scaling, scale", [("alpha/r", 16 / 4), ("alpha/sqrt(r)", 16 / 2)])
def test_scales(scaling, scale):
    tuned = LoRA(rank=4, alpha=16.0, scaling=scaling, epochs=0)(nn.Linear(8, 8))
    assert tuned.adapter.scale == scale


def test_rank_stable_updates_keep_their_size():
    """One step of A and B as drawn: alpha / r shrinks the update as r grows, alpha / sqrt(r) does not (Kalajdzievski)."""
    sizes = {}
    for scaling in ("alpha/r", "alpha/sqrt(r)"):
        for rank in (4, 256):
            adapter, rng = Adapter(512, 512, rank, 16.0, scaling), torch.Generator().manual_seed(0)
            adapter.reset(rng)
            adapter.B.data.copy_(torch.randn(512, rank, generator=rng))
            sizes[scaling, rank] = adapter.delta().std().item()
    assert sizes["alpha/r", 256] / sizes["alpha/r", 4] == pytest.approx(1 / 8, rel=0.15)
    assert sizes["alpha/sqrt(r)", 256] / sizes["alpha/sqrt(r)", 4] == pytest.approx(1, rel=0.15)


def test_a_is_kaiming_uniform():
    adapter = Adapter(400, 100, 64, 16.0)
    adapter.reset(torch.Generator().manual_seed(0))
    twin = nn.init.kaiming_uniform_(torch.empty(64, 400), a=math.sqrt(5), generator=torch.Generator().manual_seed(1))
    assert adapter.A.abs().max() <= 1 / 20 and twin.abs().max() <= 1 / 20
    assert adapter.A.std().item() == pytest.approx(twin.std().item(), rel=0.02)
    assert adapter.A.mean().abs() < 1e-3


def test_with_both_factors_at_zero_nothing_would_learn():
    tuned = LoRA(epochs=0)(gpt())
    for layer in adapted(tuned).values():
        layer.adapter.A.data.zero_()
    task = language_task()
    task.loss(tuned(task.train.at(0)[0]), task.train.at(0)).backward()
    assert all(p.grad.eq(0).all() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.slow
def test_training_lowers_the_loss_also_over_four_bits():
    task = language_task()
    for steps in ((LoRA(steps=60, lr=0.02),), (RTN(4, 16), LoRA(steps=60, lr=0.02))):
        model = gpt()
        tuned = Pipeline(steps)(model, task)
        batch = task.train.at(0)
        assert task.loss(tuned(batch[0]), batch) < task.loss(model(batch[0]), batch) - 0.15


def test_seeds_and_epochs():
    first, again, other = (LoRA(epochs=0, seed=s)(gpt()) for s in (0, 0, 1))
    name = next(iter(adapted(first)))
    a = [m.get_submodule(name).adapter.A for m in (first, again, other)]
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], a[2])
    assert LoRA(epochs=3).length(language_task()) == 3 * len(language_task().train)
    assert LoRA(epochs=3, steps=5).length(language_task()) == 5 and LoRA(epochs=0).length(None) == 0


# where it goes


def test_two_factors_get_one_adapter_on_their_product():
    tuned = LoRA(epochs=0, rank=2)(SVD(rank=3)(mlp()))
    layer = tuned.layers[0]
    assert isinstance(layer, LoRALinear) and type(layer.base).__name__ == "LowRankLinear"
    assert type(layer.base.up) is nn.Linear and (layer.in_features, layer.out_features) == (784, 32)


def test_layers_are_chosen_by_path():
    tuned = LoRA(epochs=0, layers="blocks.*.attention.q")(gpt())
    assert list(adapted(tuned)) == ["blocks.0.attention.q", "blocks.1.attention.q"]
    assert "blocks.0.attention.q: an adapter of rank 8 over Linear (LoRA)" in str(log(tuned))
    assert not any(p.requires_grad for n, p in tuned.named_parameters() if "adapter" not in n)


def test_a_thin_layer_gets_the_rank_that_it_has():
    tuned = LoRA(epochs=0, rank=16)(mlp())
    assert [layer.adapter.rank for layer in adapted(tuned).values()] == [16, 16, 10]


def test_batch_norm_statistics_belong_to_the_base():
    model, task = resnet(), image_task()
    tuned = LoRA(steps=2)(model, task)
    assert list(adapted(tuned)) == ["classifier"]
    assert all(torch.equal(b, dict(tuned.named_buffers())[n]) for n, b in model.named_buffers())
    assert not tuned.stages[0].norm1.training
    assert all(m.training for m in LoRA(steps=1)(model.train(), task).modules())


def test_a_mask_under_an_adapter_stays():
    model = mlp()
    parametrizations.weight_norm(model.layers[0])
    tuned = LoRA(steps=2)(model, image_task())
    assert torch.equal(dense_weight(tuned.layers[0].base), model.layers[0].weight)


def test_hooks_move_to_the_pair():
    calls, model = [], mlp()
    handle = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    tuned = LoRA(epochs=0)(model)
    outputs(tuned, image_task())
    assert calls == [1]
    outputs(strip(tuned), image_task())
    assert calls == [1, 1]
    handle.remove()
    outputs(model, image_task())
    assert calls == [1, 1]


# refusals


def test_a_base_that_stops_gradients_is_refused():
    with pytest.raises(ValueError, match="cannot train over Int8Linear at blocks.0.attention.q: its rounding stops the gradient"):
        Pipeline((W8A8(), LoRA(epochs=0)))(gpt())
    assert Pipeline((LoRA(epochs=0), W8A8()))(gpt())(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 64)


def test_twice_is_refused():
    with pytest.raises(ValueError, match="LoRA needs a model without adapters: this one has them at blocks.0.attention.q"):
        LoRA(epochs=0)(LoRA(epochs=0)(gpt()))
    with pytest.raises(ValueError, match="LoRA needs a model without adapters"):
        Pipeline((LoRA(), LoRA()))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(rank=0), "rank must be a whole number, at least 1, got 0"),
        (dict(rank=True), "rank must be"),
        (dict(alpha=0.0), "alpha must be"),
        (dict(scaling="r"), "scaling must be one of"),
        (dict(epochs=-1), "epochs must be"),
        (dict(steps=1.5), "steps must be"),
        (dict(lr=0.0), "lr must be"),
    ],
)
def test_bad_settings_get_one_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        LoRA(**settings)


def test_a_rank_above_every_layers_and_a_task_without_data():
    with pytest.raises(ValueError, match="rank must be at most 784 here, got 785"):
        LoRA(rank=785, epochs=0)(mlp())
    with pytest.raises(ValueError, match="LoRA reads task.train, loss"):
        LoRA()(mlp())


# the oracle


def theirs_and_ours(scaling, rank=4, steps=12):
    """Losses of Hugging Face's PEFT and ours on one GPT: the same A, the same batches, the same optimizer."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    model, task, schedule = gpt(), language_task(), Schedule(steps, lr=0.01)
    tuned = LoRA(rank=rank, alpha=8.0, scaling=scaling, epochs=0)(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=rank, lora_alpha=8.0, target_modules=targets, use_rslora=scaling != "alpha/r")
    other = peft.get_peft_model(model.to_hf(), config)
    layers = [m for m in other.modules() if hasattr(m, "lora_A")]
    order = ["q", "k", "v", "o", "gate", "up", "down"]
    ours = {tuple(path.split(".")[-3::2]): layer for path, layer in adapted(tuned).items()}  # (block, name)
    assert len(ours) == len(layers) == 14
    for i, layer in enumerate(layers):
        adapter = ours[str(i // 7), order[i % 7]].adapter
        layer.lora_A["default"].weight.data.copy_(adapter.A)
        assert layer.scaling["default"] == adapter.scale
    curve = fit(other, task, schedule, loss=lambda m, b: language_loss(m(b[0]).logits, b))
    return curve, fit(tuned, task, schedule)


@pytest.mark.slow
@pytest.mark.peers("peft", "transformers")
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_losses_are_pefts_step_by_step(scaling):
    theirs, ours = theirs_and_ours(scaling)
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < 1e-4
    assert ours[-1] < ours[0] - 0.02, "nothing was learnt, so equal losses would prove nothing"


@pytest.mark.slow
@pytest.mark.peers("peft", "transformers")
def test_a_forgotten_scale_is_caught_by_the_oracle(monkeypatch):
    """Planted: the update without alpha / r."""
    right = Adapter.forward
    monkeypatch.setattr(Adapter, "forward", lambda self, x: right(self, x) / self.scale)
    with pytest.raises(AssertionError):
        test_losses_are_pefts_step_by_step("alpha/r")


def test_random_b_is_caught(monkeypatch):
    """Planted: B drawn like A."""

    def reset(self, rng):
        self.A.data.uniform_(-1, 1, generator=rng)
        self.B.data.uniform_(-1, 1, generator=rng)

    monkeypatch.setattr(Adapter, "reset", reset)
    with pytest.raises(AssertionError):
        test_a_fresh_adapter_changes_nothing("float")


def test_an_unfrozen_base_is_caught(monkeypatch):
    """Planted: the adapters are inserted, and nothing is frozen."""

    def insert(model, layers, adapters, by=""):
        result = right(model, layers, adapters, by=by)
        return result.requires_grad_(True)

    right = lora.insert
    monkeypatch.setattr(lora, "insert", insert)
    with pytest.raises(AssertionError):
        test_only_adapters_receive_gradients_and_the_base_stays_bit_by_bit("float")


@pytest.mark.parametrize("seed", [2.5, -1, 2**64, "0"])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295, got .*: the same seed draws"):
        LoRA(seed=seed)


def test_a_rank_of_0_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="rank must be a whole number, at least 1, got 0: 8 is usual"):
        LoRA(rank=0)
