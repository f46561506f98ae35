"""The generic benchmark: which rule judges, and what each rule accepts."""

from __future__ import annotations

import pytest

from tests.evaluation.scenes import picture, record
from valr_ops.data.records import Rejection
from valr_ops.evaluation.benchmarks import BenchmarkError, Verdict
from valr_ops.evaluation.benchmarks.jsonl import PROFILES, JsonlBenchmark, options, totals
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored, ScoringError

RIGHT, WRONG, UNRESOLVED = Verdict(True, True), Verdict(False, True), Verdict(False, False)


def verdict(gold: str, answer: str, question: str = "What is it?") -> Verdict:
    benchmark = JsonlBenchmark("mine", [record(0, gold, question)])
    return benchmark.score(benchmark.items()[0], answer)


OPTIONS = "Which colour?\nA. red\nB. blue green\nC. a"


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B)", "B:", "blue green", "Blue  Green."])
@pytest.mark.parametrize("gold", ["B", "(B)", "blue green"])
def test_a_choice_is_right_by_its_letter_or_by_its_text(gold: str, answer: str) -> None:
    assert verdict(gold, answer, OPTIONS) == RIGHT


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A", WRONG),
        ("C", WRONG),
        ("D", UNRESOLVED),
        ("because", UNRESOLVED),
        ("B or A", UNRESOLVED),
        ("(b).", UNRESOLVED),
    ],
)
def test_a_choice_is_never_guessed_from_a_first_letter(answer: str, expected: Verdict) -> None:
    assert verdict("B", answer, OPTIONS) == expected


def test_an_option_whose_text_is_a_letter_wins_over_the_letter() -> None:
    assert verdict("C", "a", OPTIONS) == RIGHT


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (OPTIONS, {"A": "red", "B": "blue green", "C": "a"}),
        ("Which? (A) one red (B) two", {"A": "one red", "B": "two"}),
        ("Which? (A) red, (B) blue.", {"A": "red", "B": "blue"}),
        ("A. only one option", {}),
        ("A. red\nC. blue", {}),
        ("Is (X) left of (Y)?", {}),
    ],
)
def test_options_are_read_from_the_question(question: str, found: dict[str, str]) -> None:
    assert options(question) == found


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("true", "True.", RIGHT),
        ("true", "yes", RIGHT),
        ("No", "false", RIGHT),
        ("no", "Yes", WRONG),
        ("false", "not true", UNRESOLVED),
        ("false", "", UNRESOLVED),
    ],
)
def test_a_truth_value_is_right_in_either_pair_of_words(gold: str, answer: str, expected: Verdict) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("7", "7.", RIGHT),
        ("7", "7.0", RIGHT),
        ("7", "7.4", WRONG),
        ("3.5", "3.54", RIGHT),
        ("3.5", "3.55", RIGHT),
        ("3.5", "3.56", WRONG),
        ("0.10", "0.104", RIGHT),
        ("0.10", "0.11", WRONG),
        ("-2", "2", WRONG),
        ("1,200", "1200", RIGHT),
        ("1200", "1.2e3", RIGHT),
        ("1200", "1,20", UNRESOLVED),
        ("4", "four", UNRESOLVED),
        ("4", "4 m", UNRESOLVED),
        ("4", "nan", UNRESOLVED),
        ("4", "", UNRESOLVED),
        ("4", "9" * 5000, WRONG),
    ],
)
def test_a_number_is_right_within_half_a_unit_of_the_golds_last_digit(
    gold: str, answer: str, expected: Verdict
) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Blue  square.", RIGHT), ("a blue square", WRONG), ("", UNRESOLVED), ("e5", WRONG)],
)
def test_text_is_right_only_as_a_whole(answer: str, expected: Verdict) -> None:
    assert verdict("blue square", answer) == expected


def test_the_majority_baseline_sees_equal_answers_as_equal() -> None:
    benchmark = JsonlBenchmark("mine", [record(n, gold) for n, gold in enumerate(["yes", "True", "1,200", "1200.0"])])
    assert [benchmark.constant_answer(item) for item in benchmark.items()] == ["yes", "yes", "1200", "1200"]


def test_rejected_records_and_second_ids_are_counted_and_never_asked() -> None:
    rejection = Rejection("mine/9", "mine", "image_unreadable", "test.jsonl line 9")
    benchmark = JsonlBenchmark("mine", [record(0), rejection, record(1), record(0, "false")])
    assert [item.id for item in benchmark.items()] == ["mine/0", "mine/1"]
    assert [one.reason for one in benchmark.rejections] == ["image_unreadable", "duplicate_id"]


def test_a_benchmark_without_items_says_why() -> None:
    with pytest.raises(BenchmarkError, match="mine has no item: image_missing"):
        JsonlBenchmark("mine", [Rejection("mine/0", "mine", "image_missing", "test.jsonl line 1")])
    with pytest.raises(BenchmarkError, match=r"no test\.jsonl"):
        JsonlBenchmark("mine", [])


def test_the_prompt_is_the_input_images_in_order_and_the_question_word_for_word() -> None:
    images = (picture("red"), picture("lime", role="step"), picture("blue"))
    benchmark = JsonlBenchmark("mine", [record(0, images=images)])
    shown, question = benchmark.prompt(benchmark.items()[0])
    assert question == "Is it red?"
    assert [image.getpixel((0, 0)) for image in shown] == [(255, 0, 0), (0, 0, 255)]


