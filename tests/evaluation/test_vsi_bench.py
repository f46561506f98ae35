from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from valr_ops.evaluation.benchmarks.vsi_bench import (
    DIRECTIONS,
    MULTIPLE_CHOICE,
    NUMERIC,
    PROFILES,
    TASKS,
    THRESHOLDS,
    find_letter,
    first_number,
    first_token,
    last_number,
    totals,
)
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

LETTER, NUMBER = "route_planning", "object_counting"


def score(profile: str, output: str, gold: str, question_type: str) -> float:
    return PROFILES[profile](Case("1", gold, output, question_type)).score


def test_the_ten_thresholds_are_those_of_numpy_to_the_last_digit() -> None:
    assert np.array_equal(THRESHOLDS, 1 - np.linspace(0.5, 0.95, int((0.95 - 0.5) / 0.05 + 2)))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("9", "8", 0.8),
        ("34", "40", 0.8),
        ("48", "60", 0.6),
        ("87", "60", 0.1),
        ("27", "20", 0.4),
        ("2.7", "2", 0.3),
        ("33", "22", 0.1),
        ("4", "4", 1.0),
        ("1" * 400, "4", 0.0),
        ("0", "4", 0.0),
    ],
)
def test_ties_of_the_relative_error_fall_as_float64_has_them(
    profile: str, prediction: str, gold: str, expected: float
) -> None:
    assert score(profile, prediction, gold, NUMBER) == expected


@pytest.mark.parametrize(("percent", "inside"), [(5, 1), (10, 1), (15, 1), (20, 0), (25, 1), (40, 1), (45, 0), (50, 1)])
def test_an_error_of_twenty_or_forty_five_per_cent_is_outside_and_the_other_ties_are_inside(
    percent: int, inside: int
) -> None:
    met = sum(100 * threshold > percent + 1 for threshold in THRESHOLDS)
    assert score(OFFICIAL, str(100 + percent), "100", NUMBER) == (met + inside) / 10


@pytest.mark.parametrize(
    ("output", "gold", "question_type", "lmms_eval", "vlmevalkit"),
    [
        ("3.4m", "3.5", NUMBER, 1.0, 1.0),
        ("About 2,400 cm", "2400", NUMBER, 0.0, 0.0),
        ("<latent></latent><think>2 sofas and 5 chairs</think>\n<answer>7</answer>", "7", NUMBER, 0.0, 1.0),
        ("In frames 3 and 9 I count six stools.", "6", NUMBER, 0.1, 1.0),
        ("Between 12-14 square metres", "13", NUMBER, 0.9, 0.0),
        ("Option C", "C", LETTER, 0.0, 1.0),
        ("The answer is: C", "C", LETTER, 0.0, 1.0),
        (r"So \boxed{\text{C}}", "C", LETTER, 0.0, 1.0),
        ("Clearly the third cup", "C", LETTER, 0.0, 0.0),
    ],
)
def test_the_worked_examples_of_raw_answers_score_as_in_both_harnesses(
    output: str, gold: str, question_type: str, lmms_eval: float, vlmevalkit: float
) -> None:
    assert score(LMMS_EVAL, output, gold, question_type) == lmms_eval
    assert score(VLMEVALKIT, output, gold, question_type) == vlmevalkit
    assert score(OFFICIAL, output, gold, question_type) == 0


@pytest.mark.parametrize("profile", [OFFICIAL, LMMS_EVAL])
@pytest.mark.parametrize("output", ["A", "a", "A.", "A. chair", " A", "A...", "A\n", "\tA. "])
def test_the_first_token_may_be_the_letter_with_full_stops_after_it(profile: str, output: str) -> None:
    assert score(profile, output, "A", LETTER) == 1


@pytest.mark.parametrize("profile", [OFFICIAL, LMMS_EVAL])
@pytest.mark.parametrize(
    "output",
    ["(A)", "A)", "A:", "**A**", "Answer: A", "A\nbecause", "A\tchair", "chair", "", "<latent></latent>", "Ａ"],
)
def test_any_other_first_token_is_not_the_letter(profile: str, output: str) -> None:
    assert score(profile, output, "A", LETTER) == 0


