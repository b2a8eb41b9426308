"""Weights are counted as they are applied; bytes on disk are those of a file that opens again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from effkit.core.checkpoint import save
from effkit.measure import disk_bytes, nonzeros, parameters
from effkit.zoo.gpt import GPT

TINY = dict(vocab_size=60, d_model=32, layers=2, heads=4, kv_heads=2, d_ff=48, context=64)


class Keep(nn.Module):
    """A mask that lives on the module."""

    def __init__(self, keep):
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight):
        return weight * self.keep


class Codes(nn.Module):
    """A linear layer that stores small integers."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        self.register_buffer("codes", torch.ones(n_out, n_in, dtype=torch.int8))
        self.codes[0] = 0
        self.bias = nn.Parameter(torch.ones(n_out))

    def dense_weight(self):
        return self.codes.float()

    def forward(self, x):
        return x @ self.dense_weight().t() + self.bias


def test_parameters_are_those_of_the_layers():
    assert parameters(nn.Sequential(nn.Linear(10, 5), nn.BatchNorm1d(5))).value == 55 + 10


def test_a_tied_tensor_counts_once():
    untied, tied = GPT(**TINY, tied=False), GPT(**TINY)
    assert parameters(untied).value - parameters(tied).value == 60 * 32
    assert parameters(tied).value == sum(p.numel() for p in tied.parameters())


def test_a_mask_lowers_nonzeros_and_nothing_else():
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    parametrize.register_parametrization(layer, "weight", Keep(torch.arange(100).reshape(10, 10) < 30))
    assert (parameters(layer).value, nonzeros(layer).value) == (110, 40)


def test_packed_weights_count_as_what_they_stand_for():
    model = nn.Sequential(Codes(8, 4), nn.ReLU())
    assert (parameters(model).value, nonzeros(model).value) == (36, 28)


def test_a_layer_around_a_packed_one_adds_only_its_own():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = Codes(8, 4), nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.zeros(4, 2))

        def dense_weight(self):
            return self.base.dense_weight() + self.b @ self.a

    assert (parameters(Adapter()).value, nonzeros(Adapter()).value) == (36 + 24, 28 + 16)


@pytest.mark.parametrize("model", [GPT(**TINY), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())], ids=type)
def test_bytes_on_disk_are_the_files(model, tmp_path):
    save(model, tmp_path / "model.safetensors")
    reading = disk_bytes(model)
    assert reading.value == (tmp_path / "model.safetensors").stat().st_size
    assert (reading.unit, reading.provenance, reading.better) == ("B", "counted", "lower")


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(100, 10)


def test_a_class_that_effkit_does_not_know_is_written_too():
    assert disk_bytes(Foreign()).value > 1010 * 4


@pytest.mark.slow
def test_the_file_opens_in_a_fresh_process_with_equal_outputs(tmp_path):
    model, ids = GPT(**TINY).eval(), torch.randint(60, (2, 9))
    save(model, tmp_path / "model.safetensors")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = (
        "import sys, torch, effkit; from safetensors.torch import load_file, save_file\n"
        "folder = sys.argv[1]; model = effkit.load(folder + '/model.safetensors')\n"
        "ids = load_file(folder + '/ids.safetensors')['ids']\n"
        "with torch.no_grad(): save_file({'logits': model(ids)}, folder + '/logits.safetensors')"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], model(ids), atol=1e-6, rtol=0)
