"""MathVision: what is read out of an answer, what counts as equal, and that nothing a model wrote is run."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.arithmetic import latex_value, python_value
from valr_ops.evaluation.benchmarks.math_vision import PROFILES, read_answer, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

CHOICES = ("$3$", "$6$", "\\frac{1}{2}", "red", "1,000")


def scored(gold: str, output: str, options: tuple[str, ...] = (), profile: str = OFFICIAL) -> Scored:
    return PROFILES[profile](Case("1", gold, output, "algebra", options))


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        # The box ends at the last brace of the text.
        (r"\boxed{\frac{3}{4}} and {x}", r"\frac{3}{4}}and{x"),
        (r"\boxed{x=5}", "5"),
        (r"\boxed{5\text{ cm}}", "5{cm}"),
        (r"\boxed{72^\circ}", "72"),
        (r"\boxed{\text{B}}", "b"),
        ("It is (C).", "c"),
        ("I choose C.", "c"),
        ("C\nbecause", "c"),
        ("(C) C\nbecause", "c"),
        ("It is C", "itisc"),
        ("the number is 12.", "12"),
        ("The answer is 12. But see", "12"),
        ("The final answer is 3\nor 4", "3"),
        (r"\boxed{.5}", r"\frac{1}{2}"),
        ("3/4", r"\frac{3}{4}"),
        (r"\boxed{\sqrt3+\frac12}", r"\sqrt{3}+\frac{1}{2}"),
        (r"\boxed{\frac12}", r"\frac12"),
        (r"BOXED{7}", "7"),
        ("oxed{", "oxed{"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_the_authors_rules_read_the_answer(output: str, answer: str) -> None:
    assert read_answer(output) == answer


@pytest.mark.parametrize(
    ("gold", "output", "right"),
    [
        ("12", r"\boxed{12}", True),
        ("12", r"\boxed{12.004}", True),
        ("12", r"\boxed{12.01}", False),
        ("0.75", r"\boxed{\frac{3}{4}}", True),
        ("0.5", r"\boxed{\frac12}", False),
        ("1000", "1,000", True),
        ("1024", r"\boxed{2^{10}}", True),
        (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", True),
        # Nothing with a root or pi has a value there, so only equal strings are equal.
        (r"\sqrt{4}", "2", False),
        (r"2\pi", r"\boxed{\pi\cdot2}", False),
        ("(1,2)", r"\boxed{(1.0, \frac{4}{2})}", False),
        ("(0.5,2)", r"\boxed{(\frac{1}{2}, 2)}", True),
        ("12", "", False),
        ("12", "nan", False),
        ("12", "１２", False),
        ("12", r"\boxed{\boxed{12", False),
    ],
)
def test_free_answers_are_equal_as_strings_or_at_two_decimals(gold: str, output: str, right: bool) -> None:
    assert scored(gold, output).score == right
    assert scored(gold, output, profile=LMMS_EVAL) == scored(gold, output)


@pytest.mark.parametrize(
    ("output", "right"),
    [("(C).", True), ("It is C", False), (r"\boxed{C}", True), (r"\boxed{0.5}", True), (r"\boxed{B}", False)],
)
def test_a_choice_is_right_by_its_letter_or_by_its_text(output: str, right: bool) -> None:
    assert scored("C", output, CHOICES).score == right


def test_a_gold_beyond_the_options_is_a_named_error() -> None:
    with pytest.raises(ScoringError, match=r"case '1': gold 'E' is none of its 2 options"):
        scored("E", "A", ("x", "y"))


@pytest.mark.parametrize(
    ("gold", "output", "options", "expected"),
    [
        ("B", "The answer is B", CHOICES, Scored(1.0, "B")),
        ("B", r"\boxed{C} not B", CHOICES, Scored(0.0, "C")),
        ("B", "A or B", CHOICES, Scored(0.0, None, resolved=False)),
        ("0.5", "1/2", (), Scored(1.0, "1/2")),
        ("8", "2**3", (), Scored(1.0, "2**3")),
        (r"\frac{1}{3}", r"\boxed{0.33333333}", (), Scored(1.0, "0.33333333")),
        ("0.33", "1/3", (), Scored(0.0, None, resolved=False)),
        ("12", "so it is 12", (), Scored(0.0, None, resolved=False)),
        # Its variable of that name holds the gold while the answer is evaluated.
        ("12", "(A)", (), Scored(1.0, "(A)")),
        ("12", "(B)", (), Scored(0.0, None, resolved=False)),
        ("12", "", (), Scored(0.0, None, resolved=False)),
    ],
)
def test_vlmevalkit_scores_what_it_can_and_leaves_the_rest_to_a_judge(
    gold: str, output: str, options: tuple[str, ...], expected: Scored
) -> None:
    assert scored(gold, output, options, VLMEVALKIT) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3^{2}", -9),
        ("2^3^2", 64),
        ("4^{1/2}", 2),
        ("4^{0.5}", None),
        ("(-8)^{1/3}", None),
        (r"7\frac{1}{2}", 3.5),
        ("1/2 3", 1 / 6),
        (r"50\%", 0.5),
        ("50%", None),
        ("1,000.5", 1000.5),
        ("1,2", None),
        ("12:30", 0.4),
        ("3) and more", 3),
        ("x=3", 3),
        ("2>1", 1),
        (r"\binom{5}{2}", 10),
        ("1/0", None),
        ("3!", None),
        ("x", None),
        ("(3]", None),
    ],
)
def test_latex_has_the_value_that_latex2sympy_and_eval_give(text: str, value: float | None) -> None:
    found = latex_value(text)
    assert found is None if value is None else found == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9**9", "9^{9^{9^{9}}}", "9" * 5000, "(" * 100_000, "{" * 500 + "1" + "}" * 500, "2^{99999999}"),
        *("10**-400", "1e308*1e308", "__import__('os').getcwd()", "().__class__", "'a'*10**9", "[0]*10**9", "1\x00"),
        *("-" * 1999 + "1", r"\frac{" * 300, r"\binom{999999999}{5}", "0**-1", "abs(-3)"),
    ],
)
def test_hostile_numbers_are_neither_run_nor_worked_out(text: str) -> None:
    for value in (latex_value(text), python_value(text)):
        assert value is None or abs(value) < 1e308 or value == float("inf")


@pytest.mark.parametrize(
    "unit", ["oxed{", r"\boxed{}", "}", "the answer is ", "is ", r"\sqrt", r"\frac", "(a)", "1/", ",", "思", "<latent>"]
)
@pytest.mark.parametrize("profile", [OFFICIAL, VLMEVALKIT])
def test_a_megabyte_is_no_answer(unit: str, profile: str) -> None:
    assert scored("12", unit * (2**20 // len(unit)), profile=profile).score == 0


def test_totals_are_over_cases_subjects_and_levels() -> None:
    kinds = ["algebra_level1", "algebra_level3", "metric geometry - area_level3", "algebra_level1"]
    cases = [Case(str(number), "1", "", kind) for number, kind in enumerate(kinds)]
    found = totals(cases, [Scored(score, None) for score in (1.0, 0.0, 1.0, 0.0)], OFFICIAL)
    assert found == {
        "overall": 0.5,
        "micro": 0.5,
        "algebra": pytest.approx(1 / 3),
        "metric geometry - area": 1.0,
        "level1": 0.5,
        "level3": 0.5,
    }