@pytest.mark.parametrize("output", ["4", "4.", "4.0 m", "+4", "0.4e1", "1_0", "４", "４ chairs"])
def test_the_official_number_is_what_python_reads_as_one(output: str) -> None:
    gold = "10" if "_" in output else "4"
    assert score(OFFICIAL, output, gold, NUMBER) == 1


@pytest.mark.parametrize(
    "output", ["4%", "4m", "~4", "(4)", "4,", "four", "", "nan", "inf", "-inf", "4\nchairs", "I see 4"]
)
def test_the_official_score_is_zero_for_what_python_reads_as_no_finite_number(output: str) -> None:
    assert score(OFFICIAL, output, "4", NUMBER) == 0


def test_what_was_read_is_the_token_and_none_where_nothing_was() -> None:
    read = PROFILES[OFFICIAL]
    assert read(Case("1", "A", "B. chair", LETTER)).extracted == "B"
    assert read(Case("1", "A", "", LETTER)) == Scored(0.0, None)
    assert read(Case("1", "4", "4.0 m", NUMBER)).extracted == "4.0"
    assert read(Case("1", "4", "4m", NUMBER)) == Scored(0.0, None)


@pytest.mark.parametrize(
    ("output", "number"),
    [
        (".5", "5"),
        ("1,200", "1"),
        ("0.4e1", "0.4"),
        ("4-5", "4"),
        ("-4", "-4"),
        ("frames 2 and then 4 chairs", "2"),
        ("one apple, room 2", "1"),
        ("room 2, one apple", "2"),
        ("Twenty-one", "21"),
        ("three hundred and twenty-one", "321"),
        ("two thousand five hundred", "2500"),
        ("hundred", "100"),
        ("a thousand", "1000"),
        ("two 3 four", "6"),
        ("two big ones, four", "2"),
        ("someone", None),
        ("", None),
        ("٣", "٣"),
        ("hundred " * 250, "inf"),
    ],
)
def test_lmms_eval_takes_the_number_that_comes_first_in_digits_or_in_words(output: str, number: str | None) -> None:
    assert first_number(output) == number


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("4-5", "-5"),
        ("1e1 or 2E-1", "2E-1"),
        (".5", ".5"),
        ("twenty-two", "-2"),
        ("twenty", "20"),
        ("Seven of them", "7"),
        ("the thirty", None),
        ("2 <think>3 4</think> 5 <b>", "5"),
        ("2 <think>3 4</think> none", "4"),
        ("2 then <think>3 and 4", "4"),
        ("<answer>1,200</answer> 5", "1"),
        ("<answer> 7 m </answer> 9", "7"),
        ("<answer>about 7</answer> 9", "9"),
        ("<answer>7<b></b></answer> 9", "9"),
        ("<answer>7 or 9", "9"),
        ("</answer><answer>7 or 9", "9"),
        ("< ANSWER id=3 >7</ Answer > 9", "7"),
        ("[3, 4]", "3"),
        ("['five', 6]", "5"),
        ("[0x10]", "16"),
        ("[4 chairs]", None),
        ("[]", None),
        ("[1], [2]", "2"),
        ("4\u200b2", "42"),
        ("", None),
        ("[" * 300 + "1" + "]" * 300, None),
    ],
)
def test_vlmevalkit_takes_the_answer_tag_or_the_last_number(output: str, number: str | None) -> None:
    assert last_number(output) == number


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("<answer>b. chair</answer> A", "B"),
        ("<answer>because</answer> A", "B"),
        ("<answer>J</answer>", "J"),
        ("<answer>the chair</answer> A", "A"),
        ("<answer>because A", "A"),
        ("It is ( c )</answer> or not", "C"),
        ("maybe d </think> and then", "D"),
        ("A or B</think>\nC", "B"),
        ("C" + " then" * 200 + "\n**b**", "B"),
        ("A, B, C\nc) the chair", "C"),
        ("Option A: red\nI take B.", "B"),
        ("B\nA or C", "B"),
        ("A\nOption B: red", "A"),
        ("A or B\nC" + "\nx" * 5, "C"),
        ("A or B\nC" + "\nx" * 6, None),
        ("A or C or (B)</answer>" + "x" * 700, "B"),
        ("A or C or (B)</answer>" + "x" * 900, None),
        ("<think>A or B</think> C" + " then" * 200, "C"),
        ("A or B <think> C" + " then" * 200, "C"),
        ("Option A: red\nC1", "C"),
        ("A or B, so the answer is: (B", "B"),
        ("答案：(C", "C"),
        ("answer and so on", None),
        ("answer is a chair", "A"),
        ("A dog and a cat", "A"),
        ("the third cup", None),
        ("A and B", None),
        ("", None),
        ("G", None),
        ("\u200bD", "D"),
    ],
)
def test_vlmevalkit_finds_the_letter_by_the_first_rule_that_hits(output: str, letter: str | None) -> None:
    assert find_letter(output) == letter


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("part", ["<answer ", "answer is   ", "A ", "<think>", "[", " ", "選", "9", "hundred ", "( "])
def test_a_very_long_answer_takes_no_more_than_linear_time(profile: str, part: str) -> None:
    output = "x" + part * (200_000 // len(part)) + "x"
    for gold, question_type in (("A", LETTER), ("4", NUMBER)):
        assert 0 <= score(profile, output, gold, question_type) <= 1


def test_the_first_token_ends_at_a_space_and_at_no_other_blank() -> None:
    assert first_token("A.\tB C") == "A.\tB"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("gold", "question_type", "named"),
    [
        ("0", NUMBER, "relative"),
        ("0.0", NUMBER, "relative"),
        ("four", NUMBER, "no number"),
        ("nan", NUMBER, "no number"),
        ("(A)", LETTER, "no letter"),
        ("", LETTER, "no letter"),
        ("A", "", "object_counting"),
        ("A", "counting", "object_counting"),
    ],
)
def test_a_gold_or_a_question_type_that_no_rule_fits_is_an_error(
    profile: str, gold: str, question_type: str, named: str
) -> None:
    with pytest.raises(ScoringError, match=rf"case '1'.*{named}"):
        score(profile, "4", gold, question_type)


