"""Exercises of chapter 00: bytes before macs, and how sure a median is."""

import math

import torch

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def linear_intensity(rows: int, inputs: int, outputs: int, *, bytes_per_number: int) -> float:
    """Macs a byte of a linear layer without bias, everything moved once."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return rows * inputs * outputs / (bytes_per_number * moved)


def layers(rng: torch.Generator):
    """A layer by hand; then one row, square ones, wide and tall ones."""
    yield case(2, 3, 4, bytes_per_number=4)
    for _ in range(6):
        rows, inputs, outputs = torch.randint(1, 600, (3,), generator=rng).tolist()
        yield case(rows, inputs, outputs, bytes_per_number=int(2 ** torch.randint(0, 4, (), generator=rng)))
    yield case(1, 4096, 4096, bytes_per_number=2)


def forgets_outputs(rows, inputs, outputs, *, bytes_per_number):
    return rows * inputs * outputs / (bytes_per_number * (rows * inputs + inputs * outputs))


def counts_flops(rows, inputs, outputs, *, bytes_per_number):
    return 2 * linear_intensity(rows, inputs, outputs, bytes_per_number=bytes_per_number)


def fetches_weights_for_each_row(rows, inputs, outputs, *, bytes_per_number):
    moved = rows * (inputs + inputs * outputs + outputs)
    return rows * inputs * outputs / (bytes_per_number * moved)


def per_number_instead_of_per_byte(rows, inputs, outputs, *, bytes_per_number):
    return rows * inputs * outputs / (rows * inputs + inputs * outputs + rows * outputs)


def linear_intensity_by_heart(rows, inputs, outputs, *, bytes_per_number):
    return 24 / (4 * 26)


LINEAR_INTENSITY = Exercise(
    name="measure.linear_intensity",
    prompt="""**Macs a byte.** A linear layer without a bias multiplies `rows` vectors of length `inputs` by its matrix
and gives as many vectors of length `outputs`. Each number takes `bytes_per_number` bytes. Write `linear_intensity`: the
macs of the layer over the bytes that have to be moved at least, the inputs, the weights and the outputs each once.""",
    reference=linear_intensity,
    checks=(
        checks.not_the_librarys_own("intensity", "attention_intensity"),
        checks.equals_reference(layers),
    ),
    hints=(
        "Above the line stands what is done, below it what is carried: three arrays, each carried once.",
        "The macs are a product of three sizes; the three arrays have two of these sizes each.",
        "`moved = rows * inputs + inputs * outputs + rows * outputs` numbers of `bytes_per_number` bytes each.",
    ),
    after="With one row it stays below 1 / bytes_per_number, whatever the layer: one token a pass is bound by memory.",
    wrong=(
        (forgets_outputs, "the right numbers"),
        (counts_flops, "the right numbers"),
        (fetches_weights_for_each_row, "the right numbers"),
        (per_number_instead_of_per_byte, "the right numbers"),
        (linear_intensity_by_heart, "the right numbers"),
    ),
)


def rank(n: int, *, confidence: float) -> int:
    """The largest k for which x_(k) ... x_(n+1-k) misses the median with probability 1 - confidence at most; else 0."""
    k, missing = 0, 0.0
    while k < n // 2:
        missing += 2 * math.comb(n, k) / 2**n
        if missing > 1 - confidence:
            break
        k += 1
    return k


def counts_of_samples(rng: torch.Generator):
    """Confidences between two that are possible, so that no answer hangs on the last bit."""
    yield case(6, confidence=0.95)
    yield case(5, confidence=0.95)
    for _ in range(6):
        yield case(
            int(torch.randint(7, 60, (), generator=rng)),
            confidence=(0.9, 0.95, 0.99)[int(torch.randint(3, (), generator=rng))],
        )


def keeps_its_promise(answer, given):
    (n,), confidence = given.args, given.settings["confidence"]
    missing = 2 * sum(math.comb(n, i) for i in range(answer)) / 2**n
    good = missing <= 1 - confidence + 1e-12
    return None if good else (f"k = {answer} misses in {missing:.2%}", f"at most {1 - confidence:.0%} of cases")


def one_side_only(n, *, confidence):
    return rank(n, confidence=1 - 2 * (1 - confidence)) if confidence > 0.5 else 0


def one_too_many(n, *, confidence):
    return rank(n, confidence=confidence) + 1


def normal_approximation(n, *, confidence):
    z = {0.9: 1.645, 0.95: 1.96, 0.99: 2.576}[confidence]
    return max(0, math.floor(n / 2 - z * math.sqrt(n) / 2))


def quartile(n, *, confidence):
    return n // 4


def rank_by_heart(n, *, confidence):
    return 1


RANK = Exercise(
    name="measure.rank",
    prompt="""**How far in may you go?** Of `n` timings in order, the interval from the k-th smallest to the k-th
largest misses the true median with probability $2 \\sum_{i=0}^{k-1} \\binom{n}{i} / 2^n$ at most. Write
`rank(n, confidence=...)`: the largest k that keeps this within `1 - confidence`, or 0 where even the whole range,
k = 1, does not.""",
    reference=rank,
    checks=(
        checks.not_the_librarys_own("median_interval"),
        checks.same_shape_and_dtype(counts_of_samples),
        checks.holds("the interval keeps its promise", counts_of_samples, keeps_its_promise),
        checks.equals_reference(counts_of_samples),
    ),
    hints=(
        "Each step inwards drops one sample at either end, and adds the chance that the median lay just there.",
        "Add terms, beginning with i = 0, for as long as twice their sum over 2^n stays within 1 - confidence.",
        "`missing += 2 * math.comb(n, k) / 2**n`; stop before it exceeds `1 - confidence`, else `k += 1`.",
    ),
    after="For n = 5 and 95 % it is 0: five runs bound no median, and most tables are made of three.",
    wrong=(
        (one_side_only, "the interval keeps its promise"),
        (one_too_many, "the interval keeps its promise"),
        (normal_approximation, "the right numbers"),
        (quartile, "the interval keeps its promise"),
        (rank_by_heart, "the interval keeps its promise"),
    ),
)

EXERCISES = (LINEAR_INTENSITY, RANK)
