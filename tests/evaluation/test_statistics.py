"""Intervals, paired tests and the majority baseline, held against published values and against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from valr_ops.evaluation.statistics import (
    StatisticsError,
    exact_mcnemar,
    majority_answer,
    paired_difference,
    smallest_detectable_difference,
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
