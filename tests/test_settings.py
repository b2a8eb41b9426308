"""Bad settings, given to every technique of the catalogue, free for a new one: each is refused in a sentence that names the
field and the value, before any model is seen; and what is extreme but allowed is on a list, with its reason."""

import math
import typing
from dataclasses import dataclass, replace
from types import NoneType

import numpy as np
import pytest

import effkit
from effkit import catalog
from effkit.core import checks
from effkit.core.technique import Technique

EXAMPLES = {name: catalog.example(kind) for name, kind in catalog.techniques().items()}

#: by the type that a field is annotated with: what is no such value, or no sensible one
BAD: dict[object, tuple] = {
    int: (2.5, math.nan, math.inf, "3", True, None, -7, (3,)),
    float: (math.nan, math.inf, -math.inf, "0.5", True, None, -0.5, (0.5,)),
    bool: (1, "yes", None),
    str: (5, None, ("*",)),
    tuple: (3, None),
    typing.Literal: ("no such thing", 5, None),
}
#: fields for which 0 may be a value like others, and those that have no largest
ZERO = {
    "seed": "a seed like others",
    "epochs": "no training",
    "steps": "no training",
    "iterations": "the first guess stays",
    "group_size": "one group for the whole tensor",
    "sparsity": "nothing goes",
    "alpha": "one side counts nothing",
    "outliers": "every channel is one",
    "tau": "no threshold",
}
HUGE = {
    **dict.fromkeys(("epochs", "steps", "iterations"), "that long it takes; a bar says so"),
    **dict.fromkeys(("examples", "group_size", "gamma", "ngram"), "as many as there are"),
    "rank": "a layer knows how many it has",
    "lr": "training says when the loss is no number",
    **dict.fromkeys(("alpha", "temperature", "damping", "ridge", "outliers", "tau"), "a scale"),
}


def kinds(hint: object) -> tuple:
    """The types that an annotation allows, `None` and each origin among them."""
    parts = typing.get_args(hint) if checks._is_union(hint) else (hint,)
    return tuple(typing.get_origin(part) or part for part in parts)


def bad(hint: object) -> list:
    """What no field of this type may hold."""
    allowed = kinds(hint)
    held = [(3, "RTN", None) if isinstance(k, type) and issubclass(k, Technique) else BAD[k] for k in allowed if k is not NoneType]
    return [value for values in held for value in values if not (value is None and NoneType in allowed)]


SETTINGS = [
    (name, field, hint) for name, kind in catalog.techniques().items() for field, hint in checks._hints(kind).items()
]


def refused(name: str, field: str, value: object) -> str:
    """The sentence of the refusal."""
    with pytest.raises((ValueError, TypeError)) as caught:
        replace(EXAMPLES[name], **{field: value})
    return str(caught.value)


@pytest.mark.parametrize("name, field, value", [(n, f, value) for n, f, hint in SETTINGS for value in bad(hint)])
def test_a_bad_setting_is_refused_with_its_name_and_value(name, field, value):
    said = refused(name, field, value)
    assert field in said and repr(value) in said, said


NUMBERS = [(n, f, kind) for n, f, hint in SETTINGS for kind in kinds(hint) if kind in (int, float)]


@pytest.mark.parametrize("value", [0, 10**30])
@pytest.mark.parametrize("name, field, kind", NUMBERS)
def test_nothing_and_too_much_are_refused_or_have_a_meaning(name, field, kind, value):
    try:
        replace(EXAMPLES[name], **{field: kind(value)})
    except (ValueError, TypeError) as error:
        assert field in str(error) and repr(kind(value)) in str(error)
    else:
        assert field in (HUGE if value else ZERO), f"{name}({field}={value}) was taken; what does it mean?"


@pytest.mark.parametrize("kind", [int, float])
def test_a_technique_that_checks_nothing_itself_checks_types(kind):
    @dataclass(frozen=True)
    class Careless(Technique):
        share: kind = 1

    with pytest.raises(ValueError, match=r"share must be a (whole )?number, got '1': a setting of Careless"):
        Careless(share="1")


@pytest.mark.parametrize("value", [[1, 2], (1, "2"), (1,), (1, 2, 3)])
def test_a_tuple_is_checked_to_its_last_number(value):
    @dataclass(frozen=True)
    class Pair(Technique):
        sizes: tuple[int, int] = (1, 1)

    assert Pair(sizes=(1, 2)).sizes == (1, 2)
    with pytest.raises(ValueError, match="sizes must be tuple"):
        Pair(sizes=value)


def test_numpys_numbers_are_numbers():
    assert effkit.techniques()["RTN"](bits=np.int64(3)).bits == 3
    assert effkit.techniques()["Magnitude"](sparsity=np.float32(0.5)).sparsity == 0.5


def test_a_library_without_checks_is_caught(monkeypatch):
    monkeypatch.setattr(checks, "_fits", lambda value, hint: True)
    with pytest.raises(pytest.fail.Exception):
        test_a_bad_setting_is_refused_with_its_name_and_value("LoRA", "layers", 5)
