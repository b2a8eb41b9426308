"""Chapter 05. Compilation: the whole program at once, instead of one operator after another.

ir            a graph that can be read, and what it means
capture       from a model to a graph
passes        constants, dead code, common subexpressions, algebra, conv-bn
fusion        chains of pointwise operators and row reductions become one kernel
expressions   operators in C
codegen       the kernel: loops around them
schedule      an order that keeps little alive
plan          one arena for all intermediates, against the lower bound
executor      the graph as a Python function over that arena
compiled      guards, fallbacks, live weights
compile       Compile: the technique
"""

from effkit.compilation.compile import Compile
from effkit.core.showcase import Exhibit, Showcase

__all__ = ["SHOWCASE", "Compile"]

SHOWCASE = Showcase("compilation", (Exhibit("resnet", Compile, batch=8), Exhibit("gpt-small", Compile, batch=1)))
