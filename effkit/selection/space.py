"""The search space: sequences of techniques and their settings, as data.

Problem   Twenty techniques make 400 ordered pairs, most of which make no sense, each with dozens of settings.
Idea      The catalogue says which techniques there are, their fields which settings, their traits which may follow
          which. So the space is a walk: which technique next, then its settings, until "stop". An order that the
          traits forbid is never an option on the way, and a new technique in a chapter appears by itself.
Left out  Techniques that train (their `epochs` are not 0) unless asked for: each candidate would cost a training run.
          Adapters (PEFT), which change nothing until they are trained. The same technique twice in a sequence.
"""

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import count

from torch import nn

from effkit import catalog
from effkit.core.checks import require_choice, require_int
from effkit.core.technique import Identity, Pipeline, Technique, Trait

#: the course's words for settings, and the values worth trying; a field of this name means the same in every chapter
CHOICES: dict[str, tuple] = {
    "bits": (2, 3, 4, 5, 6, 8),
    "group_size": (16, 32, 64, 128, -1),
    "sparsity": (0.2, 0.35, 0.5, 0.65, 0.8),
    "keep": (0.3, 0.45, 0.6, 0.8),
}
PARADIGMS = tuple(p for p in catalog.PARADIGMS if p != "peft")
STOP = "stop"
Settings = Mapping[str, Sequence]
Choose = Callable[[str, Sequence], typing.Any]


@dataclass(frozen=True)
class Space:
    """techniques   name -> {field: values to try}; a field that is not named keeps its default
    longest      techniques in one sequence, at most
    missing      traits that the model to start from lacks"""

    techniques: Mapping[str, Settings]
    longest: int = 2
    missing: frozenset[Trait] = field(default=frozenset(), compare=False)

    def __post_init__(self):
        require_int("longest", self.longest, 1, 6)
        if not self.techniques:
            raise ValueError("the space holds no technique; name some, as in {'RTN': {'bits': (3, 4, 8)}}")
        for name, settings in self.techniques.items():
            require_choice("a technique of the space", name, sorted(catalog.techniques()))
            for setting, values in settings.items():
                self._check_setting(name, setting, values)

    def _check_setting(self, name: str, setting: str, values: Sequence) -> None:
        known = {f.name for f in fields(catalog.techniques()[name])}  # type: ignore[arg-type]
        require_choice(f"a setting of {name}", setting, sorted(known))
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name}.{setting} must be a tuple of values to try, got {values!r}")
        for value in values:  # a value that the technique refuses is refused here, before the search
            with_settings(self.plain(name), {setting: value})

    def plain(self, name: str) -> Technique:
        """The technique as its class makes it, to read its traits."""
        return catalog.example(catalog.techniques()[name])

    def on(self, model: nn.Module) -> "Space":
        """The space of what may be done to this model, whose traits are looked up once."""
        asked = {trait for name in self.techniques for trait in self.plain(name).needs}
        return replace(self, missing=frozenset(trait for trait in asked if not trait.holds(model)))

    def after(self, steps: Sequence[Technique]) -> list[str]:
        """The techniques that may come next: not there yet, and with all that they need."""
        used = {type(step).__name__ for step in steps}
        return [name for name in self.techniques if name not in used and self._allows((*steps, self.plain(name)))]

    def _allows(self, steps: tuple[Technique, ...]) -> bool:
        try:
            return not Pipeline(steps).needs & self.missing
        except ValueError:  # the traits forbid this order
            return False

    def draw(self, choose: Choose) -> Technique:
        """Walks from step to step; `choose(what, options)` decides at each fork.

        Raises ValueError where settings clash: with each other, or by a trait that only they bring about."""
        steps: tuple[Technique, ...] = ()
        while len(steps) < self.longest and (options := self.after(steps)):
            so_far = " > ".join(type(step).__name__ for step in steps) or "nothing"
            ends = (STOP,) if steps else ()  # to do nothing at all is no walk
            name = choose(f"after {so_far}: {' or '.join(options)}", (*ends, *options))
            if name == STOP:
                break
            chosen = {key: choose(f"{name}.{key}", values) for key, values in self.techniques[name].items()}
            steps += (with_settings(self.plain(name), chosen),)
            if not self._allows(steps):
                raise ValueError(f"{chosen} of {name} after {so_far} is an order that the traits forbid")
        return Pipeline(steps) if len(steps) > 1 else (*steps, Identity())[0]

    def everything(self) -> Iterator[Technique]:
        """Every candidate, each once: nothing, then walks by scripts of choices; a new fork adds one an option."""
        yield Identity()
        scripts: list[list[int]] = [[]]
        while scripts:
            script, fork = scripts.pop(), count()

            def choose(what: str, options: Sequence, script=script, fork=fork):
                if (i := next(fork)) == len(script):  # a new fork: its first option, the others later
                    scripts.extend([*script, other] for other in reversed(range(1, len(options))))
                    script.append(0)
                return options[script[i]]

            with suppress(ValueError):  # settings that clash are no candidate
                yield self.draw(choose)


def default_space(*, longest: int = 2, training: bool = False, paradigms: Sequence[str] = PARADIGMS) -> Space:
    """What the catalogue offers. training: those techniques too that train for some epochs."""
    kinds = {name: kind for name, kind in catalog.techniques().items() if catalog.paradigm(kind) in paradigms}
    chosen = {name: settings(kind) for name, kind in kinds.items() if training or not _trains(catalog.example(kind))}
    return Space(chosen, longest)


def settings(kind: type[Technique]) -> dict[str, tuple]:
    """The values to try for each field: by the course's words, for a Literal its choices, for a switch both."""
    hints, plain = typing.get_type_hints(kind), catalog.example(kind)
    found = {}
    for name in (f.name for f in fields(kind)):  # type: ignore[arg-type]
        literal = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else ()
        offered = (False, True) if hints[name] is bool else CHOICES.get(name, literal)
        values = tuple(value for value in offered if _accepts(plain, name, value))
        if len(values) > 1:
            found[name] = values
    return found


def with_settings(technique: Technique, chosen: Mapping[str, object]) -> Technique:
    """The technique with these fields. Raises ValueError where it refuses them."""
    return replace(technique, **chosen)  # type: ignore[type-var]


def _accepts(plain: Technique, name: str, value: object) -> bool:
    try:
        with_settings(plain, {name: value})
    except ValueError:
        return False
    return True


def _trains(technique: Technique) -> bool:
    """Whether it, or a technique within it, trains for some epochs."""
    values = {f.name: getattr(technique, f.name) for f in fields(technique)}  # type: ignore[arg-type]
    return bool(values.get("epochs")) or any(_trains(v) for v in values.values() if isinstance(v, Technique))
