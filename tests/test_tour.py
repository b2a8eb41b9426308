"""The tour: its verdicts follow the numbers, its files say where each number comes from, and nothing is left half-written."""

import html
import json
import re

import pytest

from effkit import tour
from effkit.catalog import PARADIGMS
from effkit.core import native
from effkit.core.paths import checkout
from effkit.core.report import PROVENANCES, Reading, Report
from effkit.measure import Decode, Paired
from tests.subjects import SUBJECTS


def report(name, *, latency, size=100.0, macs=100.0, score=0.9, spread=0.01, memory=100.0) -> Report:
    return Report(
        name,
        {
            "accuracy": Reading(score, "", "measured", 0.001, "higher"),
            "bytes on disk": Reading(size, "B", "measured", better="lower"),
            "resident memory": Reading(memory, "B", "counted", better="lower"),
            "macs": Reading(macs, "macs", "counted", better="lower"),
            "latency": Reading(latency, "s", "measured", spread, "lower"),
        },
    )


def said(before: Report, after: Report, score="accuracy", noise=0.001) -> str:
    return stop(before, after, score, noise).verdict


def stop(before: Report, after: Report, score="accuracy", noise=0.001) -> tour.Stop:
    change = after[score] - before[score]
    paired = Paired(change, (change.value - noise, change.value + noise), None, 100)
    return tour.Stop("pruning", "mlp", score, before, after, paired)


def test_reversed_numbers_give_the_reversed_verdict():
    slow, fast = report("slow", latency=2.0, size=400, macs=400), report("fast", latency=1.0, size=100, macs=100)
    forward, backward = said(slow, fast), said(fast, slow)
    assert "4.0x smaller" in forward and "2.00x faster" in forward and "4.0x fewer multiplications" in forward
    assert "4.0x larger" in backward and "2.00x slower" in backward and "4.0x more multiplications" in backward


def test_smaller_but_not_faster_says_but_and_why():
    verdict = said(report("a", latency=1.0), report("b", latency=1.0, size=25, memory=25))
    assert "4.0x smaller" in verdict and ", but not faster here, because" in verdict and "unpack" in verdict


@pytest.mark.parametrize("new, word", [(0.95, "better"), (0.5, "worse"), (0.9, "the same")])
def test_quality_points_the_right_way(new, word):
    assert word in said(report("a", latency=1.0), report("b", latency=1.0, score=new))


@pytest.mark.parametrize("noise, word", [(0.009, True), (0.011, False)])
def test_what_the_paired_difference_cannot_tell_from_nothing_is_noise(noise, word):
    """Not the scores' own errors: the two models saw the same examples."""
    verdict = said(report("a", latency=1.0), report("b", latency=1.0, score=0.89), noise=noise)
    assert ("within the noise" not in verdict) == word


def test_a_lower_score_can_be_the_better_one():
    def bits(value):
        readings = dict(report("x", latency=1.0).readings)
        readings.pop("accuracy")
        return Report("x", {"bits per byte": Reading(value, "bit/B", "measured", 0.001, "lower"), **readings})

    assert "bits per byte worse by 0.2" in said(bits(1.0), bits(1.2), "bits per byte")
    assert "bits per byte better by 0.2" in said(bits(1.2), bits(1.0), "bits per byte")


def test_within_the_spread_nothing_is_faster():
    assert "not faster" in said(report("a", latency=1.2, spread=0.5), report("b", latency=1.0, spread=0.5))


def small(name: str):
    build, task = SUBJECTS["gpt" if name.startswith("gpt") else "resnet" if name == "resnet" else "mlp"]
    return build(), task()


