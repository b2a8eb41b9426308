"""torchvision can be imported beside any torch, and one that fits notices nothing."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from effkit.core import vision_ops

NAME = "torchvision._meta_registrations"


@pytest.fixture
def declared(monkeypatch):
    """Counts declarations instead of making them."""
    calls = []
    monkeypatch.setattr(vision_ops, "_declare", lambda: calls.append("library") or "library")
    return calls


@pytest.mark.parametrize("has_ops, wanted", [(True, []), (False, ["library"])])
def test_declares_only_what_could_not_be_loaded(monkeypatch, declared, has_ops, wanted):
    monkeypatch.setitem(sys.modules, "torchvision.extension", SimpleNamespace(_has_ops=lambda: has_ops))
    finder = vision_ops._OperatorDeclarer()
    assert finder.find_spec(NAME) is None
    assert finder.find_spec(NAME) is None, "a second import of it is asked about too"
    assert declared == wanted


def test_other_imports_pass_by(monkeypatch, declared):
    monkeypatch.setitem(sys.modules, "torchvision.extension", SimpleNamespace(_has_ops=lambda: False))
    assert vision_ops._OperatorDeclarer().find_spec("torchvision.ops") is None
    assert declared == []


def test_mending_twice_is_mending_once():
    vision_ops.mend_torchvision()
    before = list(sys.meta_path)
    vision_ops.mend_torchvision()
    assert sys.meta_path == before


@pytest.mark.slow
def test_it_costs_nothing_until_torchvision_is_imported():
    """In a fresh process, from the file alone, since `import effkit` has already mended it."""
    code = f"""
import runpy, sys
runpy.run_path({vision_ops.__file__!r})["mend_torchvision"]()
assert "torch" not in sys.modules
import torchvision.datasets, torchvision.transforms, torchvision.models
"""
    subprocess.run([sys.executable, "-c", code], check=True)
