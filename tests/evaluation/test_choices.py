"""The harnesses' shared rules for letters: what they read, and what they wrongly read."""

from __future__ import annotations

import time

import pytest

from valr_ops.evaluation.choices import by_can_infer, can_infer, extract_letter, gold_letter, read_leniently
from valr_ops.evaluation.scoring import Case, Scored, ScoringError

OPTIONS = ("left", "right", "above", "below")
ONE_TEXT = ("(a) Open (b) Closed",)


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("Option C", "C"),
        ("The answer is: C", "C"),
        (r"So \boxed{\text{C}}", "C"),
        ("**D**", "D"),
        ("b", None),
        ("Ｂ", None),
        ("A or B", None),
        ("B is the one I see here", None),
        ("it is B as I see", "B"),
        ("I see two, A and B. The answer is B", "B"),
        ("A, B or C; the answer is **d**, I am sure of it", "D"),
        ("A and B: the answer is clear", "C"),
        ("A and B: the answer is E", None),
        ("E", None),
        ("to the LEFT", "A"),
        ("not left but right", None),
        ("it is on the left of it, as far as I can see it", None),
        ("Z", "Z"),
        ("Z or B", "B"),
        ("Cannot determine the answer, B", "Z"),
        ("Failed to obtain answer via API. B", None),
        ("Failed to obtain answer via API: left", "A"),
        ("", None),
    ],
)
def test_can_infer_reads_a_letter_near_the_end_then_a_phrase_then_an_options_text(
    output: str, letter: str | None
) -> None:
    assert can_infer(output, OPTIONS) == letter


def test_the_text_of_an_option_counts_only_in_an_answer_at_most_twice_as_long_as_the_options() -> None:
    longest = "left" + "." * (2 * len("leftrightabovebelow") - 4)
    assert can_infer(longest, OPTIONS) == "A"
    assert can_infer(longest + ".", OPTIONS) is None


def test_without_options_the_letters_are_a_to_d_and_no_text_is_guessed() -> None:
    assert [can_infer(output, ()) for output in ("D", "E", "left")] == ["D", None, None]


def test_what_would_go_to_a_language_model_is_unresolved_and_a_refusal_is_plainly_wrong() -> None:
    assert by_can_infer(Case("1", "(B)", "A or B", options=OPTIONS)) == Scored(0.0, None, resolved=False)
    assert by_can_infer(Case("1", "(B)", "Z", options=OPTIONS)) == Scored(0.0, "Z")
    assert by_can_infer(Case("1", "(B)", "right", options=OPTIONS)) == Scored(1.0, "B")


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("B", "B"),
        ("b", None),
        ("B. The answer is C", "B"),
        ("C is wrong, it is B.", "C"),
        ("(A) or (B), the answer is C now", "C"),
        ("My answer is B. The answer is A here", "A"),
        ("(A) then B: or so", "A"),
        ("A. B: or so", "A"),
        ("I take B) or so", "B"),
        ("MAC then SAB then", "B"),
        ("xAxCx", "C"),
        ("정답은 C 입니다", "C"),
        ("我选B了", "B"),
        ("the answer is Ünclear but Dim", "D"),
        ('"A"', "A"),
        ("E", None),
        ("   ", None),
        ("", None),
    ],
)
def test_the_shared_extractor_takes_the_best_format_and_the_latest_of_equals(output: str, letter: str | None) -> None:
    assert extract_letter(output) == letter


@pytest.mark.parametrize(
    ("gold", "letter"), [("B", "B"), ("(B)", "B"), (" b ", "B"), ("right", "B"), ("below", "D"), ("(d)", "D")]
)
def test_gold_is_a_letter_in_or_out_of_brackets_or_an_options_text(gold: str, letter: str) -> None:
    assert gold_letter(Case("1", gold, "", options=OPTIONS)) == letter


@pytest.mark.parametrize("gold", ["", "()", "AB", "Right", "3"])
def test_another_gold_is_an_error_that_names_the_case(gold: str) -> None:
    with pytest.raises(ScoringError, match=r"'case-7'.*gold"):
        gold_letter(Case("case-7", gold, "", options=OPTIONS))


@pytest.mark.parametrize("unit", [" ", "answer is ", "answer is *", "A ", "(", "left ", "思"])
def test_a_very_long_answer_is_read_in_one_pass(unit: str) -> None:
    started = time.process_time()
    output = "answer" + unit * (2**17 // len(unit))
    can_infer(output, OPTIONS)
    extract_letter(output)
    # One pass takes a hundredth of a second, a quadratic one minutes.
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("output", "gold", "options", "found"),
    [
        ("(b)", "B", OPTIONS, True),
        ("**B**, to the right", "(B)", OPTIONS, True),
        ("on the right", "B", OPTIONS, True),
        ("A or B", "B", OPTIONS, False),
        ("(C)", "B", OPTIONS, False),
        ("I see a car on the right.", "A", OPTIONS, False),
        ("I think that it must be (b), closed", "(b)", ONE_TEXT, True),
        ("Closed", "(b)", ONE_TEXT, True),
        ("It is a cat, so closed", "(a)", ONE_TEXT, False),
        ("3.4m", "3.4", (), True),
        ("first 3.4, then 5", "3.4", (), False),
        ("It says EXIT.", "exit", (), True),
        ("exits", "exit", (), False),
        ("", "exit", (), False),
    ],
)
def test_a_kind_reader_finds_answers_that_only_their_form_lost(
    output: str, gold: str, options: tuple[str, ...], found: bool
) -> None:
    assert read_leniently(Case("1", gold, output, options=options)) is found
