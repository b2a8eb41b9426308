"""One report a model, one table a race; whatever is measured stays as it was."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from effkit.core.generation import Autoregressive
from effkit.core.report import PROVENANCES
from effkit.core.task import Batches, Score, Task
from effkit.measure import Decode, Forward, TrainStep, compare, measure
from effkit.zoo.gpt import GPT

NAMES = ["bytes on disk", "resident memory", "peak memory", "parameters", "nonzeros", "macs"]
NAMES += ["latency", "throughput", "energy"]
QUICK = dict(min_repeats=2, budget_s=0.01)


def cross_entropy(logits, batch):
    return nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def per_example(model, data):
    return torch.cat([(model(x).argmax(-1) == y).float().flatten(1).mean(1) for x, y in data])


def digits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    data = Batches(torch.randn(20, 1, 4, 4), torch.randint(3, (20, 1)).flatten(), size=8)
    score = lambda m, d: torch.cat([(m(x).argmax(-1) == y).float() for x, y in d])  # noqa: E731
    task = Task("digits", (data.inputs[:4],), train=data, test=data, loss=cross_entropy, per_example=score)
    return model, replace(task, score=Score("accuracy"))


def text():
    model = GPT(vocab_size=40, d_model=32, layers=2, heads=4, kv_heads=2, d_ff=48, context=64)
    ids = torch.randint(40, (6, 13))
    data = Batches(ids[:, :-1], ids[:, 1:], size=3)
    return model, Task(example=(ids[:1],), train=data, val=data, test=data, loss=cross_entropy, per_example=per_example)


CASES = [(digits, Forward(), 1), (digits, TrainStep(6), 6)]
CASES += [(text, Forward(2), 26), (text, Decode(7, 4), 4), (text, TrainStep(2), 24)]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "work", "items"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_reading_is_there_and_the_model_as_before(make, work, items):
    model, task = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = measure(model, task, work, **QUICK)
    assert list(report) == [task.score.name, *NAMES]
    assert report["throughput"].value == pytest.approx(items / report["latency"].value)
    assert report["peak memory"].value > report["resident memory"].value
    assert report["macs"].value > 0
    assert all(r.provenance in PROVENANCES and r.value >= 0 for r in report.readings.values())
    assert str(work) in str(report)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_a_training_step_costs_three_forward_passes():
    model, task = digits()
    forward = measure(model, task, Forward(6), quality=False, **QUICK)["macs"].value
    step = measure(model, task, TrainStep(6), quality=False, **QUICK)["macs"].value
    assert step == 3 * forward - 6 * 16 * 8  # nobody asks for the gradient of the images


@pytest.mark.slow
def test_a_table_begins_with_the_baseline():
    model, task = digits()
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    table = compare({"small": model, "wide": wide}, task, title="two models", **QUICK)
    assert [report.name for report in table] == ["small", "wide"]
    assert (table["wide"]["parameters"] / table["small"]["parameters"]).unit == "x"
    assert "two models" in str(table) and "accuracy" in str(table)
    assert json.loads(table.to_json())[1]["readings"]["macs"]["value"] == 16 * 64 + 64 * 3


def test_decode_uses_the_models_own_way_to_decode():
    class Noticed(Autoregressive):
        calls = 0

        def forward(self, model, ids, max_new_tokens, **settings):
            Noticed.calls += 1
            assert ids.shape == (1, 20) and settings["sampler"].temperature == 0
            return super().forward(model, ids, max_new_tokens, **settings)

    model, task = text()
    model.decoding = Noticed()
    out = Decode(prompt=20, new=3).prepare(model, task)()
    assert out.shape == (1, 23) and Noticed.calls == 1
    assert torch.equal(out[0, :12], task.val.inputs[0])  # the text goes on in the next row


def test_a_batch_is_made_of_the_example():
    _, task = digits()
    model = nn.Identity()
    out = Forward(10).prepare(model, task)()
    assert torch.equal(out, task.example[0][torch.arange(10) % 4])


@pytest.mark.parametrize(
    ("work", "task", "named"),
    [
        (Forward(), Task(), "Forward reads task.example"),
        (TrainStep(), Task(), "TrainStep reads task.train, loss"),
        (Decode(), Task(), "Decode reads task.example"),
        (Decode(), digits()[1], "Decode needs token ids"),
    ],
)
def test_what_the_work_reads_must_be_there(work, task, named):
    with pytest.raises(ValueError, match=named):
        measure(nn.Linear(2, 2), task, work, quality=False)


@pytest.mark.parametrize(
    "make", [lambda: Forward(0), lambda: Decode(new=0), lambda: Decode(prompt=2.5), lambda: TrainStep(-1)]
)
def test_impossible_workloads_are_refused(make):
    with pytest.raises(ValueError, match="whole number"):
        make()


def test_a_frozen_model_cannot_train_and_nothing_cannot_be_compared():
    model, task = digits()
    with pytest.raises(ValueError, match="requires_grad_"):
        TrainStep(2).prepare(model.requires_grad_(False), task)
    with pytest.raises(ValueError, match="no models"):
        compare({}, task)
