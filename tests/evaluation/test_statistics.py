"""Intervals, tests and the majority baseline, held against published values, scipy and counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from valr_ops.evaluation.statistics import (
    Interval,
    StatisticsError,
    against_printed,
    bootstrap_interval,
    clustered_standard_error,
    detectable_difference,
    exact_mcnemar,
    majority_answer,
    page_trend,
    paired_bootstrap,
    paired_comparison,
    paired_difference,
    score_interval,
    smallest_detectable_difference,
    spearman,
    wilson_interval,
)


def answers(both: int, first_only: int, second_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Answers of two models with this cross table."""
    cells = [(True, True)] * both + [(True, False)] * first_only + [(False, True)] * second_only
    cells += [(False, False)] * neither
    first, second = zip(*cells, strict=True)
    return list(first), list(second)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_gives_the_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_is_the_one_of_scipy_at_every_count_and_level() -> None:
    for correct, confidence in itertools.product(range(31), (0.5, 0.9, 0.99)):
        expected = stats.binomtest(correct, 30).proportion_ci(confidence, method="wilson")
        assert wilson_interval(correct, 30, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_an_interval_of_impossible_counts_is_refused(correct: int, n: int) -> None:
    with pytest.raises(StatisticsError, match=f"{correct} correct of {n}"):
        wilson_interval(correct, n)


def test_the_paired_interval_and_the_exact_test_give_the_published_values() -> None:
    # Cavo et al. (2012), the worked example of Fagerland, Lydersen and Laake, Statistical Analysis of Contingency
    # Tables, chapter 8.
    found = paired_difference(*answers(59, 6, 16, 80))
    assert (found.difference, found.low, found.high) == pytest.approx((-0.0621, -0.1186, -0.0046), abs=5e-5)
    assert found.p_value == pytest.approx(0.052479, abs=5e-7)


def test_swapping_the_models_mirrors_the_difference_and_its_interval() -> None:
    first, second = answers(40, 12, 3, 20)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert one.p_value == other.p_value
    assert (one.gained, one.lost) == (other.lost, other.gained) == (12, 3)


def test_the_order_of_the_items_does_not_matter_but_their_pairing_does() -> None:
    first, second = (np.array(column) for column in answers(40, 12, 3, 20))
    shuffled = np.random.default_rng(0).permutation(len(first))
    assert paired_difference(first[shuffled], second[shuffled]) == paired_difference(first, second)
    unpaired = paired_difference(first, second[shuffled])
    assert unpaired.high - unpaired.low > 1.2 * (
        paired_difference(first, second).high - paired_difference(first, second).low
    )


def test_models_that_agree_everywhere_are_within_noise_with_an_interval_that_has_a_width() -> None:
    found = paired_difference(*answers(30, 0, 0, 10))
    assert found.difference == 0.0
    assert found.low < 0.0 < found.high
    assert (found.p_value, found.verdict) == (1.0, "within noise")


def test_a_few_discordant_items_are_noise_even_where_the_interval_leaves_out_zero() -> None:
    found = paired_difference(*answers(14, 5, 0, 22))
    assert found.low > 0.0
    assert found.p_value == pytest.approx(0.0625)
    assert found.verdict == "within noise"


def test_a_clear_difference_differs() -> None:
    assert paired_difference(*answers(100, 40, 5, 55)).verdict == "differs"
    assert paired_difference(*answers(100, 5, 40, 55)).verdict == "differs"


def test_the_paired_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    shares = [0.55, 0.15, 0.07, 0.23]
    tables = generator.multinomial(100, shares, size=400)
    intervals = [paired_difference(*answers(*(int(count) for count in table))) for table in tables]
    covered = sum(one.low <= 0.08 <= one.high for one in intervals) / len(intervals)
    assert 0.92 <= covered <= 0.985


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(StatisticsError, match="same items"):
        paired_difference([True], [True, False])


def test_the_exact_test_counts_coin_tosses() -> None:
    tosses = list(itertools.product([0, 1], repeat=8))
    at_least_as_uneven = sum(abs(2 * sum(toss) - 8) >= 6 for toss in tosses)
    assert exact_mcnemar(7, 1) == pytest.approx(at_least_as_uneven / len(tosses))


def test_the_smallest_detectable_difference_is_found_with_the_stated_power() -> None:
    n, discordant = 500, 0.3
    difference = smallest_detectable_difference(n, discordant)
    shares = [0.4, (discordant + difference) / 2, (discordant - difference) / 2, 0.3]
    tables = np.random.default_rng(2).multinomial(n, shares, size=600)
    found = sum(exact_mcnemar(int(gained), int(lost)) <= 0.05 for _, gained, lost, _ in tables) / len(tables)
    assert 0.72 <= found <= 0.86
    assert smallest_detectable_difference(4 * n, discordant) == pytest.approx(difference / 2)


def test_the_majority_answer_is_the_best_constant_and_ties_go_to_the_alphabet() -> None:
    assert majority_answer(["b", "a", "b", "c"]) == ("b", 0.5)
    assert majority_answer(["b", "a"]) == ("a", 0.5)
    with pytest.raises(StatisticsError):
        majority_answer([])


CLUSTERED = np.random.default_rng(3)
SCENES = [f"scene{number}" for number in range(40) for _ in range(6)]
OF_SCENES = np.repeat(CLUSTERED.uniform(0.2, 0.8, 40), 6)
FRACTIONS = np.clip(OF_SCENES + CLUSTERED.normal(0, 0.1, 240), 0, 1).round(1)
"""Scores such as MRA's tenths, alike within a scene."""


def test_the_bootstrap_interval_is_the_one_of_scipy() -> None:
    found = bootstrap_interval(FRACTIONS, resamples=20_000)
    expected = stats.bootstrap((FRACTIONS,), np.mean, n_resamples=5_000, method="percentile", batch=1_000, rng=0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.002)
    assert found.value == pytest.approx(FRACTIONS.mean())


def test_clusters_are_drawn_whole() -> None:
    scenes = FRACTIONS.reshape(40, 6).mean(axis=1)
    by_scene, of_means = bootstrap_interval(FRACTIONS, SCENES), bootstrap_interval(scenes)
    assert (by_scene.low, by_scene.high) == pytest.approx((of_means.low, of_means.high), abs=1e-12)
    assert by_scene.method == "bootstrap of 40 clusters of 240 items"
    by_item = bootstrap_interval(FRACTIONS)
    assert by_scene.high - by_scene.low > 1.8 * (by_item.high - by_item.low)


def test_items_without_a_label_stand_by_themselves() -> None:
    labels = ["pair" if item < 2 else "" for item in range(240)]
    assert clustered_standard_error(FRACTIONS, [""] * 240) == pytest.approx(stats.sem(FRACTIONS))
    assert bootstrap_interval(FRACTIONS, labels).method == "bootstrap of 239 clusters of 240 items"


def test_the_standard_error_of_clusters_is_that_of_their_means() -> None:
    scenes = FRACTIONS.reshape(40, 6).mean(axis=1)
    assert clustered_standard_error(FRACTIONS, SCENES) == pytest.approx(stats.sem(scenes))
    assert clustered_standard_error(FRACTIONS) == pytest.approx(stats.sem(FRACTIONS))


def test_a_macro_average_has_the_error_of_its_groups_by_their_shares() -> None:
    few, many = FRACTIONS[:20], FRACTIONS[20:]
    groups, shares = ["few"] * 20 + ["many"] * 220, {"few": 0.75, "many": 0.25}
    found = bootstrap_interval(FRACTIONS, groups=groups, shares=shares)
    error = float(np.hypot(0.75 * stats.sem(few), 0.25 * stats.sem(many)))
    assert found.value == pytest.approx(0.75 * few.mean() + 0.25 * many.mean())
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.05)
    assert clustered_standard_error(FRACTIONS, groups=groups, shares=shares) == pytest.approx(error, rel=0.03)


