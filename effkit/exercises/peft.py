"""Exercises of chapter 06: what an adapter adds, and what training has to hold."""

import torch
from torch import Tensor

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def adapted(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, alpha: float) -> Tensor:
    """What a layer with weight w (out, in) and adapter a (rank, in), b (out, rank) makes of x (tokens, in)."""
    rank = a.shape[0]
    return x @ w.T + alpha / rank * ((x @ a.T) @ b.T)


def layers(rng: torch.Generator):
    """By hand: one input of 1 and 2; then random ones, the last with a fresh adapter."""
    yield case(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]), alpha=4.0,
    )  # fmt: skip
    for tokens, inputs, outputs, rank in ((3, 5, 4, 2), (2, 6, 6, 3), (4, 3, 8, 1)):
        x, w, a = (torch.randn(shape, generator=rng) for shape in ((tokens, inputs), (outputs, inputs), (rank, inputs)))
        b = torch.randn(outputs, rank, generator=rng) if rank > 1 else torch.zeros(outputs, rank)
        yield case(x, w, a, b, alpha=16.0)


def base_where_b_is_zero(answer, given):
    """A fresh adapter changes nothing."""
    x, w, _, b = given.args
    if b.any() or torch.allclose(answer, x @ w.T, atol=1e-5):
        return None
    return (f"off by {(answer - x @ w.T).abs().max():.4g} although b is all zeros", "the base layer's own output")


def scales_by_alpha(x, w, a, b, *, alpha):
    return x @ w.T + alpha * ((x @ a.T) @ b.T)


def scales_by_root(x, w, a, b, *, alpha):
    return x @ w.T + alpha / a.shape[0] ** 0.5 * ((x @ a.T) @ b.T)


def reads_rank_off_the_wrong_side(x, w, a, b, *, alpha):
    return x @ w.T + alpha / a.shape[1] * ((x @ a.T) @ b.T)


def scales_the_base_too(x, w, a, b, *, alpha):
    return alpha / a.shape[0] * (x @ w.T + (x @ a.T) @ b.T)


def writes_into_w(x, w, a, b, *, alpha):
    w += alpha / a.shape[0] * b @ a
    return x @ w.T


def adapted_by_heart(x, w, a, b, *, alpha):
    return torch.tensor([[7.0, 14.0]])


ADAPTED = Exercise(
    name="peft.adapted",
    prompt="""**One layer, one adapter.** A frozen layer applies `w` (out, in) to tokens `x` (tokens, in). Its adapter has
two factors, `a` of shape (rank, in) and `b` of shape (out, rank); their product b a, times alpha / rank, is the change
of the weight. Write `adapted(x, w, a, b, alpha=...)`, the layer's output of shape (tokens, out). The base must stay as
it was; and do it in an order that never builds a matrix of shape (out, in).""",
    reference=adapted,
    checks=(
        checks.not_the_librarys_own("LoRA", "LoRALinear", "Adapter"),
        checks.same_shape_and_dtype(layers),
        checks.holds("a fresh adapter changes nothing", layers, base_where_b_is_zero),
        checks.equals_reference(layers),
        checks.input_unchanged(layers),
    ),
    hints=(
        "Two paths side by side, one frozen, one thin, and their outputs added.",
        "The thin path multiplies by a first: (tokens, in) to (tokens, rank), then by b.",
        "`x @ w.T + alpha / rank * ((x @ a.T) @ b.T)`, where rank is the number of rows of a.",
    ),
    after="Thin first costs rank (in + out) multiplications a token; b a first would cost as much as the layer itself.",
    wrong=(
        (scales_by_alpha, "the right numbers"),
        (scales_by_root, "the right numbers"),
        (reads_rank_off_the_wrong_side, "the right numbers"),
        (scales_the_base_too, "a fresh adapter changes nothing"),
        (writes_into_w, "its input unchanged"),
        (adapted_by_heart, "shape and dtype"),
    ),
)


def training_bytes(*, frozen: int, trained: int, frozen_bits: int) -> int:
    """Bytes held by weights, gradients and AdamW's moments; what is trained is float32."""
    return frozen * frozen_bits // 8 + trained * 4 * (1 + 1 + 2)


def models(rng: torch.Generator):
    """By hand: 1,000 frozen weights of 4 bits and 10 trained ones; then random sizes, fully trained ones among them."""
    yield case(frozen=1000, trained=10, frozen_bits=4)
    yield case(frozen=0, trained=500, frozen_bits=32)
    for bits in (32, 16, 4):
        frozen, trained = (8 * int(n) for n in torch.randint(10, 1000, (2,), generator=rng))
        yield case(frozen=frozen, trained=trained, frozen_bits=bits)


def gradients_for_all(*, frozen, trained, frozen_bits):
    return frozen * frozen_bits // 8 + 4 * frozen + trained * 4 * 4


def one_moment(*, frozen, trained, frozen_bits):
    return frozen * frozen_bits // 8 + trained * 4 * 3


def forgets_the_frozen(*, frozen, trained, frozen_bits):
    return trained * 4 * 4


def trains_in_the_frozen_precision(*, frozen, trained, frozen_bits):
    return (frozen + 4 * trained) * frozen_bits // 8


def training_bytes_by_heart(*, frozen, trained, frozen_bits):
    return 660


TRAINING_BYTES = Exercise(
    name="peft.training_bytes",
    prompt="""**The ledger.** A model has `frozen` weights of `frozen_bits` bits each and `trained` ones in float32. It is
trained with AdamW, which keeps two moments for each number that it trains, in float32 like the gradient. Write
`training_bytes(frozen=..., trained=..., frozen_bits=...)`: the bytes that weights, gradients and moments take together
(a whole number; activations are another matter).""",
    reference=training_bytes,
    checks=(
        checks.not_the_librarys_own("memory_ledger"),
        checks.same_shape_and_dtype(models),
        checks.equals_reference(models, rtol=0.0),
    ),
    hints=(
        "What is frozen is only read; what is trained is held several times over.",
        "Per trained number: itself, its gradient, and two moments.",
        "`frozen * frozen_bits // 8` for the base, `4 * 4` bytes for each trained number.",
    ),
    after="16 bytes a trained weight against half a byte for a frozen one of 4 bits: that is QLoRA's whole arithmetic.",
    wrong=(
        (gradients_for_all, "the right numbers"),
        (one_moment, "the right numbers"),
        (forgets_the_frozen, "the right numbers"),
        (trains_in_the_frozen_precision, "the right numbers"),
        (training_bytes_by_heart, "the right numbers"),
    ),
)

EXERCISES = (ADAPTED, TRAINING_BYTES)