def scored(means: dict[str, Sequence[float]]) -> tuple[list[Case], list[Scored]]:
    rows = [(name, value) for name, values in means.items() for value in values]
    cases = [Case(str(number), "A", "", name) for number, (name, _) in enumerate(rows)]
    return cases, [Scored(value, None) for _, value in rows]


def every_type() -> dict[str, Sequence[float]]:
    means: dict[str, Sequence[float]] = dict.fromkeys((*NUMERIC, *MULTIPLE_CHOICE), (0.5,))
    return means | {DIRECTIONS[0]: (1.0,), DIRECTIONS[1]: (0.0,), DIRECTIONS[2]: (0.0, 0.0, 0.0)}


def test_macro_is_the_mean_of_eight_tasks_with_the_three_directions_as_one() -> None:
    found = totals(*scored(every_type()), OFFICIAL)
    assert found["object_rel_direction"] == pytest.approx(100 / 3)
    assert found["overall"] == found["macro"] == pytest.approx((7 * 50 + 100 / 3) / 8)
    assert found["micro"] == pytest.approx(100 * (7 * 0.5 + 1) / 12)
    assert found.keys() == {*TASKS, *DIRECTIONS, "overall", "macro", "micro"}


def test_totals_are_percent_but_rounded_fractions_by_lmms_eval() -> None:
    rows = scored(every_type())
    assert totals(*rows, VLMEVALKIT) == totals(*rows, OFFICIAL)
    assert totals(*rows, LMMS_EVAL)["object_rel_direction"] == 0.333333
    assert totals(*rows, LMMS_EVAL)["macro"] == round((7 * 0.5 + 1 / 3) / 8, 6)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("missing", [NUMERIC[0], DIRECTIONS[0], DIRECTIONS[2], "route_planning"])
def test_a_missing_type_leaves_no_macro_and_is_named(profile: str, missing: str) -> None:
    means = every_type()
    del means[missing]
    found = totals(*scored(means), profile)
    assert found["overall"] is found["macro"] is None
    assert found["absent"] == [missing]
    assert found["micro"] is not None
    assert found[missing] is None
    assert missing not in DIRECTIONS or found["object_rel_direction"] is None
