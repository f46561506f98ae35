"""A user's own questions: which rule scores a record, what each rule accepts, and the totals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from valr_ops.data.records import Image, Record, Rejection
from valr_ops.evaluation.benchmarks import BenchmarkError, Item
from valr_ops.evaluation.benchmarks.jsonl import PROFILES, comparable, from_records, group_totals, options, totals
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored, ScoringError

RIGHT, WRONG, UNRESOLVED = (1.0, True), (0.0, True), (0.0, False)
RED, LIME, BLUE = (Image(name.encode(), name, 24, 24, "input") for name in ("red", "lime", "blue"))


def record(number: int, gold: str = "true", question: str = "Is it red?", images: tuple[Image, ...] = (RED,)) -> Record:
    """A test record of the source `mine`."""
    return Record(f"mine/{number}", "mine", "CC-BY-4.0", "test", "single_view", question, images, (), gold)


def item(gold: str, question: str = "What is it?") -> Item:
    (found,), rejections = from_records("mine", [record(0, gold, question)])
    assert rejections == []
    return found


def verdict(gold: str, answer: str, question: str = "What is it?") -> tuple[float, bool]:
    """Score and whether something could be read."""
    of = item(gold, question)
    scored = PROFILES[OFFICIAL](Case(of.id, of.gold, answer, of.question_type, of.options))
    return scored.score, scored.resolved


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
def test_a_choice_is_never_guessed_from_a_first_letter(answer: str, expected: tuple[float, bool]) -> None:
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
def test_a_truth_value_is_right_in_either_pair_of_words(gold: str, answer: str, expected: tuple[float, bool]) -> None:
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
    gold: str, answer: str, expected: tuple[float, bool]
) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Blue  square.", RIGHT), ("a blue square", WRONG), ("", UNRESOLVED), ("e5", WRONG)],
)
def test_text_is_right_only_as_a_whole(answer: str, expected: tuple[float, bool]) -> None:
    assert verdict("blue square", answer) == expected


def test_a_text_that_reads_like_a_list_is_one_text_and_not_several_right_ones() -> None:
    assert verdict("[1, 2]", "[1, 2]") == RIGHT
    assert verdict("[1, 2]", "1") == WRONG


@pytest.mark.parametrize(
    ("gold", "question", "kind"),
    [
        ("(b)", "Which?", "choice"),
        ("blue green", OPTIONS, "choice"),
        ("yes", "Is it? (A) yes (B) no", "choice"),
        ("yes", "Is it?", "yes_no"),
        ("-3.5", "How many?", "number"),
        ("b", "Which?", "text"),
    ],
)
def test_the_rule_of_a_record_follows_from_its_answer_and_the_options_that_it_states(
    gold: str, question: str, kind: str
) -> None:
    assert item(gold, question).question_type == kind


def test_the_majority_baseline_sees_equal_answers_as_equal() -> None:
    items, _ = from_records("mine", [record(n, gold) for n, gold in enumerate(["yes", "True", "1,200", "1200.0"])])
    assert [comparable(one) for one in items] == ["yes", "yes", "1200", "1200"]
    assert [comparable(item(gold, OPTIONS)) for gold in ("(B)", "Blue green", "[1, 2]")] == ["B", "B", "[1, 2]"]
    assert comparable(Case("1", '["Red", 2.0]', "", "list")) == comparable(Case("1", '["red", 2]', "", "list"))


def test_rejected_records_and_second_ids_are_counted_and_never_asked() -> None:
    rejection = Rejection("mine/9", "mine", "image_unreadable", "test.jsonl line 9")
    items, rejections = from_records("mine", [record(0), rejection, record(1), record(0, "false")])
    assert [one.id for one in items] == ["mine/0", "mine/1"]
    assert [one.reason for one in rejections] == ["image_unreadable", "duplicate_id"]


def test_a_letter_that_no_option_has_is_rejected_since_no_answer_could_be_right() -> None:
    items, rejections = from_records("mine", [record(0, "D", OPTIONS), record(1, "C", OPTIONS)])
    assert [one.id for one in items] == ["mine/1"]
    assert [(one.id, one.reason) for one in rejections] == [("mine/0", "answer_not_allowed")]


def test_a_benchmark_without_items_says_why() -> None:
    with pytest.raises(BenchmarkError, match="mine has no item: image_missing"):
        from_records("mine", [Rejection("mine/0", "mine", "image_missing", "test.jsonl line 1")])
    with pytest.raises(BenchmarkError, match=r"no test\.jsonl"):
        from_records("mine", [])


def test_a_record_is_asked_word_for_word_with_its_input_images_in_order() -> None:
    step = replace(LIME, role="step")
    (one,), _ = from_records("mine", [record(0, question=OPTIONS, gold="A", images=(RED, step, BLUE))])
    assert one.question == OPTIONS
    assert one.images == (RED, BLUE)


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


def test_groups_count_equally_in_their_macro_and_a_pair_is_right_only_as_a_whole() -> None:
    asked = [("a", "x", "1"), ("a", "y", "1"), ("a", "x", ""), ("b", "", "2"), ("b", "", "2")]
    items = [
        Item(str(n), "mine", "?", "1", group=group, subgroup=subgroup, cluster=pair)
        for n, (group, subgroup, pair) in enumerate(asked)
    ]
    scores = [Scored(float(right), None) for right in (1, 0, 1, 1, 1)]
    expected = {"a": 2 / 3, "a/x": 1.0, "a/y": 0.0, "b": 1.0, "macro": 5 / 6, "pair": 0.5}
    assert group_totals(items, scores) == pytest.approx(expected)
    assert group_totals([Item("1", "mine", "?", "1")], scores[:1]) == {}
