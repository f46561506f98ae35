"""RealWorldQA: letters, open answers, and questions made ones of choice."""

from __future__ import annotations

import pytest

from valr_ops.evaluation.benchmarks.realworldqa import PROFILES, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored, ScoringError


@pytest.mark.parametrize(
    ("gold", "output", "scored"),
    [
        ("B", "B.", Scored(1.0, "B")),
        (" b", "so (B)", Scored(1.0, "B")),
        ("B", "b", Scored(0.0, None)),
        ("B", "The answer is B, not A", Scored(0.0, "A")),
        ("Downhill", " downhill.. ", Scored(1.0, "downhill")),
        ("Downhill", "It is downhill", Scored(0.0, "it is downhill")),
        ("0", "0.", Scored(1.0, "0")),
        ("0", "zero", Scored(0.0, "zero")),
        ("0", "0.0", Scored(0.0, "0.0")),
        ("Yes.", "Yes.", Scored(0.0, "yes")),
        ("E", "e", Scored(1.0, "e")),
        ("0", "", Scored(0.0, None)),
    ],
)
def test_lmms_eval_extracts_letters_a_to_d_and_compares_other_golds_as_text(
    gold: str, output: str, scored: Scored
) -> None:
    assert PROFILES[LMMS_EVAL](Case("1", gold, output)) == scored


def test_vlmevalkit_needs_options_for_an_open_question() -> None:
    rule = PROFILES[VLMEVALKIT]
    assert rule(Case("1", "Downhill", "it goes downhill", options=("Uphill", "Downhill"))) == Scored(1.0, "B")
    with pytest.raises(ScoringError, match="Downhill"):
        rule(Case("1", "Downhill", "it goes downhill"))


def test_the_total_is_the_sample_mean() -> None:
    cases = [Case(str(at), "B", "") for at in range(4)]
    scores = [Scored(score, None) for score in (1.0, 0.0, 0.0, 0.0)]
    assert totals(cases, scores, LMMS_EVAL) == {"overall": 0.25, "micro": 0.25}
