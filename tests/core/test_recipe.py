"""Recipes: every technique survives JSON, and what strangers send is refused field by field."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import effkit
from effkit.core import checks, recipe
from effkit.core.technique import Identity, Pipeline, Technique


@dataclass(frozen=True)
class Nested(Technique):
    """One field of each kind that a recipe may hold."""

    count: int = 1
    share: float | None = None
    on: bool = False
    how: Literal["a", "b"] = "a"
    pairs: tuple[tuple[str, int], ...] = ()
    sizes: tuple[int, ...] | None = None
    inner: Technique = Identity()


CATALOG = {"Nested": Nested, "Identity": Identity, "Pipeline": Pipeline}


def nested(inner):
    return st.builds(
        Nested,
        count=st.integers(-5, 5),
        share=st.none() | st.floats(-1, 1),
        on=st.booleans(),
        how=st.sampled_from("ab"),
        pairs=st.lists(st.tuples(st.text(max_size=3), st.integers()), max_size=2).map(tuple),
        sizes=st.none() | st.lists(st.integers(), max_size=2).map(tuple),
        inner=inner | st.lists(inner, max_size=3).map(lambda steps: Pipeline(tuple(steps))),
    )


@given(st.recursive(st.just(Identity()), nested, max_leaves=4))
def test_round_trips_through_json(technique):
    assert recipe.from_json(json.loads(json.dumps(recipe.to_json(technique))), CATALOG) == technique


def test_round_trips_through_a_file(tmp_path):
    technique = Pipeline((Nested(count=3, inner=Nested(on=True)), Identity()))
    recipe.write(technique, tmp_path / "r.json")
    assert recipe.read(tmp_path / "r.json", CATALOG) == technique


def test_a_field_that_is_missing_has_its_default():
    assert recipe.from_json({"schema": 1, "technique": "Nested", "count": 4}, CATALOG) == Nested(count=4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("count", 2.5),
        ("count", True),
        ("count", "2"),
        ("count", None),
        ("share", "0.5"),
        ("share", True),
        ("on", 1),
        ("how", "c"),
        ("pairs", [["a", "b"]]),
        ("pairs", 3),
        ("inner", 3),
        ("inner", {"technique": "os.system"}),
        ("inner", {"technique": "Nested", "how": "c"}),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_with_its_value(field, value):
    with pytest.raises(ValueError) as caught:
        recipe.from_json({"schema": 1, "technique": "Nested", field: value}, CATALOG)
    assert len(str(caught.value)) > 25


@pytest.mark.parametrize("data", [None, [], "x", {}, {"schema": 2, "technique": "Identity"}, {"schema": 1}])
def test_what_is_no_recipe_is_refused(data):
    with pytest.raises(ValueError, match="schema|no technique"):
        recipe.from_json(data, CATALOG)


def test_only_the_catalogue_is_made():
    with pytest.raises(ValueError, match="no technique 'Nested' in the catalogue; it has"):
        effkit.load_recipe({"schema": 1, "technique": "Nested"})


@pytest.mark.parametrize("content", ["", "{", "\x00", '{"schema": 1'])
def test_a_file_that_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a recipe"):
        recipe.read(path, CATALOG)


def test_a_recipe_that_makes_a_forbidden_order_is_refused():
    steps = [{"technique": "RTN"}, {"technique": "Magnitude"}]
    with pytest.raises(ValueError, match="put Magnitude first"):
        effkit.load_recipe({"schema": 1, "technique": "Pipeline", "steps": steps})


def test_a_reader_that_trusts_types_is_caught(monkeypatch):
    monkeypatch.setattr(checks, "_fits", lambda value, hint: True)
    with pytest.raises(pytest.fail.Exception):
        test_a_field_of_the_wrong_kind_is_refused_with_its_value("count", 2.5)


def test_bits_that_are_no_whole_number_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8, got 2.5: codes are packed"):
        effkit.load_recipe({"schema": 1, "technique": "RTN", "bits": 2.5})


@pytest.mark.parametrize("content, why", [(b"\x80\x81\xff\x00", "is not a recipe: it is not JSON"), (None, "cannot be read")])
def test_a_file_that_cannot_be_a_recipe_is_named_with_the_way_out(tmp_path, content, why):
    for path in (tmp_path, tmp_path / "r.json"):
        if content is not None and path != tmp_path:
            path.write_bytes(content)
        with pytest.raises((ValueError, OSError)) as caught:
            recipe.read(path, CATALOG)
        said = str(caught.value)
        assert said.startswith(str(path)) and "effkit.save_recipe or effkit select" in said and "Errno" not in said
    assert why in said
