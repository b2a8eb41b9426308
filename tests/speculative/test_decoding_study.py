"""The study of all drafts on all models: what its cells hold, and that the texts it races are the ones it says."""

import copy
import json
import platform
from dataclasses import replace
from statistics import median

import pytest
import torch

from effkit import zoo
from effkit.caching.streams import Request
from effkit.core.generation import Sampler
from effkit.core.technique import Identity, Pipeline
from effkit.speculative import EarlyExit, PromptLookup, Speculative, SpeculativeTree
from effkit.studies import decoding as study
from effkit.zoo.data import Windows
from effkit.zoo.use import Use
from tests.speculative.cycles import cyclic, learned, windows


@pytest.fixture
def small(monkeypatch):
    """The same study of a decoder that knows a cycle."""
    model, task = learned(), replace(windows(), val=Windows(cyclic(400), length=16, size=1))
    known = lambda name: (copy.deepcopy(model), task)  # noqa: E731
    known.cache_clear = lambda: None
    monkeypatch.setattr(study, "loaded", known)
    monkeypatch.setattr(study, "MODELS", {"gpt-small": torch.float32})
    monkeypatch.setattr(study, "brought", lambda: {"gpt-draft-distilled, 2 in a line": Speculative(EarlyExit(0.5), gamma=2)})
    monkeypatch.setattr(study, "prompts", lambda name, kind, some: [cyclic(8)[None], cyclic(13)[None, 5:]])
    monkeypatch.setattr(study, "THEIRS", {"dynamic": {}, "static": study.STATIC})
    monkeypatch.setattr(study, "stream", lambda seed, n: [Request(tuple(cyclic(4 + i).tolist()), 3 + i, float(i)) for i in range(4)])
    monkeypatch.setattr(study, "AGREEING", {"half": EarlyExit(0.5), "itself": Identity()})
    for name, value in dict(NEW=10, ROUNDS=6, LONG=4, BATCHES=(1, 2), HELD=4, SIZES=(1, 3), RATES=(2.0,)).items():
        monkeypatch.setattr(study, name, value)
    return model


OTHERS = ("caches", "serving", "batches", "passes", "agreement")


def small_cells(made):
    return {name: cell for name, cell in made["cells"].items() if not any(word in name for word in OTHERS)}


