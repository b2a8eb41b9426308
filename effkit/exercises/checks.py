"""Checks that exercises are composed of: each says what it saw and what it wanted, in values small enough to be read.

`cases` is a function that takes a torch.Generator and yields `case(...)`: afresh in every run, so that no answer can
be learned by heart, and the hand-sized one first, since that is the one a message can be followed on.
"""

from collections.abc import Callable, Iterable
from numbers import Integral, Real
from types import CodeType

import torch
from torch import Tensor

from effkit.exercises.base import Case, Check, Refusal, Unattempted, call
from effkit.exercises.values import FULL, leaves, legible, shown

Cases = Callable[[torch.Generator], Iterable[Case]]


def case(*args: object, **settings: object) -> Case:
    """The arguments of one call, written as they are in it: case(x, bits=4)."""
    return Case(args, settings)


def on_each(name: str, cases: Cases, judge: Callable[[Callable, Callable, Case], Refusal | None]) -> Check:
    """A check of one's own: `judge(function, reference, case)` returns what was seen and wanted, or None: all well."""

    def look(function, reference, rng):
        return next(filter(None, (judge(function, reference, drawn) for drawn in cases(rng))), None)

    return Check(name, look)


def equals_reference(cases: Cases, *, rtol: float = 1e-4, atol: float = 1e-6) -> Check:
    """The reference's numbers within atol + rtol * |wanted|; whether they come as tuple, list, number or 0-d tensor is
    left to same_shape_and_dtype."""

    def judge(function, reference, drawn):
        seen, wanted = call(function, drawn.copy()), call(reference, drawn.copy())
        if _close(seen, wanted, rtol, atol):
            return None
        return (f"{_difference(seen, wanted)} for {shown(drawn)}", legible(wanted))

    return on_each("the right numbers, on cases drawn afresh", cases, judge)


def same_shape_and_dtype(cases: Cases) -> Check:
    """As many values as the reference returns, of its shapes and dtypes; of a number, whether it is whole."""

    def judge(function, reference, drawn):
        seen, wanted = (_kinds(call(f, drawn.copy())) for f in (function, reference))
        return None if seen == wanted else (f"{seen} for {shown(drawn)}", wanted)

    return on_each("shape and dtype", cases, judge)


def finite(cases: Cases) -> Check:
    """No NaN and no infinity."""

    def judge(function, reference, drawn):
        answer = call(function, drawn.copy())
        fine = all(torch.as_tensor(leaf).isfinite().all() for leaf in leaves(answer) if _is_number(leaf))
        return None if fine else (f"{legible(answer)} for {shown(drawn)}", "finite numbers")

    return on_each("finite", cases, judge)


def input_unchanged(cases: Cases) -> Check:
    """The function leaves its arguments as they were, so that calling it twice gives the same."""

    def judge(function, reference, drawn):
        given = drawn.copy()
        call(function, given)
        for was, now in zip(leaves([drawn.args, drawn.settings]), leaves([given.args, given.settings]), strict=False):
            if _is_number(was) and not _close(now, was, 0, 0):
                return (f"the input became {legible(now)}", f"as it was: {legible(was)}; work on a copy")
        return None

    return on_each("its input unchanged", cases, judge)


def random_state_kept(cases: Cases) -> Check:
    """No draw from torch's global generator: whoever calls the function goes on with the same random numbers."""

    def judge(function, reference, drawn):
        before = torch.get_rng_state()
        call(function, drawn.copy())
        if torch.equal(before, torch.get_rng_state()):
            return None
        return ("a draw from torch's global generator", "draws from a generator handed in, or none")

    return on_each("the global random state kept", cases, judge)


def holds(name: str, cases: Cases, law: Callable[[object, Case], tuple[object, object] | None]) -> Check:
    """A law of the answer: `law(answer, case)` returns None, or, where it is broken, what was seen and was wanted."""

    def judge(function, reference, drawn):
        broken = law(call(function, drawn.copy()), drawn)
        return (f"{legible(broken[0])} for {shown(drawn)}", legible(broken[1])) if broken else None

    return on_each(name, cases, judge)


