"""Traits that more than one chapter speaks of; each is a predicate on the model that is really there."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from effkit.core.surgery import is_linear_like
from effkit.core.technique import EAGER, Trait

__all__ = ["DECODER", "EAGER", "FLOAT_WEIGHTS", "UNANSWERED", "UNMASKED"]


def _float_weights(model: nn.Module) -> bool:
    """Every linear or convolution layer holds its weight as floating-point numbers that can be trained."""
    layers = [m for m in model.modules() if is_linear_like(m) or hasattr(m, "kernel_size") and hasattr(m, "out_channels")]
    holders = [m for m in layers if not any(is_linear_like(child) for child in m.children())]
    return all(isinstance(getattr(m, "weight", None), Tensor) and m.weight.is_floating_point() for m in holders)  # type: ignore[operator]


def _unmasked(model: nn.Module) -> bool:
    """No tensor is parametrized: what a layer applies is what it stores."""
    return not any(parametrize.is_parametrized(m) for m in model.modules())


FLOAT_WEIGHTS = Trait("float weights", _float_weights)
UNMASKED = Trait("plain weights (no masks)", _unmasked)
#: generates text with caches of its own
DECODER = Trait("a decoder", lambda model: all(hasattr(model, name) for name in ("new_cache", "generate", "kv", "decoding")))
#: what keeps answers stands around a way to generate: another one would take its place, and the answers with it
UNANSWERED = Trait("that no answers are kept yet", lambda model: not hasattr(getattr(model, "decoding", None), "inner"))
