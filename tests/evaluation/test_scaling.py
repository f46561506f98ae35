"""The length study: association and effect are told apart, nothing is dropped, and the files say what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from valr_ops.evaluation.scaling import (
    SCHEMA,
    ScalingError,
    imposed_budgets,
    observational_bins,
    sentences,
    when_to_stop,
    write_scaling,
)
from valr_ops.evaluation.statistics import StatisticsError, bootstrap_interval, paired_difference, wilson_interval


def row(name: int, score: float, tokens: int, **other: Any) -> dict[str, Any]:
    """A line of predictions.jsonl, of an answer without latents that ended by itself."""
    return {
        "id": f"item{name}",
        "benchmark": "mmvp",
        "correct": score == 1.0,
        "score": score,
        "resolved": True,
        "answer_found": True,
        "text_tokens": tokens,
        "latent_steps": 0,
        "segments": 0,
        "finish_reason": "stop",
        "seconds": tokens / 100,
    } | other


def answered(scores: Sequence[float], tokens: Sequence[int], **other: Any) -> list[dict[str, Any]]:
    return [row(name, score, length, **other) for name, (score, length) in enumerate(zip(scores, tokens, strict=True))]


def hard_and_easy(right_when_easy: float, right_when_hard: float, n: int = 200) -> list[dict[str, Any]]:
    """The first half of the items is easy and answered in few tokens, the other hard and answered in many."""
    # Right answers are spread evenly over their half, so that nothing else goes with the length.
    places = np.arange(1, n // 2 + 1)
    easy, hard = (np.diff(np.floor(places * share + 1e-9), prepend=0) for share in (right_when_easy, right_when_hard))
    lengths = [*range(50, 50 + n // 2), *range(200, 200 + n // 2)]
    return answered([float(right) for right in (*easy, *hard)], lengths)


def test_bins_hold_what_their_edges_say_and_drop_nothing() -> None:
    rows = answered([1, 1, 0, 1, 0, 0], [99, 100, 150, 200, 299, 1000])
    found = observational_bins(rows, rows, "text_tokens", edges=(100, 200, 300, 2000))
    assert [(one.low, one.high) for one in found.bins] == [(0, 100), (100, 200), (200, 300), (300, 2000), (2000, None)]
    assert [one.answers.n for one in found.bins] == [1, 2, 2, 1, 0]
    assert [one.answers.accuracy and one.answers.accuracy.value for one in found.bins] == [1.0, 0.5, 0.5, 0.0, None]
    assert found.bins[1].answers.accuracy is not None
    assert (found.bins[1].answers.accuracy.low, found.bins[1].answers.accuracy.high) == wilson_interval(1, 2)
    assert found.bins[1].answers.mean_lengths["text_tokens"] == 125


def test_without_edges_bins_hold_equal_numbers() -> None:
    lengths = list(range(1, 81))
    found = observational_bins(answered([1.0] * 80, lengths), answered([1.0] * 80, lengths), "seconds", count=5)
    assert [one.answers.n for one in found.bins] == [16] * 5


def test_equal_lengths_stay_in_one_bin() -> None:
    rows = answered([1, 0, 1, 0, 1, 0], [7, 7, 7, 7, 9, 9])
    found = observational_bins(rows, rows, "text_tokens")
    assert [one.answers.n for one in found.bins] == [4, 2]
    same = answered([1, 0, 1], [7, 7, 7])
    alone = observational_bins(same, same, "text_tokens")
    assert ([one.answers.n for one in alone.bins], alone.correlation) == ([3], None)
    assert "length explains nothing" in sentences([alone], [])[0]


def test_latents_and_their_control_tokens_are_part_of_the_decode_steps() -> None:
    rows = [row(0, 1.0, 30, latent_steps=32, segments=2), row(1, 0.0, 40)]
    found = observational_bins(rows, rows, "decode_steps", edges=(60,))
    assert [one.answers.mean_lengths["decode_steps"] for one in found.bins] == [40, 30 + 32 + 2 * 2]
    assert found.bins[1].answers.mean_lengths["text_tokens"] == 30


def test_a_fall_with_length_that_the_base_model_shares_is_laid_to_the_items() -> None:
    found = observational_bins(hard_and_easy(0.9, 0.5), hard_and_easy(0.8, 0.4), "text_tokens", count=2)
    assert [one.base and one.base.value for one in found.bins] == [0.8, 0.4]
    assert found.correlation is not None
    assert found.base_correlation is not None
    assert found.correlation.high < 0 and found.base_correlation.high < 0
    said = sentences([found], [])[0]
    assert "90.0 % for answers below 175" in said
    assert "no effect of length follows" in said


def test_a_rise_with_length_that_the_base_model_lacks_is_still_called_association() -> None:
    found = observational_bins(hard_and_easy(0.5, 0.9), hard_and_easy(0.6, 0.6), "text_tokens", count=2)
    said = sentences([found], [])[0]
    assert "Longer answers score higher" in said
    assert "association and no effect" in said


def test_the_base_models_items_may_come_in_another_order() -> None:
    rows, base = hard_and_easy(0.9, 0.5), hard_and_easy(0.8, 0.4)
    assert observational_bins(rows, base[::-1]) == observational_bins(rows, base)


def test_items_of_one_cluster_make_the_interval_wider() -> None:
    scores = [float(pair % 2) for pair in range(40) for _ in range(2)]
    lengths = [10 + item % 7 for item in range(80)]
    labels = [f"pair{item // 2}" for item in range(80)]
    rows = [one | {"cluster": label} for one, label in zip(answered(scores, lengths), labels, strict=True)]
    found = observational_bins(rows, rows, "text_tokens", count=1)
    assert found.bins[0].answers.accuracy == bootstrap_interval(scores, labels)


def test_cut_off_and_unread_answers_are_told_apart() -> None:
    rows = [
        row(0, 1.0, 5),
        row(1, 0.0, 9, finish_reason="length", resolved=False, answer_found=False),
        row(2, 0.0, 5, resolved=False),
        row(3, 0.0, 5, answer_found=False),
    ]
    found = observational_bins(rows, rows, "text_tokens", count=1)
    assert (found.bins[0].answers.truncated, found.bins[0].answers.unread) == (0.25, 0.5)


def budgets(*shares: float, n: int = 400) -> dict[float, list[dict[str, Any]]]:
    """Budgets 0, 1, 2, 4, ...: the first items are right at every budget, more of them at some."""
    scores = [(np.arange(n) < share * n).astype(float) for share in shares]
    values = [0.0, *(2.0**power for power in range(len(shares) - 1))]
    return {
        budget: answered(list(right), [50] * n, segments=int(budget), latent_steps=16 * int(budget))
        for budget, right in zip(values, scores, strict=True)
    }


def test_every_item_is_compared_with_itself_at_the_smallest_budget() -> None:
    runs = budgets(0.5, 0.6, 0.7)
    found = imposed_budgets(runs, "max_segments")
    assert [point.answers.n for point in found.points] == [400] * 3
    assert [point.answers.mean_lengths["decode_steps"] for point in found.points] == [50, 50 + 18, 50 + 36]
    right = [[one["correct"] for one in runs[budget]] for budget in (2.0, 0.0)]
    assert found.points[2].gain == paired_difference(*right)
    assert found.points[0].gain is None


def test_a_gain_that_levels_off_says_where_to_stop_and_what_it_could_have_missed() -> None:
    found = imposed_budgets(budgets(0.5, 0.6, 0.7, 0.705), "max_segments")
    assert (found.stop.budget, found.stop.last) == (2.0, False)
    assert 0.005 < found.stop.detectable < 0.02
    said = sentences([], [found])[0]
    assert "Stop at 2: no longer budget is better beyond noise" in said
    assert "50.0 % at 0 and 70.5 % at 4, +20.5 points" in said
    assert found.trend.p_value < 1e-6


def test_a_gain_that_goes_on_does_not_say_that_it_ends() -> None:
    found = imposed_budgets(budgets(0.5, 0.6, 0.7), "max_segments")
    assert (found.stop.budget, found.stop.last) == (2.0, True)
    assert "where the gain ends is unknown" in sentences([], [found])[0]


def test_a_gain_that_comes_late_is_waited_for() -> None:
    found = imposed_budgets(budgets(0.5, 0.505, 0.56), "max_segments")
    assert found.points[1].gain is not None
    assert found.points[1].gain.verdict == "within noise"
    assert found.stop.budget == 2.0


def test_a_longer_budget_that_is_worse_is_no_reason_to_go_on() -> None:
    found = imposed_budgets(budgets(0.7, 0.6, 0.5), "max_segments")
    assert (found.stop.budget, found.best, found.best_gain) == (0.0, 0.0, None)
    assert found.trend.p_value > 0.99
    assert "The smallest budget, 0, is the best" in sentences([], [found])[0]


def test_the_best_of_many_budgets_must_clear_a_higher_bar() -> None:
    found = imposed_budgets(budgets(0.5, 0.51, 0.53, 0.52, 0.5), "max_segments")
    assert found.best == 2.0
    assert found.best_gain is not None
    of_pair = found.points[2].gain
    assert of_pair is not None
    assert found.best_gain.confidence == pytest.approx(1 - 0.05 / 4)
    assert found.best_gain.low < of_pair.low < of_pair.high < found.best_gain.high


def test_budgets_that_change_no_answer_are_told_from_a_flat_curve() -> None:
    same = answered([1.0, 0.0] * 20, [50] * 40)
    found = imposed_budgets({1.0: same, 2.0: same}, "max_segments")
    assert (found.stop.budget, found.best_gain, found.trend.p_value) == (1.0, None, 1.0)
    assert "did not make answers longer" in sentences([], [found])[0]


def test_stopping_is_decided_by_clusters_where_there_are_any() -> None:
    first, second = np.zeros(60), np.zeros(60)
    second[:20] = 0.5
    scores = np.stack([first, second], axis=1)
    scenes = [f"scene{item // 20}" for item in range(60)]
    assert when_to_stop([1, 2], scores).budget == 2
    assert when_to_stop([1, 2], scores, scenes).budget == 1


def test_the_files_hold_every_bin_and_budget_and_equal_studies_give_equal_bytes(tmp_path: Path) -> None:
    rows, base = hard_and_easy(0.9, 0.5), hard_and_easy(0.8, 0.4)
    observed = [observational_bins(rows, base, length, count=3) for length in ("text_tokens", "seconds")]
    observed.append(observational_bins(rows, base, "decode_steps", edges=(100, 1000)))
    imposed = [imposed_budgets(budgets(0.5, 0.6, 0.6), "max_segments")]
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        tables = write_scaling(folder, observed, imposed)
    files = ["result.md", "scaling.parquet", "scaling.png", "scaling.svg"]
    assert sorted(path.name for path in folders[0].iterdir()) == files
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files)

    written = pq.read_table(folders[0] / "scaling.parquet")
    assert written.schema.equals(SCHEMA)
    lines = written.to_pylist()
    assert [line["protocol"] for line in lines] == ["observational-bins"] * 9 + ["interventional-budget"] * 3
    assert [line["n"] for line in lines[6:9]] == [50, 150, 0]
    assert (lines[8]["bin_low"], lines[8]["bin_high"], lines[8]["accuracy"]) == (1000, None, None)
    assert lines[10]["gain"] == pytest.approx(0.1)
    assert lines[10]["mean_decode_steps"] == 68
    text = (folders[0] / "result.md").read_text(encoding="utf-8")
    assert all(table in text for table in tables.values())


def test_one_item_and_wrong_answers_only_still_make_a_study(tmp_path: Path) -> None:
    alone = answered([0.0], [0])
    observed = [observational_bins(alone, alone)]
    imposed = [imposed_budgets({1: alone, 2: alone}, "max_segments")]
    write_scaling(tmp_path, observed, imposed)
    assert (tmp_path / "scaling.png").stat().st_size > 0


GOOD = answered([1.0, 0.0], [5, 6])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the observed run has no rows"),
        ([GOOD[0], row(1, 0.0, 6, benchmark="vstar")], "mixes mmvp, vstar"),
        ([GOOD[0], GOOD[0]], "'item0' more than once"),
        ([GOOD[0], row(1, float("nan"), 6)], "score of item 'item1' is nan"),
        ([GOOD[0], row(1, 6.0, 6)], r"score of item 'item1' is 6; it must be in \[0, 1\]"),
        ([GOOD[0], row(1, 0.0, 6, seconds=float("inf"))], "seconds of item 'item1' is inf"),
        ([GOOD[0], row(1, 0.0, 6, seconds=None)], "'item1' lacks seconds, and others have them"),
    ],
)
def test_rows_that_no_study_can_be_made_of_are_named(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ScalingError, match=said):
        observational_bins(rows, GOOD)


def test_different_items_are_never_compared() -> None:
    with pytest.raises(ScalingError, match=r"the base model answered 1 items .* such as \['item1'\]"):
        observational_bins(GOOD, GOOD[:1])
    with pytest.raises(ScalingError, match="max_segments=2 answered 1 items"):
        imposed_budgets({1: GOOD, 2: GOOD[:1]}, "max_segments")


def test_bins_and_budgets_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="don't rise"):
        observational_bins(GOOD, GOOD, edges=(200, 100))
    with pytest.raises(ScalingError, match="makes no bins"):
        observational_bins(GOOD, GOOD, count=0)
    with pytest.raises(ScalingError, match="'words' is not measured"):
        observational_bins(GOOD, GOOD, "words")
    with pytest.raises(ScalingError, match="1 budgets"):
        imposed_budgets({1: GOOD}, "max_segments")
    with pytest.raises(ScalingError, match="no length study"):
        write_scaling(tmp_path, [], [])
    with pytest.raises(StatisticsError, match="confidence"):
        observational_bins(GOOD, GOOD, confidence=95)
