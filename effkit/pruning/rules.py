"""What each operator does to labels: the axes of its results, from those of its arguments.

A rule gets the labels, the result and the operator's own arguments, and returns one list of axes for each tensor of the
result. Names are those of ATen, the operators that remain when all Python has run.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from effkit.pruning.labels import Axis, Labels, blank, blocks, regroup, tensors_in

Axes = list[list[Axis]]


def same(t: Labels, out: Tensor, x: Tensor, *rest, **settings) -> Axes:
    """The result has the shape of the first argument, index by index."""
    return [t.axes(x)]


def pointwise(t: Labels, out, *args, **settings) -> Axes:
    """Arguments are lined up from the last dimension, as broadcasting does; a dimension of 1 goes with anything."""
    operands = tensors_in((args, settings))
    shape = tensors_in(out)[0].shape
    axes = [blank(n) for n in shape]
    for d in range(1, len(shape) + 1):
        meeting = [t.axes(x)[-d] for x in operands if x.dim() >= d and x.shape[-d] == shape[-d]]
        for axis in meeting[1:]:
            meeting[0] = t.classes.tie(meeting[0], axis)
        axes[-d] = meeting[0] if meeting else axes[-d]
    return [axes for _ in tensors_in(out)]


def view(t: Labels, out: Tensor, x: Tensor, *rest, **settings) -> Axes:
    axes, result = t.axes(x), []
    for old, new in blocks(x.shape, out.shape):
        kept = tuple(x.shape[old]) == tuple(out.shape[new])
        result += axes[old] if kept else regroup(t, axes[old], out.shape[new])
    return [result]


def permute(t: Labels, out: Tensor, x: Tensor, dims: Sequence[int]) -> Axes:
    return [[t.axes(x)[d] for d in dims]]


def transpose(t: Labels, out: Tensor, x: Tensor, a: int = 0, b: int = 1) -> Axes:
    axes = list(t.axes(x))
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
    return [axes]


def expand(t: Labels, out: Tensor, x: Tensor, *rest, **settings) -> Axes:
    """New dimensions, and those that grew from 1, are copies: nothing to take out."""
    axes, new = t.axes(x), out.dim() - x.dim()
    return [[axes[d - new] if d >= new and x.shape[d - new] == n else blank(n) for d, n in enumerate(out.shape)]]


def cat(t: Labels, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> Axes:
    parts = [x for x in parts if x.dim() == out.dim()]
    axes = [list(t.axes(x)) for x in parts]
    result = axes[0]
    for other in axes[1:]:
        result = [a if d == dim % out.dim() else t.classes.tie(a, other[d]) for d, a in enumerate(result)]
    result[dim] = np.concatenate([a[dim] for a in axes])
    return [result]


def cut(t: Labels, out, x: Tensor, *rest, **settings) -> Axes:
    """Slices, pads and pieces: where in a dimension they begin is written in the code, so what changes size stays."""
    parts = tensors_in(out)
    if any(part.dim() != x.dim() for part in parts):  # select, unbind
        t.hold(x, "single indices are picked from it")
        return []
    for part in parts:
        for axis, n in zip(t.axes(x), part.shape, strict=True):
            if n != len(axis):
                t.classes.hold(axis, "slices are cut from it, or it is padded")
    return [[a if n == len(a) else blank(n) for a, n in zip(t.axes(x), part.shape, strict=True)] for part in parts]


def spatial(n: int) -> Callable[..., Axes]:
    """Pooling and resampling: the last n dimensions are places, the others keep their labels."""

    def rule(t: Labels, out, x: Tensor, *rest, **settings) -> Axes:
        for axis in t.axes(x)[-n:]:
            t.classes.hold(axis, "pooling runs over it")
        return [[*t.axes(x)[:-n], *map(blank, part.shape[-n:])] for part in tensors_in(out)]

    return rule


def reduce(t: Labels, out, x: Tensor, dim=None, keepdim: bool = False, **settings) -> Axes:
    """A mean over channels would change when one is gone, even one that is zero."""
    if not isinstance(dim, int | list | tuple) or isinstance(dim, bool):
        t.hold(x, "it is averaged or summed over")
        return []
    dims = {d % max(1, x.dim()) for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))}
    for d in dims:
        t.classes.hold(t.axes(x)[d], "it is averaged or summed over")
    wide = tensors_in(out)[0].dim() == x.dim()
    axes = [blank(1) if d in dims else axis for d, axis in enumerate(t.axes(x)) if wide or d not in dims]
    return [axes for _ in tensors_in(out)]


def softmax(t: Labels, out: Tensor, x: Tensor, dim: int, *rest) -> Axes:
    t.classes.hold(t.axes(x)[dim], "a softmax runs over it")
    return [t.axes(x)]


def contract(t: Labels, a: Tensor, i: int, b: Tensor, j: int) -> None:
    """A sum over products: an index gone on both sides leaves out a product with a weight, which could have been 0."""
    if t.is_weight(a) or t.is_weight(b):
        t.classes.tie(t.axes(a)[i], t.axes(b)[j])
    else:
        t.hold((a, b), "activations are multiplied with activations")


def matmul(t: Labels, out: Tensor, a: Tensor, b: Tensor, *rest, **settings) -> Axes:
    """(..., n, k) x (..., k, m)."""
    contract(t, a, -1, b, -2)
    batch = [t.classes.tie(p, q) for p, q in zip(t.axes(a)[:-2], t.axes(b)[:-2], strict=True)]
    return [[*batch, t.axes(a)[-2], t.axes(b)[-1]]]


def matvec(t: Labels, out: Tensor, a: Tensor, b: Tensor) -> Axes:
    """(n, k) x (k)."""
    contract(t, a, 1, b, 0)
    return [t.axes(a)[:1]]


def biased_matmul(t: Labels, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **settings) -> Axes:
    t.set(out, matmul(t, out, a, b)[0])
    return pointwise(t, out, out, bias)


def convolution(
    t: Labels, out: Tensor, x: Tensor, w: Tensor, bias, stride, padding, dilation, transposed: bool, more, groups: int
) -> Axes:
    """Dense: inputs tie to the weight's, outputs are the weight's. Depthwise: inputs are outputs. Other groups stay."""
    inputs, outputs = (0, 1) if transposed else (1, 0)
    channels = t.axes(w)[outputs]
    depthwise = groups > 1 and groups == x.shape[1] == out.shape[1] and not transposed
    if groups == 1:
        contract(t, x, 1, w, inputs)
    elif depthwise:
        channels = t.classes.tie(t.axes(x)[1], channels)
    else:
        for axis in (t.axes(x)[1], *t.axes(w)[:2]):
            t.classes.hold(axis, "a grouped convolution")
        channels = blank(out.shape[1])
    if bias is not None:
        channels = t.classes.tie(channels, t.axes(bias)[0], "a grouped convolution")
    return [[t.axes(x)[0], channels, *map(blank, out.shape[2:])]]


def batch_norm(t: Labels, out, x: Tensor, *statistics, **settings) -> Axes:
    """Weight, bias, mean and variance go with the channels, dimension 1."""
    axes = list(t.axes(x))
    for vector in tensors_in(statistics):
        axes[1] = t.classes.tie(axes[1], t.axes(vector)[0])
    return [axes]


def embedding(t: Labels, out: Tensor, w: Tensor, ids: Tensor, *rest, **settings) -> Axes:
    t.classes.hold(t.axes(w)[0], "it is the vocabulary")
    return [[*map(blank, ids.shape), t.axes(w)[1]]]


def attention(t: Labels, out, q: Tensor, k: Tensor, v: Tensor, *rest, **settings) -> Axes:
    """Heads are channels: keys, values and the queries that share them go together; what lies within a head stays."""
    heads = t.classes.tie(t.axes(k)[1], t.axes(v)[1])
    queries = t.classes.tie(t.axes(q)[1], np.repeat(heads, q.shape[1] // k.shape[1]))
    for x in (q, k, v):
        for axis in t.axes(x)[2:]:
            t.classes.hold(axis, "attention runs over it")
    return [[t.axes(q)[0], queries, *map(blank, tensors_in(out)[0].shape[2:])]]


_RULES: dict[Callable[..., Axes], str] = {
    same: "clone detach alias _to_copy zeros_like ones_like full_like empty_like hardswish dropout",
    pointwise: "_prelu_kernel copy masked_fill",
    view: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze",
    transpose: "transpose t",
    permute: "permute",
    expand: "expand",
    cat: "cat",
    cut: "slice split split_with_sizes select unbind constant_pad_nd",
    reduce: "mean sum amax amin var std prod any all",
    softmax: "_softmax _log_softmax",
    matmul: "mm bmm",
    matvec: "mv",
    biased_matmul: "addmm baddbmm",
    convolution: "convolution",
    batch_norm: "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training",
    embedding: "embedding",
    attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    spatial(1): "max_pool1d avg_pool1d upsample_nearest1d upsample_linear1d",
    spatial(2): "max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d",
    spatial(3): "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d",
}
#: operator -> rule; what is missing here and works element by element goes by `pointwise`
RULES = {name: rule for rule, names in _RULES.items() for name in names.split()}
