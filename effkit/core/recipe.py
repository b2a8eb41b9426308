"""Recipes: a technique as JSON and back, nested, every field checked.

A recipe is data that strangers send; it names classes of a catalogue that is passed in, never modules to import.
"""

import dataclasses
import json
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
    way_out = "give the path of a file that effkit.save_recipe or effkit select wrote"
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}): {way_out}") from error
    except ValueError as error:  # no JSON, or not even text
        raise ValueError(f"{path} is not a recipe: it is not JSON ({error}); {way_out}") from error
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
    fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields) - {"technique"}):
        raise ValueError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(fields) or 'none'}")
    return kind(**{key: _value(data[key], catalog) for key in fields if key in data})


def _value(value: object, catalog: Mapping[str, type[Technique]]) -> object:
    """As a technique's field has it: lists become tuples. Whether it may be that, the technique checks itself."""
    if isinstance(value, dict):
        return _decode(value, catalog)
    return tuple(_value(v, catalog) for v in value) if isinstance(value, list) else value
