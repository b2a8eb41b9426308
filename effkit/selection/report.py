"""What a search leaves behind: its frontier as a table and a figure, and the recommended recipe."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from effkit import plots, zoo
from effkit.core import recipe
from effkit.core.paths import write_atomically
from effkit.selection.candidates import label
from effkit.selection.constraints import BYTES, Constraints
from effkit.selection.select import Selection, select


def frontier_plot(found: Selection, title: str = "") -> Figure:
    """Score against bytes on disk; the frontier's candidates are numbered as in `legend`."""
    higher = found.score.better == "higher"
    number = {c.key: str(n) for n, c in enumerate(found.frontier, 1)}
    points = {number.get(c.key, f"_{c.key}"): (c.readings[BYTES], c.readings[found.score.name]) for c in found.measured}
    title = title or f"What does a byte buy? {len(points)} candidates, measured"
    ylabel = f"{found.score.name} on val ({found.score.unit or 'a share'}), {'more' if higher else 'less'} is better"
    return plots.pareto(points, title=title, xlabel="bytes on disk", ylabel=ylabel, higher_y=higher, logx=True)


def legend(found: Selection) -> str:
    """The numbers of the figure in words."""
    return "\n".join(f"{number:3}  {label(c.technique)}" for number, c in enumerate(found.frontier, 1))


def write(found: Selection, folder: Path, name: str) -> list[Path]:
    """NAME.txt, NAME.png and, where something is recommended, NAME.json, its recipe. Each whole or not at all."""
    paths = [folder / f"{name}.txt", folder / f"{name}.png"]
    write_atomically(paths[0], f"{found}\n\n{legend(found)}\n".encode())
    write_atomically(paths[1], plots.to_png(frontier_plot(found)))
    if found.recommended:
        paths.append(folder / f"{name}.json")
        recipe.write(found.technique, paths[-1])
    return paths


def run(model: str, limits: Constraints, study: str, **options) -> tuple[Selection, list[Path]]:
    """`effkit select`: the search over a model of the zoo, its journal and results under results/select/."""
    if study != Path(study).name or "\\" in study or study == "..":
        raise ValueError(f"study must be a name without folders, got {study!r}: its files go to results/select/")
    loaded, task = zoo.load(model)
    folder, name = Path("results") / "select", study or f"{model}-{digest(limits, options)}"
    found = select(loaded, task, limits, storage=folder / f"{name}.journal", study=name, **options)
    return found, write(found, folder, name)


def digest(limits: Constraints, options: Mapping[str, object]) -> str:
    """Names a search by its settings, so that the same call goes on and another one begins anew."""
    said = repr((limits, sorted((key, repr(value)) for key, value in options.items() if key not in ("trials", "prefer"))))
    return hashlib.sha256(said.encode()).hexdigest()[:8]
