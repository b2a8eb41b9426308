"""The laws of grading, on a toy exercise and on every exercise of the course."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import effkit.exercises as course
from effkit.exercises import checks
from effkit.exercises.base import Exercise, Question, grade
from effkit.exercises.checks import case


def double(x):
    """Twice x."""
    return 2 * x


def drawn(rng):
    yield case(torch.tensor([1.0, -2.0]))
    yield case(torch.randn(3, 4, generator=rng))


def toy(*tried, reference=double):
    return Exercise(
        name="toy.double",
        prompt="Write `double`.",
        reference=reference,
        checks=tried or (checks.same_shape_and_dtype(drawn), checks.equals_reference(drawn)),
        hints=("Think.", "Look.", "`2 * x`"),
        after="Twice is not thrice.",
        wrong=(
            (lambda x: 3 * x, "numbers"),
            (lambda x: x.sum(), "shape"),
            (lambda x: torch.tensor([2.0, -4.0]), "shape"),
        ),
    )


def answers(x):
    return x + x


def refused_by(check, function, reference=double):
    """The one finding of a failed check, whose reason names what was seen and wanted."""
    result = grade(toy(check, reference=reference), function)
    assert result.status == "fail", result
    (finding,) = result.checks
    assert finding.seen and finding.wanted
    return finding


@pytest.mark.slow
def test_the_whole_course_proves_itself():
    assert course.selftest() == []


def test_a_pass_says_what_it_was_good_for():
    result = Question(toy()).check(answers)
    assert result and result.status == "pass" and all(result.checks)
    assert "Twice is not thrice." in repr(result) and "Twice is not thrice." in result._repr_html_()


# ---- unattempted


def raising(x):
    raise NotImplementedError


def raising_with_text(x):
    y = x + 1
    raise NotImplementedError(f"TODO, {y}")


def dots(x):
    return ...


def pair_of_dots(x):
    return x, ...


def bare(x): ...


def documented(x):
    """Twice x."""


@pytest.mark.parametrize(
    "stub", [raising, raising_with_text, dots, pair_of_dots, bare, documented], ids=lambda f: f.__name__
)
def test_a_stub_is_unattempted_and_raises_nothing(stub, work):
    question = Question(toy())
    result = question.check(stub)
    assert (result.status, bool(result), result.checks) == ("unattempted", False, ())
    assert repr(question.check(stub)) == repr(result)  # the same in every run, as nbval wants it
    assert question.attempts == 0 and not work.exists()


def test_a_stub_is_unattempted_whatever_check_comes_first():
    first = (
        checks.finite(drawn),
        checks.input_unchanged(drawn),
        checks.random_state_kept(drawn),
        checks.raises_when(case(1)),
        checks.holds("law", drawn, lambda answer, given: None),
        checks.not_the_librarys_own(),
    )
    for check in first:
        assert grade(toy(check, checks.equals_reference(drawn)), raising).status == "unattempted", check.name


def test_torch_s_own_not_implemented_is_an_error():
    result = grade(toy(), lambda x: torch.linalg.svd(x.half()[:, None]))
    assert result.status == "error" and "NotImplementedError" in result.message


# ---- errors


def test_an_exception_shows_the_learner_s_own_lines_only():
    def mine(x):
        return helper(x)

    def helper(x):
        return torch.nn.functional.linear(x, torch.ones(7, 7))

    result = grade(toy(), mine)
    assert result.status == "error" and not result
    assert "in mine: return helper(x)" in result.message and "in helper" in result.message
    assert "base.py" not in result.message and "in call" not in result.message and "RuntimeError" in result.message


def test_a_call_instead_of_the_function_is_told():
    result = grade(toy(), torch.ones(2))
    assert result.status == "error" and "pass the function itself" in result.message


def test_interrupting_the_kernel_interrupts():
    def stops(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade(toy(), stops)


# ---- the checks


def test_numbers_that_are_off_are_named():
    finding = refused_by(checks.equals_reference(drawn), lambda x: 3 * x)
    assert finding.seen == "[3, -6] for ([1, -2])" and finding.wanted == "[2, -4]"


def test_of_a_large_answer_the_worst_element_is_named():
    def nearly(x):
        return 2 * x + torch.nn.functional.pad(torch.ones(1, 1), (7, 992, 3, 6))

    finding = refused_by(checks.equals_reference(lambda rng: [case(torch.zeros(10, 1000))]), nearly)
    assert "element [3, 7] is 1, not 0" in finding.seen


def test_nan_is_no_number_and_equals_nan():
    nan = lambda rng: [case(torch.tensor([float("nan")]))]  # noqa: E731
    assert grade(toy(checks.equals_reference(nan)), answers)
    assert "nan" in refused_by(checks.finite(nan), answers).seen
    assert "nan" in refused_by(checks.equals_reference(drawn), lambda x: x * torch.nan).seen


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (lambda x: (2 * x).double(), "float64 [2]"),
        (lambda x: (2 * x)[None], "float32 [1, 2]"),
        (lambda x: (2 * x, 1), "(float32 [2], a whole number)"),
        (lambda x: [].clear(), "NoneType"),
        (lambda x: (2 * x).tolist(), "(a real number, a real number)"),
    ],
)
def test_shape_and_dtype(wrong, seen):
    assert refused_by(checks.same_shape_and_dtype(drawn), wrong).seen.startswith(seen)


def test_a_whole_number_is_not_a_real_one_and_a_tensor_of_one_number_is_that_number():
    one = lambda rng: [case(3)]  # noqa: E731
    both = (checks.same_shape_and_dtype(one), checks.equals_reference(one))
    assert grade(toy(*both), lambda x: torch.tensor(6))
    assert refused_by(both[0], lambda x: 6.0).wanted == "a whole number"


def test_an_input_that_was_written_into_is_refused_and_the_reference_never_sees_it():
    def writes(x):
        return x.mul_(2)

    assert grade(toy(checks.equals_reference(drawn)), writes)
    finding = refused_by(checks.input_unchanged(drawn), writes)
    assert finding.seen == "the input became [2, -4]" and "[1, -2]" in finding.wanted


def test_checks_hand_out_copies_of_modules_and_generators_too():
    rng = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(2, 2)
    fixed = lambda _: [case(layer, rng=rng)]  # noqa: E731

    def draws(layer, *, rng):
        layer.weight.data.zero_()
        return torch.rand(3, generator=rng)

    before, state = layer.weight.clone(), rng.get_state()
    assert grade(toy(checks.equals_reference(fixed), reference=draws), draws)
    assert "became" in refused_by(checks.input_unchanged(fixed), draws).seen
    assert torch.equal(layer.weight, before) and torch.equal(rng.get_state(), state)


def test_a_draw_from_the_global_generator_is_refused_and_undone():
    before = torch.get_rng_state()
    refused_by(checks.random_state_kept(drawn), lambda x: x + torch.rand(()))
    assert torch.equal(before, torch.get_rng_state())


def test_raises_when():
    def strict(x):
        if x < 0:
            raise ValueError("negative")
        return 2 * x

    check = checks.raises_when(case(-1))
    assert check.name == "a ValueError for (-1)" and grade(toy(check), strict)
    assert refused_by(check, double).seen == "-2 for (-1)"
    assert refused_by(check, lambda x: [][1]).seen.startswith("IndexError")


def test_a_law_names_what_broke_it():
    law = checks.holds("even", drawn, lambda answer, given: (answer, "even numbers") if (answer % 2).any() else None)
    assert grade(toy(law), lambda x: x.round() * 2)
    assert refused_by(law, lambda x: x).wanted == "even numbers"


def test_the_library_s_own_answer_is_refused():
    from effkit.core.technique import clone

    check = checks.not_the_librarys_own("quantize")
    assert grade(toy(check), answers)
    assert "function of your own" in refused_by(check, double).wanted
    for own in (functools.partial(double), clone):
        refused_by(check, own)
    assert "`quantize`" in refused_by(check, lambda x: torch.quantize(x)).seen
    assert "`effkit" in refused_by(check, imports_inside).seen


def imports_inside(x):
    def nested():
        import effkit.core.checks

        return effkit.core.checks

    return nested()


def test_two_runs_draw_different_cases_and_a_seed_the_same():
    seen = []
    record = checks.equals_reference(drawn)
    for seed in (None, None, 3, 3):
        inputs = []
        grade(toy(record), lambda x, inputs=inputs: inputs.append(x) or 2 * x, seed=seed)
        seen.append(inputs[1])
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])


def test_grading_stops_at_the_first_refusal():
    result = grade(toy(), lambda x: x.sum())
    assert [bool(finding) for finding in result.checks] == [False]


# ---- the session


def test_hints_come_one_a_call_and_the_last_stays():
    question = Question(toy())
    assert [question.hint() for _ in range(4)] == [
        "Hint 1 of 3: Think.", "Hint 2 of 3: Look.", "Hint 3 of 3: `2 * x`", "Hint 3 of 3: `2 * x`",
    ]  # fmt: skip


def test_the_solution_is_locked_until_a_pass_or_three_attempts():
    question = Question(toy())
    assert "3 more times" in question.solution() and "return 2 * x" in question.solution(reveal=True)
    for left in (2, 1):
        question.check(bare)  # no attempt
        question.check(lambda x: x)
        assert f"{left} more times" in question.solution()
    question.check(lambda x: 1 / 0)
    assert "return 2 * x" in question.solution()
    other = Question(dataclasses.replace(toy(), name="toy.other"))
    other.check(answers)
    assert "return 2 * x" in other.solution()


def test_attempts_survive_a_restart():
    Question(toy()).check(answers)
    assert "return 2 * x" in Question(toy()).solution()


def test_a_guess_is_kept_and_compared():
    question = Question(toy())
    assert "no guess" in question.observe(2.0)
    question.predict(None)
    assert question.guess is None
    assert "8" in question.predict(8)
    assert question.observe(2.0) == "You guessed 8; it came out as 2, 4 times less."
    question.predict("memory")
    assert question.observe("arithmetic") == "You guessed memory; it came out as arithmetic."


def test_the_stub_keeps_name_arguments_and_docstring():
    assert toy().stub == 'def double(x):\n    """Twice x."""\n    raise NotImplementedError\n'
    assert toy().stub in repr(Question(toy()))


# ---- the collection


def test_unknown_and_duplicate_names_are_refused():
    with pytest.raises(ValueError, match=r"quantization\.affine.*got 'quantization\.afine'"):
        course.exercise("quantization.afine")
    with pytest.raises(ValueError, match=r"two exercises are called 'toy\.double'"):
        course.collect([toy(), toy()])


@pytest.mark.parametrize("field", [{"name": "Toy"}, {"hints": ("one",)}, {"checks": ()}, {"wrong": ()}])
def test_an_incomplete_exercise_is_refused(field):
    with pytest.raises(ValueError, match=r"name must be|it|an exercise has"):
        dataclasses.replace(toy(), **field)


def test_the_selftest_would_notice():
    def three_times(x):
        return 3 * x

    passes = dataclasses.replace(toy(), wrong=((answers, "numbers"), *toy().wrong[:2]))
    assert "must be refused" in str(course.selftest([passes])[0])
    other_reason = dataclasses.replace(toy(), wrong=((three_times, "shape"), *toy().wrong[:2]))
    assert "not by" in str(course.selftest([other_reason])[0])
    breaks = dataclasses.replace(toy(), wrong=((lambda x: 1 / 0, "numbers"), *toy().wrong[:2]))
    assert "error" in str(course.selftest([breaks])[0])
    broken = toy(checks.holds("never", drawn, lambda answer, given: ("this", "that")))
    assert course.selftest([broken])[0].function == "reference"


def test_a_whole_number_of_another_library_is_a_whole_number():
    one = course.catalogue()["speculative.best_gamma"]
    for kind in (np.int64, torch.tensor):
        assert grade(one, lambda alpha, cost, most, kind=kind: kind(one.reference(alpha, cost, most=most)))
    assert grade(one, lambda alpha, cost, most: float(one.reference(alpha, cost, most=most))).status == "fail"
