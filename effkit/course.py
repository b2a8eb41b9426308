"""The course's notebooks as files: copied once for the learner, executed and saved for the course.

A learner works on copies in work/, so that `git pull` never meets an answer, and no copy is ever overwritten.
"""

import re
from collections.abc import Collection
from pathlib import Path

from effkit.core.checks import require_choice
from effkit.core.paths import checkout, work_dir, write_atomically
from effkit.stages import offline

WIDGET = "application/vnd.jupyter.widget-view+json"  # tqdm's bars are widgets in a notebook ...
BAR = re.compile(r"\d%\|.*\|.*(it/s|s/it|\?it)")  # ... and characters where there are none: `44%|####4     | 75/170 [...it/s]`


def shipped(names: Collection[str] = ()) -> list[Path]:
    """The course's notebooks in order, or those of these names. Raises ValueError for a name that is not among them."""
    found = {path.stem: path for path in sorted(checkout().glob("notebooks/*.ipynb"))}
    for name in names:
        require_choice("the notebook", name, found)
    return [path for stem, path in found.items() if not names or stem in names]


def copy_for_learner() -> list[Path]:
    """Copies into work/ what is not there yet, and returns the new copies."""
    work = work_dir()
    work.mkdir(parents=True, exist_ok=True)
    new = [(notebook, work / notebook.name) for notebook in shipped() if not (work / notebook.name).exists()]
    for notebook, copy in new:
        write_atomically(copy, notebook.read_bytes())
    return [copy for _, copy in new]


def execute(path: Path) -> None:
    """Runs a notebook from top to bottom and saves it with its outputs; on an error the file stays as it was.

    Raises nbclient's CellExecutionError, which shows the cell and its traceback.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    # record_timing would make each run a difference in git; the kernel's own warnings are not the notebook's.
    NotebookClient(notebook, timeout=120, record_timing=False, extra_arguments=["--log-level=ERROR"],
                   resources={"metadata": {"path": str(path.parent)}}).execute(env=offline())  # fmt: skip
    save_still(notebook, path)


def save_still(notebook, path: Path) -> None:
    """Writes a notebook without what only a kernel can move: sliders, boxes, progress bars. The words and the pictures
    beside them stay."""
    import nbformat

    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) and not BAR.search(o.get("text", ""))]
    write_atomically(path, nbformat.writes(notebook).encode() + b"\n")
