"""Bad settings, given to every technique of the catalogue, free for a new one: each is refused in a sentence that names the
field and the value, before any model is seen; and what is extreme but allowed is on a list, with its reason."""

import math
import typing
from dataclasses import dataclass, replace
from types import NoneType

import numpy as np
import pytest
import torch

import effkit
from effkit import catalog
from effkit.core import checks
from effkit.core.technique import Identity, Pipeline, Technique

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
    "extra": "a proposal adds nothing to a pass",
    "epochs": "no training",
    "steps": "no training",
    "iterations": "the first guess stays",
    "group_size": "one group for the whole tensor",
    "sparsity": "nothing goes",
    "alpha": "one side counts nothing",
    "outliers": "every channel is one",
    "tau": "no threshold",
    "sinks": "a plain sliding window",
    "recent": "nobody is spared for being new",
}
HUGE = {
    **dict.fromkeys(("epochs", "steps", "iterations"), "that long it takes; a bar says so"),
    **dict.fromkeys(("examples", "group_size", "gamma", "ngram"), "as many as there are"),
    **dict.fromkeys(("window", "sinks", "budget", "residual"), "all of the text"),
    **dict.fromkeys(("rank", "kv_heads"), "a layer knows how many it has"),
    "interval": "once a drawing",
    "capacity": "nothing is forgotten",
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

    with pytest.raises(ValueError, match=r"share must be a (whole )?number, got '1': write Careless\(share=1\), for example"):
        Careless(share="1")


def test_where_there_is_no_default_to_show_the_help_is_named():
    @dataclass(frozen=True)
    class Bare(Technique):
        share: float

    with pytest.raises(ValueError, match=r"share must be a number, got '1': see help\(Bare\)"):
        Bare(share="1")


class Explains:
    """A mixin with checks of its own, which never heard of the library's."""

    def __post_init__(self):
        if self.share == 0:
            raise ValueError("share 0 does nothing: leave it out")


class Hides:
    """A mixin that keeps the library from seeing its subclasses."""

    def __init_subclass__(cls):
        pass


@dataclass(frozen=True)
class Mixed(Explains, Technique):
    share: float = 1.0


@dataclass(frozen=True)
class Inherited(Mixed):
    count: int = 1


@dataclass(frozen=True)
class Hidden(Hides, Explains, Technique):
    share: float = 1.0


@dataclass(frozen=True, init=False)
class SetsItself(Technique):
    share: float = 1.0

    def __init__(self, share):
        object.__setattr__(self, "share", share)


@pytest.mark.parametrize("kind, bad", [(Mixed, dict(share="1")), (Inherited, dict(share="1")), (Inherited, dict(count=1.5))])
def test_a_mixin_does_not_switch_the_types_off(kind, bad):
    ((field, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{field} must be a (whole )?number, got {value!r}: write {kind.__name__}"):
        kind(**bad)
    with pytest.raises(ValueError, match="share 0 does nothing"):
        kind(share=0)
    assert kind(share=1).share == 1


@pytest.mark.parametrize("kind", [Hidden, SetsItself])
def test_what_is_made_around_the_checks_is_refused_at_the_door(kind):
    model = torch.nn.Linear(2, 2)
    for use in (kind(share="1"), Pipeline((kind(share="1"),))):
        with pytest.raises(ValueError, match=f"share must be a number, got '1': write {kind.__name__}"):
            use(model)


@pytest.mark.parametrize("value, taken", [
    (1, True), (np.int64(1), True), (True, False), (1.0, False), (2, False), ("a", True), ("b", False), (torch.ones(2), False),
])  # fmt: skip
def test_a_choice_is_held_to_its_type(value, taken):
    """True == 1 == 1.0, and they are three settings."""

    @dataclass(frozen=True)
    class Chooses(Technique):
        how: typing.Literal[1, "a"] = 1

    if taken:
        assert Chooses(how=value).how == value
    else:
        with pytest.raises(ValueError, match="how must be 1 or 'a', got"):
            Chooses(how=value)


@pytest.mark.parametrize("steps", [Identity(), 3, (Identity, ), (Identity(), None)])  # fmt: skip
def test_what_is_no_tuple_of_techniques_is_no_pipeline(steps):
    with pytest.raises(ValueError, match=r"steps must be techniques, in a tuple, got .*: write Pipeline\(\(RTN\(bits=4\),\)\)"):
        Pipeline(steps)


def test_a_seed_is_refused_with_its_range_and_the_way_out():
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295, got -1: .*; take 0 where any will do"):
        checks.require_seed(-1)


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
    with pytest.raises(pytest.fail.Exception):
        test_a_choice_is_held_to_its_type(2, False)


def test_checks_that_only_the_class_that_writes_them_is_wrapped_in_are_caught(monkeypatch):
    """Planted: a class without a __post_init__ of its own is left as it is."""
    wrap = Technique.__init_subclass__.__func__
    own = classmethod(lambda cls: wrap(cls) if "__post_init__" in vars(cls) else None)
    monkeypatch.setattr(Technique, "__init_subclass__", own)

    @dataclass(frozen=True)
    class Mixed(Explains, Technique):
        share: float = 1.0

    with pytest.raises(pytest.fail.Exception):
        test_a_mixin_does_not_switch_the_types_off(Mixed, dict(share="1"))
