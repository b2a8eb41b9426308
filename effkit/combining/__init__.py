"""Combining: what one paradigm leaves for the next.

qap     QAP: a mask and a grid, trained together
pairs   two techniques in either order: what they cost together and apart
"""

from effkit.combining.pairs import Pair, forbidden, interaction
from effkit.combining.qap import QAP

__all__ = ["QAP", "Pair", "forbidden", "interaction"]
