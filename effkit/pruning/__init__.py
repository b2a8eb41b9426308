"""Chapter 02. Pruning: the same function with fewer weights.

masks        which weights stay, exactly how many, and where that is written so that training cannot undo it
schedules    at once, or gradually (Zhu & Gupta)
prune        the base: a score, a pattern, a schedule
magnitude    Magnitude, and Filters for whole channels
scores       Fisher: what the loss says about a weight
labels, rules, graph   which channels hang together, through residuals, from one run of the model
structured   channels, neurons and heads, physically removed
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.pruning.graph import Group, groups
from effkit.pruning.magnitude import Filters, Magnitude
from effkit.pruning.prune import Prune
from effkit.pruning.scores import Fisher

__all__ = ["SHOWCASE", "Filters", "Fisher", "Group", "Magnitude", "Prune", "groups"]

SHOWCASE = Showcase(
    "pruning",
    (
        Exhibit("resnet", lambda: Filters(sparsity=0.5, epochs=2), batch=64),
        Exhibit("mlp", lambda: Magnitude(sparsity=0.8), batch=64),
        Exhibit("gpt-small", lambda: Fisher(0.25, "channels", layers="*.ff.*", examples=32), work="decode"),
    ),
)
