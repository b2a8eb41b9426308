"""A technique: a frozen dataclass that you call with a model and get a new model back.

    quantized = RTN(bits=4)(model, task)

Its fields are its configuration, its repr is the recipe, == and dataclasses.replace make it searchable. The model
is copied once, at the door; `rewrite_` may then change the copy in place. Order is checked by traits: predicates on
the model that is really there, declared by each technique as what it needs, breaks and gives.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ClassVar

import torch
from torch import nn

from effkit.core.checks import require_types
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task


@dataclass(frozen=True)
class Paper:
    """The publication that a technique implements, and the equation in it."""

    authors: str
    year: int
    title: str
    identifier: str  # arXiv number, DOI or ISBN
    equation: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, [f"{self.authors} {self.year}: {self.title}", self.identifier, self.equation]))


@dataclass(frozen=True)
class Trait:
    """A property of a model that can be looked up on the model itself, a loaded one too."""

    name: str
    holds: Callable[[nn.Module], bool]

    def __repr__(self) -> str:
        return self.name


#: what every technique needs: rewriting layers whose graph has already been compiled would change nothing that runs
EAGER = Trait("an eager model", lambda model: not any(getattr(module, "runs_a_graph", False) for module in model.modules()))


class Technique:
    """Base of all techniques. Subclasses are frozen dataclasses that implement `rewrite_` and `claim`."""

    needs: ClassVar[frozenset[Trait]] = frozenset()
    breaks: ClassVar[frozenset[Trait]] = frozenset()
    gives: ClassVar[frozenset[Trait]] = frozenset()
    paper: ClassVar[Paper]

    def __init_subclass__(cls):
        """What a class checks itself, and explains, comes first; then each setting has to be what its annotation says.
        A class that checks nothing is wrapped too, for it may have its checks from a mixin, which knows nothing of ours."""
        super().__init_subclass__()
        own = cls.__post_init__
        cls.__post_init__ = wraps(own)(lambda self: _checked(self, own))  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """What a class checks itself; the end of every chain of super().__post_init__()."""

    def __call__(self, model: nn.Module, task: Task | None = None) -> nn.Module:
        """The model, rewritten; the one passed in is untouched, and so are the global random state and each mode."""
        model = unwrap(model)
        check_weights(model)
        self.check(model)
        with kept_random_state():
            result = self.rewrite_(clone(model), task if task is not None else Task())
        return result

    def check(self, model: nn.Module) -> None:
        """Raises ValueError when the model lacks a trait that this technique needs, or a setting is not of its type."""
        require_types(self)  # again, for a class may have an __init__ of its own
        for trait in sorted(self.needs | {EAGER}, key=lambda t: t.name):
            if not trait.holds(model):
                raise ValueError(f"{type(self).__name__} needs {trait.name}, which this model lacks; see effkit.log(model) for what removed it")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        """Changes the model in place where it can and returns it, or returns another."""
        raise NotImplementedError

    def claim(self, model: nn.Module) -> Reading:
        """What this technique promises about its result, counted on the model itself; its parameters, unless it says more."""
        return Reading(sum(p.numel() for p in model.parameters()), "params", "counted", better="lower")


def _checked(technique: Technique, own: Callable[[Technique], None]) -> None:
    try:
        own(technique)
    except TypeError:  # as of "4" < 8
        require_types(technique)
        raise
    require_types(technique)


@dataclass(frozen=True)
class Identity(Technique):
    """Changes nothing: the baseline of every comparison."""

    paper = Paper("effkit", 2026, "the unchanged model", "", "")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        return model


@dataclass(frozen=True)
class Pipeline(Technique):
    """Techniques one after another, on one copy; an impossible order is refused when the pipeline is built."""

    steps: tuple[Technique, ...] = ()

    paper = Paper("effkit", 2026, "composition of techniques", "", "")

    def __post_init__(self):
        steps = tuple(self.steps) if isinstance(self.steps, Iterable) else (None,)
        if not all(isinstance(step, Technique) for step in steps):
            raise ValueError(f"steps must be techniques, in a tuple, got {self.steps!r}: write Pipeline((RTN(bits=4),)), for example")
        object.__setattr__(self, "steps", steps)
        broken: dict[Trait, Technique] = {}
        for step in self.steps:
            for trait in (step.needs | {EAGER}) & broken.keys():
                later, first = type(step).__name__, type(broken[trait]).__name__
                raise ValueError(f"{later} needs {trait.name}, which {first} removes; put {later} first")
            broken = {t: s for t, s in broken.items() if t not in step.gives} | dict.fromkeys(step.breaks, step)

    def _traits(self) -> tuple[frozenset[Trait], ...]:
        """What the steps need and no earlier one gives, what is broken at the end, and what is given."""
        needed = broken = given = frozenset[Trait]()
        for step in self.steps:
            needed |= step.needs - given
            broken, given = (broken - step.gives) | step.breaks, (given - step.breaks) | step.gives
        return needed, broken, given

    needs = property(lambda self: self._traits()[0])
    breaks = property(lambda self: self._traits()[1])
    gives = property(lambda self: self._traits()[2])

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        for step in self.steps:
            step.check(model)
            model = step.rewrite_(model, task)
        return model

    def claim(self, model: nn.Module) -> Reading:
        return (self.steps or (Identity(),))[-1].claim(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a torch.compile'd one; compile again after rewriting."""
    inner = getattr(model, "_orig_mod", None)
    if not isinstance(inner, nn.Module):
        return model
    note(inner, "", "unwrapped", "the model came compiled; the result is eager: call torch.compile on it again")
    return inner


def check_weights(model: nn.Module) -> None:
    """Refuses parameters that hold no numbers yet, or NaN and infinity, which no technique can rank or round."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name} is uninitialized (a lazy module): run one forward pass first")
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device and holds no numbers: load a checkpoint first")
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name} holds NaN or infinity: only finite weights are allowed; retrain, or clean it with torch.nan_to_num")


def clone(model: nn.Module) -> nn.Module:
    """A deep copy; where that is impossible, the error names the attribute in the way."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        for path, module in model.named_modules():
            for name in [n for n in vars(module) if n not in ("_modules", "_parameters")]:
                try:
                    copy.deepcopy(vars(module)[name])
                except Exception:  # noqa: BLE001 (whatever it is, it is what we are looking for)
                    where = f"{path}.{name} ({type(vars(module)[name]).__name__})".lstrip(".")
                    raise ValueError(f"the model cannot be copied because of its attribute {where}; remove it, or set it after the technique") from error
        raise


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Building an nn.Linear draws random numbers; the caller's stream goes on as if nothing had happened."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in eval mode inside, each back in its own mode afterwards; BatchNorm statistics stay put."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
