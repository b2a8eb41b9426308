"""A compiled model: runs its graph where the graph is right, and the original everywhere else, and says why.

Problem   The graph is right for one shape, dtype, device and mode; a model is used with many.
Idea      A guard before each call compares what stands in the signature. Where all agrees the graph runs, otherwise the
          original model, which is still inside; the reasons are counted in `fallbacks` and noted in the log.
Live      Weights in the graph share memory with the model's. When one was written to or replaced, what was folded from
          it is stale, and the passes run again. Gradients need the original: they fall back.
File      `save` writes the original model and the signature; the first call after `load` compiles again.
Source    Ansel et al. 2024, doi:10.1145/3620665.3640366 (PyTorch 2: guards around captured graphs).
"""

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effkit.compilation.capture import CannotCompile, capture
from effkit.compilation.executor import Executor
from effkit.compilation.fusion import fuse
from effkit.compilation.ir import Graph
from effkit.compilation.passes import algebra, conv_bn, cse, dce, fold
from effkit.compilation.schedule import schedule
from effkit.core.checkpoint import KINDS, stored
from effkit.core.surgery import note
from effkit.core.technique import evaluating

PASSES = {f.__name__: f for f in (conv_bn, algebra, fold, cse, dce, fuse, schedule)}
DEFAULT = ("conv_bn", "algebra", "cse", "fold", "dce", "fuse", "schedule")
#: relative and absolute difference between the graph's outputs and the model's beyond which a build is refused
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 1e-2}


