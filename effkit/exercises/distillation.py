"""Exercises of chapter 03: the loss on the teacher's doubts, and how hard it pulls at each logit."""

import math

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def soft_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> float:
    """T^2 KL(teacher || student), both softened by T, the mean over rows."""
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * kl.mean().item()


def logits(rng: torch.Generator):
    """First by hand: p = (3/4, 1/4) and q = (1/2, 1/2) at T = 2; then rows drawn afresh, a copy of the teacher last."""
    yield case(torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), temperature=2.0)
    for rows, classes, temperature in ((1, 3, 1.0), (4, 5, 3.0), (6, 10, 8.0)):
        student, teacher = (3 * torch.randn(rows, classes, generator=rng) for _ in range(2))
        yield case(student, teacher, temperature=temperature)
    yield case(teacher, teacher, temperature=4.0)


def never_negative(loss, given):
    student, teacher = given.args
    if loss < -1e-5:
        return loss, "at least 0: a divergence is zero for a copy and positive elsewhere"
    if torch.equal(student, teacher) and loss > 1e-4:
        return loss, "0: the student already says what the teacher says"
    return None


def divergence(p: Tensor, q: Tensor, temperature: float) -> Tensor:
    """KL between rows of logits: what several mistakes have in common."""
    log_p, log_q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forgets_t_squared(student, teacher, *, temperature):
    return divergence(teacher, student, temperature).mean().item()


def softens_the_student_alone(student, teacher, *, temperature):
    log_p, log_q = teacher.log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def swaps_the_two(student, teacher, *, temperature):
    return temperature**2 * divergence(student, teacher, temperature).mean().item()


def averages_over_classes_too(student, teacher, *, temperature):
    return temperature**2 * divergence(teacher, student, temperature).mean().item() / student.shape[-1]


def cross_entropy_instead(student, teacher, *, temperature):
    p = (teacher / temperature).softmax(-1)
    return -(temperature**2) * (p * (student / temperature).log_softmax(-1)).sum(-1).mean().item()


def soft_loss_by_heart(student, teacher, *, temperature):
    return 0.5232


SOFT_LOSS = Exercise(
    name="distillation.soft_loss",
    prompt="""**The teacher's doubts as a loss.** `student` and `teacher` are logits, one row an image and one column a
class. Write `soft_loss(student, teacher, temperature=...)`: divide both by the temperature T, make probabilities of
them (q of the student, p of the teacher), take KL(p || q) = sum_i p_i log(p_i / q_i) of each row, average over all rows
and multiply by T^2. Return a number.""",
    reference=soft_loss,
    checks=(
        checks.not_the_librarys_own("soft_loss", "forward_kl", "reverse_kl", "soften"),
        checks.same_shape_and_dtype(logits),
        checks.finite(logits),
        checks.holds("zero for a copy, positive elsewhere", logits, never_negative),
        checks.equals_reference(logits, rtol=1e-3, atol=1e-5),
        checks.input_unchanged(logits),
    ),
    hints=(
        "A divergence is the mean, under the first distribution (here the teacher's), of a difference of logarithms.",
        "Both sides are softened by the same T; `log_softmax(-1)` gives logarithms without overflow.",
        "`log_p = (teacher / temperature).log_softmax(-1)`, `log_q` too; `(log_p.exp() * (log_p - log_q)).sum(-1)`.",
    ),
    after="With T^2 the teacher's pull keeps its strength when T changes, so that alpha and T can be chosen apart.",
    wrong=(
        (forgets_t_squared, "the right numbers"),
        (softens_the_student_alone, "zero for a copy"),
        (swaps_the_two, "the right numbers"),
        (averages_over_classes_too, "the right numbers"),
        (cross_entropy_instead, "zero for a copy"),
        (soft_loss_by_heart, "zero for a copy"),
    ),
)


def pull(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """The gradient of T^2 KL(p || q) with respect to each logit of one student's answer."""
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    return temperature * (q - p)


def answers(rng: torch.Generator):
    """First by hand, at T = 2; then answers of several lengths, mild and hot."""
    yield case(torch.zeros(2), torch.tensor([2 * math.log(3), 0.0]), temperature=2.0)
    for classes, temperature in ((3, 1.0), (5, 4.0), (10, 50.0)):
        student, teacher = (3 * torch.randn(classes, generator=rng) for _ in range(2))
        yield case(student, teacher, temperature=temperature)


def sums_to_zero(gradient, given):
    total = float(gradient.sum())
    return (
        None
        if abs(total) < 1e-3
        else (f"a sum of {total:.4g}", "a sum of 0: probability that one class gains, others lose")
    )


def forgets_the_factor(student, teacher, *, temperature):
    return pull(student, teacher, temperature=temperature) / temperature**2


def points_uphill_and_down(student, teacher, *, temperature):
    return -pull(student, teacher, temperature=temperature)


def always_in_the_limit(student, teacher, *, temperature):
    gap = student - teacher
    return (gap - gap.mean()) / len(gap)


def without_softening(student, teacher, *, temperature):
    return temperature * (student.softmax(-1) - teacher.softmax(-1))


def only_the_teachers_choice(student, teacher, *, temperature):
    chosen = torch.nn.functional.one_hot(teacher.argmax(), len(teacher)).float()
    return temperature * ((student / temperature).softmax(-1) - chosen)


def pull_by_heart(student, teacher, *, temperature):
    return torch.tensor([-0.5, 0.5])


PULL = Exercise(
    name="distillation.pull",
    prompt="""**How hard does the teacher pull?** For one image, `student` and `teacher` are vectors of logits. Write
`pull(student, teacher, temperature=...)`: the gradient of T^2 KL(p || q) with respect to the student's logits, as a
formula, without autograd. p and q are the softened probabilities of teacher and student.""",
    reference=pull,
    checks=(
        checks.not_the_librarys_own("backward", "grad", "soft_loss", "forward_kl"),
        checks.same_shape_and_dtype(answers),
        checks.holds("the pulls cancel", answers, sums_to_zero),
        checks.equals_reference(answers, rtol=1e-3, atol=1e-5),
        checks.input_unchanged(answers),
    ),
    hints=(
        "Only log q depends on the student, and softmax with a logarithm is an old friend: probability minus target.",
        "d KL / d z_i = (q_i - p_i) / T: the 1 / T is the inner derivative of z / T. Then comes the factor T^2.",
        "`temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))`.",
    ),
    after="q - p shrinks like 1 / T, so T (q - p) has a limit: the gap of the logits over the number of classes.",
    wrong=(
        (forgets_the_factor, "the right numbers"),
        (points_uphill_and_down, "the right numbers"),
        (always_in_the_limit, "the right numbers"),
        (without_softening, "the right numbers"),
        (only_the_teachers_choice, "the right numbers"),
        (pull_by_heart, "shape and dtype"),
    ),
)

EXERCISES = (SOFT_LOSS, PULL)
