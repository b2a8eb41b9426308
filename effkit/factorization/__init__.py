"""Chapter 04. Factorization: one layer as a product of thinner ones.

rank          how many directions: break-even, by energy, by one budget for all layers
svd           SVD: a linear layer as two
weighted_svd  WhitenedSVD: the same, measured by what the inputs use
tucker        Tucker2: a convolution as three
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.factorization.svd import SVD
from effkit.factorization.tucker import Tucker2
from effkit.factorization.weighted_svd import WhitenedSVD

__all__ = ["SHOWCASE", "SVD", "Tucker2", "WhitenedSVD"]

SHOWCASE = Showcase(
    "factorization",
    (Exhibit("mlp", lambda: SVD(keep=0.3), batch=64), Exhibit("resnet", lambda: Tucker2(fraction=0.5), batch=64)),
)
