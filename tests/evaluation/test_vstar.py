"""V*Bench by lmms-eval and VLMEvalKit, and its averages."""

from __future__ import annotations

import time

import pytest

from valr_ops.evaluation.benchmarks.vstar import CATEGORIES, PROFILES, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored


def scored(profile: str, output: str, gold: str = "C") -> Scored:
    return PROFILES[profile](Case("3", gold, output, CATEGORIES[0], ("red", "blue", "green", "white")))


@pytest.mark.parametrize(
    ("output", "extracted"),
    [
        ("C", "C"),
        ("c", "C"),
        ("Clearly the third cup", "C"),
        ("Answer: B", "A"),
        ("Based on it", "B"),
        ("blue", "B"),
        ("Option C", "C"),
        ("The answer is: C", "C"),
        ("it, my choice::  d", "D"),
        ("the one, (C), not B.", "C"),
        ("it is B ] or C", "B"),
        ("it is C", "C"),
        ("TO C OR NOT", "C"),
        ("it is the (C", "C"),
        (r"So \boxed{\text{C}}", None),
        ("it is the bone", "B"),
        ("it is the cab", None),
        ("the sum: none", None),
        ("", None),
    ],
)
def test_lmms_eval_takes_the_first_place_that_has_a_letter_even_within_words(
    output: str, extracted: str | None
) -> None:
    assert scored(LMMS_EVAL, output) == Scored(float(extracted == "C"), extracted)


def test_vlmevalkit_reads_the_text_of_an_option() -> None:
    assert scored(VLMEVALKIT, "it is green") == Scored(1.0, "C")
    assert scored(VLMEVALKIT, "Based on it") == Scored(0.0, None, resolved=False)


def test_the_authors_score_needs_likelihoods_and_is_not_offered() -> None:
    assert OFFICIAL not in PROFILES


@pytest.mark.parametrize("unit", [" ", "ANSWER ", "E ", ":"])
def test_a_very_long_answer_is_read_in_one_pass(unit: str) -> None:
    started = time.process_time()
    scored(LMMS_EVAL, "x answer" + unit * (2**17 // len(unit)))
    # One pass takes a hundredth of a second, a quadratic one minutes.
    assert time.process_time() - started < 20


def test_the_overall_number_of_lmms_eval_is_in_percent() -> None:
    cases = [Case(str(at), "C", "", CATEGORIES[at == 3]) for at in range(4)]
    scores = [Scored(score, None) for score in (1.0, 0.0, 0.0, 1.0)]
    assert totals(cases, scores, LMMS_EVAL) == {
        "overall": 50.0,
        "micro": 0.5,
        "direct_attributes": 1 / 3,
        "relative_position": 1.0,
    }
    assert totals(cases, scores, VLMEVALKIT)["overall"] == 0.5
    assert totals([], [], LMMS_EVAL) == {"overall": None, "micro": None}
