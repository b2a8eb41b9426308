"""Structured pruning: channels, neurons and heads that are gone, not zero.

Problem   Dense hardware multiplies by zero as slowly as by anything else.
Idea      Take a channel out of every tensor that it lies in (graph.py): narrower layers, an ordinary dense model.
Law       The model without a channel equals the model in which the channel's weights are zero, on every input: what
          reads the channel multiplies by those zeros. It is checked on the example each time, because a size that is
          written into a model's code (`x.view(-1, 512)`) shows in no graph.
Source    Li et al. 2016, arXiv:1608.08710, sec. 3; through residuals Fang et al. 2023, arXiv:2301.12900.
"""

import fnmatch
from collections import defaultdict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effkit.core.surgery import note
from effkit.core.technique import evaluating
from effkit.pruning.graph import Group, Place, groups

#: groups, and which of their channels stay
Choice = list[tuple[Group, Bool[Tensor, " channels"]]]


def removable(model: nn.Module, example: tuple[Tensor, ...], *, layers: str = "*", by: str = "") -> list[Group]:
    """Groups that may lose channels and have a layer that matches; those held are noted. Raises ValueError for none."""
    found = [group for group in groups(model, example) if group.layers]
    chosen = [group for group in found if any(fnmatch.fnmatchcase(path, layers) for path in group.layers)]
    if not chosen:
        names = "; ".join(map(str, found)) or "none at all"
        raise ValueError(f"{by}: the pattern {layers!r} matches no layer with channels; candidates: {names}")
    for group in chosen:
        if group.held:
            note(model, group.layers[0], f"all {group} left alone", group.held)
    free = [group for group in chosen if not group.held]
    if not free:
        raise ValueError(f"{by}: every channel must be left alone: " + "; ".join(f"{g}: {g.held}" for g in chosen))
    return free


def channel_totals(group: Group, scores: dict[str, Tensor]) -> tuple[Float[Tensor, " channels"], int]:
    """For each channel the sum of the scores of all weights that go with it; and how many weights those are.

    scores   layer's path -> score of each weight"""
    totals, weights = torch.zeros(len(group), dtype=torch.float64), 0
    for place, indices in group.where.items():
        path, _, name = place.tensor.rpartition(".")
        if name == "weight" and path in scores:
            score = scores[path].double().cpu().movedim(place.dim, 0).flatten(1)
            totals += score.sum(1)[torch.tensor(indices)].sum(1)
            weights += score.shape[1] * len(indices[0])
    return totals, weights


def going(choice: Choice) -> dict[Place, list[int]]:
    """place -> the indices that go."""
    found: dict[Place, list[int]] = defaultdict(list)
    for group, keep in choice:
        for place, indices in group.where.items():
            for channel in (~keep).nonzero().flatten().tolist():
                found[place] += indices[channel]
    return {place: indices for place, indices in found.items() if indices}


def mask_channels_(model: nn.Module, choice: Choice) -> None:
    """The simulated twin: the channels' weights, biases and statistics become zero, and everything keeps its shape."""
    for place, indices in going(choice).items():
        tensor = _tensor(model, place.tensor)
        tensor.data = tensor.data.index_fill(place.dim, torch.tensor(indices, device=tensor.device), 0)


def remove_channels_(model: nn.Module, choice: Choice) -> None:
    """The real thing: every tensor without its channels, and every layer's numbers as its tensors say."""
    for place, indices in going(choice).items():
        tensor = _tensor(model, place.tensor)
        stays = torch.ones(tensor.shape[place.dim], dtype=torch.bool)
        stays[indices] = False
        tensor.data = tensor.data.index_select(place.dim, stays.nonzero().squeeze(1).to(tensor.device))
        tensor.grad = None
    for module in model.modules():
        _renumber(module)


def shrink_(model: nn.Module, choice: Choice, example: tuple[Tensor, ...]) -> None:
    """Masks, runs, removes, runs again; raises ValueError where the two outputs differ."""
    mask_channels_(model, choice)
    masked = _outputs(model, example)
    remove_channels_(model, choice)
    try:
        removed = _outputs(model, example)
    except RuntimeError as error:
        raise ValueError(f"{_blame(choice)}: {str(error).splitlines()[0]}") from error
    if not all(_equal(a, b) for a, b in zip(removed, masked, strict=True)):
        raise ValueError(f"{_blame(choice)}: its outputs changed")


def _blame(choice: Choice) -> str:
    names = "; ".join(str(group) for group, keep in choice if not keep.all())
    return f"the model's code seems to have sizes written in, for it changed without some of {names}; set `layers`"


def _outputs(model: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [t.detach().clone() for t in tree_leaves(model(*example)) if isinstance(t, Tensor)]


def _equal(a: Tensor, b: Tensor) -> bool:
    """To half of the digits: another shape means another kernel, which rounds otherwise."""
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape  # indices of nearly equal numbers may differ
    a, b, eps = a.double(), b.double(), torch.finfo(a.dtype).eps
    largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=eps**0.5 * (1 + largest), equal_nan=True)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    return getattr(model.get_submodule(path), own)


def _renumber(module: nn.Module) -> None:
    """Layers state their sizes; a narrowed one states its new ones."""
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        module.groups = shape[0] if depthwise else module.groups
        first, second = shape[0], shape[1] * module.groups
        module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        sizes = [len(v) for v in (module.weight, module.running_mean) if v is not None]
        module.num_features = sizes[0] if sizes else module.num_features
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
