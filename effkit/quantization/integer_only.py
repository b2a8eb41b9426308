"""IntegerOnly: a float model, calibrated and translated, operator by operator, into integers.

Problem   Integer operators (integer_net.py) don't make an integer model: someone has to see that a batch norm follows
          a convolution, what range each sum has, and that nothing in between is left in float.
Idea      Trace the model's calls, run them on calibration data to learn every range, then walk through the trace. Batch
          norm goes into the weights before they are rounded (sec. 3.2, eq. 14), a ReLU into the operator it follows,
          dropout and the identity into nothing; all else becomes one integer operator, or is refused by name.
Cost      8 bits a weight and 72 more an output; a float pass over a few hundred examples; two digits are left of the
          activations.
Limit     Ranges are fixed: an input beyond those of calibration saturates. A global mean keeps the image size.
Left out  Training for it (see QAT); operators without an integer form here (softmax, products of activations, layer
          norm, a batch norm that follows no layer); models of which only a part is in integers.
Source    Jacob et al. 2017, arXiv:1712.05877, sec. 2 and 3.2; Reed et al. 2021, arXiv:2112.08429 (torch.fx).
"""

import operator
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from effkit.core.checks import require_choice, require_int
from effkit.core.report import Reading
from effkit.core.surgery import bake, log, note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique, evaluating
from effkit.core.traits import FLOAT_WEIGHTS
from effkit.quantization import integer_net as net
from effkit.quantization.observers import OBSERVERS, REAL_ZERO

_SAMPLE = 2**16  # values of a tensor that its range is chosen from, a batch
_WAY_OUT = "leave this model in float, and quantize its linear layers with W8A8 or its weights with RTN"


def fold(w: Float64[Tensor, "out n"], b: Float64[Tensor, " out"], norm: Any) -> tuple[Tensor, Tensor]:
    """The layer that computes norm(W x + b) for a batch norm in evaluation mode (eq. 14)."""
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    gain = gain if norm.weight is None else gain * norm.weight.double()
    b = (b - norm.running_mean.double()) * gain
    return w * gain[:, None], b if norm.bias is None else b + norm.bias.double()


