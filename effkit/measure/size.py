"""Size: how many numbers a model applies, how many of them are not zero, how many bytes its file takes.

Problem   Three numbers go by the name of size and part company as soon as a model is compressed: a masked model has
          fewer nonzeros but as many parameters, a 4-bit one as many of both in an eighth of the bytes.
Idea      Count the weights that the model applies, not those that it stores; and write the file.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.checkpoint import save
from effkit.core.report import Reading
from effkit.core.surgery import dense_weight


def parameters(model: nn.Module) -> Reading:
    """How many numbers the model applies: a tensor that serves twice counts once, a packed one as what it encodes."""
    return Reading(sum(w.numel() for w in weights(model)), "params", "counted", better="lower")


def nonzeros(model: nn.Module) -> Reading:
    """How many of them are not zero, after masks have been applied."""
    return Reading(sum(int(torch.count_nonzero(w)) for w in weights(model)), "nonzeros", "counted", better="lower")


def disk_bytes(model: nn.Module) -> Reading:
    """Bytes of the file that `save` writes. It is written: header, scales, masks and ties are all in the number."""
    with tempfile.TemporaryDirectory(prefix="effkit-") as folder:
        path = Path(folder) / "model.safetensors"
        save(model, path)
        return Reading(path.stat().st_size, "B", "counted", better="lower")


@torch.no_grad()
def weights(model: nn.Module) -> Iterator[Tensor]:
    """Every weight that the model applies, each once: masked tensors after their mask, packed ones as numbers."""
    seen: set[int] = set()
    for module in model.modules():
        if packed(module):
            yield dense_weight(module)
        for name in getattr(module, "parametrizations", {}):
            yield getattr(module, name)
        for name, parameter in module.named_parameters(recurse=False):
            original = isinstance(module, parametrize.ParametrizationList) and name.startswith("original")
            if not original and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def packed(module: nn.Module) -> bool:
    """True for a layer that offers `dense_weight` and holds no matrix as a floating-point parameter, itself or below:
    its weight is codes. A layer around others, such as an adapter or two factors, holds matrices, and is not packed."""
    matrices = (p for p in module.parameters() if p.dim() > 1 and p.is_floating_point())
    inner = (m for m in module.modules() if m is not module and hasattr(m, "dense_weight"))
    return hasattr(module, "dense_weight") and not any(True for _ in matrices) and not any(True for _ in inner)
