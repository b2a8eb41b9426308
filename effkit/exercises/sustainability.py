"""Exercises of theme 09: when a compression pays, and whose share of a machine a computation is."""

import math

import torch

from effkit.exercises import checks
from effkit.exercises.base import Exercise
from effkit.exercises.checks import case


def pays_after(cost: float, *, before: float, after: float) -> float:
    """The smallest whole number of inferences with which compressing has cost no more than leaving it; or inf."""
    if cost <= 0:
        return 0
    return math.ceil(cost / (before - after)) if before > after else math.inf


def savings(rng: torch.Generator):
    """By hand; then costs between two whole numbers of inferences, so that no answer hangs on the last bit."""
    yield case(100.0, before=3.0, after=1.0)
    yield case(5.0, before=2.0, after=0.0)
    for _ in range(5):
        saved, after, part = (torch.rand(3, generator=rng) + 0.1).tolist()
        n = int(torch.randint(1, 50, (), generator=rng))
        yield case((n - 0.3 - 0.3 * part) * saved, before=after + saved, after=after)
    yield case(3.0, before=1.0, after=1.5)
    yield case(0.0, before=2.0, after=1.0)


def never_before_its_time(answer, given):
    """At the answer nothing is lost any more; one inference earlier something was."""
    (cost,), s = given.args, given.settings
    if s["before"] <= s["after"] or cost <= 0:
        return None
    balance = answer * (s["before"] - s["after"]) - cost
    return None if balance >= 0 else (f"{answer:.6g} inferences, when {-balance:.3g} J are still owed", "nothing owed")


def forgets_that_inference_goes_on(cost, *, before, after):
    return math.ceil(cost / before) if before > after else math.inf


def rounds_down(cost, *, before, after):
    return math.floor(cost / (before - after)) if before > after else math.inf


def negative_where_it_never_pays(cost, *, before, after):
    return math.ceil(cost / (before - after)) if before != after else math.inf


def one_too_late(cost, *, before, after):
    return math.floor(cost / (before - after)) + 1 if before > after else math.inf


def pays_after_by_heart(cost, *, before, after):
    return 50


PAYS_AFTER = Exercise(
    name="sustainability.pays_after",
    prompt="""**When does it pay?** Compressing a model takes `cost` joules, once. An inference takes `before` joules with
the model as it was, and `after` joules with the compressed one. Write `pays_after(cost, before=..., after=...)`: the
smallest whole number of inferences at which compressing has cost no more, all in all, than leaving the model alone;
`math.inf` where that never happens, and 0 where compressing was free.""",
    reference=pays_after,
    checks=(
        checks.not_the_librarys_own("inferences", "payback", "Payback"),
        checks.holds("nothing is owed any more", savings, never_before_its_time),
        checks.equals_reference(savings),
    ),
    hints=(
        "Draw two straight lines over the number of inferences; one starts at zero, the other at the cost.",
        "Each inference pays back the difference of the two, not the whole of what it used to take.",
        "`math.ceil(cost / (before - after))`, with a look at the sign of the difference before you divide.",
    ),
    after="What seldom runs is not worth compressing for its energy, whatever the table of speeds says.",
    wrong=(
        (forgets_that_inference_goes_on, "nothing is owed any more"),
        (rounds_down, "nothing is owed any more"),
        (negative_where_it_never_pays, "the right numbers"),
        (one_too_late, "the right numbers"),
        (pays_after_by_heart, "the right numbers"),
    ),
)


def embodied_share(total: float, *, hours: float, years: float, utilization: float) -> float:
    """The part of `total`, in its unit, that falls on so many busy hours of the machine."""
    busy = years * 365 * 24 * utilization
    return total * hours / busy


def machines(rng: torch.Generator):
    """BLOOM's server for a day; then any."""
    yield case(2500.0, hours=24.0, years=6.0, utilization=0.85)
    for _ in range(6):
        total, hours, years, utilization = (torch.rand(4, generator=rng) * 0.8 + 0.1).tolist()
        yield case(1000 * total, hours=100 * hours, years=10 * years, utilization=utilization)


def a_whole_life_is_the_whole(answer, given):
    """The shares of all busy hours must add up to the total."""
    (total,), s = given.args, given.settings
    life = answer / s["hours"] * s["years"] * 365 * 24 * s["utilization"]
    good = math.isclose(life, total, rel_tol=1e-4)
    return None if good else (f"{life:.4g} over all busy hours of its life", f"{total:.4g}, all there is")


def forgets_utilization(total, *, hours, years, utilization):
    return total * hours / (years * 365 * 24)


def utilization_upside_down(total, *, hours, years, utilization):
    return total * hours * utilization / (years * 365 * 24)


def hours_over_days(total, *, hours, years, utilization):
    return total * hours / (years * 365 * utilization)


def embodied_by_heart(total, *, hours, years, utilization):
    return 2500 * 24 / (6 * 8760 * 0.85)


EMBODIED_SHARE = Exercise(
    name="sustainability.embodied_share",
    prompt="""**Whose share of the machine?** Making a machine emitted `total` kg of CO2e. It will live `years` years of 365
days, and be busy for the fraction `utilization` of them. Write `embodied_share(total, hours=..., years=...,
utilization=...)`: the kg that fall on a computation of `hours` busy hours, so that the shares of everything that ever runs
on the machine add up to `total`.""",
    reference=embodied_share,
    checks=(
        checks.not_the_librarys_own("embodied", "footprint"),
        checks.finite(machines),
        checks.holds("a whole life adds up to the whole", machines, a_whole_life_is_the_whole),
        checks.equals_reference(machines),
    ),
    hints=(
        "Only busy hours can carry the burden: nobody else pays for those in which the machine idles.",
        "How many busy hours does the machine live? The computation takes `hours` of them.",
        "`busy = years * 365 * 24 * utilization`; the share is `hours / busy` of the total.",
    ),
    after="Half the utilization doubles every share: an idle machine is embodied carbon without a purpose.",
    wrong=(
        (forgets_utilization, "a whole life adds up to the whole"),
        (utilization_upside_down, "a whole life adds up to the whole"),
        (hours_over_days, "a whole life adds up to the whole"),
        (embodied_by_heart, "a whole life adds up to the whole"),
    ),
)

EXERCISES = (PAYS_AFTER, EMBODIED_SHARE)
