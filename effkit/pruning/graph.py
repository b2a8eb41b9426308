"""The dependency graph: groups of channels that can only be taken out together, found by running the model once.

Idea      Label every index of every weight, run the model on an example, and let each operator tie or hold labels:
          x W^T ties the last dimension of x to the second of W, an addition ties both sides, a mean holds what it runs
          over. No layer needs to be known: residuals, concatenations, flattening, gates follow from the operators.
Cost      One forward pass, and a union-find over a few thousand labels.
Unknown   An operator without a rule holds all that it touches: less is pruned, nothing is broken.
Peer      Torch-Pruning walks autograd's graph with a rule for each kind of layer; here there is one for each operator.
Source    Fang et al. 2023, arXiv:2301.12900, sec. 3.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effkit.core.technique import clone, evaluating
from effkit.pruning.labels import Labels, tensors_in
from effkit.pruning.rules import RULES, pointwise

#: kinds of layers that can be narrowed -> tensor -> its dimensions that may lose indices, that of the outputs first
NARROWABLE: dict[type, dict[str, tuple[int, ...]]] = {
    nn.Linear: {"weight": (0, 1), "bias": (0,)},
    nn.modules.conv._ConvTransposeNd: {"weight": (1, 0), "bias": (0,)},
    nn.modules.conv._ConvNd: {"weight": (0, 1), "bias": (0,)},
    nn.modules.batchnorm._BatchNorm: {"weight": (0,), "bias": (0,), "running_mean": (0,), "running_var": (0,)},
    nn.Embedding: {"weight": (1,)},
    nn.PReLU: {"weight": (0,)},
}


@dataclass(frozen=True)
class Place:
    """A dimension of a tensor: ("stages.0.conv1.weight", 0) are the filters of that convolution."""

    tensor: str
    dim: int
    output: bool = field(default=True, compare=False)  # of the layer, not its input


@dataclass(frozen=True)
class Group:
    """Channels of one kind: each lies at `where[place][channel]`, a list of indices, in every one of these places."""

    where: dict[Place, list[list[int]]]
    held: str = ""  # why none of them can be taken out

    def __len__(self) -> int:
        return len(next(iter(self.where.values())))

    @property
    def layers(self) -> list[str]:
        """The layers whose outputs these channels are, or that normalize them."""
        return sorted({place.tensor.rpartition(".")[0] for place in self.where if place.output})

    def __str__(self) -> str:
        return f"{len(self)} channels of {', '.join(self.layers) or 'the input'}"


class _Tracer(TorchDispatchMode):
    """Sees every operator that reaches a kernel and applies its rule."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_")
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else None)
        if rule is None or any(t.numel() == 0 for t in tensors_in(args)):
            self.labels.hold((args, kwargs), f"{name} has no rule")
        else:
            for tensor, axes in zip(tensors_in(result), rule(self.labels, result, *args, **kwargs), strict=False):
                self.labels.set(tensor, axes)
        return result


def groups(model: nn.Module, example: tuple[Tensor, ...]) -> list[Group]:
    """Every group of channels, those that must stay included; the model is run once, in evaluation mode.

    A model on a GPU is copied for that: which operators run depends on the device, and the rules know a CPU's."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        model, example = clone(model).cpu(), tuple(x.cpu() for x in example)
    labels, names = Labels(), watchable(model)
    for tensor, (_, dims) in names.items():
        labels.watch(tensor, dims)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it runs a whole encoder layer as one operator
    try:
        with evaluating(model), torch.no_grad(), _Tracer(labels):
            result = model(*example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    labels.hold(result, "it is the model's output")
    return collected(labels, names)


def watchable(model: nn.Module) -> dict[Tensor, tuple[str, tuple[int, ...]]]:
    """Each tensor of a layer that can be narrowed, once: its name, and the dimensions that may lose indices."""
    found: dict[Tensor, tuple[str, tuple[int, ...]]] = {}
    foreign = {id(p) for m in model.modules() if kind_of(m) is None for p in m.parameters(recurse=False)}
    for path, module in model.named_modules():
        for name, dims in NARROWABLE.get(kind_of(module), {}).items():  # type: ignore[arg-type]
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and id(tensor) not in foreign:
                found.setdefault(tensor, (f"{path}.{name}".lstrip("."), dims))
    return found


def kind_of(module: nn.Module) -> type | None:
    return next((kind for kind in NARROWABLE if isinstance(module, kind)), None)


def collected(labels: Labels, names: dict[Tensor, tuple[str, tuple[int, ...]]]) -> list[Group]:
    """Classes that lie in the same places are channels of one group."""
    classes: dict[int, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
    for tensor, (name, dims) in names.items():
        for dim in dims:
            for index, label in enumerate(labels.axes(tensor)[dim].tolist()):
                classes[labels.classes.root(label)][Place(name, dim, dim == dims[0])].append(index)
    alike: dict[tuple, list[dict[Place, list[int]]]] = defaultdict(list)
    for root, places in classes.items():
        alike[frozenset(places), labels.classes.held.get(root, "")].append(places)
    return [Group({at: [c[at] for c in channels] for at in channels[0]}, held) for (_, held), channels in alike.items()]
