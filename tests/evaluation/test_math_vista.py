"""MathVista: the normalisation of each type of answer, and what is left to a language model."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.benchmarks.math_vista import EXTRACTED, PROFILES, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

CHOICES = ("3/11", "8/11", "6/11", "3/5")
UNRESOLVED = Scored(0.0, None, resolved=False)


def scored(kind: str, gold: str, output: str, options: tuple[str, ...] = (), profile: str = OFFICIAL) -> Scored:
    return PROFILES[profile](Case("1", gold, output, kind, options))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("(B) 8/11", Scored(1.0, "8/11")),
        ("so it is (b), not (A)", Scored(1.0, "8/11")),
        ("not (A), but (B)", Scored(0.0, "3/11")),
        ("B", Scored(1.0, "8/11")),
        (" 8/11 ", Scored(1.0, "8/11")),
        ("b", UNRESOLVED),
        ("(E)", UNRESOLVED),
        ("about 8/11", UNRESOLVED),
        ("", UNRESOLVED),
    ],
)
@pytest.mark.parametrize("kind", ["multi_choice", "text", ""])
def test_a_choice_is_read_by_its_letter_or_text_and_never_by_likeness(kind: str, output: str, expected: Scored) -> None:
    assert scored(kind, "8/11", output, CHOICES) == expected


@pytest.mark.parametrize(
    ("kind", "gold", "output", "expected"),
    [
        ("integer", "14", "14", Scored(1.0, "14")),
        ("integer", "14", "14.9", Scored(1.0, "14")),
        ("integer", "-14", "-14.9", Scored(1.0, "-14")),
        ("free_form", "14", "1.4e1", Scored(1.0, "14")),
        ("free_form", "14", "１４", Scored(1.0, "14")),
        ("integer", "14", "14 cm", UNRESOLVED),
        ("integer", "14", "inf", UNRESOLVED),
        ("integer", "14", "nan", UNRESOLVED),
        ("integer", "14", "9" * 5000, UNRESOLVED),
        ("integer", "14", "", Scored(0.0, None)),
        ("float", "1.4", "1.35", Scored(1.0, "1.4")),
        ("float", "1.4", "1.449", Scored(1.0, "1.4")),
        ("free_form", "2.67", "2.675", Scored(1.0, "2.67")),
        ("float", "0.60", "0.6", Scored(0.0, "0.6")),
        ("float:2", "0.6", "0.604", Scored(1.0, "0.6")),
        ("float:2", "0.6", "0.64", Scored(0.0, "0.64")),
        ("list", "[1, 2]", "[1, 2]", Scored(1.0, "[1, 2]")),
        ("free_form", "[1, 2]", "[1,2]", Scored(0.0, "[1,2]")),
        ("list", "[1, 2]", "1 and 2", UNRESOLVED),
    ],
)
def test_numbers_and_lists_are_equal_as_strings_after_normalisation(
    kind: str, gold: str, output: str, expected: Scored
) -> None:
    assert scored(kind, gold, output) == expected


def test_lmms_eval_leaves_white_space_around_out_where_the_authors_do_not() -> None:
    assert scored("list", "[1, 2]", " [1, 2]").score == 0
    assert scored("list", "[1, 2]", " [1, 2]", profile=LMMS_EVAL).score == 1


@pytest.mark.parametrize(
    ("kind", "gold", "output", "expected"),
    [
        ("multi_choice", "8/11", "The answer is (B)", Scored(1.0, "B")),
        ("multi_choice", "8/11", "8/11", Scored(1.0, "B")),
        ("multi_choice", "8/11", "(B) or (C)", UNRESOLVED),
        ("integer", "14", " 14 ", Scored(1.0, "14")),
        ("integer", "14", "14.0", UNRESOLVED),
        ("integer", "14", "15", UNRESOLVED),
        ("integer", "0", "0", UNRESOLVED),
        ("float", "1.40", "1.4", Scored(1.0, "1.4")),
        ("float", "1.4", "nan", UNRESOLVED),
        ("list", "[1, 2]", "[1, 2]", UNRESOLVED),
    ],
)
def test_vlmevalkit_takes_only_what_is_right_as_it_stands(kind: str, gold: str, output: str, expected: Scored) -> None:
    options = CHOICES if kind == "multi_choice" else ()
    assert scored(kind, gold, output, options, VLMEVALKIT) == expected


@pytest.mark.parametrize(
    ("kind", "gold", "output", "score"),
    [("integer", "0", "0", 1.0), ("integer", "14", "15", 0.0), ("float", "1.4", "x", 0.0), ("list", "[1]", "[1]", 0.0)],
)
def test_vlmevalkit_compares_what_its_judge_extracted(kind: str, gold: str, output: str, score: float) -> None:
    assert EXTRACTED[VLMEVALKIT](Case("1", gold, output, kind)) == Scored(score, output)


@pytest.mark.parametrize(
    ("kind", "gold", "options", "message"),
    [
        ("geometry", "1", (), "question_type 'geometry' is none of multi_choice"),
        ("integer:2", "1", (), "question_type 'integer:2'"),
        ("multi_choice", "B", CHOICES, "gold 'B' is the text of none of its 4 options"),
    ],
)
def test_a_case_in_another_form_is_a_named_error(kind: str, gold: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        scored(kind, gold, "1", options)


@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("unit", ["(", "(a", "<latent>", "[", "9", " ", "思"])
def test_a_megabyte_is_no_answer(unit: str, profile: str) -> None:
    text = unit * (2**20 // len(unit))
    assert scored("integer", "14", text, profile=profile).score == 0
    assert scored("multi_choice", "8/11", text, CHOICES, profile).score == 0


def test_totals_are_over_cases_and_types_and_lmms_eval_has_none_where_nothing_is_right() -> None:
    cases = [Case("1", "1", "", "integer"), Case("2", "1", "", "integer"), Case("3", "[1]", "", "list")]
    right, wrong = Scored(1.0, "1"), Scored(0.0, None)
    found = totals(cases, [right, wrong, wrong], OFFICIAL)
    assert found == {"overall": pytest.approx(1 / 3), "micro": pytest.approx(1 / 3), "integer": 0.5, "list": 0.0}
    assert totals(cases, [wrong] * 3, LMMS_EVAL)["overall"] is None
    assert totals(cases, [wrong] * 3, OFFICIAL)["overall"] == 0
