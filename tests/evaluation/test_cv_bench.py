"""CV-Bench by its three profiles, source by source, and its ways of averaging."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.benchmarks.cv_bench import PROFILES, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError


def scored(profile: str, output: str, source: str = "ade", options: tuple[str, ...] = ("4", "two", "o", "1")) -> Scored:
    return PROFILES[profile](Case("9", "(C)", output, source, options))


@pytest.mark.parametrize(
    ("output", "extracted"),
    [
        ("C", "c"),
        ("(c).", "c"),
        ("((C", "c"),
        ("Clearly the third cup", "c"),
        ("The answer is C", "c"),
        ("The answer is (A). No: the answer is (C).", "c"),
        ("Answer: C", "c"),
        ("Answer: A, that is, the answer is C", "c"),
        ("The answer is A. Answer: C", "c"),
        ("The answer is: C", ":"),
        ("Option C", "o"),
        ("( C", " "),
        ("**C**", "*"),
        ("The answer is ...", None),
        ("", None),
    ],
)
def test_the_authors_read_one_character_after_their_cuts(output: str, extracted: str | None) -> None:
    assert scored(OFFICIAL, output) == Scored(float(extracted == "c"), extracted)


def test_the_script_for_omni_drops_more_marks_and_takes_an_option_of_one_character() -> None:
    assert scored(OFFICIAL, ":,.", "coco") == Scored(0.0, ":")
    assert scored(OFFICIAL, ":,.", "omni") == Scored(0.0, None)
    assert scored(OFFICIAL, "Option C", "omni") == Scored(1.0, "o")
    assert scored(OFFICIAL, "Option C", "omni", ()) == Scored(0.0, "o")


@pytest.mark.parametrize("source", ["ADE20K", "COCO", "Omni3D", "ade"])
def test_a_source_may_be_written_as_the_data_set_writes_it(source: str) -> None:
    assert scored(OFFICIAL, "C", source).score == 1.0


@pytest.mark.parametrize("source", ["", "2D", "Count"])
def test_the_authors_rule_needs_the_source(source: str) -> None:
    with pytest.raises(ScoringError, match=r"'9'.*ade, coco or omni"):
        scored(OFFICIAL, "C", source)


@pytest.mark.parametrize(
    ("output", "extracted"),
    [
        ("(c) 4", "C"),
        ("( (C", "C"),
        ("The answer is: C", "T"),
        ("Option C", "O"),
        ("Clearly", "C"),
        ("4", None),
        ("", None),
    ],
)
def test_lmms_eval_reads_the_first_letter_of_the_text(output: str, extracted: str | None) -> None:
    assert scored(LMMS_EVAL, output) == Scored(float(extracted == "C"), extracted)


def test_vlmevalkit_reads_the_text_of_an_option() -> None:
    assert scored(VLMEVALKIT, "two", options=("4", "two", "3", "1")) == Scored(0.0, "B")


SOURCES = ("ade", "ade", "ade", "coco", "omni", "omni", "omni", "omni")
CASES = [Case(str(at), "(C)", "", source) for at, source in enumerate(SOURCES)]
SCORES = [Scored(score, None) for score in (1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)]


def test_each_profile_weighs_the_sources_in_its_own_way() -> None:
    assert totals(CASES, SCORES, OFFICIAL) == {
        "overall": 0.5 * ((1 / 3 + 1) / 2 + 1 / 4),
        "micro": 3 / 8,
        "ade": 1 / 3,
        "coco": 1.0,
        "omni": 1 / 4,
        "2d": (1 / 3 + 1) / 2,
        "3d": 1 / 4,
    }
    lmms_eval, vlmevalkit = totals(CASES, SCORES, LMMS_EVAL), totals(CASES, SCORES, VLMEVALKIT)
    assert (lmms_eval["overall"], lmms_eval["2d"], lmms_eval["3d"]) == (3 / 8, 2 / 4, 1 / 4)
    assert (vlmevalkit["overall"], vlmevalkit["2d"], vlmevalkit["3d"]) == (None, (1 / 3 + 1) / 2, 1 / 4)


def test_without_a_source_what_needs_it_is_none() -> None:
    assert totals(CASES[3:], SCORES[3:], OFFICIAL) == {
        "overall": None,
        "micro": 2 / 5,
        "coco": 1.0,
        "omni": 1 / 4,
        "2d": None,
        "3d": 1 / 4,
        "absent": ["ade"],
    }
    assert totals(CASES[:4], SCORES[:4], OFFICIAL)["overall"] is None
