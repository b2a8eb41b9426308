"""Chapter 01. Quantization: the same weights in fewer bits.

affine      the map between reals and codes, groups, packing
observers   which range: min-max, percentile, least squares, KL, real zero points, HQQ
layers      layers whose weight stands in a store; the base of weight-only techniques
packed      RTN: round to nearest, stored packed
integer     W8A8: int8 matrix products; activation scales found while running or before, outliers in float
integer_net    operators on int8 codes: fixed-point multipliers instead of scales
integer_only   IntegerOnly: a calibrated model without floats inside
rescale     AWQ and SmoothQuant: what is large changes sides
codebook    KMeans, NF4, FP8, MXFP4: grids that are not uniform
gptq        GPTQ: rounding that passes its errors on
mixed       MixedPrecision: widths chosen layer by layer under a budget
inputs      what layers see, on a grid too; products of both grids' codes
qat         QAT: train through the rounding
lsq         LSQ: the step is learned
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.quantization.codebook import FP8, MXFP4, NF4, KMeans
from effkit.quantization.gptq import GPTQ
from effkit.quantization.integer import W8A8
from effkit.quantization.integer_only import IntegerOnly
from effkit.quantization.lsq import LSQ
from effkit.quantization.mixed import MixedPrecision
from effkit.quantization.packed import RTN
from effkit.quantization.qat import QAT
from effkit.quantization.rescale import AWQ, SmoothQuant

__all__ = ["AWQ", "FP8", "GPTQ", "LSQ", "MXFP4", "NF4", "QAT", "RTN", "SHOWCASE", "IntegerOnly", "KMeans", "MixedPrecision",
           "SmoothQuant", "W8A8"]  # fmt: skip

SHOWCASE = Showcase(
    "quantization",
    (Exhibit("gpt-small", lambda: RTN(bits=4, group_size=32), work="decode"), Exhibit("mlp", W8A8, batch=64)),
)
