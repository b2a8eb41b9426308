"""Calibration: what a layer sees, gathered once.

Problem   A weight that meets only small inputs may be far off without harm; the weights don't say which.
Idea      Any linear layer's error on its inputs is a quadratic form, sum_t ||(W - W_hat) x_t||^2 = tr((W - W_hat) G
          (W - W_hat)^T) with G = sum_t x_t x_t^T, whichever way W_hat was found: on a grid, sparse, of low rank. So G,
          as large as one layer's input squared, replaces all the tokens. Every method that asks for inputs reads it.
Cost      One forward pass over task.calib and in_features^2 macs a token and layer; in_features^2 numbers held a layer.
Left out  What earlier layers' errors do to later inputs: all layers are watched in the unchanged model.
Source    Hassibi & Stork 1993, Second order derivatives for network pruning, NIPS 5 (the Hessian of a layer's squared
          error is 2 G); Frantar & Alistarh 2022, arXiv:2208.11580, eq. 2.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from effkit.core.checkpoint import SCHEMA, digest, fingerprint, read_tensors, write_tensors
from effkit.core.surgery import is_linear_like, matching
from effkit.core.task import Task
from effkit.core.technique import evaluating


def layer_error(
    weight: Float[Tensor, "out in"], approximate: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> Float[Tensor, ""]:
    """sum over tokens of ||(W - W_hat) x||^2, from the Gram matrix alone; float64, since its terms may cancel."""
    off = (weight - approximate).double()
    return ((off @ gram.double()) * off).sum()


@dataclass(frozen=True)
class Statistics:
    """The inputs of one layer, summed up.

    gram     sum over tokens of x x^T
    absmax   the largest magnitude of each input channel
    tokens   how many inputs went into both
    """

    gram: Float[Tensor, "in in"]
    absmax: Float[Tensor, " in"]
    tokens: int

    @property
    def mean_square(self) -> Float[Tensor, " in"]:
        """The mean of x^2, channel by channel."""
        return self.gram.diagonal() / self.tokens


class Calibration(dict[str, Statistics]):
    """Path -> Statistics of each layer that saw inputs; `unreached` names those that were watched in vain."""

    unreached: tuple[str, ...] = ()

    def __missing__(self, path: str) -> Statistics:
        why = "no input reached it" if path in self.unreached else "it was not watched"
        raise ValueError(f"no statistics of layer {path!r}: {why}; there are {', '.join(self)}")


def gather(model: nn.Module, task: Task, *, layers: str = "*", dtype: torch.dtype = torch.float32) -> Calibration:
    """Runs task.calib through the model, batch by batch, and sums up what its linear layers see.

    layers   a glob pattern over paths;  dtype   of the sums: float64 where activations are extreme

    The model is as before afterwards: modes, buffers, hooks, log. A layer that is used twice has one entry, for both.
    Raises ValueError for an empty calibration, for a pattern that matches nothing, and, naming the layer, for inputs
    that are not finite.
    """
    if task.calib is None:
        raise ValueError("gather reads task.calib, which this task lacks; pass Task(calib=...)")
    if _memory is None:
        return gathered(model, task, layers, dtype)
    question = repr(model), fingerprint([model]), digest((str(i), x) for i, (x, _) in enumerate(task.calib)), layers, dtype
    key = hashlib.sha256(repr(question).encode()).hexdigest()[:32]
    if key not in _memory.found:
        _memory.found.clear()  # of one question only: they are large
        _memory.found[key] = gathered(model, task, layers, dtype, _memory.folder and _memory.folder / f"{key}.safetensors")
    return _memory.found[key]


@dataclass(frozen=True)
class _Memory:
    folder: Path | None
    found: dict[str, Calibration] = field(default_factory=dict)


#: what was gathered last, while somebody wants it kept
_memory: _Memory | None = None
EVERY = 30.0  # seconds after which the sums so far are written


@contextmanager
def remembering(folder: str | Path | None = None) -> Iterator[None]:
    """Within, techniques that ask the same of the same weights and the same inputs one after another share one answer:
    a model is looked at once, and then compressed in ten ways.

    folder   where the sums are written while they grow: a pass that was interrupted goes on from there, the next time too
    """
    global _memory
    before, _memory = _memory, _Memory(Path(folder) if folder else None)
    try:
        yield
    finally:
        _memory = before


def gathered(model: nn.Module, task: Task, layers: str, dtype: torch.dtype, file: Path | None = None) -> Calibration:
    """`gather`, anew; or from where `file` stopped."""
    # reading needs no permission: tied layers, which `find` would leave alone, are watched as well
    watched = {path: Running(layer, dtype) for path, layer in matching(model, is_linear_like, layers=layers, by="gather")}
    batches = done = _restore(file, watched) if file else 0
    written = began = time.monotonic()
    bar = tqdm(task.calib, desc="calibration", leave=False, delay=2)
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for seen in watched.values():
            hooks.callback(seen.layer.register_forward_pre_hook(seen.watch, with_kwargs=True).remove)
        for batches, (inputs, _) in enumerate(bar, start=1):
            if batches <= done:
                continue
            model(inputs)
            if file and time.monotonic() - written > EVERY:
                _keep(file, watched, batches)
                written = time.monotonic()
    if batches == 0:
        raise ValueError("the calibration is empty: task.calib yields no batch; give it some examples")
    if not any(seen.tokens for seen in watched.values()):
        raise ValueError(f"no input reached {', '.join(watched)}: the model does not call these layers, or calls those of the one it was copied from")
    if file and batches > done and time.monotonic() - began > EVERY:
        _keep(file, watched, batches)
    found = Calibration({path: seen.statistics(path) for path, seen in watched.items() if seen.tokens})
    found.unreached = tuple(path for path in watched if path not in found)
    return found


class Running:
    """The sums of one layer while batches go by; its `watch` is a hook before the layer's forward pass."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        self.layer, self.dtype, self.tokens = layer, dtype, 0
        self.gram: Tensor | float = 0.0
        self.absmax: Tensor | float = 0.0

    def watch(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.detach()[None].flatten(0, -2).to(self.dtype)  # tokens, whatever the shape
        if len(x):
            self.gram = self.gram + x.T @ x
            self.absmax = torch.maximum(x.abs().amax(0), torch.as_tensor(self.absmax, dtype=x.dtype, device=x.device))
            self.tokens += len(x)

    def statistics(self, path: str) -> Statistics:
        result = Statistics(self.gram, self.absmax, self.tokens)  # type: ignore[arg-type]
        if not torch.isfinite(result.gram).all():
            how = "look for NaN and infinity in data and weights, or pass dtype=torch.float64"
            raise ValueError(f"layer {path or '(the model)'} sees inputs whose squares are not finite: {how}")
        return result


def _keep(file: Path, watched: dict[str, Running], batches: int) -> None:
    """The sums over so many batches, in one file with its SHA-256."""
    reached = {path: seen for path, seen in watched.items() if seen.tokens}
    sums = {f"{path}/{name}": getattr(seen, name).cpu().contiguous() for path, seen in reached.items() for name in ("gram", "absmax")}
    write_tensors(file, {"schema": SCHEMA, "batches": batches, "tokens": {p: seen.tokens for p, seen in reached.items()}}, sums)


def _restore(file: Path, watched: dict[str, Running]) -> int:
    """Puts the sums where the file says that they were; how many batches they hold."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        return 0
    header, sums = read_tensors(file, "delete it, and the inputs are looked at again")
    for path, tokens in header["tokens"].items():
        seen = watched[path]
        device = next((t.device for t in (*seen.layer.parameters(), *seen.layer.buffers())), "cpu")
        seen.tokens, seen.gram, seen.absmax = tokens, sums[f"{path}/gram"].to(device), sums[f"{path}/absmax"].to(device)
    return header["batches"]
