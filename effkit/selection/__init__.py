"""Theme 11. Selection: which techniques, in which order, with which settings, for this model and these limits?

frontier     what no other choice beats: Pareto frontier, and the hypervolume that it covers
space        sequences of techniques and their settings, as data; forbidden orders are not in it
constraints  hard limits on bytes, latency and score, and by how much a candidate misses them
candidates   one evaluation for all: apply, write the file, score on val, time
search       Optuna proposes, a journal remembers; random search as the baseline
evolution    breeding sequences: walks are crossed, not vectors
select       the whole: search, measure again, recommend, report on test
"""

from effkit.selection.candidates import Candidate, Evaluate, label
from effkit.selection.constraints import Constraints
from effkit.selection.frontier import dominates, hypervolume, pareto
from effkit.selection.search import SAMPLERS, Search
from effkit.selection.select import Selection, select
from effkit.selection.space import Space, default_space

__all__ = [
    "SAMPLERS", "Candidate", "Constraints", "Evaluate", "Search", "Selection", "Space",
    "default_space", "dominates", "hypervolume", "label", "pareto", "select",
]  # fmt: skip
