"""Where effkit keeps things, and how it writes them: whole or not at all.

Three places, each with an environment variable that moves it: the checkout's `data/` (EFFKIT_DATA: shipped, read),
its `work/` (EFFKIT_WORK: the learner's), and the user's own cache (EFFKIT_CACHE: fetched models, compiled kernels).
"""

import os
import shutil
import sys
import uuid
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
    the error goes on to the caller.
    """
    path = Path(path).resolve()  # through a link: its target is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:  # not tempfile: that one is readable by its owner alone
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
