"""Labels: which index of which dimension of which tensor is the same channel.

Problem   A channel is not one row of one weight: normalization, additions, concatenations and flattening tie it to
          others, and taking out one of them alone breaks the model, or worse, doesn't.
Idea      Give each index of each weight's dimensions a label. Labels that must go together are tied into classes; what
          cannot be taken out is held, with the reason. rules.py says which operator does what.
"""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: the labels of a dimension's indices; 0 means that nothing can be taken out there
Axis = Int[np.ndarray, " n"]


class Classes:
    """Union-find: labels that are tied are one class; a class may be held, for a reason."""

    def __init__(self):
        self.parent = [0]
        self.held: dict[int, str] = {}

    def fresh(self, n: int) -> Axis:
        """n new labels, each a class of its own."""
        self.parent.extend(range(len(self.parent), len(self.parent) + n))
        return np.arange(len(self.parent) - n, len(self.parent))

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def roots(self, axis: Axis) -> Axis:
        return np.array([self.root(i) for i in axis.tolist()], dtype=np.int64) if axis.any() else axis

    def tie(self, a: Axis, b: Axis, why: str = "it meets a tensor of fixed size") -> Axis:
        """Index i of one is index i of the other. Where one has no label, the other has to stay."""
        if a is b or not (a.any() or b.any()):
            return a
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            first, second = self.root(i), self.root(j)
            if first != second and first and second:
                self.parent[second] = first
                if second in self.held:
                    self.held.setdefault(first, self.held.pop(second))
            elif first != second:
                self.held.setdefault(first or second, why)
        return np.where(a == 0, b, a)

    def hold(self, axis: Axis, why: str) -> None:
        for i in axis[axis > 0].tolist():
            self.held.setdefault(self.root(i), why)


class Labels:
    """The axes of every tensor that was seen, and the classes of their labels."""

    def __init__(self):
        self.classes = Classes()
        self.known: dict[int, tuple[Tensor, list[Axis]]] = {}  # holds the tensor too: an id may not be used again
        self.storages: set[int] = set()

    def watch(self, tensor: Tensor, dims: Sequence[int]) -> None:
        """Gives a weight's dimensions their labels."""
        self.storages.add(tensor.untyped_storage().data_ptr())
        self.set(tensor, [self.classes.fresh(n) if d in dims else blank(n) for d, n in enumerate(tensor.shape)])

    def axes(self, tensor: Tensor) -> list[Axis]:
        """A tensor that nobody has seen, such as a constant, has a fixed size: no labels."""
        found = self.known.get(id(tensor))
        return found[1] if found else [blank(n) for n in tensor.shape]

    def set(self, tensor: Tensor, axes: list[Axis]) -> None:
        self.known[id(tensor)] = (tensor, axes)

    def hold(self, value: object, why: str) -> None:
        """Every index of every tensor in a nest of lists stays."""
        for tensor in tensors_in(value):
            for axis in self.axes(tensor):
                self.classes.hold(axis, why)

    def is_weight(self, tensor: Tensor) -> bool:
        """A weight, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self.storages


def blank(n: int) -> Axis:
    return np.zeros(n, dtype=np.int64)


def tensors_in(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Runs of dimensions that a reshape maps onto each other: equal products, as short as can be."""
    i = j = 0
    while i < len(old) and j < len(new):
        a, b, i, j = i, j, i + 1, j + 1
        while (p := prod(old[a:i])) != (q := prod(new[b:j])):
            i, j = (i + 1, j) if p < q else (i, j + 1)
        yield slice(a, i), slice(b, j)
    yield slice(i, len(old)), slice(j, len(new))  # ones at the end


def regroup(labels: Labels, axes: list[Axis], shape: Sequence[int]) -> list[Axis]:
    """The axes after a reshape of one block, such as (channels, height, width) -> (everything).

    A channel becomes a run of indices with one label; where a dimension is cut up, as into heads, each part is one."""
    fixed = [blank(n) for n in shape]
    labelled = [d for d, axis in enumerate(axes) if axis.any()]
    if not labelled:
        return fixed
    if len(labelled) > 1 or prod(shape) == 1:
        for d in labelled:
            labels.classes.hold(axes[d], "a reshape mixes it with other channels, or drops it")
        return fixed
    d = labelled[0]
    place = [-1 if i == d else 1 for i in range(len(axes))]
    flat = np.broadcast_to(labels.classes.roots(axes[d]).reshape(place), [len(a) for a in axes])
    grids = {j: np.moveaxis(flat.reshape(shape), j, 0).reshape(n, -1) for j, n in enumerate(shape) if n > 1}
    whole = [j for j, grid in grids.items() if (grid == grid[:, :1]).all()]
    j = whole[0] if whole else min(grids)
    for column in range(1, 0 if whole else grids[j].shape[1]):
        labels.classes.tie(grids[j][:, 0].copy(), grids[j][:, column].copy())
    return [*fixed[:j], grids[j][:, 0].copy(), *fixed[j + 1 :]]
