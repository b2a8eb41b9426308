"""Chapter 03. Distillation: a small model learns from a large one's doubts.

losses    softened probabilities, forward and reverse KL, the composite loss and its T^2
distill   Distill: teacher in, student out; the student is made by a technique
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.distillation.distill import Distill
from effkit.zoo.build import Fresh

__all__ = ["SHOWCASE", "Distill"]


def narrow_student(epochs: int = 20) -> Distill:
    """Two hidden layers of 30 units, the narrowest student of Hinton et al. 2015, sec. 3, for which temperatures of 2.5
    to 4 did best."""
    return Distill(Fresh(numbers=(("widths", (784, 30, 30, 10)),)), temperature=4.0, epochs=epochs, lr=1e-2)


SHOWCASE = Showcase("distillation", (Exhibit("mlp", narrow_student, batch=64),))
