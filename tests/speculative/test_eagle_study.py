"""The study of a block for SmolLM2: it goes on where it stopped, in the texts, in the training and between cells."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

import effkit
from effkit.core.paths import data_dir
from effkit.core.training import Schedule
from effkit.studies import decoding, eagle
from effkit.zoo.data import Windows
from effkit.zoo.fetch import where
from tests.speculative.cycles import cyclic, learned, windows


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The same study of a decoder that knows a cycle, and of its own folders."""
    model, task = learned(), replace(windows(), val=Windows(cyclic(400), length=16, size=1))
    monkeypatch.setattr(eagle, "loaded", lambda: (model, task))
    monkeypatch.setattr(eagle, "asked", lambda topics: [cyclic(3 + len(t))[None] for t in topics])
    sizes = dict(ROWS=8, TOKENS=20, BATCH=8, FREQUENT=12, TRIALS=1, PROMPT=6, NEW=10, ROUNDS=6, SCHEDULE=Schedule(24, 1e-2))
    for name, value in sizes.items():
        monkeypatch.setattr(eagle, name, value)
    chosen = ("EAGLE, 1 in a line", "EAGLE, 4 in a line", "EAGLE, a tree of 3, 2 and 1", "5 of 6 blocks", "lookup, else EAGLE")
    monkeypatch.setattr(eagle, "DRAFTS", {name: eagle.DRAFTS[name] for name in chosen})
    monkeypatch.setenv("EFFKIT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_draft_has_its_tokens_a_pass_and_its_seconds(small):
    study = eagle.STUDY.run(small / "eagle.json")
    assert study == json.loads((small / "eagle.json").read_text())
    cells = study["cells"]
    assert len(cells) == 1 + 4 * len(eagle.DRAFTS)
    assert cells["training"]["last loss"] < cells["training"]["first loss"] and cells["training"]["tokens"] == 16 * 8 * 20
    for name, cell in cells.items():
        if name != "training":
            assert cell["tokens a pass"] >= 1 and {len(each) for each in cell["seconds"].values()} == {6}
            middle, low, high = decoding.ratio(cell)
            assert 0 < low <= middle <= high
    assert cells["EAGLE, 4 in a line; requests; 0.0"]["tokens a pass"] > cells["EAGLE, 1 in a line; requests; 0.0"]["tokens a pass"] > 1.2


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_writes_no_text_twice(small, monkeypatch):
    whole, wanted = eagle.training(), effkit.load(small / f"{eagle.HEAD}.safetensors").state_dict()
    for path in (small / "results" / "eagle").iterdir():
        path.unlink()
    real, calls = eagle.eagle_loss, []

    def interrupted(*settings):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*settings)

    monkeypatch.setattr(eagle, "eagle_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        eagle.training()
    texts = {path: path.stat().st_mtime_ns for path in (small / "results" / "eagle").glob("*[0-9].safetensors")}
    assert len(texts) == len(eagle.LEARNED) and eagle.training() == whole
    assert len(calls) == 1 + 24
    assert {path: path.stat().st_mtime_ns for path in texts} == texts
    found = effkit.load(small / f"{eagle.HEAD}.safetensors").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_states_are_those_of_the_texts(small):
    prompt = cyclic(5)[None]
    made = eagle.written(small / "one.safetensors", prompt, 3)
    assert made["ids"].shape == (8, 20) and (made["ids"][:, :5] == prompt).all()
    with torch.no_grad():
        assert torch.allclose(made["states"], eagle.loaded()[0].features(made["ids"]))
    assert len({tuple(row.tolist()) for row in made["ids"]}) > 4, "texts of one prompt differ"


def test_texts_of_other_settings_are_refused(small, monkeypatch):
    eagle.written(small / "one.safetensors", cyclic(5)[None], 0)
    monkeypatch.setattr(eagle, "WARMTH", 1.0)
    with pytest.raises(ValueError, match="one.safetensors was made with .*: delete its folder to start over"):
        eagle.written(small / "one.safetensors", cyclic(5)[None], 0)


def test_nobody_is_asked_about_what_was_learned():
    assert not set(eagle.HELD_OUT) & set(eagle.LEARNED) and len(set(eagle.LEARNED)) == len(eagle.LEARNED)
    assert eagle.settings()["drafts"].keys() == eagle.DRAFTS.keys() and json.dumps(eagle.settings())


@pytest.fixture(scope="module")
def recorded():
    return eagle.STUDY.read()


def test_every_cell_is_recorded_with_the_settings_of_now(recorded):
    assert {key: recorded[key] for key in eagle.settings()} == eagle.settings()
    assert set(recorded["cells"]) == set(eagle.cells())


def test_the_block_that_is_shipped_is_as_large_as_the_one_that_was_raced(recorded):
    """Which one it is, its card says by its hash."""
    made = recorded["cells"]["training"]
    assert made["bytes on disk"] == (data_dir() / f"{eagle.HEAD}.safetensors").stat().st_size < 10e6
    assert made["tokens"] == len(eagle.LEARNED) * len(eagle.REQUESTS) * eagle.ROWS * eagle.TOKENS
    assert made["last loss"] < made["first loss"] / 2


def test_no_greedy_text_parts(recorded):
    for name, cell in recorded["cells"].items():
        if name.endswith("; 0.0"):
            assert cell["texts that part"] == {"drafting": 0}, name


def test_a_real_model_gets_faster_and_a_tree_loses(recorded):
    """By one guess everywhere, drawn or not; lookup in turns adds to it where it is greedy."""
    ratios = {name: decoding.ratio(cell) for name, cell in recorded["cells"].items() if name != "training"}
    for kind, temperature in product(("requests", "pydoc"), eagle.TEMPERATURES):
        assert ratios[f"EAGLE, 1 in a line; {kind}; {temperature}"][1] > 1
        assert ratios[f"EAGLE, a tree of 3, 2 and 1; {kind}; {temperature}"][2] < 1 > ratios[f"5 of 6 blocks; {kind}; {temperature}"][2]
    for kind in ("requests", "pydoc"):
        assert ratios[f"lookup, else EAGLE; {kind}; 0.0"][1] > ratios[f"EAGLE, 2 in a line; {kind}; 0.0"][2]


def test_more_guesses_give_no_fewer_tokens_a_pass(recorded):
    """Greedily the text is the same, and a longer line begins with the shorter one."""
    for kind in ("requests", "pydoc"):
        given = [recorded["cells"][f"EAGLE, {gamma} in a line; {kind}; 0.0"]["tokens a pass"] for gamma in (1, 2, 3, 4)]
        assert all(few <= more + 0.02 for few, more in zip(given, given[1:], strict=False)) and given[0] > 1.1


@pytest.mark.slow
@pytest.mark.real
def test_tokens_a_pass_computed_anew_are_those_recorded(recorded, monkeypatch):
    """But for times. Within a twentieth: another processor may round two tokens that are all but tied the other way."""
    if where("smollm2") is None:
        pytest.skip("smollm2 is not here: effkit fetch smollm2")
    monkeypatch.setattr(decoding, "timed", lambda runs, rounds: {})
    eagle.loaded.cache_clear()
    for name in ("EAGLE, 2 in a line", "lookup, else EAGLE"):
        made, old = eagle.cell(eagle.DRAFTS[name], "requests", 0.0), recorded["cells"][f"{name}; requests; 0.0"]
        for what in ("tokens a pass", "acceptance", "proposed a pass"):
            assert made[what] == pytest.approx(old[what], rel=0.1), (name, what)  # without bfloat16 products texts are others: 5 % off was seen
    eagle.loaded.cache_clear()


@pytest.mark.slow
@pytest.mark.real
def test_it_runs_on_smollm2(monkeypatch, tmp_path):
    if where("smollm2") is None:
        pytest.skip("smollm2 is not here: effkit fetch smollm2")
    sizes = dict(LEARNED=("bees",), REQUESTS=("Explain {} to a child.",), ROWS=2, TOKENS=40, BATCH=2, FREQUENT=64, TRIALS=1, PROMPT=8, NEW=8,
                 ROUNDS=1, SCHEDULE=Schedule(2, 1e-3), TEMPERATURES=(0.0,))  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(eagle, name, value)
    monkeypatch.setattr(eagle, "DRAFTS", {name: eagle.DRAFTS[name] for name in ("EAGLE, 2 in a line", "EAGLE, a tree of 3, 2 and 1")})
    monkeypatch.setenv("EFFKIT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    study = eagle.STUDY.run(tmp_path / "eagle.json")
    assert len(study["cells"]) == 5 and study["cells"]["training"]["bytes on disk"] < 10e6
