"""A study: cells computed one after another, each recorded as soon as it is done; the same call goes on where it stopped.

Its results stand in data/studies/NAME.json with the command, commit, date and machine that made them, and every setting
that they depend on: results of other settings are refused rather than mixed. Delete the file to start over.
"""

import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from effkit.core.calibration import remembering
from effkit.core.paths import checkout, data_dir, write_atomically
from effkit.measure import processor

Cells = Mapping[str, Callable[[], dict]]


@dataclass(frozen=True)
class Study:
    """name      of the file, and of the study on the command line
    settings  everything that its cells depend on, as JSON
    cells     called when some are missing: name of each cell -> what computes it
    """

    name: str
    settings: Callable[[], dict[str, Any]]
    cells: Callable[[], Cells]

    @property
    def path(self) -> Path:
        return data_dir() / "studies" / f"{self.name}.json"

    @property
    def command(self) -> str:
        return f"python -m effkit study {self.name}"

    def run(self, path: Path | None = None) -> dict:
        """Computes what is not there yet, and returns the whole study."""
        path = path or self.path
        study = self.begun(path)
        missing = {name: cell for name, cell in self.cells().items() if name not in study["cells"]}
        with remembering():  # cells that look at the same inputs of the same model look once
            for name, cell in tqdm(missing.items(), desc=self.name):
                study["cells"][name] = cell()
                write_atomically(path, json.dumps(study, indent=1).encode())
        return study

    def read(self, path: Path | None = None) -> dict:
        """The recorded study."""
        path = path or self.path
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: make it with `{self.command}`")
        return json.loads(path.read_text())

    def header(self) -> dict:
        """Where and how the study is made."""
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout(), capture_output=True, text=True)
        how = {"study": self.name, "command": self.command, "commit": commit.stdout.strip() or "unknown"}
        return how | {"date": date.today().isoformat()} | here() | self.settings() | {"cells": {}}

    def begun(self, path: Path) -> dict:
        """What was computed before, or nothing yet. Raises ValueError where that was with other settings, or elsewhere."""
        new = self.header()
        if not path.exists():
            return new
        found = json.loads(path.read_text())
        for key in (*here(), *self.settings()):
            if found.get(key) != new[key]:
                raise ValueError(f"{path} was begun with {key} {found.get(key)}, not {new[key]}; delete it to start over")
        return found


def here() -> dict[str, Any]:
    """The machine and the versions that results depend on."""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = {"machine": f"{processor()}{gpu}", "python": platform.python_version(), "torch": torch.__version__}
    return versions | {"threads": torch.get_num_threads()}
