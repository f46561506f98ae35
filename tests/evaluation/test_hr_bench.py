"""HR-Bench: two matchers that differ, and one average."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.benchmarks.hr_bench import PROFILES, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored

UNRESOLVED = Scored(0.0, None, resolved=False)


@pytest.mark.parametrize(
    ("output", "by_lmms_eval", "by_vlmevalkit"),
    [
        ("B", Scored(1.0, "B"), Scored(1.0, "B")),
        ("B is the one that I see here", Scored(1.0, "B"), UNRESOLVED),
        ("A or B, so the answer is B", UNRESOLVED, Scored(1.0, "B")),
        ("It stands to the right of the tall man in the red coat", Scored(1.0, "B"), UNRESOLVED),
        ("A man to the right", Scored(0.0, "A"), Scored(1.0, "B")),
        ("right", Scored(1.0, "B"), Scored(1.0, "B")),
        ("left or right", UNRESOLVED, UNRESOLVED),
        ("Z", Scored(0.0, "Z"), Scored(0.0, "Z")),
        ("I can't process this file.", Scored(0.0, "Z"), Scored(0.0, "Z")),
        ("", UNRESOLVED, UNRESOLVED),
    ],
)
def test_lmms_eval_has_an_older_matcher_than_vlmevalkit(
    output: str, by_lmms_eval: Scored, by_vlmevalkit: Scored
) -> None:
    case = Case("5", "B", output, "cross", ("left", "right"))
    assert PROFILES[LMMS_EVAL](case) == by_lmms_eval
    assert PROFILES[VLMEVALKIT](case) == by_vlmevalkit


def test_the_totals_are_means_over_samples_and_categories() -> None:
    cases = [Case(str(at), "B", "", "single" if at < 3 else "cross") for at in range(4)]
    scores = [Scored(score, None) for score in (1.0, 0.0, 0.0, 1.0)]
    assert totals(cases, scores, VLMEVALKIT) == {"overall": 0.5, "micro": 0.5, "single": 1 / 3, "cross": 1.0}
