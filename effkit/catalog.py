"""The catalogue is the code: every technique is found by walking the chapters; two of one name are an error."""

import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from effkit.core import recipe
from effkit.core.technique import Technique

#: the eight paradigms, in the order of the course
PARADIGMS = ("quantization", "pruning", "distillation", "factorization",
             "compilation", "peft", "caching", "speculative")  # fmt: skip


@cache
def techniques() -> dict[str, type[Technique]]:
    """Name -> class, of every technique that core, the zoo, the chapters and their combinations define."""
    found: dict[str, type[Technique]] = {}
    for package in ("core", "zoo", *PARADIGMS, "combining"):
        for module in _modules(f"effkit.{package}"):
            for name, kind in inspect.getmembers(module, inspect.isclass):
                if not issubclass(kind, Technique) or kind.__module__ != module.__name__ or not _complete(kind):
                    continue
                if name in found:
                    raise ValueError(f"two techniques are called {name}: {found[name].__module__} and {module.__name__}; rename one")
                found[name] = kind
    return found


def paradigm(kind: type[Technique]) -> str:
    """The chapter a technique belongs to; core and the zoo for those that belong to none."""
    return kind.__module__.split(".")[1]


def example(kind: type[Technique]) -> Technique:
    """An instance to try: made without arguments, or by the class's own `example`."""
    return kind.example() if hasattr(kind, "example") else kind()


def load_recipe(source: str | Path | dict) -> Technique:
    """A technique from a recipe's file or data; only techniques of the catalogue are made."""
    return recipe.from_json(source, techniques()) if isinstance(source, dict) else recipe.read(source, techniques())


save_recipe = recipe.write


def _modules(package: str) -> list[ModuleType]:
    root = importlib.import_module(package)
    names = [f"{package}.{info.name}" for info in pkgutil.iter_modules(root.__path__)]
    return [root, *map(importlib.import_module, names)]


def _complete(kind: type[Technique]) -> bool:
    """False for the base classes that a technique is made from: something in them is left to be written."""
    return not inspect.isabstract(kind) and kind.rewrite_ is not Technique.rewrite_
