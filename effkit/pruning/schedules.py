"""When to prune: at once, or gradually while training.

Problem   Cutting 90 % at once leaves training too little to recover from.
Idea      Cut fast while there is much to spare, slowly towards the end: s_t = s_f + (s_i - s_f) (1 - t / T)^3.
Left out  Here a weight that is gone stays gone; in the paper it may return when another falls below it.
Source    Zhu & Gupta 2017, arXiv:1710.01878, eq. 1.
"""

RAMP = 0.7  # of all steps; the rest is for recovering
CUTS = 20  # masks computed on the way


def cubic(t: int, *, steps: int, final: float, initial: float = 0.0) -> float:
    """The sparsity after t of `steps` steps; constant afterwards."""
    left = 1 - min(max(t, 0), steps) / steps
    return final + (initial - final) * left**3


def cutting_steps(total: int) -> tuple[int, frozenset[int]]:
    """The length of the ramp in steps, and after which of them masks are computed; the last always is one of them."""
    ramp = max(1, round(RAMP * total))
    every = max(1, ramp // CUTS)
    return ramp, frozenset(range(every, ramp, every)) | {ramp}