@stored
class Compiled(nn.Module):
    """A model and its graph. Attributes that it lacks are the original's; parameters are the original's own."""

    runs_a_graph = True  # what the trait EAGER looks for

    def __init__(
        self,
        passes: tuple[str, ...] = DEFAULT,
        signature: tuple = (),
        wraps: str = "",
        original: nn.Module | None = None,
    ):
        super().__init__()
        self.passes, self.wraps = tuple(passes), wraps
        self.signature = tuple((tuple(shape), dtype, device) for shape, dtype, device in signature)
        self.original = original if original is not None else nn.Identity()
        self.fallbacks: Counter[str] = Counter()
        self.executor: Executor | None = None
        self.history: list[tuple[str, int]] = []
        self._hooks: list[dict] = []
        self._watched: list[tuple] = []
        self.train(self.original.training)

    def numbers(self) -> dict:
        """`wraps` names the original's class where a file cannot hold it: whoever opens the file passes a base."""
        kind = type(self.original)
        known = kind is KINDS.get(kind.__name__) or kind in (nn.Sequential, nn.ModuleList)
        signature = [[list(shape), dtype, device] for shape, dtype, device in self.signature]
        return {"passes": list(self.passes), "signature": signature, "wraps": "" if known else kind.__name__}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._unlike(args, kwargs) or self._unready(args)
        executor = self.executor
        if reason or executor is None:
            return self._fall_back(reason, args, kwargs)
        if not executor.busy.acquire(blocking=False):
            return self._fall_back("another thread is using the arena", args, kwargs)
        try:
            return executor(*(x.contiguous() for x in args))
        finally:
            executor.busy.release()

    def _fall_back(self, reason: str, args: tuple, kwargs: dict) -> Any:
        if reason not in self.fallbacks:
            note(self, "", "ran the original model", reason)
        self.fallbacks[reason] += 1
        return self.original(*args, **kwargs)

    def _unlike(self, args: tuple, kwargs: dict) -> str:
        """How this call differs from the one that was compiled, or nothing."""
        if self.training:
            return "training mode"
        if kwargs or any(type(x) not in (Tensor, nn.Parameter) for x in args):
            return "arguments other than positional tensors"
        if not self._expected(args):
            return f"inputs {_shown(describe(args))}, compiled for {_shown(self.signature)}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast"
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*args, *self.original.parameters())):
            return "gradients are wanted; call it under torch.no_grad()"
        return "hooks on inner modules" if any(map(len, self._hooks)) else ""

    def _expected(self, args: tuple) -> bool:
        """The signature, compared without making strings: this runs before every call."""
        if len(args) != len(self.signature):
            return False
        return all(x.shape == shape and x.dtype is getattr(torch, dtype) and x.device.type == device
                   for x, (shape, dtype, device) in zip(args, self.signature, strict=True))  # fmt: skip

    def _unready(self, args: tuple) -> str:
        """Builds what is missing or stale; why that was impossible, or nothing."""
        if self.executor is not None and not self._stale():
            return ""
        try:
            self.build(args)
        except CannotCompile as error:
            return str(error)
        return "hooks on inner modules" if any(map(len, self._hooks)) else ""

    @torch.no_grad()
    def build(self, example: tuple[Tensor, ...]) -> None:
        """Captures, runs the passes, makes the executor, and compares its outputs with the model's on the example."""
        self._forget()
        example = tuple(x.contiguous() for x in example)
        stages = self.graphs(example)
        executor = Executor(stages[-1][1])
        with evaluating(self.original):
            _compare(executor(*example), self.original(*example))
        self.executor, self.history = executor, [(name, len(graph.operators)) for name, graph in stages]
        self._watch()
        self._hold(executor)

    def _watch(self) -> None:
        """Where hooks would appear, and what would show that a weight was written to, moved or replaced."""
        modules = list(self.original.modules())
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        tables = [table for m in modules for table in (m._parameters, m._buffers)]
        held = [(table, key, t) for table in tables for key, t in table.items() if t is not None]
        self._watched = [(table, key, t, t._version, t.data_ptr()) for table, key, t in held]

    def graphs(self, example: tuple[Tensor, ...]) -> list[tuple[str, Graph]]:
        """The captured graph, then what each pass made of it."""
        stages = [("captured", capture(self.original, example))]
        for name in self.passes:
            stages.append((name, PASSES[name](stages[-1][1])))
        return stages

    def _hold(self, executor: Executor) -> None:
        """Memory that compiling added counts as the module's own: the arena, and weights that were folded."""
        self.register_buffer("arena", executor.arena, persistent=False)
        own = {t.untyped_storage().data_ptr() for t in (*self.original.parameters(), *self.original.buffers())}
        for name, value in executor.graph.values.items():
            if value.untyped_storage().data_ptr() not in own:
                self.register_buffer(f"folded_{name}", value, persistent=False)

    def _forget(self) -> None:
        self.executor, self.history, self._hooks, self._watched = None, [], [], []
        self._buffers.clear()

    def _stale(self) -> bool:
        same = (
            table.get(key) is t and t._version == version and t.data_ptr() == place
            for table, key, t, version, place in self._watched
        )
        return not all(same)

    def ready(self) -> Executor:
        """The executor; where none is there yet, as after loading a file, it is built on inputs of zeros."""
        if self.executor is None:
            self.build(tuple(torch.zeros(shape, dtype=getattr(torch, dtype), device=d) for shape, dtype, d in self.signature))
        return cast(Executor, self.executor)

    def __getstate__(self) -> dict:
        """Copies and pickles hold the original and the signature, and compile again."""
        return self.__dict__ | {"executor": None, "history": [], "_hooks": [], "_watched": [], "_buffers": {}}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "original" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.original, name)

    def report(self) -> str:
        """What compiling did, and what happened since."""
        executor = self.ready()
        outside = sum(b.size for b in executor.outside)
        lines = ["operators: " + ", ".join(f"{name} {n}" for name, n in self.history)]
        lines += [f"arena: {executor.plan}"]
        lines += [
            f"outside it: {len(executor.outside)} buffers, {outside:,} bytes, returned or of kernels that take memory themselves"
        ]
        return "\n".join(lines + [f"fell back {n} times: {reason}" for reason, n in self.fallbacks.items()])


def describe(inputs: tuple) -> tuple:
    """Shape, dtype and device of each input: the signature."""
    return tuple((tuple(x.shape), str(x.dtype).removeprefix("torch."), x.device.type) for x in inputs)


def _shown(signature: tuple) -> str:
    return ", ".join(f"{dtype}{list(shape)} on {device}" for shape, dtype, device in signature) or "none"


def _compare(seen: Any, wanted: Any) -> None:
    """Refuses a graph that does not compute what the model does."""
    for a, b in zip(tree_leaves(seen), tree_leaves(wanted), strict=True):
        if isinstance(b, Tensor):
            rtol = TOLERANCE.get(b.dtype, 0.0)
            scale = b.nan_to_num(0, 0, 0).abs().max().item() if b.numel() and b.is_floating_point() else 1.0
            if a.shape != b.shape or a.dtype != b.dtype or not torch.allclose(a, b, rtol, rtol * scale, equal_nan=True):
                raise CannotCompile("the graph's outputs differ from the model's on the example: it does something that torch cannot see")
