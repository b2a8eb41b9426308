"""The ledger counts what AdamW really holds."""

import pytest
import torch

from effkit.core import training
from effkit.peft import LoRA, ledger
from effkit.peft.ledger import memory_ledger, trained_share
from effkit.quantization import RTN
from tests.subjects import gpt, language_task


def held_after_a_step(model, task):
    """Bytes of gradients, and of float32 copies and moments, that exist once `fit` made a step; AdamW's counter aside."""
    run = training._Run.of(model, task, training.Schedule(steps=1), None)
    training._step(run, 0)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    copies = [master for name, master in run.masters.items() if master is not run.trained[name]]
    gradients = size(p.grad for p in (*model.parameters(), *copies) if p.grad is not None)
    return gradients, size(copies) + size(t for s in run.optimizer.state.values() for k, t in s.items() if k != "step")


CASES = {
    "all": lambda: gpt(),
    "LoRA": lambda: LoRA(epochs=0)(gpt()),
    "QLoRA": lambda: LoRA(epochs=0)(RTN(4, 16)(gpt())),
    "bfloat16": lambda: gpt().to(torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_counted_is_what_is_held(case):
    model = CASES[case]()
    lines = memory_ledger(model)
    gradients, moments = held_after_a_step(model, language_task())
    assert (lines["gradients"].value, lines["optimizer"].value) == (gradients, moments)
    tensors = [*model.parameters(), *model.buffers()]
    assert lines["weights"].value == sum(t.numel() * t.element_size() for t in tensors)
    assert lines["in all"].value == sum(lines[k].value for k in ("weights", "gradients", "optimizer"))
    assert {r.provenance for r in lines.values()} == {"counted"}


def test_shares_order_as_they_should():
    whole, few, packed = (memory_ledger(CASES[c]())["in all"].value for c in ("all", "LoRA", "QLoRA"))
    assert packed < few < whole
    assert trained_share(gpt()).value == 1 and trained_share(CASES["LoRA"]()).value < 0.4


def test_a_ledger_with_one_moment_is_caught(monkeypatch):
    """Planted: momentum alone, as if AdamW were SGD."""
    monkeypatch.setattr(ledger, "MOMENTS", 1)
    with pytest.raises(AssertionError):
        test_counted_is_what_is_held("LoRA")