def test_a_limit_keeps_the_first_items() -> None:
    benchmark = JsonlBenchmark("mine", [record(n) for n in range(5)], limit=2)
    assert [item.id for item in benchmark.items()] == ["mine/0", "mine/1"]


def scored(kind: str, gold: str, output: str, stated: tuple[str, ...] = ()) -> Scored:
    return PROFILES[OFFICIAL](Case("1", gold, output, kind, stated))


NOTHING_READ = Scored(0.0, None, resolved=False)


@pytest.mark.parametrize("output", ["B", "b", "(B)", "B.", "B)", "B:", " right ", "Right.", "B. right"])
@pytest.mark.parametrize("gold", ["B", "(B)", "right"])
def test_a_case_of_choice_is_right_by_letter_or_text(gold: str, output: str) -> None:
    assert scored("", gold, output, ("A. left", "B. right")) == Scored(1.0, "B")
    assert scored("choice", gold, output.removeprefix("B. "), ("left", "right")) == Scored(1.0, "B")


@pytest.mark.parametrize("output", ["", "C", "(b).", "(B", "because", "B or A", "right side", "<latent>", "B" * 2**20])
def test_a_case_of_choice_is_never_guessed(output: str) -> None:
    assert scored("choice", "B", output, ("left", "right")) == NOTHING_READ


@pytest.mark.parametrize(
    ("kind", "gold", "output", "expected"),
    [
        ("yes_no", "yes", "True.", Scored(1.0, "yes")),
        ("yes_no", "no", "yes", Scored(0.0, "yes")),
        ("yes_no", "no", "not true", NOTHING_READ),
        ("number", "3.5", "3.54", Scored(1.0, "3.54")),
        ("number", "1,200", "1200", Scored(1.0, "1200")),
        ("number", "7", "7.4", Scored(0.0, "7.4")),
        ("number", "7", "1,20", NOTHING_READ),
        ("number", "7", "nan", NOTHING_READ),
        ("number:mra", "8", "9", Scored(0.8, "9")),
        ("number:mra", "40", "34", Scored(0.8, "34")),
        ("number:mra", "60", "48", Scored(0.6, "48")),
        ("number:mra", "60", "87", Scored(0.1, "87")),
        ("number:mra", "2", "2.7", Scored(0.3, "2.7")),
        ("number:mra", "22", "33", Scored(0.1, "33")),
        ("number:mra", "22", "1e999", Scored(0.0, "1e999")),
        ("number:abs_tol=0.5", "0", "-0.5", Scored(1.0, "-0.5")),
        ("number:abs_tol=0.5", "0", "0.51", Scored(0.0, "0.51")),
        ("number:rel_tol=0.05", "20", "21", Scored(1.0, "21")),
        ("number:rel_tol=0.05", "-20", "-21.1", Scored(0.0, "-21.1")),
        ("text", "Blue square", "blue  SQUARE.", Scored(1.0, "blue square")),
        ("", '["grey", "gray"]', "Gray", Scored(1.0, "gray")),
        ("text", "blue", "", NOTHING_READ),
        ("list", '["red", 2]', '["Red", 2.0]', Scored(1.0, '["Red", "2.0"]')),
        ("list", '["red", 2]', '[2, "red"]', Scored(0.0, '["2", "red"]')),
        ("list", '["red", 2]', '["red"]', Scored(0.0, '["red"]')),
        ("list", '["red", 2]', "red, 2", NOTHING_READ),
        ("list", "[1]", "[" * 100_000, NOTHING_READ),
        ("list", "[1]", "[NaN]", Scored(0.0, '["NaN"]')),
    ],
)
def test_a_case_is_scored_by_the_rule_that_it_names(kind: str, gold: str, output: str, expected: Scored) -> None:
    assert scored(kind, gold, output) == expected


@pytest.mark.parametrize(
    ("kind", "gold", "message"),
    [
        ("numbers", "1", "question_type 'numbers' names no rule; choose one of choice, yes_no"),
        ("choice:mra", "A", "'choice:mra' names no rule"),
        ("number:abs_tol", "1", "write number, number:mra, number:abs_tol=0.5"),
        ("number:mra=2", "1", "write number"),
        ("number", "four", "gold 'four' is no number"),
        ("number", "inf", "gold 'inf' is no number"),
        ("number:mra", "0", "gold '0' is 0, of which there is no relative error"),
        ("number:rel_tol=0.1", "0.0", "there is no relative error"),
        ("yes_no", "maybe", "gold 'maybe' is none of yes, no, true, false"),
        ("choice", "left or right", "neither a letter nor the text"),
        ("list", "1, 2", "is no JSON list"),
    ],
)
def test_a_case_that_no_rule_fits_is_a_named_error(kind: str, gold: str, message: str) -> None:
    with pytest.raises(ScoringError, match=f"case '1': .*{message}"):
        scored(kind, gold, "1")


def test_totals_of_cases_are_over_cases_and_over_rules() -> None:
    cases = [Case("1", "1", "", "number"), Case("2", "1", "", "number"), Case("3", "x", "", "text")]
    found = totals(cases, [Scored(1.0, "1"), Scored(0.0, "2"), Scored(1.0, "x")], OFFICIAL)
    assert found == {"overall": 2 / 3, "micro": 2 / 3, "macro": 0.75, "number": 0.5, "text": 1.0}
