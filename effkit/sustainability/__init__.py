"""Theme 09. Sustainability: what compressing costs, what it saves, and who says so.

footprint   joules to grams: electricity, its place, the building, and the making of the machine
useful      energy per token, and per correct answer
payback     after how many inferences a compression has saved what it cost
published   three published accounts, from their own inputs, to within rounding

Energy and grid intensities themselves are measured, or estimated and called so, by effkit.measure.
"""

from effkit.sustainability.footprint import Footprint, Machine, electricity, embodied, footprint, operational
from effkit.sustainability.payback import Payback, payback
from effkit.sustainability.published import ACCOUNTS, Line, span
from effkit.sustainability.useful import per_correct, per_token

__all__ = [
    "ACCOUNTS", "Footprint", "Line", "Machine", "Payback", "electricity", "embodied", "footprint", "operational",
    "payback", "per_correct", "per_token", "span",
]  # fmt: skip
