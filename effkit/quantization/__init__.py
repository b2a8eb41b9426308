"""Chapter 01. Quantization: the same weights in fewer bits.

affine      the map between reals and codes, groups, packing
observers   which range: min-max, least squares
layers      layers whose weight stands in a store; the base of weight-only techniques
packed      RTN: round to nearest, stored packed
integer     W8A8: int8 matrix products with dynamic activation scales
gptq        GPTQ: rounding that passes its errors on
qat         QAT: train through the rounding
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.quantization.gptq import GPTQ
from effkit.quantization.integer import W8A8
from effkit.quantization.packed import RTN
from effkit.quantization.qat import QAT

__all__ = ["GPTQ", "QAT", "RTN", "SHOWCASE", "W8A8"]

SHOWCASE = Showcase(
    "quantization",
    (Exhibit("gpt-small", lambda: RTN(bits=4, group_size=32), work="decode"), Exhibit("mlp", W8A8, batch=64)),
)