def trace(model: nn.Module) -> fx.GraphModule:
    """The calls of one forward pass, without those whose results nobody reads.

    Raises ValueError where Python decides by values, and for models of several inputs."""
    root = nn.Sequential(model) if fx.Tracer().is_leaf_module(model, "") else model
    try:
        traced = fx.GraphModule(root, fx.Tracer().trace(root))
    except Exception as error:  # noqa: BLE001  (whatever stops the trace is the reason)
        what = f"a forward pass that can be traced, which {type(model).__name__} has not ({error})"
        raise ValueError(f"IntegerOnly needs {what}; {_WAY_OUT}") from error
    traced.graph.eliminate_dead_code()
    inputs = [node.name for node in traced.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise ValueError(f"IntegerOnly needs a model of one input, got {', '.join(inputs) or 'none'}; {_WAY_OUT}")
    return traced


class Ranges(fx.Interpreter):
    """Runs a trace, and keeps of what each call yields the shape, and a sample of the values with both extremes."""

    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.samples: dict[fx.Node, list[Tensor]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
            if value.is_floating_point() and value.numel():
                self.samples[n].append(_sample(n, value.detach().float().flatten()))
        return value


def _sample(node: fx.Node, x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    low, high = torch.aminmax(x)
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{_path(node)} yields NaN or infinity on task.calib: only finite numbers have a range; clean the data, or rescale the model")
    return torch.cat([x[:: len(x) // _SAMPLE + 1], low[None], high[None]])


def _path(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _pair(value: Any) -> tuple:
    return (value[0], value[-1]) if isinstance(value, tuple | list) else (value, value)


def _fixed(m: float) -> tuple[int, int]:
    """M0 and shift of a single M."""
    multiplier, shift = net.fixed_point(torch.tensor([m], dtype=torch.float64))
    return int(multiplier), int(shift)


_ALIKE = (nn.Identity, nn.modules.dropout._DropoutNd, F.dropout, "contiguous")
_SHAPES = (nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, "flatten",
           "unflatten", "reshape", "view", "squeeze", "unsqueeze")  # fmt: skip
_LAYERS, _NORMS = (nn.Linear, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d)
_RELUS = (nn.ReLU, nn.ReLU6, F.relu, F.relu6, torch.relu, "relu", "relu_")  # the top of ReLU6 is that of its grid
_SUMS, _JOINS = (operator.add, operator.iadd, torch.add, "add", "add_"), (torch.cat,)
_MAXIMA, _POOLS = (nn.MaxPool2d, F.max_pool2d), (nn.AvgPool2d, F.avg_pool2d)
_MEANS, _ADAPTIVE = (torch.mean, "mean"), (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)


class Translation:
    """From a trace and its ranges to integer operators, call by call."""

    def __init__(self, traced: fx.GraphModule, seen: Ranges, search: str):
        self.traced, self.seen, self.search = traced, seen, search
        self.names: dict[Any, str] = {}  # under which a call's result is found among the codes
        self.grids: dict[str, tuple[float, int]] = {}
        self.layers: dict[int, net.IntegerConv2d] = {}

    def result(self) -> net.IntegerNet:
        rules = ((_ALIKE, self.alike), (_SHAPES, self.reshape), (_LAYERS, self.layer), (_MAXIMA, self.maximum),
                 (_POOLS + _MEANS + _ADAPTIVE, self.mean), (_RELUS + _SUMS + _JOINS, self.sum))  # fmt: skip
        steps = []
        for node in self.traced.graph.nodes:
            if node.op == "placeholder" and node.users:
                self.names[node], self.grids["x"] = "x", self.grid(node)
            elif node.op == "output":
                self.source(node, node.args[0])
            elif node in self.seen.shapes and node not in self.names:
                rule = next((rule for kinds, rule in rules if self.calls(node, kinds)), None)
                steps.append(rule(node) if rule else self.refuse(node, "has none"))
        if not any(steps):
            raise ValueError(f"IntegerOnly needs a model of at least one operator, and this one returns its input; {_WAY_OUT}")
        result = net.IntegerNet(*self.grids["x"])
        result.steps.extend(filter(None, steps))
        return result

    def callee(self, node: fx.Node) -> Any:
        """The module, the function or the name of the method."""
        return self.traced.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def calls(self, node: fx.Node, kinds: tuple) -> bool:
        callee = self.callee(node)
        return any(isinstance(callee, kind) if isinstance(kind, type) else callee == kind for kind in kinds)

    def refuse(self, node: fx.Node, why: str) -> Any:
        callee = self.callee(node)
        kind = type(callee).__name__ if isinstance(callee, nn.Module) else getattr(callee, "__name__", callee)
        raise ValueError(f"IntegerOnly needs operators that have an integer form, and {_path(node)} ({kind}) {why}; {_WAY_OUT}")

    def grid(self, node: fx.Node) -> tuple[float, int]:
        """Scale and zero point of a result; codes here are those of the observers less 128."""
        if not self.seen.samples[node]:
            raise ValueError(f"IntegerOnly needs real numbers in task.calib, and none reaches {_path(node)}; give it examples that do, or {_WAY_OUT}")
        scale, zero_point = OBSERVERS[self.search](torch.cat(self.seen.samples[node])[None], bits=8)
        return scale.item(), round(zero_point.item()) + net.LOW

    def source(self, node: fx.Node, read: Any = None) -> str:
        """Where to find among the codes what a call reads: its first input, unless it is said which."""
        read = node.all_input_nodes[0] if read is None else read
        return self.names[read] if read in self.names else self.refuse(node, f"takes {read}, which is no activation")

    def shapes(self, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Before and after."""
        return tuple(self.seen.shapes[node.all_input_nodes[0]]), tuple(self.seen.shapes[node])

    def follower(self, node: fx.Node, kinds: tuple) -> list[fx.Node]:
        """The only reader of a result, where it is of these kinds: the operator can take it in."""
        return [user for user in node.users if len(node.users) == 1 and self.calls(user, kinds)]

    def writes(self, *chain: fx.Node, reads: list[str]) -> dict[str, Any]:
        """What every step says of itself. A call and those that it takes in share a name, and the grid of the last."""
        chain = (*chain, *self.follower(chain[-1], _RELUS))
        self.names |= dict.fromkeys(chain, chain[0].name)
        self.grids[chain[0].name] = scale, zero_point = self.grid(chain[-1])
        relu = self.calls(chain[-1], _RELUS)
        return dict(name=chain[0].name, inputs=tuple(reads), scale=scale, zero_point=zero_point, relu=relu)

    def passes(self, node: fx.Node) -> dict[str, Any]:
        """The same of a step that writes on the grid it reads."""
        read, self.names[node] = self.source(node), node.name
        self.grids[node.name] = scale, zero_point = self.grids[read]
        return dict(name=node.name, inputs=(read,), scale=scale, zero_point=zero_point, relu=False)

    def alike(self, node: fx.Node) -> None:
        self.names[node] = self.source(node)

    def reshape(self, node: fx.Node) -> net.IntegerReshape:
        before, after = self.shapes(node)
        if before[:1] != after[:1]:
            self.refuse(node, f"turns {before} into {after}, which mixes examples")
        return net.IntegerReshape(**self.passes(node), shape=after[1:])

    def layer(self, node: fx.Node) -> net.IntegerConv2d:
        layer: Any = bake(self.callee(node))
        read, after = self.source(node), self.shapes(node)[1]
        conv, w = isinstance(layer, nn.Conv2d), layer.weight.detach().double().movedim(1, -1).flatten(1)
        b = w.new_zeros(len(w)) if layer.bias is None else layer.bias.detach().double()
        if not len(w) or not 0 < w.shape[1] <= net.MOST_INPUTS:
            self.refuse(node, f"sums {w.shape[1]} products for each of {len(w)} outputs: an int32 holds 1 to {net.MOST_INPUTS}")
        if conv and (layer.padding_mode != "zeros" or len(after) != 4):
            self.refuse(node, f"pads with {layer.padding_mode} and yields {after}: zeros and 4 dimensions are allowed")
        norms = [n for n in self.follower(node, _NORMS) if len(after) == 2 + 2 * conv]
        for norm in norms:
            w, b = fold(w, b, self.callee(norm))
        (s_x, z_x), said = self.grids[read], self.writes(node, *norms, reads=[read])
        step: net.IntegerConv2d = net.IntegerLinear(**said, in_channels=w.shape[1], out_channels=len(w), z_x=z_x)
        if conv:
            fields = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
            said |= {name: getattr(layer, name) for name in fields}
            step = net.IntegerConv2d(**said, z_x=z_x, pads=tuple(layer._reversed_padding_repeated_twice))
        step.set_(w, b, s_x)
        twin = self.layers.setdefault(id(layer), step)  # a layer that is used twice holds its codes once
        step.codes = twin.codes if torch.equal(step.codes, twin.codes) else step.codes
        return step

    def image(self, node: fx.Node) -> dict[str, Any]:
        """Kernel, stride, padding and dilation of a pooling, from the module or from the call's arguments."""
        said: Any = self.callee(node)
        if isinstance(said, nn.Module):
            said = vars(said)
        elif call := node.normalized_arguments(self.traced, normalize_to_only_use_kwargs=True):
            said = call.kwargs
        kernel, (height, width) = _pair(said["kernel_size"]), _pair(said["padding"])
        partial = said["ceil_mode"] or not said.get("count_include_pad", True) and height + width > 0
        if partial or said.get("divisor_override") or len(self.shapes(node)[1]) != 4:
            self.refuse(node, "has ceil_mode, divisor_override, padding that is not counted, or no batch")
        image = dict(kernel_size=kernel, stride=_pair(said["stride"] or kernel), pads=(width, width, height, height))
        return image | ({"dilation": _pair(said["dilation"])} if "dilation" in said else {})

    def parts(self, node: fx.Node) -> dict[str, Any]:
        """The same of a mean over an image, or over equal parts of it."""
        (before, after), dims = self.shapes(node), (2, 3)
        if self.calls(node, _MEANS):
            said: Any = node.kwargs.get("dim", (*node.args, None, None)[1])
            dims = tuple(said) if isinstance(said, tuple | list) else (said,)
        places = after[2:] or (1, 1)
        if dims not in ((2, 3), (-2, -1)) or len(before) != 4 or any(map(operator.mod, before[2:], places)):
            self.refuse(node, f"turns {before} into {after}: it has to be the mean of equal parts of images, dim=(2, 3)")
        kernel = tuple(map(operator.floordiv, before[2:], places))
        return dict(kernel_size=kernel, stride=kernel, pads=(0, 0, 0, 0))

    def maximum(self, node: fx.Node) -> net.IntegerMax:
        return net.IntegerMax(**self.image(node), **self.passes(node))

    def mean(self, node: fx.Node) -> net.IntegerMean:
        image = self.image(node) if self.calls(node, _POOLS) else self.parts(node)
        read, pixels = self.source(node), prod(image["kernel_size"])
        if pixels > net.MOST_PIXELS:
            self.refuse(node, f"takes the mean of {pixels} pixels: an int32 holds the sum of {net.MOST_PIXELS}")
        (s_x, z_x), said = self.grids[read], self.writes(node, reads=[read])
        multiplier, shift = _fixed(s_x / (pixels * said["scale"]))
        flat = len(self.shapes(node)[1]) == 2
        return net.IntegerMean(**said, **image, z_x=z_x, multiplier=multiplier, shift=shift, flat=flat)

    def sum(self, node: fx.Node) -> net.IntegerSum:
        """Also a concatenation; and a ReLU that no operator could take in, which is a sum of one."""
        read = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        said: Any = node.kwargs.get("dim", (*node.args, 0, 0)[1]) if self.calls(node, _JOINS) else 0
        dim = said % len(self.shapes(node)[1])
        adds = self.calls(node, _SUMS) and (len(read) != 2 or "alpha" in node.kwargs)
        if adds or self.calls(node, _JOINS) and dim == 0:
            self.refuse(node, "joins examples, or adds something else than two activations")
        inplace = node.kwargs.get("inplace") or getattr(self.callee(node), "inplace", False)
        if (inplace or self.calls(node, (operator.iadd, "add_", "relu_"))) and len(read[0].users) > 1:
            self.refuse(node, f"writes into {read[0]}, which others read: use the form that writes a new tensor")
        names = [self.source(node, part) for part in read]
        grids, said = [self.grids[name] for name in names], self.writes(node, reads=names)
        factors = [min(s_x / said["scale"], 2.0**29) for s_x, _ in grids]
        shift = _fixed(max(factors))[1]
        multipliers, zero_points = tuple(round(m * 2**shift) for m in factors), tuple(z for _, z in grids)
        return net.IntegerSum(**said, zero_points=zero_points, multipliers=multipliers, shift=shift, dim=dim)


@dataclass(frozen=True)
class IntegerOnly(Technique):
    """The whole model in integers, from the codes of its input to those of its logits; calibrated, not trained.

    search    how ranges are found from what calibration saw: "min-max", or another of the chapter's observers
    examples  of task.calib that are run
    """

    search: str = "min-max"
    examples: int = 256

    needs = frozenset({FLOAT_WEIGHTS})
    breaks = frozenset({FLOAT_WEIGHTS})
    paper = Paper("Jacob et al.", 2017,
                  "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
                  "arXiv:1712.05877", "eq. 2-7, 11, 14")  # fmt: skip

    def __post_init__(self):
        whole = [name for name in OBSERVERS if name not in REAL_ZERO]
        require_choice("search", self.search, whole, hint="zero points are codes here")
        require_int("examples", self.examples, 1, hint="ranges come from what calibration sees")

    @torch.no_grad()
    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        few = task.few(self.examples, by=self)
        with evaluating(model):
            traced = trace(model)
            seen = Ranges(traced)
            for inputs, _ in few.calib:  # type: ignore[union-attr]
                seen.run(inputs)
            result = Translation(traced, seen, self.search).result()
        result.__dict__["effkit_log"] = log(model)
        what = f"{type(model).__name__} -> IntegerNet of {len(result.steps)} operators"
        note(result, "", what, "IntegerOnly; hooks stay behind")
        called = {_path(node) for node in traced.graph.nodes}
        for path, module in model.named_modules():
            if path and path not in called and next(module.parameters(recurse=False), None) is not None:
                note(result, path, "left out", "the forward pass never reaches it")
        return result.train(model.training)

    def claim(self, model: nn.Module) -> Reading:
        """Bits per weight of the layers, offsets, multipliers and shifts included."""
        layers = [module for module in model.modules() if isinstance(module, net.IntegerConv2d)]
        held, weights = sum(t.nbytes for m in layers for t in m.buffers()), sum(m.codes.numel() for m in layers)
        return Reading(8 * held / max(1, weights), "bits per weight", "counted", better="lower")
