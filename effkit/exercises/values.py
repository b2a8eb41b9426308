"""Values as a grade shows them: small ones in full, large ones by shape and range."""

import traceback
from collections.abc import Callable, Iterator

from torch import Tensor, nn

FULL = 12  # a tensor of so many elements is shown whole


def legible(value: object) -> str:
    """Four digits, whole tensors where they are small; never more than a line or two."""
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(legible, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, str):
        return value
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _tensor(value: Tensor) -> str:
    if value.numel() <= FULL:
        return legible(value.tolist())
    what = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{what} from {legible(value.min().item())} to {legible(value.max().item())}"


def shown(case) -> str:
    """The arguments of a call as they would be typed."""
    settings = (f"{name}={legible(value)}" for name, value in case.settings.items())
    return f"({', '.join([*map(legible, case.args), *settings])})"


def leaves(value: object) -> Iterator[object]:
    """The tensors and plain values inside tuples, lists, dicts and modules, in order."""
    if isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def gap(guess: object, actual: object) -> str:
    """How far a guess was off, in words; empty where they are no numbers."""
    try:
        guessed, came = float(guess), float(actual)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    if guessed == came:
        return ": exactly"
    if guessed * came > 0:
        larger = max(guessed / came, came / guessed)
        return f", {larger:.2g} times {'less' if abs(came) < abs(guessed) else 'more'}"
    return f", {abs(came - guessed):.3g} apart"


def own_traceback(error: Exception, entry: Callable, limit: int = 3) -> str:
    """The learner's own lines on the way to the error, which are those that `entry` called, without libraries."""
    steps = traceback.extract_tb(error.__traceback__)
    ours = (entry.__code__.co_filename, entry.__name__)
    called = next((i for i, step in enumerate(steps) if (step.filename, step.name) == ours), len(steps))
    own = [step for step in steps[called + 1 :] if "site-packages" not in step.filename][-limit:]
    lines = [f"  line {step.lineno}, in {step.name}: {step.line}" for step in own]
    return "\n".join([*lines, f"  {type(error).__name__}: {error}"])
