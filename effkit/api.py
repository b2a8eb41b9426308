"""What `import effkit` offers by name; everything else is in its module."""

from effkit.core.vision_ops import mend_torchvision

mend_torchvision()

from effkit import catalog, zoo  # noqa: E402 (torchvision has to be mended before anything can import it)
from effkit.catalog import load_recipe, save_recipe, techniques  # noqa: E402
from effkit.core.checkpoint import load, save  # noqa: E402
from effkit.core.generation import Sampler, generate  # noqa: E402
from effkit.core.report import Reading, Report, Table  # noqa: E402
from effkit.core.surgery import log  # noqa: E402
from effkit.core.task import Batches, Score, Task  # noqa: E402
from effkit.core.technique import Identity, Pipeline, Technique, Trait  # noqa: E402
from effkit.exercises import exercise, progress  # noqa: E402
from effkit.measure import compare  # noqa: E402 (`measure` stays the module: from effkit.measure import measure)

catalog.techniques()  # files may hold any chapter's layers, so all of them register before the first `load`
__all__ = [
    "Batches", "Identity", "Pipeline", "Reading", "Report", "Sampler", "Score", "Table", "Task", "Technique", "Trait",
    "compare", "exercise", "generate", "load", "load_recipe", "log", "progress", "save", "save_recipe", "techniques", "zoo",
]  # fmt: skip
