"""The study of pairs: it goes on where it stopped, refuses another's results, and records what is forbidden."""

import importlib
import json
import platform
from dataclasses import replace

import pytest
import torch

from effkit import zoo
from effkit.combining.pairs import Pair
from effkit.core.recipe import to_json
from effkit.core.technique import Identity
from effkit.studies import pairs
from effkit.zoo.data import Windows
from effkit.zoo.gpt import GPT
from effkit.zoo.tasks import language_loss


@pytest.fixture
def small(monkeypatch):
    """The study on a model of two layers and a text of noise."""
    from effkit.core.task import Task

    torch.manual_seed(0)
    model = GPT(vocab_size=32, d_model=32, layers=2, heads=4, kv_heads=2, d_ff=64, context=64).eval()
    ids = torch.randint(32, (600,), generator=torch.Generator().manual_seed(1))
    text = Windows(ids, length=16, size=8)
    task = Task("noise", example=(ids[None, :16],), calib=text, test=text, loss=language_loss)
    monkeypatch.setattr(pairs.zoo, "load", lambda name: (model, task))
    monkeypatch.setattr(pairs, "WINDOWS", 8)
    real = pairs.interleaved
    monkeypatch.setattr(pairs, "interleaved", lambda runs, **_: real(runs, min_repeats=1, budget_s=0.01))


@pytest.mark.slow
def test_every_pair_has_its_losses_or_its_reason(small, tmp_path):
    study = pairs.STUDY.run(tmp_path / "pairs.json")
    assert study == pairs.STUDY.read(tmp_path / "pairs.json") and len(study["cells"]) == 10
    found = pairs.pairs(study)
    assert len(found) == 6
    refused = {pair for pair, entry in found.items() if isinstance(entry, str)}
    assert refused == {("quantize", "prune"), ("quantize", "factorize")}
    assert all(isinstance(entry, Pair) for pair, entry in found.items() if pair not in refused)
    pair = found["prune", "quantize"]
    cells = study["cells"]
    both, alone = cells["prune, then quantize"]["loss"], cells["prune"]["loss"] + cells["quantize"]["loss"]
    assert pair.interaction == pytest.approx(both - alone + cells["unchanged"]["loss"])
    assert cells["quantize"]["bytes on disk"]["value"] < cells["unchanged"]["bytes on disk"]["value"]


@pytest.mark.slow
def test_an_interrupted_study_goes_on(small, tmp_path, monkeypatch):
    done, real = [], pairs.cell

    def interrupted(parts, model, task):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(parts)
        return real(parts, model, task)

    monkeypatch.setattr(pairs, "cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pairs.STUDY.run(tmp_path / "pairs.json")
    kept = json.loads((tmp_path / "pairs.json").read_text())["cells"]
    again = []
    monkeypatch.setattr(pairs, "cell", lambda *args: again.append(args[0]) or real(*args))
    study = pairs.STUDY.run(tmp_path / "pairs.json")
    assert len(kept) == 4 and len(again) == 6 and not set(again) & set(done)
    assert all(study["cells"][name] == entry for name, entry in kept.items())


def test_results_of_other_settings_are_refused(small, tmp_path, monkeypatch):
    (tmp_path / "pairs.json").write_text(json.dumps(pairs.STUDY.header()))
    monkeypatch.setattr(pairs, "WINDOWS", 9)
    with pytest.raises(ValueError, match="begun with windows 8, not 9; delete it to start over"):
        pairs.STUDY.run(tmp_path / "pairs.json")


@pytest.mark.slow
def test_a_recorded_cell_comes_out_again():
    """What the notebook shows as recorded: two cells of ten, computed anew from the shipped checkpoint."""
    study = pairs.STUDY.read()
    if platform.python_version_tuple()[:2] != tuple(study["python"].split(".")[:2]):
        pytest.skip(f"the study was made with the standard library of Python {study['python']}: other text, other losses")
    model, task = zoo.load("gpt-small")
    task = replace(task, test=task.test.first(8))
    for name, technique in {"unchanged": Identity(), "quantize": pairs.PARTS["quantize"]}.items():
        assert study["recipes"].get(name, to_json(technique)) == to_json(technique)
        again = pairs.losses(technique(model, task), task)
        assert again == pytest.approx(study["cells"][name]["windows"][:8], abs=2e-3)


def test_a_missing_study_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m effkit study pairs"):
        pairs.STUDY.read(tmp_path / "pairs.json")


@pytest.mark.slow
def test_the_command_line_runs_every_study(small, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from effkit import studies
    from effkit.cli import app

    for name in studies.STUDIES:
        assert importlib.import_module(f"effkit.studies.{name}").STUDY.name == name
    monkeypatch.setattr(type(pairs.STUDY), "path", property(lambda self: tmp_path / f"{self.name}.json"))
    done = CliRunner().invoke(app, ["study", "pairs"])
    assert done.exit_code == 0 and "10 cells" in done.output and pairs.STUDY.read()["cells"]
    refused = CliRunner().invoke(app, ["study", "nothing"])
    assert refused.exit_code != 0 and "'pairs'" in refused.output
