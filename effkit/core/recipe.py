"""Recipes: a technique as JSON and back, nested, every field checked.

A recipe is data that strangers send; it names classes of a catalogue that is passed in, never modules to import.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from effkit.core.paths import write_atomically
from effkit.core.technique import Technique

SCHEMA = 1


def to_json(technique: Technique) -> dict:
    """The recipe as plain data, with its schema version."""
    return {"schema": SCHEMA, **_encode(technique)}


def from_json(data: object, catalog: Mapping[str, type[Technique]]) -> Technique:
    """The technique that a recipe describes. Raises ValueError naming the unknown technique, field, or wrong type."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"this recipe has schema {found!r}, and {SCHEMA} is what this version reads; write it again with effkit.save_recipe")
    return _decode({key: value for key, value in data.items() if key != "schema"}, catalog)


def write(technique: Technique, path: str | Path) -> None:
    write_atomically(Path(path), json.dumps(to_json(technique), indent=1).encode())


def read(path: str | Path, catalog: Mapping[str, type[Technique]]) -> Technique:
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a recipe: it is not JSON ({error})") from error
    return from_json(data, catalog)


def _encode(value: object) -> typing.Any:
    if isinstance(value, Technique):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"technique": type(value).__name__, **fields}
    return [_encode(v) for v in value] if isinstance(value, tuple) else value


def _decode(data: dict, catalog: Mapping[str, type[Technique]]) -> Technique:
    name = data.get("technique")
    if not isinstance(name, str) or name not in catalog:
        raise ValueError(f"no technique {name!r} in the catalogue; it has {', '.join(sorted(catalog))}")
    kind = catalog[name]
    hints = typing.get_type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields) - {"technique"})
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(fields) or 'none'}")
    return kind(**{key: _value(data[key], hints[key], f"{name}.{key}", catalog) for key in fields if key in data})


def _value(value: object, hint: object, where: str, catalog) -> object:
    """A field's value as its annotation wants it: lists become tuples, numbers stay what they are."""
    if isinstance(value, dict):
        value = _decode(value, catalog)
    if isinstance(value, list):
        kinds = (hint, *typing.get_args(hint))  # of `tuple[int, ...] | None` the tuple
        kind = next((k for k in kinds if typing.get_origin(k) is tuple), hint)
        args = [a for a in typing.get_args(kind) if a is not Ellipsis] or [object]
        value = tuple(_value(v, args[min(i, len(args) - 1)], f"{where}[{i}]", catalog) for i, v in enumerate(value))
    if not _fits(value, hint):
        raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _fits(value: object, hint: object) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple)
    if origin is typing.Literal:
        return value in args
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (object, typing.Any) or (isinstance(hint, type) and isinstance(value, hint))