def raises_when(bad: Case, error: type[Exception] = ValueError) -> Check:
    """These arguments are refused by this error."""

    def judge(function, reference, drawn):
        try:
            seen = legible(call(function, drawn.copy()))
        except error:
            return None
        except (Unattempted, NotImplementedError):
            raise
        except Exception as other:  # noqa: BLE001  (the wrong error is what we report)
            seen = f"{type(other).__name__}: {other}"
        return (f"{seen} for {shown(drawn)}", f"a {error.__name__}")

    return on_each(f"a {error.__name__} for {shown(bad)}", lambda rng: (bad,), judge)


def not_the_librarys_own(*names: str) -> Check:
    """Refuses the reference itself, a function of effkit, and one whose code mentions effkit or one of these names.

    Only the code is read, never the learner's globals, so an alias slips through: whoever makes one knows what he does.
    """

    def look(function, reference, rng):
        inner = _innermost(function)
        home = getattr(inner, "__module__", None) or ""
        if inner is reference or (home.startswith("effkit.") and not home.startswith("effkit.exercises.")):
            return (f"{home}.{getattr(inner, '__name__', inner)}", "a function of your own")
        used = _mentioned(getattr(inner, "__code__", None))
        own = next((name for name in sorted(used) if name in names or name.split(".")[0] == "effkit"), None)
        return (f"`{own}`, which solves it", "your own steps; or another name, if it's your helper") if own else None

    return Check("your own work", look)


def _innermost(function: object) -> object:
    """Beneath functools.partial, wraps and bound methods."""
    inner = next((getattr(function, a) for a in ("func", "__wrapped__", "__func__") if hasattr(function, a)), None)
    return function if inner is None else _innermost(inner)


def _mentioned(code: CodeType | None) -> set[str]:
    """Names of globals, attributes and imports in the code, nested functions included."""
    if code is None:
        return set()
    nested = (_mentioned(inner) for inner in code.co_consts if isinstance(inner, CodeType))
    return set(code.co_names).union(*nested)


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor | Real)


def _kinds(value: object) -> str:
    """A 0-d tensor counts as the number in it."""
    if isinstance(value, Tensor) and value.dim():
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    value = value.item() if isinstance(value, Tensor) else value
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_kinds, value))})"
    if isinstance(value, bool) or not isinstance(value, Real):
        return type(value).__name__
    return "a whole number" if isinstance(value, Integral) else "a real number"


def _close(seen: object, wanted: object, rtol: float, atol: float) -> bool:
    pairs = list(zip(*(list(leaves(v)) for v in (seen, wanted)), strict=False))
    same_count = len(pairs) == max(len(list(leaves(v))) for v in (seen, wanted))
    return same_count and all(_leaf_close(s, w, rtol, atol) for s, w in pairs)


def _leaf_close(seen: object, wanted: object, rtol: float, atol: float) -> bool:
    if not (_is_number(seen) and _is_number(wanted)):
        return seen == wanted
    s, w = (torch.as_tensor(v).double() for v in (seen, wanted))
    return s.shape == w.shape and torch.allclose(s, w, rtol, atol, equal_nan=True)


def _difference(seen: object, wanted: object) -> str:
    """Small answers in full; of a large tensor the worst element."""
    if not (isinstance(seen, Tensor) and isinstance(wanted, Tensor) and seen.shape == wanted.shape):
        return legible(seen)
    if seen.numel() <= FULL:
        return legible(seen)
    off = (seen.double() - wanted.double()).abs().nan_to_num(nan=torch.inf)
    place = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    return f"{legible(seen)}; element {list(place)} is {legible(seen[place])}, not {legible(wanted[place])},"
