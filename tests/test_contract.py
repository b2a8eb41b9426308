"""The laws that every technique obeys, free for a new one. What cannot be tried is skipped with its reason, and a law
that skips more than half of the techniques fails."""

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effkit import catalog, load, save
from effkit.caching import GroupHeads
from effkit.combining import QAP
from effkit.compilation import Compile
from effkit.core import recipe
from effkit.core.technique import Identity, Pipeline, Technique
from effkit.core.training import Schedule, fit
from effkit.factorization import SVD, Tucker2, WhitenedSVD
from effkit.peft import LoRA
from effkit.pruning import Filters, Fisher, Magnitude
from effkit.quantization import QAT
from effkit.speculative import EarlyExit
from tests.subjects import SUBJECTS, outputs

TECHNIQUES = catalog.techniques()
_results: dict[tuple[str, str], tuple] = {}


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


def untrainable(name: str) -> str:
    """Why no training step can be tried; empty where one can."""
    trained = any(p.requires_grad for p in applied(name)[3].parameters())
    return "" if trained else "nothing in it can be trained"


@cache
def unsaved(name: str) -> str:
    """Why there is no file of it, a compiled graph, say; empty where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save(applied(name)[3], Path(folder) / "model.safetensors")
        except ValueError as error:
            return str(error)
    return ""


def unless(why: str) -> None:
    """Skips the test for this reason, if it is one."""
    if why:
        pytest.skip(why)


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
    unless(untrainable(name))
    technique, _, task, result = applied(name)
    result = copy.deepcopy(result)
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


FRESH = """
import sys, pathlib, torch, effkit
from safetensors.torch import load_file
torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
wanted = load_file(folder / "wanted")
for path in sorted(folder.glob("*.safetensors")):
    with torch.no_grad():
        y = effkit.load(path)(wanted["example " + path.stem])
    assert torch.equal(y, wanted["outputs " + path.stem]), path.stem
    print(path.stem)
"""


@pytest.mark.slow
def test_files_open_in_a_fresh_process_with_the_same_outputs_bit_by_bit(tmp_path):
    """All techniques' results at once: starting Python and torch takes seconds."""
    wanted = {}
    names = [name for name in sorted(TECHNIQUES) if not unsaved(name)]
    for name in names:
        _, _, task, result = applied(name)
        save(result, tmp_path / f"{name}.safetensors")
        wanted |= {f"example {name}": task.example[0].clone(), f"outputs {name}": outputs(result, task)}
    save_file(wanted, tmp_path / "wanted")
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == names, run.stderr


@every
def test_file_gives_the_same_outputs(name, tmp_path):
    unless(unsaved(name))
    _, _, task, result = applied(name)
    save(result, tmp_path / "model.safetensors")
    opened = load(tmp_path / "model.safetensors")
    assert torch.equal(outputs(opened, task), outputs(result, task))
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in result.parameters())
    assert [n for n, p in opened.named_parameters() if p.requires_grad] == [
        n for n, p in result.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("why", [untrainable, unsaved])
def test_no_law_skips_more_than_half(why):
    skipped = [name for name in TECHNIQUES if why(name)]
    assert len(skipped) <= len(TECHNIQUES) / 2, f"{why.__name__}: {skipped}"


#: a technique switched off, and what it then equals; a technique that always rounds, say, has no such setting
OFF = [
    (Identity(), Identity()), (Pipeline(), Identity()), (Compile(passes=()), Identity()), (LoRA(epochs=0), Identity()),
    (Magnitude(0.0), Identity()), (Fisher(0.0), Identity()), (Filters(0.0), Identity()),
    (Magnitude(0.0, pattern="channels"), Identity()), (SVD(keep=1.0), Identity()), (SVD(energy=1.0), Identity()),
    (WhitenedSVD(keep=1.0), Identity()), (WhitenedSVD(energy=1.0), Identity()), (Tucker2(fraction=1.0), Identity()),
    (Tucker2(energy=1.0), Identity()), (EarlyExit(depth=1.0), Identity()), (GroupHeads(kv_heads=2), Identity()),
    (QAP(sparsity=0.0), QAT()),
]  # fmt: skip


def check_off(off: Technique, equals: Technique, subject: str) -> None:
    build, task = SUBJECTS[subject]
    try:
        changed = off(build(), task())
    except ValueError as error:
        pytest.skip(f"not for this model: {error}")
    assert torch.equal(outputs(changed, task()), outputs(equals(build(), task()), task()))


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("off, equals", OFF, ids=repr)
def test_switched_off_it_changes_nothing(off, equals, subject):
    check_off(off, equals, subject)


@pytest.mark.parametrize("off, _", OFF, ids=repr)
def test_what_is_switched_off_can_be_tried_on_a_model(off, _):
    subject_for(off)


@pytest.mark.parametrize("on", [Magnitude(0.1), SVD(keep=0.5), Filters(0.25), QAT()], ids=repr)
def test_what_is_not_off_is_caught(on):
    with pytest.raises(AssertionError):
        check_off(on, Identity(), "mlp")
