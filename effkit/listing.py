"""The catalogue in print: every technique with its settings and its paper, and the bibliography."""

from dataclasses import fields

from rich.table import Table

from effkit import catalog
from effkit.core.technique import Technique


def table() -> Table:
    """One row a technique, a section a chapter."""
    grid = Table("technique", "settings, and what they are unless told otherwise", "paper", title="effkit's catalogue")
    chapter = ""
    for name, kind in catalog.techniques().items():
        if (here := catalog.paradigm(kind)) != chapter:
            grid.add_section()
            grid.add_row(f"[bold]{here}[/bold]")
            chapter = here
        grid.add_row(name, settings(kind), str(kind.paper))
    return grid


def settings(kind: type[Technique]) -> str:
    """The fields with the values that the class, or its example, gives them."""
    plain = catalog.example(kind)
    return ", ".join(f"{f.name}={getattr(plain, f.name)!r}" for f in fields(kind))  # type: ignore[arg-type]


def bibliography() -> list[str]:
    """The papers that the techniques implement, each once, by author and year, and which techniques those are."""
    users: dict[tuple, list[str]] = {}
    for name, kind in catalog.techniques().items():
        paper = kind.paper
        if paper.identifier:  # ours have none
            users.setdefault((paper.authors, paper.year, paper.title, paper.identifier), []).append(name)
    return [f"{a} ({year}). {title}. {where}. [{', '.join(by)}]" for (a, year, title, where), by in sorted(users.items())]
