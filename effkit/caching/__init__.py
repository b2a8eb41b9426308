"""Chapter 07. Caching: keep what was computed.

cost   macs and bytes of a token, with a cache and without; macs a byte of attention
kv     Recompute, the baseline; Preallocated, a cache that is written in place
fused  Fused: few tokens pass through a block in three calls
features  DeepCache: a U-Net's depths serve for several steps of a drawing
results   ResultCache: the same question, or nearly the same, is answered from memory
"""

from effkit.caching.features import DeepCache
from effkit.caching.fused import Fused
from effkit.caching.kv import Preallocated, Recompute
from effkit.caching.results import ResultCache
from effkit.core.showcase import Exhibit, Showcase
from effkit.core.technique import Identity

__all__ = ["SHOWCASE", "DeepCache", "Fused", "Preallocated", "Recompute", "ResultCache"]

SHOWCASE = Showcase(
    "caching",
    tuple(Exhibit("gpt-small", Preallocated, work="decode", baseline=before) for before in (Recompute, Identity)),
)