@pytest.mark.slow
def test_every_cell_has_its_tokens_a_pass_and_its_seconds(small, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    chosen = {"prompt lookup": PromptLookup(), "half": Speculative(Pipeline((EarlyExit(0.5),))), "tree": SpeculativeTree(EarlyExit(0.5), (2, 1))}
    monkeypatch.setattr(study, "drafts", lambda model: chosen)
    made = study.STUDY.run(tmp_path / "decoding.json")
    assert made == json.loads((tmp_path / "decoding.json").read_text())
    assert set(small_cells(made)) == {f"gpt-small: {name}" for name in chosen}
    for name, cell in small_cells(made).items():
        forecast = cell.pop("foretold", None)
        assert (forecast is not None) == name.endswith("half")
        assert set(cell) == {f"{kind}; {temperature}" for kind in study.KINDS for temperature in study.TEMPERATURES}
        for case, found in cell.items():
            assert set(found.get("texts that part", {"drafting": 0}).values()) == {0}
            known = case.endswith("0.0") and "tree" not in name
            assert set(found["seconds"]) == {"plain", "drafting", "reading"} | ({"theirs plain", "theirs drafting"} if known else set())
            assert found["tokens a pass"] >= 1 and {len(each) for each in found["seconds"].values()} == {6}
            middle, low, high = study.ratio(found)
            assert 0 < low <= middle <= high
    for precision in ("float32", "bfloat16"):
        seconds = made["cells"][f"gpt-small: caches, {precision}"]["seconds"]
        assert set(seconds) == {*study.CACHES, *(f"transformers, {key}" for key in study.THEIRS)}
        assert made["cells"][f"gpt-small: caches, {precision}"]["transformers"].count(".") >= 2
    assert [set(each["seconds"]) for each in made["cells"]["gpt-target: batches"].values()] == [{"plain", "drafting"}] * 2
    rates, waits = (made["cells"]["gpt-small: serving"][what] for what in ("tokens a second", "seconds to an answer"))
    assert set(rates) == set(waits) == {"continuous", "static"} and all(len(each) == 3 and min(each) > 0 for each in rates.values())
    assert all(0 < one["2.0"]["50"] <= one["2.0"]["95"] <= one["2.0"]["99"] for one in waits.values())
    assert set(made["cells"]["gpt-small: passes"]["seconds"]) == {"1", "3"}
    accepted = made["cells"]["smollm2: agreement"]["sum min(p, q)"]
    assert accepted["itself"] == pytest.approx(1) and 0 < accepted["half"] < 0.99


def test_tokens_a_pass_are_foretold(small):
    """A copy is always right; of another draft many texts give about what one expects."""
    sampler = Sampler(temperature=1.0)
    certain = study.foretold(small, Speculative(Identity(), gamma=3)(small), [cyclic(8)[None], cyclic(9)[None]], sampler, 12)
    assert certain["sum min(p, q)"] == pytest.approx(1) and certain["tokens a pass"] == certain["place by place"] == pytest.approx(4)
    assert certain["by the law"] == pytest.approx(4)
    found = study.foretold(small, Speculative(EarlyExit(0.5))(small), [cyclic(8 + i)[None] for i in range(40)], sampler, 24)
    assert abs(found["tokens a pass"] - found["place by place"]) < 5 * found["standard error"]
    assert found["standard error"] == pytest.approx(jackknife(small, Speculative(EarlyExit(0.5))(small), 40, sampler, 24), rel=0.05)


def jackknife(plain, drafting, texts, sampler, new):
    """The spread of tokens a pass, by leaving one text out after another."""
    each = (drafting.decoding.passes(drafting, cyclic(8 + i)[None], new, sampler=sampler, rng=torch.Generator().manual_seed(100 + i)) for i in range(texts))
    counts = torch.tensor([len(list(steps)) for steps in each]).double()
    rates = new * (texts - 1) / (counts.sum() - counts)
    return ((texts - 1) / texts * (rates - rates.mean()).square().sum()).sqrt().item()


def test_transformers_writes_the_same_texts(small):
    pytest.importorskip("transformers")
    begun = study.prompts("gpt-small", "held out", 2)
    for draft in (PromptLookup(), Speculative(Pipeline((EarlyExit(0.5),)))):
        for write in study.theirs(small, draft, begun).values():
            for theirs, ids in zip(write(), begun, strict=True):
                assert torch.equal(theirs, small.generate(ids, study.NEW, temperature=0.0))


def test_a_ratio_is_that_of_each_round():
    cell = {"seconds": {"plain": [1.0, 2.0, 3.0, 4.0, 5.0, 8.0], "drafting": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}}
    apart = {"seconds": {"plain": [3.0] * 6, "drafting": [2.0] * 6, "reading": [1.0] * 6}}
    assert study.ratio(apart) == (1.5, 1.5, 1.5) and study.ratio(apart, less="reading") == (2.0, 2.0, 2.0)
    assert study.ratio(cell) == (3.5, 1.0, 8.0) and study.ratio(cell, "drafting", "plain")[0] == pytest.approx((1 / 3 + 1 / 4) / 2)


MODULE = '''
def short():
    return 1


@decorated
def other(x):
    """1"""
    2
    3
    4
    5
    6
    return 7


def walk(tree, walk_on):
    """Up
    and
    down.
    """
    for node in tree:
        walk_on(node)
    return tree


def last(tree):
    found = None
    for node in tree:
        found = node
    return found
'''


def test_the_head_of_the_copy_stands_behind_an_example_and_the_function():
    one, two = (MODULE[MODULE.index(f"def {name}") :].strip() for name in ("walk", "last"))
    one = one[: one.index("\n\n\n")]
    assert study.edit(MODULE) == "\n\n\n".join((one, one.replace("def walk(", "def walk_2("), two, "def last_2(tree):\n"))
    assert study.edit(MODULE[: MODULE.index("def last")]) is None


@pytest.mark.slow
def test_texts_are_held_out_and_short_enough():
    model, task = study.loaded("gpt-small")
    for kind in study.KINDS:
        begun = study.prompts("gpt-small", kind, 4)
        assert len(begun) == len({tuple(ids[0].tolist()) for ids in begun}) == 4
        assert all(1 <= ids.shape[1] <= model.context - study.NEW for ids in begun)
    text = "\n".join(zoo.tokenizer("gpt-small").decode(ids[0].tolist()) for ids in study.prompts("gpt-small", "edits", 4))
    heads = [line for line in text.splitlines() if line.startswith("def ")]
    assert len(heads) == 16 and [head.split("(")[0] + "_2" for head in heads[::2]] == [head.split("(")[0] for head in heads[1::2]]


def test_transformers_is_asked_only_where_it_knows_the_draft(small):
    pytest.importorskip("transformers")
    begun = study.prompts("gpt-small", "edits", 2)
    named = Pipeline((Use("gpt-small"),))
    assert not study.theirs(small, SpeculativeTree(EarlyExit(0.5)), begun)
    assert not study.theirs(small, Speculative(named, gamma=8, cost=0.2), begun)
    assert not study.theirs(small, PromptLookup(otherwise=Speculative(named, gamma=4)), begun)


def test_few_texts_where_a_token_takes_long():
    assert study.trials("gpt-small", "Jacobi") == study.trials("gpt-target", "EAGLE") == {"held out": 8, "edits": 3}
    assert study.trials("smollm2", "prompt lookup") == study.trials("gpt-target", study.SLOW) == {"held out": 2, "edits": 2}


@pytest.fixture(scope="module")
def recorded():
    return study.STUDY.read()


def draft_cells(recorded):
    """(model, draft) -> what is recorded of it."""
    return {tuple(name.split(": ", 1)): cell for name, cell in recorded["cells"].items() if "edits; 0.0" in cell}


def test_every_cell_is_recorded_with_the_settings_of_now(recorded):
    now = study.settings()
    assert {key: recorded[key] for key in now} == now
    assert set(recorded["cells"]) == set(study.cells())


def test_no_greedy_text_of_ours_parts(recorded):
    for name, cell in draft_cells(recorded).items():
        assert [cell[f"{kind}; 0.0"]["texts that part"]["drafting"] for kind in study.KINDS] == [0, 0], name


def test_the_fused_decoder_is_faster_than_every_cache_of_transformers(recorded):
    for name, cell in recorded["cells"].items():
        if ": caches" in name:
            behind = {key: study.ratio(cell, key, "fused") for key in cell["seconds"] if key.startswith("transformers")}
            assert len(behind) == 3 and all(low > 1 for _, low, _ in behind.values()), (name, behind)


def test_aims(recorded):
    """Continuous batching by half as much again as static, by the median of three; tokens a pass foretold; lookup pays on held-out text, and
    twice where SmolLM2 edits code, in the writing alone. What was missed is told by notebook 08 and not asserted."""
    rates = recorded["cells"]["gpt-small: serving"]["tokens a second"]
    assert median(rates["continuous"]) >= 1.5 * median(rates["static"])
    cells = draft_cells(recorded)
    for name, cell in cells.items():
        if said := cell.get("foretold"):
            for way in ("by the law", "place by place"):
                off = abs(said[way] - said["tokens a pass"])
                assert off <= max(0.1 * said["tokens a pass"], 2 * said["standard error"]), (name, way, said)
    for model in study.MODELS:
        assert any(study.ratio(cell["held out; 0.0"])[1] > 1 for (name, draft), cell in cells.items() if name == model and "lookup" in draft), model
    eight = cells["smollm2", "prompt lookup, 8 at a time"]["edits; 0.0"]
    assert study.ratio(eight, less="reading")[0] >= 2 and study.ratio(eight)[1] > 1


def test_a_pass_over_several_tokens_costs_little_more_than_one(recorded):
    """What speculation lives on; 32 tokens are arithmetic for every model."""
    for name in ("gpt-small", "gpt-target", "smollm2"):
        cost = study.over_one(recorded["cells"][f"{name}: passes"])
        assert cost[4] < 2 < cost[32], (name, cost)


def test_smollm2_accepts_copies_in_few_bits_and_hardly_its_own_half(recorded):
    accepted = recorded["cells"]["smollm2: agreement"]["sum min(p, q)"]
    assert accepted["4 bits"] > accepted["3 bits"] > accepted["the first 25 of 30 blocks"] > accepted["the first 15"] > 0


def test_a_draft_that_learned_on_from_the_target_guesses_better(recorded):
    """Whether by its teacher or by its time, this does not say: drafts taught by the text as long are recorded beside it."""
    cells = draft_cells(recorded)
    for gamma in (2, 4):
        plain, taught = (cells["gpt-target", f"{name}, {gamma} in a line"]["foretold"]["sum min(p, q)"] for name in ("gpt-draft", "gpt-draft-distilled"))
        assert taught > plain


def test_losing_cases(recorded):
    """Many texts at once; a draft that is made of half of the target; a window, whose keys are turned anew, on a short text."""
    some = recorded["cells"]["gpt-target: batches"]
    assert all(study.ratio(some[str(n)])[2] < 1 for n in study.BATCHES if n >= 8) and study.ratio(some["1"])[1] > 1
    assert all(study.ratio(cell["held out; 0.0"])[2] < 1 for (_, name), cell in draft_cells(recorded).items() if name == "half of the blocks")
    for model in ("gpt-target", "gpt-small"):
        assert study.ratio(recorded["cells"][f"{model}: caches, float32"], "preallocated", "a window of 256")[2] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt lookup", "half of the blocks", "Jacobi"])
def test_tokens_a_pass_computed_anew_are_those_recorded(recorded, name, monkeypatch):
    """But for times. Within a hundredth where nothing is drawn: another processor may round two tokens that are all but tied the other way."""
    if platform.python_version_tuple()[:2] != tuple(recorded["python"].split(".")[:2]):
        pytest.skip(f"the study was made with the standard library of Python {recorded['python']}: other text, other passes")
    monkeypatch.setattr(study, "timed", lambda runs, rounds: {})
    monkeypatch.setattr(study, "theirs", lambda *args: {})
    monkeypatch.setattr(study, "LONG", 2)
    made, old = study.cell("gpt-small", study.drafts("gpt-small")[name]), recorded["cells"][f"gpt-small: {name}"]
    for kind in study.KINDS:
        for what in ("tokens a pass", "acceptance", "proposed a pass"):
            assert made[f"{kind}; 0.0"][what] == pytest.approx(old[f"{kind}; 0.0"][what], rel=0.01), (kind, what)
