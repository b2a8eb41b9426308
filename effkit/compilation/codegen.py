"""Code generation: a fused group as a C function.

Problem   A group says what each element is; a processor wants loops over memory.
Idea      Shapes and strides are known, so they become constants. Dimensions that lie one behind another in all operands
          become one; the innermost becomes the loop that the C compiler turns into vector instructions; the others are
          counted by one index, which threads share. A row that is reduced is walked once for each reduction that has to
          be finished before the next operator can start.
Exact     Sums are reassociated and divisions may become reciprocals, so the last digits differ from eager's; infinities
          and NaN behave as there.
Left out  Explicit vectors, tiles, autotuning: the C compiler's own choices are what we get.
Source    Lattner et al. 2021, doi:10.1109/CGO51591.2021.9370308 (progressive lowering).
"""

import math

from effkit.compilation.expressions import C_TYPES, Step, steps
from effkit.compilation.ir import Graph, Type

CHUNK = 4096  # elements that one thread takes at a time
WORTH_THREADS = 32768  # elements from which starting threads pays
#: with this macro glibc declares its vector versions of exp and others, accurate to 4 units in the last place
_HEAD = """#ifndef __FAST_MATH__
#define __FAST_MATH__ 1
#endif
#include <math.h>
typedef {c} real;
"""
_FUNCTIONS = ("exp", "log", "sqrt", "sin", "cos", "tanh", "erf", "fabs", "pow")


def to_c(graph: Graph) -> str:
    """`void kernel(const real *in0, ..., real *out, int threads)`."""
    result: Type = graph[graph.outputs[0].name].type
    reads = [node for node in graph.nodes if node.op == "input"]
    lines = steps(graph)
    by_rows = any(line.row for line in lines)
    sizes, strides = _loops(result, [node.type for node in reads], keep_last=by_rows)
    c = C_TYPES[result.dtype]
    parameters = ", ".join([*(f"const real *restrict {node.name}_" for node in reads), "real *restrict out_", "int threads"])
    chunked = len(sizes) == 1 and sizes[0] > CHUNK and not by_rows
    body = _body(lines, [node.name for node in reads], sizes, strides, graph.outputs[0].name, chunked)
    for name in _FUNCTIONS:
        body = body.replace(f"{name.upper()}(", f"{name}{'f' * (c == 'float')}(")
    return _HEAD.format(c=c) + f"void kernel({parameters}) {{\n{body}}}\n"


def _loops(result: Type, operands: list[Type], *, keep_last: bool) -> tuple[list[int], list[list[int]]]:
    """Sizes of the loops, outermost first, and for each loop the stride of every operand and of the result."""
    rank = len(result.shape)
    rows = [_broadcast(t, rank) for t in operands] + [list(result.stride)]
    loops = [(n, [row[d] for row in rows]) for d, n in enumerate(result.shape)]
    last = [loops.pop()] if keep_last else []
    loops = sorted((loop for loop in loops if loop[0] > 1), key=lambda loop: -loop[1][-1])
    merged: list[tuple[int, list[int]]] = []
    for n, stride in loops:
        if merged and all(a == b * n for a, b in zip(merged[-1][1], stride, strict=True)):
            merged[-1] = (merged[-1][0] * n, stride)
        else:
            merged.append((n, stride))
    merged = [*merged, *last] or [(1, [0] * len(rows))]
    return [n for n, _ in merged], [stride for _, stride in merged]


def _broadcast(kind: Type, rank: int) -> list[int]:
    """Strides in the result's dimensions: 0 where the operand has one element for all."""
    missing = rank - len(kind.shape)
    return [0] * missing + [0 if n == 1 else s for n, s in zip(kind.shape, kind.stride, strict=True)]


