"""BLINK by its three profiles, trap by trap, and its two averages."""

from __future__ import annotations

import time

import pytest

from valr_ops.evaluation.benchmarks.blink import PROFILES, SUB_TASKS, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

UNRESOLVED = Scored(0.0, None, resolved=False)


def scored(profile: str, output: str, gold: str = "(C)", options: tuple[str, ...] = ("a cup", "b", "c", "d")) -> Scored:
    return PROFILES[profile](Case("val_Counting_1", gold, output, "Counting", options))


@pytest.mark.parametrize(
    ("output", "extracted"),
    [
        ("C", "(C)"),
        ("(C)", "(C)"),
        ("E", "(E)"),
        ("it is (B) then", "(B)"),
        ("(A) or (B)\n\nso (C) it is", "(C)"),
        ("so (C) it is\n\nno more", "(C)"),
        ("first\n\n(A)\n\n\n(C) ", "(C)"),
        ("(C) (C)", "(C)"),
    ],
)
def test_the_authors_take_the_only_bracketed_word_the_last_paragraph_first(output: str, extracted: str) -> None:
    assert scored(OFFICIAL, output) == Scored(float(extracted == "(C)"), extracted)


@pytest.mark.parametrize(
    "output", ["", " C", "C.", "(C).", "c", "(c)", "Option C", "(A) or (C)", "(A)\n\n(B) (C)", "C\n"]
)
def test_what_the_authors_ask_a_language_model_is_unresolved(output: str) -> None:
    assert scored(OFFICIAL, output) == UNRESOLVED


def test_a_bracketed_letter_beyond_the_options_is_no_word_for_the_authors() -> None:
    assert scored(OFFICIAL, "either (B) or (C)", "(B)", ("left", "right")) == Scored(1.0, "(B)")
    assert scored(OFFICIAL, "either (B) or (C)", "(B)", ()) == UNRESOLVED


@pytest.mark.parametrize(
    ("output", "extracted"),
    [
        ("c", "C"),
        ("(C)", "C"),
        ("C.\nBecause (A)", "C"),
        ("C :),", "C"),
        ("Both are right", "B"),
        ("The answer is: C", "C"),
        ("Answer - (b)\nno, answers c", "C"),
        ("answer is C? I pick (B)", "C"),
        ("I pick (B), no, (C)", "C"),
        ("Clearly the third cup", "C"),
        ("Option C", None),
        ("The answer is a\u00e4, (D)", "A"),
        ("answer is Cat", "A"),
        (r"So \boxed{\text{C}}", None),
        ("E", None),
        ("", None),
    ],
)
def test_lmms_eval_reads_a_line_of_a_letter_then_the_last_answer_then_brackets_then_the_start(
    output: str, extracted: str | None
) -> None:
    assert scored(LMMS_EVAL, output) == Scored(float(extracted == "C"), extracted)


def test_the_number_of_options_limits_the_letters_of_lmms_eval() -> None:
    assert scored(LMMS_EVAL, "Clearly (B)", "(B)", ("left", "right")).extracted == "B"
    assert scored(LMMS_EVAL, "C", "(B)", ("left", "right")).extracted is None
    assert scored(LMMS_EVAL, "The answer", "(B)", ()).extracted == "T"


def test_vlmevalkit_reads_the_text_of_an_option() -> None:
    assert scored(VLMEVALKIT, "on the right", "(B)", ("left", "right")) == Scored(1.0, "B")


@pytest.mark.parametrize("unit", [" ", "answer ", "answer   ", "(A) ", "\n\n", "("])
def test_a_very_long_answer_is_read_in_one_pass(unit: str) -> None:
    started = time.process_time()
    for profile in PROFILES:
        scored(profile, "answer" + unit * (2**17 // len(unit)))
    # One pass takes a hundredth of a second, a quadratic one minutes.
    assert time.process_time() - started < 20


def test_a_gold_that_is_no_letter_is_an_error() -> None:
    with pytest.raises(ScoringError, match="val_Counting_1"):
        scored(OFFICIAL, "C", gold="(three)")


def every_task() -> tuple[list[Case], list[Scored]]:
    """One right case a task, and three wrong ones more of Counting."""
    names = [*SUB_TASKS, *["Counting"] * 3]
    cases = [Case(str(at), "(A)" if at % 2 else "(B)", "", name, ("x", "y")) for at, name in enumerate(names)]
    return cases, [Scored(float(at < 14), None) for at in range(len(names))]


def test_the_overall_number_is_the_mean_over_tasks_and_for_vlmevalkit_over_samples() -> None:
    cases, scores = every_task()
    official, vlmevalkit = totals(cases, scores, OFFICIAL), totals(cases, scores, VLMEVALKIT)
    assert official["overall"] == official["macro"] == (13 + 0.25) / 14
    assert vlmevalkit["overall"] == official["micro"] == 14 / 17
    assert "absent" not in official
    assert (official["Counting"], official["Jigsaw"]) == (0.25, 1.0)
    assert (official["always_a"], official["random"]) == (8 / 17, 0.5)


def test_with_a_task_missing_there_is_no_mean_over_tasks() -> None:
    cases, scores = every_task()
    kept = [at for at, case in enumerate(cases) if case.question_type != "Jigsaw"]
    some = totals([cases[at] for at in kept], [scores[at] for at in kept], LMMS_EVAL)
    assert some["macro"] is some["overall"] is None
    assert some["absent"] == ["Jigsaw"]
    assert some["micro"] == 13 / 16
    assert totals([], [], OFFICIAL)["micro"] is None
