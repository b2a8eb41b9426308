"""What calibration sees: the sums are right, the model is untouched, and nothing empty passes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from effkit.core import calibration
from effkit.core.calibration import gather, layer_error
from effkit.core.surgery import log
from effkit.core.task import Batches, Task


class Twice(nn.Module):
    """One layer used twice, one never, and a BatchNorm whose statistics must stay."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.shared = nn.Linear(6, 6)
        self.never = nn.Linear(6, 3)
        self.out = nn.Linear(6, 2, bias=False)

    def forward(self, x):
        return self.out(self.shared(self.shared(self.norm(x))))


def task(n=20, width=6, size=8, scale=1.0):
    x = scale * torch.randn(n, width, generator=torch.Generator().manual_seed(1))
    return Task(calib=Batches(x, torch.zeros(n), size=size))


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=20)
def test_layer_error_is_the_error_on_the_inputs(outputs, inputs, tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    w, w_hat = (torch.randn(outputs, inputs, generator=rng, dtype=torch.float64) for _ in range(2))
    x = torch.randn(tokens, inputs, generator=rng, dtype=torch.float64)
    assert_close(layer_error(w, w_hat, x.T @ x), (x @ (w - w_hat).T).square().sum())
    assert layer_error(w, w, x.T @ x) == 0


def test_sums_equal_those_over_all_tokens_at_once():
    layer, data = nn.Linear(6, 3), task()
    seen = gather(layer, data)[""]
    x = data.calib.inputs
    assert seen.tokens == 20
    assert_close(seen.gram, x.T @ x)
    assert_close(seen.absmax, x.abs().amax(0))
    assert_close(seen.mean_square, x.square().mean(0))


def test_sequences_count_every_token():
    x = torch.randn(3, 5, 6)
    seen = gather(nn.Linear(6, 3), Task(calib=Batches(x, torch.zeros(3), size=2)))[""]
    assert seen.tokens == 15
    assert_close(seen.gram, x.flatten(0, 1).T @ x.flatten(0, 1))


def test_a_layer_used_twice_has_one_entry_for_both_uses():
    torch.manual_seed(0)
    model, data = Twice().eval(), task()
    found = gather(model, data)
    assert set(found) == {"shared", "out"} and found.unreached == ("never",)
    first = model.norm(data.calib.inputs)
    second = model.shared(first)
    assert found["shared"].tokens == 40
    assert_close(found["shared"].gram, (first.T @ first + second.T @ second).detach())


def test_nothing_is_kept_on_the_model():
    model, data = Twice().train(), task()
    model.out.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calls = []
    model.out.register_forward_hook(lambda *_: calls.append(1))
    gather(model, data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "BatchNorm's statistics moved"
    assert model.training and model.norm.training and not model.out.training
    assert not any(m._forward_pre_hooks for m in model.modules()) and len(model.out._forward_hooks) == 1
    assert len(calls) == 3 and not log(model)
    assert all(p.grad is None for p in model.parameters())


def test_hooks_go_even_when_the_model_fails():
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(4, 3)).train()
    with pytest.raises(RuntimeError):
        gather(model, task())
    assert not any(m._forward_pre_hooks for m in model.modules()) and model[0].training


def test_the_pattern_chooses_layers_and_a_wrong_one_lists_them():
    assert set(gather(Twice(), task(), layers="o*")) == {"out"}
    with pytest.raises(ValueError, match="candidates: shared, never, out"):
        gather(Twice(), task(), layers="conv*")


def test_empty_calibrations_are_refused():
    with pytest.raises(ValueError, match="task.calib, which this task lacks"):
        gather(Twice(), Task())
    with pytest.raises(ValueError, match="the calibration is empty"):
        gather(Twice(), task(n=0))
    with pytest.raises(ValueError, match="no input reached never"):
        gather(Twice(), task(), layers="never")


def test_an_unreached_layer_says_so_when_it_is_asked_for():
    found = gather(Twice(), task())
    with pytest.raises(ValueError, match="'never': no input reached it"):
        found["never"]
    with pytest.raises(ValueError, match="'stem': it was not watched"):
        found["stem"]
    assert "never" not in found


def test_extreme_activations_name_the_layer_and_fit_into_float64():
    model, data = nn.Sequential(nn.Identity(), nn.Linear(6, 2)), task(scale=1e25)
    with pytest.raises(ValueError, match="layer 1 sees inputs whose squares are not finite"):
        gather(model, data)
    assert torch.isfinite(gather(model, data, dtype=torch.float64)["1"].gram).all()


def test_half_precision_inputs_are_summed_in_float32():
    x = torch.full((300, 4), 17.0)  # 300 * 289 overflows float16
    layer = nn.Linear(4, 2).to(torch.bfloat16)
    seen = gather(layer, Task(calib=Batches(x.to(torch.bfloat16), torch.zeros(300), size=64)))[""]
    assert_close(seen.gram, x.T @ x)


def test_an_uncalled_child_of_an_opaque_module_is_listed():
    attention = nn.MultiheadAttention(6, 2, batch_first=True)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = attention, nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    x = torch.randn(4, 3, 6)
    found = gather(Block(), Task(calib=Batches(x, torch.zeros(4), size=2)))
    assert found.unreached == ("attention.out_proj",) and found["out"].tokens == 12


def test_a_sum_that_forgets_earlier_batches_is_caught(monkeypatch):
    """Planted: the last batch overwrites what came before."""

    def forgetful(self, layer, args, kwargs):
        x = args[0].detach()
        self.gram, self.absmax, self.tokens = x.T @ x, x.abs().amax(0), self.tokens + len(x)

    monkeypatch.setattr(calibration.Running, "watch", forgetful)
    with pytest.raises(AssertionError):
        test_sums_equal_those_over_all_tokens_at_once()


def test_within_remembering_the_same_question_is_answered_once(monkeypatch):
    asked, real = [], calibration.gathered
    monkeypatch.setattr(calibration, "gathered", lambda *args: asked.append(args) or real(*args))
    model, data = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), task()
    with calibration.remembering():
        first = gather(model, data)
        assert gather(copy.deepcopy(model), data) is first and len(asked) == 1
        gather(model, data, layers="0")
        gather(model, task(n=19))
        with torch.no_grad():
            model[1].bias += 1
        gather(model, task(n=19))
        assert len(asked) == 4, "other layers, other inputs and other weights are other questions"
    assert gather(model, data) is not gather(model, data), "outside, nothing is kept"


