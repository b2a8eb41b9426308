"""effkit: AI efficiency, built from scratch and measured honestly.

    import effkit
    model, task = effkit.zoo.load("gpt-small")
    small = effkit.quantization.RTN(bits=4)(model, task)
    print(effkit.compare({"float32": model, "4 bits": small}, task))
"""

__version__ = "0.1.0"

try:
    from effkit.api import *  # noqa: F403
    from effkit.api import __all__
except (ImportError, OSError) as error:  # a machine that lacks something can still run `effkit doctor`, which says what
    _reason, __all__ = error, []

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"effkit lacks something here ({_reason}); `python -m effkit doctor` says what, and the remedy") from _reason
