"""Kernels are compiled once; a damaged or unwritable cache costs a compilation and a sentence, never a crash."""

import subprocess
import sys
import warnings

import pytest

from effkit.core import native

SOURCE = "int answer(void) { return 42; }"
compiles = pytest.mark.skipif(native.compiler() is None, reason="no C compiler (cc, gcc, clang)")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of one's own, and a process that has loaded nothing yet."""
    monkeypatch.setenv("EFFKIT_CACHE", str(tmp_path / "cache"))
    native._loaded.cache_clear()
    native._scratch.cache_clear()
    yield tmp_path / "cache"
    native._loaded.cache_clear()


def in_a_fresh_process() -> subprocess.CompletedProcess:
    """A damaged library can end the process that loads it, and one that is loaded is not loaded again."""
    code = f"from effkit.core import native; print(native.library({SOURCE!r}).answer())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("left", [0, 100, 0.5], ids=["nothing", "a header", "half"])
def test_a_damaged_kernel_is_compiled_anew(home, left):
    assert native.library(SOURCE).answer() == 42
    (kernel,) = (home / "kernels").iterdir()
    whole = kernel.read_bytes()
    kernel.unlink()  # the one that is open here stays as it is
    kernel.write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])
    run = in_a_fresh_process()
    assert (run.returncode, run.stdout.strip()) == (0, "42"), run.stderr


@compiles
def test_a_whole_kernel_is_not_compiled_again(home, monkeypatch):
    assert native.library(SOURCE).answer() == 42
    native._loaded.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert native.library(SOURCE).answer() == 42


@compiles
def test_where_the_cache_cannot_be_written_a_temporary_folder_serves_and_is_named_once(home):
    home.write_text("a file where the folder should be")
    with pytest.warns(UserWarning) as said:
        assert native.library(SOURCE).answer() == 42
        assert native.library(SOURCE.replace("42", "43")).answer() == 43
    (warning,) = said
    assert str(home / "kernels") in str(warning.message) and "set EFFKIT_CACHE" in str(warning.message)


@compiles
def test_where_no_folder_can_be_written_there_is_no_kernel_and_a_reason(home, monkeypatch):
    home.write_text("a file where the folder should be")

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.tempfile, "mkdtemp", full)
    assert native.library(SOURCE) is None
    assert str(home / "kernels") in native.why_not(SOURCE) and "set EFFKIT_CACHE" in native.why_not(SOURCE)


@compiles
def test_what_the_compiler_refuses_is_no_fault_of_the_folder(home):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library("no C at all") is None and "could not compile it" in native.why_not("no C at all")


def test_without_a_compiler_there_is_no_kernel_and_a_reason(monkeypatch):
    monkeypatch.setenv("EFFKIT_NO_COMPILER", "1")
    assert native.library(SOURCE) is None and "install one" in native.why_not(SOURCE)
