"""Where effkit keeps things, and how it writes them: whole or not at all.

Three places, each with an environment variable that moves it: the checkout's `data/` (EFFKIT_DATA: shipped, read),
its `work/` (EFFKIT_WORK: the learner's), and the user's own cache (EFFKIT_CACHE: fetched models, compiled kernels).
"""

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def checkout() -> Path:
    """The folder that holds pyproject.toml, notebooks/ and data/. Raises FileNotFoundError where there is none."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file():
        raise FileNotFoundError(
            f"{folder} is no checkout of effkit: its notebooks and data are not packaged, so clone the repository "
            "and install it there with `pip install -e .`"
        )
    return folder


def data_dir() -> Path:
    """Shipped checkpoints, tokenizer, studies and dated constants."""
    return _from_environment("EFFKIT_DATA") or checkout() / "data"


def work_dir() -> Path:
    """The learner's notebooks, progress and grades; git never looks in here."""
    return _from_environment("EFFKIT_WORK") or checkout() / "work"


def cache_dir() -> Path:
    """The user's cache folder for effkit, by the custom of the system; not yet made."""
    return _from_environment("EFFKIT_CACHE") or _user_cache() / "effkit"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return _from_environment("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return _from_environment("XDG_CACHE_HOME") or Path.home() / ".cache"


def _from_environment(name: str) -> Path | None:
    """An empty variable counts as unset, as the XDG specification asks."""
    value = os.environ.get(name)
    return Path(value).expanduser() if value else None


def write_atomically(path: Path | str, content: bytes) -> None:
    """Writes a file beside `path`, flushes it to disk and renames it, so that readers see the old one or the new one.

    Whatever goes wrong, a full disk or Ctrl-C included, the old file stays as it was, nothing else stays behind, and
    the error goes on to the caller; an OSError names the file and the way out.
    """
    path = Path(path).resolve()  # through a link: its target is replaced, not the link
    with _named(path), _beside(path) as beside:
        with open(beside, "xb") as file:  # not tempfile: that one is readable by its owner alone
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)


def check_writable(path: Path | str) -> None:
    """Raises the OSError of `write_atomically` before the work that it would cost; makes the folder. Writing is tried,
    for permissions alone don't tell on network drives."""
    with _named(Path(path)), _beside(Path(path)) as beside:
        beside.touch()
        if Path(path).is_dir():
            raise IsADirectoryError("it is a folder")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The name of a file in the same folder, which is made, and that is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors speak of the file that was wanted, not of the one beside it."""
    try:
        yield
    except OSError as error:
        why = f"{path} cannot be written ({error.strerror or error})"
        raise type(error)(f"{why}: make room there, or name a file in another folder, one that you may write to") from error
