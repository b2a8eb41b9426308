"""Lets torchvision be imported beside a torch that it was not built for.

Problem   torchvision's wheels on the package index are built for CUDA. Beside a CPU-only torch their operators don't
          load, and then `import torchvision` fails: "operator torchvision::nms does not exist". So do transformers
          and peft, which import it. Yet datasets, transforms and models need none of those operators.
Idea      Declare the two operators that the import asks for, by name and signature, without an implementation.
          Calling one still fails, and says so.
When      torchvision tries its operators itself (torchvision.extension) before it asks for them (_meta_registrations).
          A finder on sys.meta_path waits for exactly that moment: it costs nothing until somebody imports
          torchvision, takes torchvision's own word for what loaded, and does nothing where all is well.
"""

import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _OperatorDeclarer:
    """An import finder that finds nothing: it only acts at the right moment."""

    library = None  # torch forgets the declarations once nobody holds the library

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and self.library is None:
            extension = sys.modules.get("torchvision.extension")
            if extension is not None and not extension._has_ops():
                self.library = _declare()
        return None


def _declare():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


def mend_torchvision() -> None:
    """From now on `import torchvision` works beside any torch. Called when effkit is imported; twice is once."""
    if not any(isinstance(finder, _OperatorDeclarer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OperatorDeclarer())
