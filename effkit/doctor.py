"""What this machine lacks for the course, and how to get it: one short question a function, one line an answer."""

import importlib
import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effkit.core import native
from effkit.core.paths import cache_dir, check_writable, checkout

GIB = 2**30
INSTALL = "python -m pip install -c requirements.lock"


@dataclass(frozen=True)
class Finding:
    """What was seen; `remedy` is empty where nothing is amiss; only what is `required` makes the doctor fail."""

    subject: str
    seen: str
    remedy: str = ""
    required: bool = False


def examine() -> list[Finding]:
    """All findings, most important first."""
    return [answer(question) for question in QUESTIONS]


def answer(question: Callable[[], Finding]) -> Finding:
    """What is found; on a machine that lacks much, some questions can't be asked."""
    try:
        return question()
    except (ImportError, OSError) as error:
        return Finding(question.__name__, f"can't be told: {error}")


def python() -> Finding:
    remedy = "" if sys.version_info >= (3, 11) else "install Python 3.11 or later and make .venv anew"
    seen = f"{platform.python_version()}, {platform.system()} on {platform.machine()}"
    return Finding("Python", seen, remedy, required=True)


def dependencies() -> Finding:
    missing = _missing(_requirements(extra=None))
    seen = f"missing: {', '.join(missing)}" if missing else "all there"
    return Finding("dependencies", seen, f"{INSTALL} -e ." if missing else "", required=True)


def torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return Finding("torch", f"cannot be imported: {error}", f"{INSTALL} torch", required=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, and none is needed"
    return Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads; {device}", required=True)


def torchvision() -> Finding:
    try:
        return Finding("torchvision", importlib.import_module("torchvision").__version__, required=True)
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "install the torchvision that was released with your torch"
        return Finding("torchvision", f"cannot be imported: {error}", remedy, required=True)


def compiler() -> Finding:
    found = native.compiler()
    remedy = "kernels fall back to torch; for native ones, Debian: apt install gcc; macOS: xcode-select --install"
    return Finding("C compiler", found or "none", "" if found else remedy)


def processor() -> Finding:
    from effkit.measure.roofline import processor

    return Finding("processor", str(processor()))


def memory() -> Finding:
    free = _free_memory()
    seen = "unknown on this system" if free is None else f"{free / GIB:.1f} GiB free"
    short = free is not None and free < 2 * GIB
    return Finding("memory", seen, "the tour wants 2 GiB: close other programs or kernels" if short else "")


def disk() -> Finding:
    free = shutil.disk_usage(_nearest(cache_dir())).free
    remedy = "" if free >= GIB else "smollm2 and kernels want 1 GiB: make room, or set EFFKIT_CACHE to another disk"
    return Finding("disk", f"{free / GIB:.1f} GiB free for {cache_dir()}", remedy)


def cache() -> Finding:
    folder = cache_dir() / "kernels"
    try:
        check_writable(folder / "any")
    except OSError as error:
        return Finding("kernel cache", str(error).rpartition(": ")[0], "set EFFKIT_CACHE to a folder of yours")
    return Finding("kernel cache", f"{folder} can be written")


def smollm2() -> Finding:
    from effkit.zoo.fetch import where

    found = where("smollm2")
    remedy = "" if found else "effkit fetch smollm2 (98 MB; only the rows on the real model need it)"
    return Finding("smollm2", str(found or "not fetched"), remedy)


def energy() -> Finding:
    from effkit.measure.energy import counters

    return Finding("energy", ", ".join(c.name for c in counters()) or "no counter: joules are estimates")


def peers() -> Finding:
    return _extra("peers", "the cells that compare with them say so and are passed over")


def dev() -> Finding:
    return _extra("dev", "`effkit test` and `effkit check` need them")


QUESTIONS: tuple[Callable[[], Finding], ...] = (
    python, dependencies, torch, torchvision, compiler, processor, memory, disk, cache, smollm2, energy, peers, dev,
)  # fmt: skip


def _extra(name: str, consequence: str) -> Finding:
    wanted = _requirements(extra=name)
    missing = _missing(wanted)
    remedy = f"{consequence}: {INSTALL} -e '.[{name}]'" if missing else ""
    return Finding(f"extra `{name}`", f"missing: {', '.join(missing)}" if missing else ", ".join(wanted), remedy)


def _requirements(extra: str | None) -> list[str]:
    """The names of the distributions that pyproject.toml asks for."""
    import tomllib

    project = tomllib.loads((checkout() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in wanted]


def _missing(names: list[str]) -> list[str]:
    return [name for name in names if not any(importlib.metadata.Distribution.discover(name=name))]


def _free_memory() -> int | None:
    """Bytes that may still be taken: what the system has left, or what a container's limit leaves, if that is less."""
    available = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    free = [int(available[1]) * 1024] if available else []
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return min(free, default=None)


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
