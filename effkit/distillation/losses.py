"""What the student learns from: labels, and the teacher's doubts.

Problem   A label says "2". The teacher also says that this 2 looks rather like a 3 and not at all like a 5, but in
          probabilities so small that a loss hardly sees them.
Idea      Soften both with a temperature T, p_i = exp(v_i / T) / sum_j exp(v_j / T), and let the student's softened
          answer q follow the teacher's p: KL(p || q) = sum_i p_i log(p_i / q_i). Mix with the loss on labels:
          L = alpha L_hard + (1 - alpha) T^2 KL(p || q).
The T^2   The gradient of KL(p || q) with respect to a logit of the student is (q_i - p_i) / T, and q - p itself shrinks
          like 1 / T: for large T the gradient is (z_i - v_i) / (N T^2), z and v the logits about their means, N the
          number of classes. Without the factor T^2, raising T from 1 to 10 is much the same as raising alpha: the
          teacher fades by a hundred. With it, alpha and T are two independent knobs.
Limit     T -> infinity is a regression of logits on logits, with all classes equal; small T listens to the likely ones.
Source    Hinton et al. 2015, arXiv:1503.02531, eq. 1 (softening), 2 to 4 (gradients), sec. 2 (mixture and T^2). Reverse
          KL: Gu et al. 2023, arXiv:2306.08543, eq. 1.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Divergence = Callable[..., Float[Tensor, "*b"]]


def soften(logits: Float[Tensor, "*b classes"], temperature: float) -> Float[Tensor, "*b classes"]:
    """Log-probabilities at this temperature, in float32 at least."""
    wide = logits if logits.itemsize >= 4 else logits.float()
    return (wide / temperature).log_softmax(-1)


def kl(log_p: Float[Tensor, "*b classes"], log_q: Float[Tensor, "*b classes"]) -> Float[Tensor, "*b"]:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), in nats; zero where p = q and positive elsewhere."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(
    student: Float[Tensor, "*b classes"], teacher: Float[Tensor, "*b classes"], *, temperature: float = 1.0
) -> Float[Tensor, "*b"]:
    """KL(teacher || student): expensive where the student denies what the teacher holds possible, so it covers all."""
    return kl(soften(teacher, temperature), soften(student, temperature))


def reverse_kl(
    student: Float[Tensor, "*b classes"], teacher: Float[Tensor, "*b classes"], *, temperature: float = 1.0
) -> Float[Tensor, "*b"]:
    """KL(student || teacher): expensive where the student claims what the teacher denies, so it settles on a mode."""
    return kl(soften(student, temperature), soften(teacher, temperature))


DIVERGENCES: dict[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl}


def soft_loss(
    student: Float[Tensor, "*b classes"],
    teacher: Float[Tensor, "*b classes"],
    *,
    temperature: float,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, ""]:
    """T^2 times the mean divergence over all that is classified: images, or every token of every text."""
    return temperature**2 * divergence(student, teacher, temperature=temperature).mean()


def composite(hard: Float[Tensor, ""], soft: Float[Tensor, ""], *, alpha: float) -> Float[Tensor, ""]:
    """alpha L_hard + (1 - alpha) L_soft; `soft` already carries its T^2."""
    return alpha * hard + (1 - alpha) * soft
