"""What a technique asks of a task: present, not empty, and named where it lacks."""

import pytest
import torch

from effkit.core.task import Batches, Task
from effkit.core.technique import Identity
from effkit.core.training import fit
from effkit.zoo.data import Windows

EMPTY = [
    None,
    Batches(torch.zeros(0, 2), torch.zeros(0)),
    Windows(torch.arange(5), length=5),  # one token short of a window and its target
]


@pytest.mark.parametrize("data", EMPTY, ids=["missing", "no examples", "text too short"])
def test_what_is_missing_or_empty_is_named(data):
    with pytest.raises(ValueError, match=r"Identity reads task\.calib, which this task lacks; pass Task\(calib=...\)"):
        Task(calib=data).require("calib", by=Identity())


@pytest.mark.parametrize("by, name", [(fit, "fit"), (Identity, "Identity"), (Identity(), "Identity")])
def test_the_asker_is_named_as_it_is_written(by, name):
    with pytest.raises(ValueError, match=f"^{name} reads"):
        Task().require("train", by=by)


def test_one_of_each_is_enough():
    data = Batches(torch.zeros(1, 2), torch.zeros(1))
    Task(train=data, calib=Windows(torch.arange(6), length=5)).require("train", "calib", by=fit)


def test_batches_depend_on_seed_and_step_alone():
    data = Batches(torch.arange(10), torch.arange(10), size=4, shuffle=True, seed=3)
    forward = [data.at(step)[0].tolist() for step in range(9)]
    assert [data.at(step)[0].tolist() for step in reversed(range(9))] == forward[::-1]
    epochs = [sum(forward[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
