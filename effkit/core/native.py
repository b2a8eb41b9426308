"""Compiling C with the system's compiler, once, and loading it; where there is none, everything falls back. What the processor can.

A kernel is cached in the user's own cache folder under a hash of its source, the compiler and its version, the flags
and the processor's features, so that a changed file or another machine compiles anew; it is written whole or not at all.
Its name ends in a hash of its bytes, so that a damaged one is compiled anew.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from effkit.core.paths import cache_dir

#: sums may be reordered; not -ffast-math, which would make the whole process flush denormal numbers to zero once the
#: kernel is loaded (GCC before 13 links crtfastmath.o), and would forget infinities and NaN
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-O3", "-march=native", *MATH, "-fPIC", "-shared", "-fopenmp")


def compiler() -> str | None:
    """The C compiler to use: $CC, else the first of cc, gcc, clang; EFFKIT_NO_COMPILER=1 plays a machine without."""
    if os.environ.get("EFFKIT_NO_COMPILER") == "1":
        return None
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)


def library(source: Path | str) -> ctypes.CDLL | None:
    """The compiled source (a path, or C text), or None where it cannot be compiled here; `why_not` says why."""
    return _loaded(source, os.environ.get("EFFKIT_NO_COMPILER"), os.environ.get("CC"))[0]


def why_not(source: Path | str) -> str:
    """Why `library` returned None for this source; empty where it did not."""
    return _loaded(source, os.environ.get("EFFKIT_NO_COMPILER"), os.environ.get("CC"))[1]


@cache
def _loaded(source: Path | str, *environment: str | None) -> tuple[ctypes.CDLL | None, str]:
    """Cached, since a kernel may be called a thousand times a second; the environment decides which compiler it is."""
    text, cc = source.read_text() if isinstance(source, Path) else source, compiler()
    if cc is None:
        return None, "there is no C compiler (cc, gcc, clang); install one, or set CC"
    key, home = _key(text, cc), cache_dir() / "kernels"
    try:
        try:
            return _opened(text, cc, home, key)
        except OSError as error:
            return _opened(text, cc, _scratch(home, error.strerror or str(error)), key)
    except OSError as error:
        return None, f"{home} cannot hold it, nor can a temporary folder ({error}); set EFFKIT_CACHE to a folder of yours"


def _opened(text: str, cc: str, folder: Path, key: str) -> tuple[ctypes.CDLL | None, str]:
    """From the folder, where a whole one is there, else compiled anew. Raises OSError where the folder is no good."""
    found = next(filter(_whole, folder.glob(f"{key}-*.so")), None) or _compile(text, cc, folder, key)
    return (None, found) if isinstance(found, str) else (ctypes.CDLL(str(found)), "")


def _compile(text: str, cc: str, folder: Path, key: str) -> Path | str:
    """The kernel's file, or why there is none. Flags that this compiler does not know are left out, OpenMP last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        source, made = Path(beside, "kernel.c"), Path(beside, "kernel.so")
        source.write_text(text)
        for flags in (FLAGS, FLAGS[:-1], ("-O2", "-fPIC", "-shared")):
            run = subprocess.run([cc, *flags, str(source), "-o", str(made), "-lm"], capture_output=True, text=True)
            if run.returncode == 0:
                return made.replace(folder / f"{key}-{_digest(made)}.so")
    return f"{cc} could not compile it: {run.stderr.strip()[:300]}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Whether the file is what its name says: half a kernel would end the process when it is loaded."""
    return path.stem.endswith(_digest(path))


@cache
def _scratch(refused: Path, why: str) -> Path:
    """A folder for this process alone, in place of one that cannot hold kernels; says so once."""
    folder = Path(tempfile.mkdtemp(prefix="effkit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    way_out = f"this process uses {folder}; to compile once and for all, set EFFKIT_CACHE to a folder of yours"
    warnings.warn(f"{refused} cannot hold compiled kernels ({why}): {way_out}", stacklevel=2)
    return folder


@cache
def _key(text: str, cc: str) -> str:
    version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout
    return hashlib.sha256("\n".join((text, cc, version, *FLAGS, _features())).encode()).hexdigest()[:32]


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; where it did not, a library's products were several times slower than in float32."""
    import torch  # not above: `effkit doctor` looks for a compiler where there is no torch yet

    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _features() -> str:
    """The processor's instruction sets: -march=native code of one machine may crash on another."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor() + platform.machine())
