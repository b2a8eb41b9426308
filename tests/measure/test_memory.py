"""Held bytes are counted once a storage; the peak is right on cases that can be worked out by hand."""

import pytest
import torch
from torch import nn

from effkit.core.task import Batches, Task
from effkit.core.technique import clone
from effkit.measure import TrainStep, peak, resident

MB = 1_000_000


@pytest.mark.slow
def test_peak_of_known_allocations():
    def work():
        a = torch.empty(1 * MB, dtype=torch.uint8)
        b = torch.empty(12 * MB, dtype=torch.uint8)
        del a
        c = torch.empty(2 * MB, dtype=torch.uint8)
        return b, c

    reading = peak(work)
    assert reading.value == pytest.approx(14 * MB, rel=0.02)
    assert (reading.unit, reading.provenance) == ("B", "measured")


@pytest.mark.slow
def test_peak_of_a_chain_of_products():
    x = torch.randn(500, 500)  # 1 MB, alive before: not counted

    def chain():
        y = x @ x
        for _ in range(5):
            y = y @ x  # the old y dies when the new one is there
        return y

    assert peak(chain).value == pytest.approx(2 * MB, rel=0.03)


@pytest.mark.slow
def test_the_second_run_needs_as_much_as_the_first():
    work = lambda: torch.zeros(20 * MB, dtype=torch.uint8).sum()  # noqa: E731
    first, second = peak(work), peak(work)
    assert second.value == pytest.approx(first.value, rel=0.02)


@pytest.mark.slow
def test_training_holds_activations_that_inference_does_not():
    layers = [nn.Sequential(nn.Linear(100, 100), nn.Tanh()) for _ in range(8)]
    model, x = nn.Sequential(*layers), torch.randn(1000, 100)  # 0.4 MB a tensor

    @torch.no_grad()
    def infer():
        return model(x)

    assert peak(infer).value < 1.3 * MB
    assert peak(lambda: model(x)).value > 3.2 * MB  # at least one tensor a layer is kept for the gradient


def test_tied_tensors_are_held_once_and_slices_hold_all():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    assert resident(model).value == 2 * 40 * 4
    model[1].weight = model[0].weight
    assert resident(model).value == 40 * 4
    model[0].weight = nn.Parameter(torch.zeros(1000, 4)[:10])
    assert resident(model).value == (4000 + 40) * 4


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_buffers_and_sparse_matrices_count():
    model = nn.BatchNorm1d(8)
    assert resident(model).value == 4 * 8 * 4 + 8  # weight, bias, mean, variance; a counter of 8 bytes
    sparse = nn.Module()
    diagonal = torch.sparse_csr_tensor(torch.arange(101), torch.arange(100), torch.ones(100), check_invariants=True)
    sparse.register_buffer("w", diagonal)
    assert resident(sparse).value == 101 * 8 + 100 * 8 + 100 * 4


@pytest.mark.slow
def test_a_training_step_holds_the_moments_while_activations_are_at_their_peak():
    """Where activations outweigh the weights, W, the peak is in the backward pass; AdamW's two moments come on top."""
    model = nn.Sequential(nn.Linear(500, 500, bias=False), nn.ReLU(), nn.Linear(500, 1, bias=False))  # W = 1 MB
    data = Batches(torch.randn(2000, 500), torch.randn(2000, 1))
    task = Task(train=data, loss=lambda out, batch: (out - batch[1]).square().mean())

    def without_optimizer():
        copied, batch = clone(model), (data.inputs.clone(), data.targets.clone())
        task.loss(copied(batch[0]), batch).backward()

    moments = peak(lambda: TrainStep(2000).prepare(model, task)()).value - peak(without_optimizer).value
    assert moments == pytest.approx(2 * MB, rel=0.1)