@pytest.mark.slow
def test_the_tour_visits_every_paradigm_and_writes_what_it_saw(tmp_path, monkeypatch):
    """On the small models, so that it takes seconds: the same path that the shipped ones take."""
    monkeypatch.setattr(tour, "_BUDGET", 0.05)
    monkeypatch.setattr(tour, "Decode", lambda prompt, new: Decode(prompt=8, new=8))
    stops = tour.tour(small)
    assert [stop.paradigm for stop in stops] == list(PARADIGMS)
    tour.write(stops, tmp_path)
    rows = json.loads((tmp_path / "tour.json").read_text())
    assert {row["paradigm"] for row in rows} == set(PARADIGMS)
    for row in rows:
        assert row["technique"] and {"bytes on disk", "latency"} <= row["readings"].keys()
        for reading in row["readings"].values():
            assert {"value", "unit", "provenance", "spread"} <= reading.keys() and reading["provenance"] in PROVENANCES
    page = (tmp_path / "tour.html").read_text()
    assert "<table>" in page and "data:image/png;base64," in page and "src='http" not in page
    assert all(stop.verdict in html.unescape(page) for stop in stops)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        tour.write([shown_stop()], blocked / "results")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tour.write([shown_stop()], tmp_path)
    assert not list(tmp_path.iterdir())


def shown_stop() -> tour.Stop:
    return stop(report("a", latency=1.0), report("b", latency=1.0))


@pytest.mark.parametrize("held, trained, speaks", [(1100, 50, True), (1000, 50, False), (500, 500, False)])
def test_only_who_trains_what_was_added_has_fewer_parameters_to_train(held, trained, speaks):
    """Adapters; not packed codes, which can't be trained at all, and not a model that is merely smaller."""

    def with_parameters(name, parameters, trainable):
        counts = {"parameters": parameters, "trainable": trainable}
        counted = {key: Reading(n, "params", "counted", better="lower") for key, n in counts.items()}
        return Report(name, {**report(name, latency=1.0).readings, **counted})

    verdict = said(with_parameters("a", 1000, 1000), with_parameters("b", held, trained))
    assert ("20x fewer parameters to train" in verdict) == speaks and ("to train" in verdict) == speaks


def test_smaller_than_float32_may_be_larger_than_16_bits():
    def sized(name, size):
        held = {"parameters": Reading(1000, "params", "counted")}
        return Report(name, held | report(name, latency=1.0, size=size).readings)

    assert "(2.0x smaller than 16 bits a weight)" in said(sized("a", 4000), sized("b", 1000))
    assert "(1.5x larger than 16 bits a weight)" in said(sized("a", 4000), sized("b", 3000))
    assert "(no smaller than 16 bits a weight)" in said(sized("a", 4000), sized("b", 2000))


@pytest.mark.parametrize("score, speaks", [(0.9, True), (0.91, False)])
def test_adapters_that_have_learned_nothing_say_so(score, speaks):
    def with_parameters(name, parameters, trainable, score):
        counts = {"parameters": Reading(parameters, "params", "counted"), "trainable": Reading(trainable, "params", "counted")}
        return Report(name, report(name, latency=1.0, score=score).readings | counts)

    verdict = said(with_parameters("a", 1000, 1000, 0.9), with_parameters("b", 1100, 50, score))
    assert ("none is trained yet" in verdict) == speaks and "20x fewer parameters to train" in verdict


@pytest.mark.parametrize("compiler, speaks", [("0", False), ("1", True)])
def test_a_machine_without_native_kernels_is_told_so_above_its_table(compiler, speaks, monkeypatch):
    if native.compiler() is None and not speaks:
        pytest.skip("no C compiler (cc, gcc, clang)")
    monkeypatch.setenv("EFFKIT_NO_COMPILER", compiler)
    for shown in (str(tour.summary([shown_stop()])), tour.page([shown_stop()])):
        assert ("run in PyTorch, slower, because there is no C compiler" in shown) == speaks
        assert ("install one" in shown) == speaks


def test_the_first_result_in_the_readme_is_worded_as_the_tour_words_it():
    """Figures aside, which are another machine's."""

    def row(name, size, memory, latency, score):
        held = report(name, latency=latency, size=size, memory=memory).readings
        held.pop("accuracy")
        score = Reading(score, "bit/B", "measured", 0.001, "lower")
        return Report(name, {"bits per byte": score, "parameters": Reading(1000, "params", "counted"), **held})

    readme = (checkout() / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^quantization: (RTN.*)$", readme, re.MULTILINE)
    verdict = said(row("RTN()", 4000, 100, 2.0, 1.0), row("RTN()", 800, 20, 1.0, 1.01), "bits per byte")
    assert re.sub(r"[\d.]*\d", "0", line) == re.sub(r"[\d.]*\d", "0", verdict)