def test_interrupted_twice_no_batch_counts_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "EVERY", -1.0)
    model, data, calls = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), task(n=40), []
    whole = gather(model, data)

    def interrupt(layer, args):
        calls.append(1)
        if len(calls) in (3, 4):
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), calibration.remembering(tmp_path):
            gather(model, data)
    with calibration.remembering(tmp_path):
        again = gather(model, data)
    hook.remove()
    assert again["0"].tokens == 40 and torch.equal(again["0"].gram, whole["0"].gram)


def test_an_interrupted_look_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "EVERY", -1.0)  # sums are written after each batch
    model, data, batches = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), task(n=40), []
    whole = gather(model, data)

    def interrupt(layer, args):
        batches.append(len(args[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), calibration.remembering(tmp_path / "sums"):
        gather(model, data)
    with calibration.remembering(tmp_path / "sums"):
        again = gather(model, data)
    assert len(batches) == 1 + len(data.calib), "only the batch that was interrupted is seen twice"
    assert all(torch.equal(again[path].gram, whole[path].gram) and again[path].tokens == whole[path].tokens for path in whole)
    hook.remove()
    (file,) = (tmp_path / "sums").iterdir()
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    with pytest.raises(ValueError, match="delete it, and the inputs are looked at again"), calibration.remembering(tmp_path / "sums"):
        gather(model, data)
