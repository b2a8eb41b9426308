"""Progress goes into a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFKIT_WORK", str(tmp_path / "work"))
    return tmp_path / "work"