def test_groups_weigh_alike_without_shares() -> None:
    groups = ["few"] * 20 + ["many"] * 220
    found = bootstrap_interval(FRACTIONS, groups=groups)
    assert found.value == pytest.approx((FRACTIONS[:20].mean() + FRACTIONS[20:].mean()) / 2)


def test_a_group_without_a_share_is_no_average_of_the_others() -> None:
    with pytest.raises(StatisticsError, match="'many'"):
        bootstrap_interval(FRACTIONS, groups=["few"] * 20 + ["many"] * 220, shares={"few": 1.0})


def test_equal_seeds_give_equal_figures() -> None:
    other = 1 - FRACTIONS
    assert bootstrap_interval(FRACTIONS, SCENES) == bootstrap_interval(FRACTIONS, SCENES)
    assert paired_bootstrap(FRACTIONS, other, SCENES) == paired_bootstrap(FRACTIONS, other, SCENES)
    assert bootstrap_interval(FRACTIONS, SCENES) != bootstrap_interval(FRACTIONS, SCENES, seed=1)


def test_the_interval_of_clusters_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    labels = [str(number) for number in range(50) for _ in range(8)]
    covered = [0, 0]
    for _ in range(200):
        right = generator.random(400) < np.repeat(generator.uniform(0.1, 0.9, 50), 8)
        for number, clusters in enumerate((labels, None)):
            found = bootstrap_interval(right, clusters, resamples=1_000)
            covered[number] += found.low <= 0.5 <= found.high
    assert 0.90 <= covered[0] / 200 <= 0.99
    assert covered[1] / 200 < 0.90


