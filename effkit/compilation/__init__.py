"""Chapter 05. Compilation: the whole program at once, instead of one operator after another.

ir         capture into a graph that can be read
passes     constants, dead code, common subexpressions, algebra, conv-bn
fusion     chains of pointwise operators and row reductions become one kernel
codegen    the kernel in C
schedule   an order that keeps little alive
plan       one arena for all intermediates, against the lower bound
executor   the graph as a Python function over that arena
compiled   Compile: the technique, its guards and its fallbacks
"""

from effkit.compilation.compiled import Compile
from effkit.core.showcase import Exhibit, Showcase

__all__ = ["SHOWCASE", "Compile"]

SHOWCASE = Showcase("compilation", (Exhibit("resnet", Compile, batch=8), Exhibit("gpt-small", Compile, batch=1)))
