"""Macs equal torch's own flop counter, except where that one is known to look away."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from effkit import zoo
from effkit.caching import Fused
from effkit.measure import Counted, count, flops, intensity, macs
from effkit.studies.recipes import RECIPES
from effkit.zoo import GPT, MLP, ResNet

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
TINY = dict(vocab_size=60, d_model=32, layers=2, d_ff=48, context=64)
IDS = torch.randint(60, (3, 11))
IMAGES = torch.randn(2, 3, 16, 16)


def peer(function) -> float:
    """torch.utils.flop_counter, told that the fused kernel on processors costs what the one on GPUs does."""
    formula = lambda q, k, v, *rest, out_shape=None, **settings: sdpa_flop_count(q, k, v)  # noqa: E731
    with FlopCounterMode(display=False, custom_mapping={FUSED: formula}) as counter:
        function()
    return counter.get_total_flops() / 2


def mlp():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10, bias=False)), torch.randn(7, 20)


def convolutions():
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)]
    layers += [nn.ConvTranspose2d(8, 4, 2, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*layers), IMAGES


def grouped_queries():
    return GPT(**TINY, heads=4, kv_heads=2), IDS


def wide_heads():
    return GPT(**TINY, heads=2, kv_heads=1, head_dim=20, tied=False), IDS


def fused_blocks():
    return Fused()(GPT(**TINY, heads=4, kv_heads=2)), IDS[:1]


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)


MODELS = [mlp, convolutions, grouped_queries, wide_heads, fused_blocks, encoder]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("kernels", [None, SDPBackend.MATH], ids=["fused", "plain"])
def test_equals_flop_counter(make, kernels):
    model, x = make()
    model.train(make is encoder)  # in evaluation mode flop_counter sees nothing of an encoder layer's fast path
    with sdpa_kernel(kernels or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert macs(model, (x,)).value == peer(lambda: model(x)) > 0


def smollm2():
    """Its real size, on the meta device: shapes without numbers."""
    with torch.device("meta"):
        model = GPT(
            vocab_size=49152, d_model=576, layers=30, heads=9, kv_heads=3, d_ff=1536, rope_theta=1e5, context=2048
        )
        return model, torch.zeros(1, 7, dtype=torch.long)


ZOO = {
    "mlp": lambda: (MLP(), torch.rand(3, 1, 28, 28)),
    "lenet-300-100": lambda: (MLP((784, 300, 100, 10)), torch.rand(3, 1, 28, 28)),
    "resnet": lambda: (ResNet(), torch.rand(3, 1, 28, 28)),
    "gpt-small": lambda: (GPT(), torch.randint(1024, (2, 40))),
    "gpt-target": lambda: (RECIPES["gpt-target"].build(), torch.randint(1024, (2, 40))),
    "gpt-draft-distilled": lambda: (RECIPES["gpt-draft-distilled"].build(), torch.randint(1024, (2, 40))),
    "gpt-draft": lambda: (RECIPES["gpt-draft"].build(), torch.randint(1024, (2, 40))),
    "unet": lambda: (RECIPES["unet"].build(), torch.rand(3, 2, 28, 28)),
    "smollm2": smollm2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_equals_flop_counter_on_the_zoo(name):
    """A model that joins the zoo has to join here."""
    model, x = ZOO[name]()
    model.eval()
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    with sdpa_kernel(SDPBackend.MATH):
        assert macs(model, (x,)).value == counter.get_total_flops() / 2 > 0


@pytest.mark.parametrize("make", [mlp, grouped_queries])
def test_equals_flop_counter_on_a_training_step(make):
    model, x = make()
    with sdpa_kernel(SDPBackend.MATH):
        assert count(lambda: model(x).sum().backward()).value == peer(lambda: model(x).sum().backward())


def test_flop_counter_alone_sees_no_attention_on_a_processor():
    model, ids = grouped_queries()
    with FlopCounterMode(display=False) as counter:
        model(ids)
    b, n = ids.shape
    attention = TINY["layers"] * b * 4 * n * n * 2 * 8  # heads 4 of width 8: scores and weighted sum, no mask
    assert macs(model, (ids,)).value - counter.get_total_flops() / 2 == attention
    assert f"attention {attention:,}" in macs(model, (ids,)).note


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 4))
def test_linear_layers_by_hand(widths, batch):
    pairs = list(zip(widths, widths[1:], strict=False))
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairs])
    assert macs(model, (torch.ones(batch, widths[0]),)).value == batch * sum(a * b for a, b in pairs)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_by_hand(transposed):
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(3, 5, 3)
    positions = 16 * 16 if transposed else 14 * 14  # of the input, of the output
    assert macs(layer, (IMAGES,)).value == 2 * positions * 3 * 5 * 9


def test_forgetting_the_batch_is_caught(monkeypatch):
    module = sys.modules["effkit.measure.macs"]
    whole = module._convolution
    monkeypatch.setattr(module, "_convolution", lambda x, *rest: whole(x[:1], *rest))
    with pytest.raises(AssertionError):
        test_a_convolution_by_hand(False)


def test_gradients_of_a_grouped_convolution_cost_two_passes():
    layer = nn.Conv2d(8, 8, 3, groups=4)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    forward = macs(layer, (x,)).value
    assert count(lambda: layer(x).sum().backward()).value == 3 * forward


def test_looking_up_is_free_and_int8_products_are_not():
    assert macs(nn.Embedding(10, 4), (torch.arange(5),)).value == 0
    a, b = torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    assert count(lambda: torch._int_mm(a, b)).value == 32 * 16 * 8
    assert count(lambda: torch.ones(4, 3) @ torch.ones(3)).value == 12


def test_inference_mode_hides_nothing():
    model, ids = grouped_queries()
    expected = macs(model, (ids,)).value
    with torch.inference_mode():
        assert count(lambda: model(ids)).value == expected


class Outside(nn.Linear):
    """Computes where torch does not look."""

    def forward(self, x):
        return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy().T)

    def macs(self, *shapes):
        return shapes[0].numel() * self.out_features


class Codes(Outside):
    """A packed layer, which need not say anything; it falls back on an operator."""

    macs = None

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.weight = nn.Parameter(self.weight.detach().to(torch.int8), requires_grad=False)

    def dense_weight(self):
        return self.weight.float()

    def forward(self, x):
        return x @ self.dense_weight().t()


@pytest.mark.parametrize("kind", [Outside, Codes])
def test_a_layer_with_its_own_kernel_counts_once(kind):
    model, x = nn.Sequential(nn.Linear(6, 8), kind(8, 4)), torch.ones(5, 2, 6)
    reading = macs(model, (x,))
    assert reading.value == 10 * (6 * 8 + 8 * 4)
    assert kind.__name__ in reading.note
    assert isinstance(Outside(1, 1), Counted)


def test_the_outermost_layer_speaks_for_those_inside():
    class Whole(nn.Sequential):
        def macs(self, *shapes):
            return 1000

    assert (
        macs(nn.Sequential(Whole(Outside(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1)), (torch.ones(1, 4),)).value == 1004
    )


def test_counting_leaves_no_trace():
    model, x = convolutions()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    macs(model, (x,))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch_module._global_forward_hooks and not torch_module._global_forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_and_intensity_follow():
    layer, x = nn.Linear(64, 64, bias=False), torch.ones(1, 64)
    assert flops(layer, (x,)).value == 2 * macs(layer, (x,)).value
    assert intensity(layer, (x,)).value == 64 * 64 / (4 * (64 * 64 + 64 + 64))
    assert (macs(layer, (x,)).unit, macs(layer, (x,)).provenance) == ("macs", "counted")
