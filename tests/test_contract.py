"""The laws that every technique obeys, free for a new one. What cannot be tried is skipped with its reason, and a law
that skips more than half of the techniques fails."""

import copy
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn

from effkit import catalog, load, save
from effkit.core import recipe
from effkit.core.technique import Pipeline, Technique
from effkit.core.training import Schedule, fit
from tests.subjects import SUBJECTS, outputs

TECHNIQUES = catalog.techniques()
_results: dict[tuple[str, str], tuple] = {}
_skips: dict[str, set] = {}


def subject_for(technique: Technique) -> tuple[str, nn.Module, object]:
    """The first small model that the technique accepts."""
    reasons = []
    for name, (build, task) in SUBJECTS.items():
        model = build()
        try:
            technique.check(model)
            result = _results.get((repr(technique), name)) or technique(model, task())
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        _results[repr(technique), name] = result
        return name, model, task()
    raise AssertionError(f"{technique} works on none of the small models: {'; '.join(reasons)}")


def applied(name: str):
    """technique, model, task, result"""
    technique = catalog.example(TECHNIQUES[name])
    subject, model, task = subject_for(technique)
    return technique, model, task, _results[repr(technique), subject]


def skip(law: str, name: str, why: str):
    _skips.setdefault(law, set()).add(name)
    pytest.skip(f"{name}: {why}")


every = pytest.mark.parametrize("name", sorted(TECHNIQUES))


@every
def test_is_a_frozen_dataclass_with_a_paper_and_no_stray_settings(name):
    kind = TECHNIQUES[name]
    assert is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert str(kind.paper)
    allowed = {"needs", "breaks", "gives", "paper", *(f.name for f in fields(kind))}
    stray = [
        k
        for k, v in vars(kind).items()
        if not k.startswith("_")
        and k not in allowed
        and not callable(v)
        and not isinstance(v, property | classmethod | staticmethod)
    ]
    assert not stray, f"{name}: {stray} has no annotation, so it is silently no field"


@every
def test_leaves_its_input_alone(name):
    technique, model, task, _ = applied(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    state = torch.get_rng_state()
    technique(model, task)
    assert torch.equal(state, torch.get_rng_state()), "the global random state moved"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and len(before) == len(
        model.state_dict()
    )
    assert modes == [m.training for m in model.modules()] and kinds == [type(m) for m in model.modules()]


@every
def test_keeps_the_interface(name):
    _, model, task, result = applied(name)
    assert isinstance(result, nn.Module)
    assert outputs(result, task).shape == outputs(model, task).shape
    assert torch.isfinite(outputs(result, task)).all()
    assert not result.training, "the model came in eval mode and must leave in it"


@every
def test_recipe_round_trips(name):
    technique = catalog.example(TECHNIQUES[name])
    data = json.loads(json.dumps(recipe.to_json(technique)))
    assert recipe.from_json(data, TECHNIQUES) == technique


@every
def test_same_seed_same_model(name):
    technique, model, task, result = applied(name)
    torch.rand(7)  # the global random state must not matter
    again = technique(model, task)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in result.state_dict().items())


@every
def test_states_a_claim_that_is_counted(name):
    technique, _, _, result = applied(name)
    assert technique.claim(result).provenance in ("counted", "estimated")


@every
def test_claim_survives_a_training_step(name):
    technique, _, task, result = applied(name)
    result = copy.deepcopy(result)
    if not any(p.requires_grad for p in result.parameters()):
        skip("training", name, "nothing in it can be trained")
    fit(result, task, Schedule(steps=1, lr=1e-2))
    assert technique.claim(result).value == pytest.approx(technique.claim(applied(name)[3]).value)


@every
def test_traits_hold_as_declared(name):
    technique, _, _, result = applied(name)
    for trait in technique.gives:
        assert trait.holds(result), f"{name} claims to give {trait}"
    for trait in technique.breaks:
        assert not trait.holds(result), f"{name} claims to break {trait}"


@every
def test_twice_is_refused_or_well_defined(name):
    technique, model, task, result = applied(name)
    try:
        twice = technique(result, task)
    except ValueError as error:
        assert len(str(error)) > 20
        return
    assert outputs(twice, task).shape == outputs(model, task).shape


@every
def test_pipeline_of_one_is_the_technique(name):
    technique, model, task, result = applied(name)
    piped = Pipeline((technique,))(model, task)
    assert torch.equal(outputs(piped, task), outputs(result, task))


def test_files_open_in_a_fresh_process(tmp_path):
    """All techniques' results at once: starting Python and torch takes seconds."""
    wanted = {}
    for name in TECHNIQUES:
        _, _, task, result = applied(name)
        try:
            save(result, tmp_path / f"{name}.safetensors")
        except ValueError as error:  # a compiled graph, say, is refused in one sentence
            skip_reason = str(error)
            _skips.setdefault("files", set()).add(f"{name}: {skip_reason}")
            continue
        wanted[name] = (
            task.example[0].tolist(),
            outputs(result, task).double().sum().item(),
            outputs(result, task).double().abs().max().item(),
        )
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    code = """
import json, sys, pathlib, torch, effkit
folder = pathlib.Path(sys.argv[1])
for name, (example, total, largest) in json.loads((folder / "wanted.json").read_text()).items():
    model = effkit.load(folder / f"{name}.safetensors")
    with torch.no_grad():
        y = model(torch.tensor(example)).double()
    assert abs(y.sum().item() - total) <= 1e-4 * max(1, largest * y.numel() ** 0.5), name
print("all opened")
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0 and "all opened" in run.stdout, run.stderr
    assert len(_skips.get("files", ())) <= len(TECHNIQUES) / 2


@every
def test_file_gives_the_same_outputs(name, tmp_path):
    _, _, task, result = applied(name)
    try:
        save(result, tmp_path / "model.safetensors")
    except ValueError as error:
        skip("file", name, str(error))
    opened = load(tmp_path / "model.safetensors")
    assert torch.equal(outputs(opened, task), outputs(result, task))
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in result.parameters())
    assert [n for n, p in opened.named_parameters() if p.requires_grad] == [
        n for n, p in result.named_parameters() if p.requires_grad
    ]


def test_no_law_skips_more_than_half():
    for law, names in _skips.items():
        assert len(names) <= len(TECHNIQUES) / 2, f"{law} is skipped by {sorted(names)}"
