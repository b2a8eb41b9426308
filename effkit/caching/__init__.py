"""Chapter 07. Caching: keep what was computed.

cost   macs and bytes of a token, with a cache and without; macs a byte of attention
kv     Recompute, the baseline; Preallocated, a cache that is written in place
fused  Fused: few tokens pass through all blocks in one call; nibbles: also where weights are held in up to 4 bits
paged     Paged: keys and values in pages of a pool, shared until somebody writes
prefix    the beginnings that prompts share; which to keep: LRU, FIFO, Belady's optimum
streams   requests as a server gets them, from a seed
grouping   GroupHeads: fewer key-value heads, in a model that was trained with more
lossy      what the next two share: what a token sees does not depend on passes
evict      Window and its sinks, H2O's heavy hitters, SnapKV: tokens are thrown away
quantized  QuantizedKV: keys and values in few bits
features  DeepCache: a U-Net's depths serve for several steps of a drawing
results   ResultCache: the same question, or nearly the same, is answered from memory
batching  continuous batching over the pages, against batches that start and end together
"""

from effkit.caching.evict import H2O, SnapKV, Window
from effkit.caching.features import DeepCache
from effkit.caching.fused import Fused
from effkit.caching.grouping import GroupHeads
from effkit.caching.kv import Preallocated, Recompute
from effkit.caching.paged import Paged
from effkit.caching.quantized import QuantizedKV
from effkit.caching.results import ResultCache
from effkit.core.showcase import Exhibit, Showcase
from effkit.core.technique import Identity

__all__ = [
    "H2O", "SHOWCASE", "DeepCache", "Fused", "GroupHeads", "Paged", "Preallocated", "QuantizedKV", "Recompute", "ResultCache",
    "SnapKV", "Window",
]  # fmt: skip

SHOWCASE = Showcase(
    "caching",
    tuple(Exhibit("gpt-small", Preallocated, work="decode", baseline=before) for before in (Recompute, Identity)),
)