@pytest.mark.parametrize(
    ("values", "clusters", "said"),
    [
        ([], None, "one item or more"),
        ([0.5, float("nan")], None, "nan at item 1"),
        ([1.0, 1.0, 1.0], None, "all alike"),
        ([0.0, 1.0], ["a", "a"], "one cluster"),
        ([0.0, 1.0], ["a"], "1 clusters for 2 items"),
    ],
)
def test_values_that_show_no_spread_have_no_bootstrap_interval(
    values: list[float], clusters: list[str] | None, said: str
) -> None:
    with pytest.raises(StatisticsError, match=said):
        bootstrap_interval(values, clusters)


def test_a_score_of_right_and_wrong_has_wilsons_interval_and_any_other_is_resampled() -> None:
    plain = score_interval([True] * 8 + [False] * 2)
    assert (plain.low, plain.high) == pytest.approx(wilson_interval(8, 10))
    assert plain.method == "Wilson interval of 10 items"
    assert score_interval(FRACTIONS) == bootstrap_interval(FRACTIONS)
    right = FRACTIONS > 0.5
    assert score_interval(right, SCENES) == bootstrap_interval(right, SCENES)


def test_a_score_without_spread_keeps_an_interval_with_a_width() -> None:
    all_right = score_interval([1.0] * 30, [str(item // 3) for item in range(30)])
    assert (all_right.low, all_right.high) == pytest.approx(wilson_interval(10, 10))
    one_each = score_interval([0.0, 0.4, 1.0], groups=["count", "size", "route"])
    assert one_each.low < 0.2 < 0.8 < one_each.high
    one_item = score_interval([0.7])
    assert one_item.low < 0.3 < 0.9 < one_item.high <= 1.0


def test_scores_out_of_their_range_are_refused() -> None:
    with pytest.raises(StatisticsError, match="6 at item 1"):
        score_interval([0.0, 6.0])


def test_the_sign_flip_test_of_right_and_wrong_is_mcnemars() -> None:
    first, second = answers(40, 12, 3, 20)
    found = paired_bootstrap(first, second)
    assert found.p_value == pytest.approx(exact_mcnemar(12, 3), abs=0.008)
    exact = paired_difference(first, second)
    assert (found.difference, found.low, found.high) == pytest.approx(
        (exact.difference, exact.low, exact.high), abs=0.02
    )


def test_the_sign_flip_test_is_the_permutation_test_of_scipy() -> None:
    first = np.array([0.9, 0.4, 0.7, 0.8, 0.3, 1.0, 0.6])
    second = np.array([0.5, 0.5, 0.2, 0.6, 0.3, 0.4, 0.5])
    expected = stats.permutation_test(
        (first, second), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", vectorized=True
    )
    assert paired_bootstrap(first, second).p_value == pytest.approx(expected.pvalue, abs=0.01)


def test_a_difference_that_a_few_scenes_make_is_within_noise() -> None:
    first, second = np.full(60, 0.5), np.full(60, 0.5)
    first[:20] = 0.8
    scenes = [f"scene{item // 20}" for item in range(60)]
    assert paired_bootstrap(first, second).verdict == "differs"
    assert paired_bootstrap(first, second, scenes).verdict == "within noise"


def test_two_clusters_never_differ_however_alike_they_are() -> None:
    found = paired_bootstrap([0.9] * 10, [0.1] * 10, ["a"] * 5 + ["b"] * 5)
    assert (found.difference, found.verdict) == (pytest.approx(0.8), "within noise")
    assert found.low < 0.0 < found.difference < found.high <= 1.0


def test_models_that_score_alike_everywhere_have_an_interval_around_zero() -> None:
    found = paired_bootstrap([0.3] * 50, [0.3] * 50)
    assert found.low == pytest.approx(-found.high)
    assert 0.0 < found.high < 0.1
    assert (found.p_value, found.verdict) == (1.0, "within noise")


def test_a_paired_macro_is_the_difference_of_the_two_macros() -> None:
    groups, other = ["few"] * 20 + ["many"] * 220, (FRACTIONS**2).round(1)
    found = paired_bootstrap(FRACTIONS, other, groups=groups)
    one, two = (bootstrap_interval(scores, groups=groups) for scores in (FRACTIONS, other))
    assert found.difference == pytest.approx(one.value - two.value)
    assert found.high - found.low < one.high - one.low


def test_the_comparison_takes_the_test_that_fits_and_says_which() -> None:
    first, second = answers(40, 12, 3, 20)
    assert paired_comparison(first, second) == paired_difference(first, second)
    assert paired_comparison(first, second).test == "exact McNemar test and Newcombe's interval, 75 items"
    pairs = [str(item // 3) for item in range(75)]
    assert "25 clusters of 75 items" in paired_comparison(first, second, pairs).test
    assert paired_comparison(FRACTIONS, 1 - FRACTIONS).test == "test by sign flips and paired bootstrap, 240 items"


def test_a_comparison_of_different_items_is_refused() -> None:
    with pytest.raises(StatisticsError, match="same items"):
        paired_comparison([0.5, 0.5], [0.5])


def test_a_score_is_held_against_a_printed_one_by_the_errors_of_both() -> None:
    # VSI-Bench: 5,130 items, 52.9 printed; the error of a difference is near one point.
    near = against_printed(score_interval([True] * 2680 + [False] * 2450), 52.9, 5130)
    far = against_printed(score_interval([True] * 2590 + [False] * 2540), 52.9, 5130)
    assert (near.verdict, far.verdict) == ("within noise", "differs")
    assert (near.printed_low, near.printed_high) == pytest.approx((0.5153, 0.5426), abs=1e-4)
    assert near.difference == pytest.approx(2680 / 5130 - 0.529)
    assert near.detectable == pytest.approx(2.8 * np.sqrt(2 * 0.5 * 0.5 / 5130), rel=0.01)


def test_one_question_of_vstar_is_noise() -> None:
    ours = score_interval([True] * 165 + [False] * 26)
    assert against_printed(ours, 86.9, 191).verdict == "within noise"


def test_a_printed_score_is_unsure_by_half_of_its_last_digit() -> None:
    exact = Interval(0.5, 0.5, 0.5, 0.95, "known")
    found = against_printed(exact, 50.0, 10**12)
    assert (found.low, found.high) == pytest.approx((-0.0005, 0.0005), abs=1e-5)


def test_a_printed_score_that_is_no_percentage_is_refused() -> None:
    with pytest.raises(StatisticsError, match="no percentage"):
        against_printed(score_interval([True, False]), 529, 5130)


def test_an_unpaired_difference_of_the_detectable_size_is_found_with_the_stated_power() -> None:
    n = 800
    error = float(np.hypot(np.sqrt(0.25 / n), np.sqrt(0.25 / n)))
    difference = detectable_difference(error)
    generator = np.random.default_rng(5)
    one, two = (generator.binomial(n, 0.5 + sign * difference / 2, size=2_000) / n for sign in (1, -1))
    assert 0.76 <= np.mean(np.abs(one - two) > 1.96 * error) <= 0.84


def test_the_trend_over_untied_scores_is_the_one_of_scipy() -> None:
    table = np.random.default_rng(6).random((30, 5)) + np.linspace(0, 0.2, 5)
    expected = stats.page_trend_test(table, method="asymptotic")
    found = page_trend(table)
    assert (found.statistic, found.p_value) == pytest.approx((expected.statistic, expected.pvalue))


def test_the_trend_of_right_and_wrong_answers_is_seen_through_their_ties() -> None:
    steps = np.random.default_rng(7).integers(0, 40, 200)
    table = np.stack([steps < limit for limit in (10, 11, 12, 14)], axis=1)
    assert page_trend(table).p_value < 0.001
    assert page_trend(table[:, ::-1]).p_value > 0.999
    assert stats.page_trend_test(table).pvalue > 0.05


def test_the_trend_rejects_about_as_often_as_it_says_where_there_is_none() -> None:
    generator = np.random.default_rng(8)
    found = [page_trend(generator.random((60, 4)) < generator.random((60, 1))).p_value for _ in range(300)]
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.09


def test_a_trend_counts_clusters_and_not_their_items() -> None:
    table = np.random.default_rng(9).random((12, 3))
    doubled, labels = np.repeat(table, 2, axis=0), [str(item // 2) for item in range(24)]
    assert page_trend(doubled, labels) == page_trend(table)
    assert page_trend(np.ones((5, 3))).p_value == 1.0
    with pytest.raises(StatisticsError, match="two conditions"):
        page_trend(np.ones((5, 1)))


def test_the_rank_correlation_is_the_one_of_scipy_with_ties_too() -> None:
    generator = np.random.default_rng(10)
    lengths = generator.integers(20, 60, 300)
    right = generator.random(300) < 0.9 - lengths / 100
    found = spearman(lengths, right)
    assert found.value == pytest.approx(stats.spearmanr(lengths, right).statistic)
    assert found.low < found.value < found.high < 0.0


def test_the_interval_of_a_rank_correlation_has_the_width_of_its_known_error() -> None:
    generator = np.random.default_rng(11)
    first = generator.normal(size=400)
    second = first + generator.normal(size=400)
    found = spearman(first, second)
    # Bonett and Wright, Psychometrika 65 (2000) 23.
    error = np.sqrt((1 + found.value**2 / 2) / (400 - 3))
    expected = np.tanh(np.arctanh(found.value) + np.array([-1.96, 1.96]) * error)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


def test_a_rank_correlation_counts_clusters_and_not_their_items() -> None:
    generator = np.random.default_rng(12)
    first, second = np.repeat(generator.random((2, 60)), 4, axis=1)
    labels = [str(item // 4) for item in range(240)]
    of_clusters, of_items = spearman(first, second, labels), spearman(first, second)
    assert of_clusters.value == pytest.approx(of_items.value)
    assert of_clusters.high - of_clusters.low == pytest.approx(2 * (of_items.high - of_items.low), rel=0.15)


@pytest.mark.parametrize(
    ("second", "clusters", "said"),
    [
        ([1, 1, 1], None, "all 3 values are 1"),
        ([1, 2], None, "3 and 2 values"),
        ([1, 2, 3], ["a"] * 3, "1 clusters of 3 items"),
    ],
)
def test_what_has_no_correlation_is_refused(second: list[float], clusters: list[str] | None, said: str) -> None:
    with pytest.raises(StatisticsError, match=said):
        spearman([1, 2, 3], second, clusters)
