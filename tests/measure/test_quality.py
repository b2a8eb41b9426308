"""A score has a standard error; pairs tell more than scores; looking does not change the model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from effkit.core.task import Batches, Score, Task
from effkit.measure import mcnemar, paired, quality


def scored(model, data):
    return torch.cat([(model(x).argmax(-1) == y).float() for x, y in data])


X = torch.randn(200, 6)
Y = X[:, :3].argmax(-1)
TASK = Task("toy", test=Batches(X, Y, size=32), per_example=scored, score=Score("accuracy", "", "higher"))


class Picks(nn.Module):
    """Right on the first n examples, wrong on the others."""

    def __init__(self, right):
        super().__init__()
        self.right = right

    def forward(self, x):
        rows = (x[:, None] == X[None]).all(-1).float().argmax(-1)
        answers = torch.where(rows < self.right, Y[rows], (Y[rows] + 1) % 3)
        return nn.functional.one_hot(answers, 3).float()


def test_quality_is_a_mean_with_its_standard_error():
    reading = quality(Picks(150), TASK)
    assert reading.value == 0.75
    assert reading.spread == pytest.approx((0.75 * 0.25 / 199) ** 0.5)
    assert (reading.provenance, reading.better) == ("measured", "higher")


def test_looking_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert quality(model, TASK).value == quality(model, TASK).value  # no dropout
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_pair_sees_what_two_scores_do_not():
    result = paired(Picks(150), Picks(158), TASK)
    assert result.difference.value == pytest.approx(0.04)
    apart = quality(Picks(158), TASK) - quality(Picks(150), TASK)
    assert result.difference.spread < apart.spread / 2
    assert result.interval[0] > 0 and result.p == pytest.approx(2 / 2**8)
    assert result.interval == pytest.approx([0.04 - 1.96 * result.difference.spread, 0.04 + 1.96 * result.difference.spread], rel=1e-3)
    assert "p = 0.00781" in str(result)


def test_no_answer_changed_is_known_to_three_in_n_and_not_to_nothing():
    """At this rate of change 200 answers would all have stayed as they were once in twenty times."""
    result = paired(Picks(150), Picks(150), TASK)
    assert (result.difference.value, result.p) == (0.0, 1.0)
    low, high = result.interval
    assert low == -high and (1 - high) ** 200 == pytest.approx(0.05, rel=0.05) and high == pytest.approx(3 / 200, rel=0.01)


def test_scores_that_are_not_right_or_wrong_have_no_mcnemar():
    task = Task(test=TASK.test, per_example=lambda model, data: torch.linspace(0, 1, 50))
    assert paired(Picks(1), Picks(2), task).p is None


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(a, b):
    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="task.val"):
        quality(Picks(1), TASK, "val")
    with pytest.raises(ValueError, match="'training'"):
        quality(Picks(1), TASK, "training")
