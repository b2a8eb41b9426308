"""Progress survives torn lines, other hands, and folders that can't be written; it stops nothing."""

import json
import os

import pytest

import effkit.exercises as course
from effkit.exercises import journal
from effkit.exercises.journal import record, records


def test_a_line_is_one_object_with_time_exercise_event_and_status(work):
    record("quantization.affine", "check", "fail")
    (line,) = (work / "progress.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert list(entry) == ["time", "exercise", "event", "status"] and entry["time"].endswith("+00:00")


def test_a_torn_last_line_costs_that_line_alone(work):
    record("a.b", "check", "fail")
    with open(work / "progress.jsonl", "a") as file:
        file.write('{"time": "2026-01-')
    record("a.b", "check", "pass")
    assert [entry["status"] for entry in records()] == ["fail", "pass"]


def test_what_is_no_record_is_passed_over(work):
    work.mkdir()
    (work / "progress.jsonl").write_bytes(b'\n[]\n7\n{"exercise": 1}\n\xff\xfe\n{"exercise": "a.b", "event": "hint"}\n')
    record("a.b", "hint", "1")
    assert len(records()) == 1


@pytest.mark.skipif(os.name == "nt", reason="a file in the folder's place, as POSIX refuses it")
def test_a_folder_that_cannot_be_written_is_said_once_and_stops_nothing(work):
    work.write_text("a file is in the way")
    journal._say_once.cache_clear()
    question = course.exercise("quantization.affine")
    with pytest.warns(UserWarning, match="EFFKIT_WORK") as said:
        question.predict(3)
        question.hint()
        assert question.check(lambda x, bits: (1.0, 0)).status == "fail"
    assert len(said) == 1 and len(course.progress().rows) >= 2


def test_where_it_is_kept(work, tmp_path, monkeypatch):
    assert journal.progress_file() == work / "progress.jsonl"
    monkeypatch.delenv("EFFKIT_WORK")
    monkeypatch.chdir(tmp_path)
    assert journal.progress_file().parent.name == "work" and journal.progress_file().parent != work  # the checkout's
    work.mkdir()
    assert journal.progress_file().resolve() == work / "progress.jsonl"  # ./work, since there is one


def test_the_table_counts_attempts_and_hints():
    question = course.exercise("quantization.affine")
    question.hint()
    question.check(lambda x, bits: (1.0, 0))
    table = course.progress()
    assert "tried   1         1" in repr(table) and f"0 of {len(table.rows)} exercises passed" in repr(table)
    assert "<th scope='row'>quantization.affine</th><td>tried</td><td>1</td>" in table._repr_html_()
    assert table.rows[0].exercise == "quantization.affine" or len(table.rows) > 2
