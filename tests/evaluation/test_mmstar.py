"""MMStar by its three profiles, and its averages."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.benchmarks.mmstar import CATEGORIES, PROFILES, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored


def scored(profile: str, output: str, gold: str = "B") -> Scored:
    return PROFILES[profile](Case("7", gold, output, "geometry", ("10", "20", "30", "40")))


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("B", 1),
        ("b", 1),
        (" B. 20", 1),
        ("Both", 1),
        ("(B", 1),
        ("Option B", 1),
        ("option\nb", 1),
        ("The answer is B", 1),
        ("the answer is b, not a", 1),
        ("The answer is (B)", 0),
        ("The answer is: B", 0),
        ("option  B", 0),
        ("the answer is", 0),
        ("Answer: B", 0),
        ("**B**", 0),
        ("Ｂ", 0),
        ("20", 0),
        ("(", 0),
        ("", 0),
    ],
)
def test_the_authors_compare_one_character_with_the_letter(output: str, score: float) -> None:
    assert scored(OFFICIAL, output).score == score


def test_the_character_that_the_authors_compare_is_shown() -> None:
    outputs = ("Zebra", "(c)", "option d", "The answer is: B", "(")
    assert [scored(OFFICIAL, output).extracted for output in outputs] == ["z", "c", "d", "t", None]


def test_lmms_eval_reads_upper_case_only_and_vlmevalkit_options_texts_as_well() -> None:
    assert scored(LMMS_EVAL, "b") == Scored(0.0, None)
    assert scored(LMMS_EVAL, "so (A) is out, (B) is it") == Scored(1.0, "B")
    assert scored(VLMEVALKIT, "20") == Scored(1.0, "B")
    assert scored(VLMEVALKIT, "b") == Scored(0.0, None, resolved=False)


def test_lmms_eval_averages_the_eighteen_parts_and_the_others_the_samples() -> None:
    parts = [part for parts in CATEGORIES.values() for part in parts]
    names = [*parts, "geometry", "geometry"]
    cases = [Case(str(at), "B", "", name) for at, name in enumerate(names)]
    scores = [Scored(float(at < 18), None) for at in range(20)]
    assert len(parts) == len(set(parts)) == 18
    official, lmms_eval = totals(cases, scores, OFFICIAL), totals(cases, scores, LMMS_EVAL)
    assert official["overall"] == official["micro"] == 18 / 20
    assert lmms_eval["overall"] == lmms_eval["l2_macro"] == pytest.approx((17 + 1 / 3) / 18, abs=1e-15)
    assert (official["geometry"], official["math"], official["logical reasoning"]) == (1 / 3, 3 / 5, 1.0)


def test_cases_that_name_only_the_category_have_no_mean_over_parts() -> None:
    some = totals([Case("1", "B", "", "math")], [Scored(1.0, "B")], LMMS_EVAL)
    parts = [part for parts in CATEGORIES.values() for part in parts]
    assert some == {"overall": None, "micro": 1.0, "l2_macro": None, "math": 1.0, "absent": parts}
