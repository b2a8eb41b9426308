"""Compiling C with the system's compiler, once, and loading it; where there is none, everything falls back.

A kernel is cached in the user's own cache folder under a hash of its source, the compiler and its version, the flags
and the processor's features, so that a changed file or another machine compiles anew; it is written whole or not at all.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from effkit.core.paths import cache_dir

#: sums may be reordered; not -ffast-math, which would make the whole process flush denormal numbers to zero once the
#: kernel is loaded (GCC before 13 links crtfastmath.o), and would forget infinities and NaN
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-O3", "-march=native", *MATH, "-fPIC", "-shared", "-fopenmp")
_NAMES = ("cc", "gcc", "clang")


def compiler() -> str | None:
    """The C compiler to use: $CC, else the first of cc, gcc, clang; EFFKIT_NO_COMPILER=1 plays a machine without."""
    if os.environ.get("EFFKIT_NO_COMPILER") == "1":
        return None
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), *_NAMES)))), None)


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
    target = cache_dir() / "kernels" / f"{_key(text, cc)}.so"
    why = "" if target.exists() else _compile(text, cc, target)
    return (None, why) if why else (ctypes.CDLL(str(target)), "")


def _compile(text: str, cc: str, target: Path) -> str:
    """Compiles beside the target, then renames. Flags that this compiler does not know are left out, OpenMP last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, made = Path(folder, "kernel.c"), Path(folder, "kernel.so")
        source.write_text(text)
        for flags in (FLAGS, FLAGS[:-1], ("-O2", "-fPIC", "-shared")):
            run = subprocess.run([cc, *flags, str(source), "-o", str(made), "-lm"], capture_output=True, text=True)
            if run.returncode == 0:
                os.replace(made, target)
                return ""
    return f"{cc} could not compile it: {run.stderr.strip()[:300]}"


@cache
def _key(text: str, cc: str) -> str:
    version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout
    return hashlib.sha256("\n".join((text, cc, version, *FLAGS, _features())).encode()).hexdigest()[:32]


def _features() -> str:
    """The processor's instruction sets: -march=native code of one machine may crash on another."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() + platform.machine()
    lines = cpuinfo.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
