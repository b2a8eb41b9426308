"""CONTRIBUTING.md: its example is a technique that works, and fails the one law that the page says it fails."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from effkit.core.training import Schedule, fit
from tests.subjects import image_task, mlp

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def technique(tmp_path, monkeypatch):
    """The class of the page's example, from a file as a reader would write it."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "power_of_two.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("power_of_two", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "power_of_two", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.PowerOfTwo()


def test_the_example_rounds_to_the_nearest_power_of_two(technique):
    model = mlp()
    rounded = technique(model)
    for before, after in zip(model.parameters(), rounded.parameters(), strict=True):
        if before.dim() == 2:
            powers = torch.cat([2.0 ** torch.arange(-40, 5), torch.zeros(1)])
            nearest = (before.abs().flatten()[:, None] - powers).abs().amin(1)
            assert torch.equal(after.abs().log2(), after.abs().log2().round())
            assert torch.allclose((after - before).abs().flatten(), nearest) and (after * before >= 0).all()


def test_the_example_takes_a_weight_normed_layer(technique):
    """Bad input 16: what the norm computed is baked, and stays a parameter that can be trained."""
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4)))
    rounded = technique(model)
    weight = rounded[0].get_parameter("weight")
    assert weight.requires_grad and technique.claim(rounded).value <= weight.numel()
    x = torch.rand(2, 6)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 4))
    plain[0].load_state_dict({"weight": model[0].weight.detach(), "bias": model[0].bias.detach()})
    assert torch.equal(rounded(x), technique(plain)(x))


def test_the_example_loses_its_claim_in_a_training_step(technique):
    rounded, task = technique(mlp()), image_task()
    before = technique.claim(rounded).value
    fit(rounded, task, Schedule(steps=1, lr=1e-3))
    assert technique.claim(rounded).value > before


@pytest.mark.parametrize("path", re.findall(r"`(effkit/[\w/]+\.py|tests/[\w/]+\.py)`", PAGE))
def test_files_that_the_page_names_exist(path):
    invented = "effkit/quantization/power_of_two.py"
    assert path == invented or (Path(__file__).parents[1] / path).exists()