def _body(
    lines: list[Step], reads: list[str], sizes: list[int], strides: list[list[int]], output: str, chunked: bool
) -> str:
    """The loop over rows, which threads share, and within it one walk along the row for each stage."""
    *outer, width = sizes
    count = -(-width // CHUNK) if chunked else math.prod(outer)
    names = [*reads, "out"]
    text = (f"#pragma omp parallel for num_threads(threads) schedule(static) if ({math.prod(sizes)} >= {WORTH_THREADS})\n")
    text += f"  for (long r = 0; r < {count}; r++) {{\n"
    if chunked:
        text += f"    const long width = r == {count - 1} ? {width - (count - 1) * CHUNK} : {CHUNK};\n"
    else:
        text += f"    const long width = {width};\n"
    for i, name in enumerate(names):
        offset = f"r * {CHUNK * strides[-1][i]}" if chunked else _offset(outer, [stride[i] for stride in strides[:-1]])
        text += f"    {'real' if name == 'out' else 'const real'} *{name}p = {name}_ + {offset};\n"
    inner = dict(zip(names, strides[-1], strict=True))
    return text + _walks(lines, reads, inner, width, output) + "  }\n"


def _offset(sizes: list[int], strides: list[int]) -> str:
    """Where row r begins."""
    terms, below = [], 1
    for n, s in reversed(list(zip(sizes, strides, strict=True))):
        if s:
            index = f"r / {below}" if below > 1 else "r"
            terms.append(f"({index}) % {n} * {s}L" if math.prod(sizes) > below * n else f"({index}) * {s}L")
        below *= n
    return " + ".join(terms) or "0"


def _walks(lines: list[Step], reads: list[str], inner: dict[str, int], width: int, output: str) -> str:
    """Stage by stage: first what is one value a row, then the walk, then the results of its reductions."""
    stages = _stage(lines)
    made_in = {line.name: line.stage for line in lines if not line.row}
    kept = {
        name
        for line in lines
        if not line.reduction
        for name in line.operands
        if made_in.get(name, line.stage) < line.stage
    }
    text = "".join(f"    const real {name} = {name}p[0];\n" for name in reads if not inner[name])
    text += "".join(f"    real {name}_row[{width}];\n" for name in sorted(kept))
    for stage in range(stages + 1):
        row = [line for line in lines if line.row and not line.reduction and line.stage == stage]
        text += "".join(f"    const real {line.name} = {line.expression};\n" for line in row)
        sums = [line for line in lines if line.reduction and line.stage == stage + 1]
        full = [line for line in lines if not line.row and line.stage == stage]
        if sums or full:
            text += _walk(full, sums, reads, inner, made_in, kept, stage, output)
        for line in sums:
            text += f"    const real {line.name} = {line.reduction[2].format(s=line.name + '_', n=width)};\n"  # type: ignore[index]
    return text


def _stage(lines: list[Step]) -> int:
    """Sets each line's stage: a reduction is there one walk after its operand. Returns the last one."""
    stage: dict[str, int] = {}
    for line in lines:
        line.stage = max((stage.get(name, 0) for name in line.operands), default=0) + (line.reduction is not None)
        stage[line.name] = line.stage
    return max(stage.values())


def _walk(full, sums, reads, inner, made_in, kept, stage: int, output: str) -> str:
    """One loop along the row: read, compute, keep what a later walk needs, add up."""
    here = {line.name for line in full}
    wanted = dict.fromkeys(name for line in (*full, *sums) for name in line.operands)
    text = "".join(f"    real {line.name}_ = {line.reduction[0]};\n" for line in sums)
    text += "    for (long j = 0; j < width; j++) {\n"
    for name in wanted:
        if name in reads and inner[name]:
            text += f"      const real {name} = {name}p[{'j' if inner[name] == 1 else f'j * {inner[name]}L'}];\n"
        elif name in made_in and name not in here:
            text += f"      const real {name} = {name}_row[j];\n"
    for line in full:
        text += f"      const real {line.name} = {line.expression};\n"
        text += f"      {line.name}_row[j] = {line.name};\n" if line.name in kept else ""
    text += "".join(f"      {line.reduction[1].format(s=line.name + '_', x=line.expression)}\n" for line in sums)
    text += (
        f"      outp[{'j' if inner['out'] == 1 else 'j * ' + str(inner['out']) + 'L'}] = {output};\n"
        if output in here
        else ""
    )
    return text + "    }\n"
