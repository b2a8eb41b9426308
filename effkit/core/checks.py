"""Bad input gets one sentence: the value, what is allowed, and the way out."""

from numbers import Integral, Real


def require_int(name: str, value: object, low: int, high: int | None = None, *, hint: str = "") -> None:
    """Raises ValueError unless value is a whole number in [low, high]; True and False are not numbers here."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number, at least {low}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}{_tail(hint)}")


def require_float(
    name: str, value: object, low: float, high: float | None = None, *, open_low=False, open_high=False, hint: str = ""
) -> None:
    """Raises ValueError unless value is a finite number in the interval; open ends exclude their bound."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    inside = number and (value > low if open_low else value >= low)  # type: ignore[operator]
    if inside and high is not None:
        inside = value < high if open_high else value <= high  # type: ignore[operator]
    if not inside or value == float("inf"):
        left, right = "(" if open_low else "[", ")" if open_high or high is None else "]"
        raise ValueError(f"{name} must be a number in {left}{low}, {'inf' if high is None else high}{right}, got {value!r}{_tail(hint)}")


def require_choice(name: str, value: object, choices, *, hint: str = "") -> None:
    """Raises ValueError unless value is one of the choices, which the message lists."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{_tail(hint)}")


def _tail(hint: str) -> str:
    return f": {hint}" if hint else ""
