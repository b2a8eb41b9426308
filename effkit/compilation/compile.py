"""Compile: the technique.

Problem   The model's Python says what to do one operator at a time, and every time anew.
Idea      Do once what does not depend on the input: see the whole, rewrite it, generate code, plan memory. Passes run
          in the order of their names; the default order is explained in passes.py.
Cost      Seconds for capture and the C compiler, once; folded weights are held beside the originals.
Refused   What cannot be captured. Everything else that the graph does not cover falls back, see compiled.py.
"""

from dataclasses import dataclass

from torch import nn

from effkit.compilation.compiled import DEFAULT, PASSES, Compiled, describe
from effkit.compilation.fusion import Kernel, groups
from effkit.core import native
from effkit.core.report import Reading
from effkit.core.surgery import log, note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import EAGER


@dataclass(frozen=True)
class Compile(Technique):
    """The forward pass of task.example as a graph: rewritten by `passes` in their order, fused to C, memory planned."""

    passes: tuple[str, ...] = DEFAULT

    breaks = frozenset({EAGER})
    paper = Paper("Chen et al.", 2018, "TVM: an automated end-to-end optimizing compiler for deep learning",
                  "arXiv:1802.04799", "sec. 3")  # fmt: skip

    def __post_init__(self):
        if isinstance(self.passes, str):
            raise ValueError(f"passes must be a tuple of names, got {self.passes!r}; write ({self.passes!r},)")
        object.__setattr__(self, "passes", tuple(self.passes))
        for name in self.passes:
            if name not in PASSES:
                raise ValueError(f"there is no pass {name!r}; passes are {', '.join(PASSES)}")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        task.require("example", by=self)
        compiled = Compiled(self.passes, describe(task.example), original=model)  # type: ignore[arg-type]
        compiled.__dict__["effkit_log"] = log(model)
        compiled.build(task.example)  # type: ignore[arg-type]
        note(compiled, "", f"captured {compiled.history[0][1]} operators, left {compiled.history[-1][1]}", "Compile")
        for why in _not_fused(compiled):
            note(compiled, "", "pointwise operators run one by one", why)
        return compiled

    def claim(self, model: nn.Module) -> Reading:
        """Operators that one forward pass calls."""
        if not isinstance(model, Compiled):
            raise ValueError(f"Compile claims something of a compiled model, got a {type(model).__name__}; pass what Compile()(model, task) returned")
        return Reading(len(model.ready().graph.operators), "operators", "counted", better="lower")


def _not_fused(compiled: Compiled) -> list[str]:
    """Why groups that could be fused were not."""
    if "fuse" not in compiled.passes:
        return []
    graph = compiled.ready().graph
    return sorted({native.why_not(Kernel.of(graph, group).source) for group in groups(graph)} - {""})
