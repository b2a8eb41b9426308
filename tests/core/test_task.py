"""What a technique asks of a task: present, not empty, and named where it lacks."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from effkit.core.task import Batches, Task
from effkit.core.technique import Identity
from effkit.core.training import Schedule, fit
from effkit.zoo.data import Windows


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


EMPTY = [
    None,
    [],
    Batches(torch.zeros(0, 2), torch.zeros(0)),
    Windows(torch.arange(5), length=5),  # one token short of a window and its target
]


@pytest.mark.parametrize("data", EMPTY, ids=["missing", "no batch", "no examples", "text too short"])
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


@pytest.mark.parametrize("batches", [[(torch.zeros(2, 3), torch.zeros(2))], DataLoader(range(3))], ids=["list", "DataLoader"])
def test_training_says_what_it_needs_more_than_a_list(batches):
    with pytest.raises(ValueError, match=r"fit reads task\.train by batch number, which a \w+ does not offer; pass Batches"):
        fit(torch.nn.Linear(3, 1), Task(train=batches, loss=lambda y, batch: y.mean()), Schedule(steps=1))


# "meta" is a device that every machine has


def devices(data) -> set[str]:
    """Where the tensors of some batches lie."""
    if isinstance(data, torch.Tensor):
        return {data.device.type}
    return set() if data is None else set().union(*map(devices, data))


@pytest.mark.parametrize("batch", [
    (torch.zeros(2, 3), torch.zeros(2)), [torch.zeros(2, 3), torch.zeros(2)], (torch.zeros(2, 3), None),
    ((torch.zeros(2, 3), torch.zeros(2, 1)), torch.zeros(2)),
    Pair(torch.zeros(2, 3), torch.zeros(2)),
], ids=["pair", "list", "no targets", "two inputs", "named"])  # fmt: skip
@pytest.mark.parametrize("field", ["train", "calib", "val", "test"])
def test_plain_lists_of_batches_move_too(field, batch):
    task = Task(example=(torch.zeros(1, 3),), **{field: [batch, batch]})
    moved = task.to("meta")
    assert devices(getattr(moved, field)) == devices(moved.example) == {"meta"}
    assert devices(getattr(task, field)) == {"cpu"}, "the task itself stays where it was"
    assert [len(pair) for pair in getattr(moved, field)] == [2, 2]
    assert type(getattr(moved, field)[0]) is type(batch)


def test_batches_and_windows_move_as_they_did():
    moved = Task(train=Batches(torch.zeros(5, 2), torch.zeros(5), size=2), calib=Windows(torch.arange(6), length=5)).to("meta")
    assert isinstance(moved.train, Batches) and isinstance(moved.calib, Windows) and (moved.val, moved.example) == (None, None)
    assert devices(moved.train) == {"meta"} and devices([moved.calib.ids]) == {"meta"}


def test_what_cannot_be_moved_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"task\.calib holds a DataLoader, which cannot be moved to meta: give Batches\(inputs, targets\)"):
        Task(calib=DataLoader(range(3))).to("meta")


def test_batches_depend_on_seed_and_step_alone():
    data = Batches(torch.arange(10), torch.arange(10), size=4, shuffle=True, seed=3)
    forward = [data.at(step)[0].tolist() for step in range(9)]
    assert [data.at(step)[0].tolist() for step in reversed(range(9))] == forward[::-1]
    epochs = [sum(forward[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_the_first_examples_of_a_plain_list_are_refused_with_the_way_out():
    batch = (torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"Identity reads the first examples of task.calib, which a list does not offer; pass Batches\(inputs, targets\)"):
        Task(calib=[batch]).few(1, by=Identity())
    task = Task(calib=Batches(*batch, size=1))
    assert len(task.few(1, by=Identity()).calib) == 1 and len(task.calib) == 2
