"""Files are written whole or not at all, and each thing has its place."""

import errno
import os
import stat
from pathlib import Path

import pytest

from effkit.core import paths


def full_disk(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(_):
    raise KeyboardInterrupt


def test_writes_into_folders_that_are_not_there_yet(tmp_path):
    target = tmp_path / "a b" / "c" / "file"
    paths.write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file"]


@pytest.mark.parametrize("failing, error", [(full_disk, OSError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("before", [{}, {"file": b"old"}], ids=["no file", "an old file"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing, error, before):
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(error):
        paths.write_atomically(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def a_file_for_a_folder(folder, monkeypatch):
    (folder / "a").write_bytes(b"")
    return folder / "a" / "model"


def a_folder_for_a_file(folder, monkeypatch):
    (folder / "model").mkdir()
    return folder / "model"


def a_full_disk(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    return folder / "model"


def a_folder_of_others(folder, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder / ".model.0f.tmp"))

    monkeypatch.setattr("builtins.open", refused)
    return folder / "model"


@pytest.mark.parametrize(
    "place, why",
    [
        (a_file_for_a_folder, "Not a directory|File exists"),
        (a_folder_for_a_file, "Is a directory"),
        (a_full_disk, "No space left"),
        (a_folder_of_others, "Permission denied"),
    ],
)
def test_an_error_names_the_file_that_was_wanted_and_the_way_out(place, why, tmp_path, monkeypatch):
    path = place(tmp_path, monkeypatch)
    with pytest.raises(OSError, match=why) as caught:
        paths.write_atomically(path, b"new")
    said = str(caught.value)
    assert said.startswith(str(path)) and "make room there, or name a file in another folder" in said
    assert ".tmp" not in said and "Errno" not in said


def test_whether_a_file_can_be_written_is_known_before_it_is(tmp_path):
    paths.check_writable(tmp_path / "new" / "file")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(OSError, match="a/file cannot be written"):
        paths.check_writable(tmp_path / "a" / "file")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_modes_are_those_of_an_ordinary_file(tmp_path):
    """In a shared course folder others must read what one has written; tempfile's 0600 would not let them."""
    (tmp_path / "ordinary").touch()
    paths.write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    (tmp_path / "ours").chmod(0o640)
    paths.write_atomically(tmp_path / "ours", b"again")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    paths.write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize(
    "platform, environment, wanted",
    [
        ("linux", {}, "~/.cache/effkit"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/effkit"),
        ("linux", {"XDG_CACHE_HOME": ""}, "~/.cache/effkit"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "~/Library/Caches/effkit"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/effkit"),
        ("win32", {}, "~/AppData/Local/effkit"),
        ("linux", {"XDG_CACHE_HOME": "/xdg", "EFFKIT_CACHE": "/mine"}, "/mine"),
        ("darwin", {"EFFKIT_CACHE": "~/mine"}, "~/mine"),
    ],
)
def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, platform, environment, wanted):
    for name in ("EFFKIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths.sys, "platform", platform)
    assert paths.cache_dir() == Path(wanted).expanduser()


@pytest.mark.parametrize("place, variable", [(paths.data_dir, "EFFKIT_DATA"), (paths.work_dir, "EFFKIT_WORK")])
def test_an_environment_variable_moves_a_place(monkeypatch, tmp_path, place, variable):
    monkeypatch.delenv(variable, raising=False)
    assert place().parent == paths.checkout()
    monkeypatch.setenv(variable, str(tmp_path))
    assert place() == tmp_path


def test_without_a_checkout_the_error_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "site-packages/effkit/core/paths.py"))
    with pytest.raises(FileNotFoundError, match=r"clone the repository .* `pip install -e \.`"):
        paths.checkout()


def test_a_folder_is_not_taken_for_a_file_before_the_work(tmp_path):
    with pytest.raises(IsADirectoryError, match="cannot be written .it is a folder.*name a file"):
        paths.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == [] and not [p for p in tmp_path.parent.iterdir() if p.suffix == ".tmp"]
