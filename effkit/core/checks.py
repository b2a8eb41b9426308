"""Bad input gets one sentence: the value, what is allowed, and the way out."""

import dataclasses
import types
import typing
from functools import cache
from numbers import Integral, Real

_WORDS: dict[object, str] = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}


def require_int(name: str, value: object, low: int, high: int | None = None, *, hint: str = "") -> None:
    """Raises ValueError unless value is a whole number in [low, high]; True and False are not numbers here."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number, at least {low}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}{_tail(hint)}")


def require_float(
    name: str, value: object, low: float, high: float | None = None, *, open_low=False, open_high=False, hint: str = ""
) -> None:
    """Raises ValueError unless value is a finite number in the interval; open ends exclude their bound."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    inside = number and (value > low if open_low else value >= low)  # type: ignore[operator]
    if inside and high is not None:
        inside = value < high if open_high else value <= high  # type: ignore[operator]
    if not inside or value == float("inf"):
        left, right = "(" if open_low else "[", ")" if open_high or high is None else "]"
        raise ValueError(f"{name} must be a number in {left}{low}, {'inf' if high is None else high}{right}, got {value!r}{_tail(hint)}")


def require_seed(seed: object) -> None:
    """Raises ValueError for what random generators do not take."""
    require_int("seed", seed, 0, 2**32 - 1, hint="the same seed draws the same numbers; take 0 where any will do")


def require_choice(name: str, value: object, choices, *, hint: str = "") -> None:
    """Raises ValueError unless value is one of the choices, which the message lists."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{_tail(hint)}")


def require_types(settings: object) -> None:
    """Raises ValueError naming the first field of a dataclass whose value is not what its annotation says."""
    owner = type(settings)
    for name, hint in _hints(owner).items():  # type: ignore[arg-type]
        if not _fits(value := getattr(settings, name), hint):
            kind = " or ".join(map(_in_words, typing.get_args(hint) if _is_union(hint) else (hint,)))
            example = f"write {owner.__name__}({name}={getattr(owner, name)!r}), for example" if hasattr(owner, name) else f"see help({owner.__name__})"
            raise ValueError(f"{name} must be {kind}, got {value!r}: {example}")


@cache
def _hints(kind: type) -> dict[str, object]:
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # an annotation that only a type checker can read: nothing to hold values against
        return {}
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _in_words(hint: object) -> str:
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return " or ".join(map(repr, choices)) or _WORDS.get(hint, hint.__name__ if isinstance(hint, type) else str(hint))


def _fits(value: object, hint: typing.Any) -> bool:
    """Whether a value is what the annotation says; what it can't tell, it lets pass."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return any(_fits(value, a) for a in args)
    if origin is tuple and isinstance(value, tuple):
        wanted = [args[0]] * len(value) if args[1:] == (...,) else args
        return len(wanted) == len(value) and all(map(_fits, value, wanted))
    if origin is typing.Literal:
        return any(_fits(value, type(choice)) and value == choice for choice in args)  # True == 1, and is no number
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return not isinstance(origin or hint, type) or isinstance(value, origin or hint)


def _tail(hint: str) -> str:
    return f": {hint}" if hint else ""
