"""MMHalu: no judge, no score; how a recorded judgement is read; and the totals."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.benchmarks.mm_halu import PROFILES, RECORDED, rating, totals
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored


@pytest.mark.parametrize("output", ["", "A red bus.", "Rating: 6", "x" * 2**20])
def test_without_a_judge_every_case_is_unresolved(output: str) -> None:
    assert PROFILES[OFFICIAL](Case("1", "A bus.", output)) == Scored(0.0, None, resolved=False)


@pytest.mark.parametrize(
    ("judgement", "found"),
    [
        ("Good.\n- Rating: 5, very informative", 5),
        ("RATING: 0", 0),
        ("rating: 3. Yes, rating: 3", 3),
        ("rating: 3 or rating: 4", None),
        ("**Rating:** 5", None),
        ("rating:5", None),
        ("rating: 7", None),
        ("rating: 60", 6),
        ("", None),
    ],
)
def test_a_rating_counts_if_it_is_the_only_one(judgement: str, found: int | None) -> None:
    assert rating(judgement) == found
    expected = Scored(0.0, None) if found is None else Scored(float(found), str(found))
    assert PROFILES[RECORDED](Case("1", "A bus.", judgement)) == expected


def test_ratings_below_three_are_hallucinations_and_types_go_by_place() -> None:
    cases = [Case(str(number), "", "") for number in range(16)]
    ratings = [float(number % 7) for number in range(16)]
    found = totals(cases, [Scored(one, None) for one in ratings], RECORDED)
    assert found["hallucination_rate"] == sum(one < 3 for one in ratings) / 16
    assert found["mean_rating"] == sum(ratings) / 16
    assert [found[f"type_{number}"] for number in range(8)] == [
        (ratings[number] + ratings[number + 8]) / 2 for number in range(8)
    ]


def test_a_type_in_the_case_goes_before_its_place() -> None:
    cases = [Case("1", "", "", "counting"), Case("2", "", "", "counting")]
    assert totals(cases, [Scored(2.0, "2"), Scored(5.0, "5")], RECORDED) == {
        "hallucination_rate": 0.5,
        "mean_rating": 3.5,
        "counting": 3.5,
    }


def test_one_unresolved_case_leaves_no_total() -> None:
    cases = [Case("1", "", "", "counting"), Case("2", "", "", "counting")]
    found = totals(cases, [Scored(5.0, "5"), Scored(0.0, None, resolved=False)], OFFICIAL)
    assert set(found.values()) == {None}
