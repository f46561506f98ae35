"""What a score is worth: intervals, tests of differences and trends, and the baseline that needs no model.

In: counts, or one score an item in [0, 1], for two models in the same item order. Items may come in clusters (a scene,
a pair, a rotated question), which share their luck; an empty label is an item by itself. They may be divided into
groups, whose means make up a macro average.
Out: shares in [0, 1] and p-values. What is drawn is drawn from a seed, so equal answers give equal figures.
Always: a test of a difference is paired where both models answered the same items; clusters are resampled whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

Scores = Sequence[float] | Sequence[bool] | np.ndarray
"""[items]."""
_RESAMPLES = 10_000
_DRAWN_AT_ONCE = 4_000_000
"""Numbers, 32 MB."""
_HALF_A_PRINTED_DIGIT = 0.0005
"""A score printed as 52.9 % is anything from 52.85 to 52.95 %."""


class StatisticsError(ValueError):
    """Counts or answers from which no statistic follows: the message says which and why."""


@dataclass(frozen=True)
class Interval:
    """An estimate and where the true value lies."""

    value: float
    low: float
    high: float
    confidence: float
    method: str
    """How the ends were found, in words."""


def wilson_interval(correct: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion: (low, high) within [0, 1]; also meaningful at 0 and at `n`.

    Neither needs to be a whole number: a mean score m of n items is as uncertain as m n right answers, or less.

    Raises:
        StatisticsError: `n` is no positive number, or `correct` is not in 0..n.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209; recommended for small n by Brown, Cai and DasGupta (2001).
    """
    if n <= 0 or not 0 <= correct <= n:
        raise StatisticsError(
            f"no interval for {correct} correct of {n}; an interval needs 0 <= correct <= n and n > 0"
        )
    z = _two_sided_quantile(confidence)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The formula is exact at the ends; rounding is not.
    low = 0.0 if correct == 0 else max(0.0, centre - half_width)
    high = 1.0 if correct == n else min(1.0, centre + half_width)
    return low, high


def bootstrap_interval(
    values: Scores,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    shares: Mapping[str, float] | None = None,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of `values` [items], or of a weighted mean of the means of `groups`.

    Args:
        values: any finite numbers.
        clusters: [items] labels; items of one label are drawn together. An empty label is an item by itself.
        groups: [items] labels, such as question types; a cluster may reach across groups.
        shares: weight of every group, 1 together; equal weights without it.
        resamples: how many times clusters are drawn.
        seed: equal seeds give equal intervals.

    Raises:
        StatisticsError: no items, values that are not finite, labels that don't fit, or nothing that varies: one
            cluster, a group in one cluster, values that leave no spread between clusters.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 2.4 and 3.8.
    """
    sample = _sample(values, clusters, groups, shares)
    lonely = [name for name, reach in zip(sample.names, sample.reach, strict=True) if reach == 1]
    if lonely:
        within = f"group {lonely[0]!r}" if groups is not None else f"the sample of {len(sample.values)}"
        raise StatisticsError(
            f"{within} stands in one cluster, so its spread is unknown; give more clusters, or take score_interval"
        )
    if not sample.spread():
        raise StatisticsError(
            f"the {sample.clusters} clusters are all alike (mean {sample.estimate():g}), so resampling them shows no "
            "spread; take score_interval"
        )
    low, high = _ends(sample.resampled(resamples, seed), confidence)
    return Interval(sample.estimate(), low, high, confidence, f"bootstrap of {sample.units()}")


def score_interval(
    scores: Scores,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    shares: Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Interval of a mean of scores in [0, 1] by the method that fits them; arguments as for `bootstrap_interval`.

    Right and wrong answers to items of their own have Wilson's interval, everything else is resampled. Where resampling
    would show no spread, the interval is Wilson's for as many items as there are clusters: too wide rather than none.

    Raises:
        StatisticsError: no items, scores out of [0, 1], or labels that don't fit.
    """
    sample = _sample(_within(scores, 0.0, 1.0), clusters, groups, shares)
    plain = sample.clusters == len(sample.values) and len(sample.names) == 1
    if not (plain and _right_or_wrong(sample.values)) and sample.spread() and sample.reach.min() > 1:
        return bootstrap_interval(scores, clusters, groups, shares, confidence)
    # The number of items whose plain mean has the variance of this weighted one.
    n = 1 / float(np.sum(sample.shares**2 / sample.reach))
    mean = min(1.0, max(0.0, sample.estimate()))
    low, high = wilson_interval(mean * n, n, confidence)
    return Interval(mean, low, high, confidence, f"Wilson interval of {sample.units()}")


def t_interval(values: Scores, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of `values`, a few independent runs, or differences of pairs of them.

    Raises:
        StatisticsError: fewer than two values, or one that is not finite.
    """
    runs = np.asarray(values, dtype=float)
    if runs.ndim != 1 or runs.size < 2 or not np.isfinite(runs).all():
        raise StatisticsError(f"an interval needs two finite values or more; given {runs.tolist()}")
    _two_sided_quantile(confidence)
    reach = special.stdtrit(runs.size - 1, 0.5 + confidence / 2) * runs.std(ddof=1) / math.sqrt(runs.size)
    mean = float(runs.mean())
    return Interval(mean, mean - float(reach), mean + float(reach), confidence, f"Student's t of {runs.size} runs")


def clustered_standard_error(
    values: Scores,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    shares: Mapping[str, float] | None = None,
) -> float:
    """Standard error of the mean that `bootstrap_interval` is about; without clusters and groups that of any textbook.

    Raises:
        StatisticsError: as there, but values that are all alike have the error 0.

    Source: Liang and Zeger, Biometrika 73 (1986) 13, times C / (C - 1) for C clusters; for benchmarks Miller,
    arXiv 2411.00640.
    """
    sample = _sample(values, clusters, groups, shares)
    if sample.clusters == 1:
        raise StatisticsError("one cluster has no standard error; give more clusters")
    return sample.standard_error()


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one model minus accuracy of another on the same items."""

    n: int
    """Items that both models answered."""
    gained: int
    """Items that only the first model has right."""
    lost: int
    """Items that only the second model has right."""
    difference: float
    """(gained - lost) / n, in [-1, 1]."""
    low: float
    high: float
    """Ends of the interval of the difference."""
    p_value: float
    """Exact McNemar test of no difference, two-sided."""
    confidence: float

    @property
    def verdict(self) -> str:
        """`differs` where the interval leaves out zero and the exact test rejects; else `within noise`.

        Both are asked because the interval is approximate and a little too willing at a handful of discordant items.
        """
        return _verdict(self.low, self.high, self.p_value, self.confidence)

    @property
    def test(self) -> str:
        """What was done, in words."""
        return f"exact McNemar test and Newcombe's interval, {self.n} items"

    @property
    def detectable(self) -> float:
        """The difference that a comparison like this one shows with a probability of 0.8."""
        return smallest_detectable_difference(self.n, (self.gained + self.lost) / self.n, self.confidence)


def paired_difference(
    first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray, confidence: float = 0.95
) -> PairedDifference:
    """Compare two models item by item; `first` and `second` [items] say which answers are right, in one order.

    The interval joins the two Wilson intervals with a correction for the correlation of the pairs, so it keeps a
    width even where the models agree on every item.

    Raises:
        StatisticsError: different lengths, or no items.

    Source: Newcombe, Stat. Med. 17 (1998) 2635, method 10.
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != two.shape or one.ndim != 1 or one.size == 0:
        raise StatisticsError(
            f"a paired comparison needs the same items, one or more; given {one.shape} and {two.shape}"
        )
    n = int(one.size)
    both, gained, lost = int((one & two).sum()), int((one & ~two).sum()), int((~one & two).sum())
    neither = n - both - gained - lost
    right_one, right_two = both + gained, both + lost
    share_one, share_two = right_one / n, right_two / n
    low_one, high_one = wilson_interval(right_one, n, confidence)
    low_two, high_two = wilson_interval(right_two, n, confidence)

    product = right_one * (n - right_one) * right_two * (n - right_two)
    association = float(both * neither - gained * lost)
    if association > 0:
        association = max(association - n / 2, 0.0)
    correlation = association / math.sqrt(product) if product else 0.0

    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = (gained - lost) / n
    return PairedDifference(
        n=n,
        gained=gained,
        lost=lost,
        difference=difference,
        low=max(-1.0, difference - joined(share_one - low_one, high_two - share_two)),
        high=min(1.0, difference + joined(high_one - share_one, share_two - low_two)),
        p_value=exact_mcnemar(gained, lost),
        confidence=confidence,
    )


def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value that a fair coin splits the discordant items as unevenly as `gained` to `lost`.

    Source: McNemar, Psychometrika 12 (1947) 153, in its exact binomial form.
    """
    if gained + lost == 0:
        return 1.0
    # Imported here because it takes a second, and every scoring imports this module.
    from scipy import stats

    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


@dataclass(frozen=True)
class PairedBootstrap:
    """Mean score of one model minus mean score of another on the same items."""

    n: int
    """Items that both models answered."""
    clusters: int
    """Of which that many stand by themselves; `n` without clusters."""
    difference: float
    """In [-1, 1]."""
    low: float
    high: float
    """Ends of the interval of the difference."""
    p_value: float
    """Test by sign flips of no difference, two-sided."""
    standard_error: float
    """Of the difference; 0 where all clusters differ alike."""
    confidence: float

    @property
    def verdict(self) -> str:
        """`differs` where the interval leaves out zero and the test rejects; else `within noise`.

        Both are asked because the interval is too narrow where there are few clusters, and the test is not.
        """
        return _verdict(self.low, self.high, self.p_value, self.confidence)

    @property
    def test(self) -> str:
        """What was done, in words."""
        drawn = f"{self.n} items" if self.clusters == self.n else f"{self.clusters} clusters of {self.n} items"
        return f"test by sign flips and paired bootstrap, {drawn}"

    @property
    def detectable(self) -> float:
        """The difference that a comparison like this one shows with a probability of 0.8.

        Where all clusters differ alike their spread says nothing; then it is at least as far as the interval reaches.
        """
        reach = max(self.difference - self.low, self.high - self.difference)
        return min(1.0, max(reach, detectable_difference(self.standard_error, self.confidence)))


def paired_bootstrap(
    first: Scores,
    second: Scores,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    shares: Mapping[str, float] | None = None,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> PairedBootstrap:
    """Compare two models by scores [items] in [0, 1] of the same items; arguments as for `bootstrap_interval`.

    The interval resamples clusters of differences. The test asks how often the difference is as large as it is if in
    each cluster a coin says which model is which; for right and wrong answers without clusters it is McNemar's. Where
    all clusters differ alike, the interval allows for differing clusters as rare as Wilson's upper end for 0 of them.

    Raises:
        StatisticsError: different lengths, no items, scores out of [0, 1], labels that don't fit, or a group of several
            that stands in one cluster.

    Source: Davison and Hinkley (1997), section 2.4; Fisher, The Design of Experiments (1935), section 21.
    """
    one, two = _within(first, 0.0, 1.0), _within(second, 0.0, 1.0)
    if one.shape != two.shape:
        raise StatisticsError(
            f"a paired comparison needs the same items, one or more; given {one.shape} and {two.shape}"
        )
    sample = _sample(one - two, clusters, groups, shares)
    difference = sample.estimate()
    if sample.spread():
        interval = bootstrap_interval(one - two, clusters, groups, shares, confidence, resamples, seed)
        low, high = interval.low, interval.high
    else:
        _, rare = wilson_interval(0, sample.clusters, confidence)
        low, high = difference - rare * (1 + difference), difference + rare * (1 - difference)
    return PairedBootstrap(
        n=len(one),
        clusters=sample.clusters,
        difference=difference,
        low=low,
        high=high,
        p_value=_sign_flip_test(sample.contributions(), resamples, seed),
        standard_error=sample.standard_error() if sample.clusters > 1 else 0.0,
        confidence=confidence,
    )


def paired_comparison(
    first: Scores, second: Scores, clusters: Sequence[str] | None = None, confidence: float = 0.95
) -> PairedDifference | PairedBootstrap:
    """Compare two models on the same items by the test that fits; ``test`` of the result says which that was.

    Right and wrong answers to items of their own are compared exactly; scores between 0 and 1, and items that share
    clusters, are compared by `paired_bootstrap`.

    Raises:
        StatisticsError: different lengths, no items, scores out of [0, 1], or labels that don't fit.
    """
    one, two = _within(first, 0.0, 1.0), _within(second, 0.0, 1.0)
    if _sample(one, clusters).clusters == len(one) and _right_or_wrong(one) and _right_or_wrong(two):
        return paired_difference(one, two, confidence)
    return paired_bootstrap(one, two, clusters, confidence=confidence)


@dataclass(frozen=True)
class PrintedDifference:
    """A score of ours minus one of which only the printed number is known."""

    difference: float
    """In [-1, 1]."""
    low: float
    high: float
    """Ends of its interval, with what the printed number lost by rounding."""
    printed_low: float
    printed_high: float
    """Wilson's interval of the printed score."""
    detectable: float
    """The difference that a comparison like this one shows with a probability of 0.8."""
    confidence: float

    @property
    def verdict(self) -> str:
        """`differs` where the interval leaves out zero; else `within noise`."""
        return "differs" if self.low > 0.0 or self.high < 0.0 else "within noise"


def against_printed(ours: Interval, printed_percent: float, printed_n: int) -> PrintedDifference:
    """Our score against one printed in percent with one decimal, such as the paper's 52.9 for 5,130 items.

    The comparison is unpaired: which of the items the printed score has right is unknown. Its error is taken to be
    binomial, which is too large for fractional scores and too small for items that come in clusters. The confidence is
    that of `ours`.

    Raises:
        StatisticsError: `printed_percent` is no percentage, or `printed_n` is not positive.

    Source: Newcombe, Stat. Med. 17 (1998) 873, method 10; for any two intervals Zou and Donner, Stat. Med. 27 (2008)
    1693.
    """
    if not 0.0 <= printed_percent <= 100.0:
        raise StatisticsError(f"printed_percent={printed_percent} is no percentage; give the number as it is printed")
    printed = printed_percent / 100
    printed_low, printed_high = wilson_interval(printed * printed_n, printed_n, ours.confidence)
    difference = ours.value - printed
    below = math.hypot(ours.value - ours.low, printed_high - printed) + _HALF_A_PRINTED_DIGIT
    above = math.hypot(ours.high - ours.value, printed - printed_low) + _HALF_A_PRINTED_DIGIT
    error = math.hypot(ours.high - ours.low, printed_high - printed_low) / (2 * _two_sided_quantile(ours.confidence))
    return PrintedDifference(
        difference=difference,
        low=max(-1.0, difference - below),
        high=min(1.0, difference + above),
        printed_low=printed_low,
        printed_high=printed_high,
        detectable=min(1.0, detectable_difference(error, ours.confidence)),
        confidence=ours.confidence,
    )


def detectable_difference(standard_error: float, confidence: float = 0.95, power: float = 0.8) -> float:
    """Difference that is shown with probability `power` where its standard error is `standard_error`; same unit.

    The error of a paired difference is the `clustered_standard_error` of the items' differences; of an unpaired one it
    is ``math.hypot`` of the errors of the two scores.
    """
    return (_two_sided_quantile(confidence) + float(special.ndtri(power))) * standard_error


def smallest_detectable_difference(
    n: int, discordant_share: float, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Difference in accuracy that `n` paired items show with probability `power`, in [0, 1].

    `discordant_share` is the share of items on which the two models disagree; where it is 0, one item is assumed.

    Source: Miettinen, Biometrics 24 (1968) 339, the leading term of the sample size of McNemar's test.
    """
    if n <= 0:
        raise StatisticsError(f"no detectable difference for n={n}; it needs at least one item")
    return min(1.0, detectable_difference(math.sqrt(max(discordant_share, 1 / n) / n), confidence, power))


@dataclass(frozen=True)
class Trend:
    """Whether scores rise over ordered conditions."""

    statistic: float
    """Page's L."""
    p_value: float
    """One-sided: that scores as they are would rise so evenly by chance."""
    blocks: int
    """Items, or clusters of them."""


def page_trend(scores: np.ndarray, clusters: Sequence[str] | None = None) -> Trend:
    """Page's test that scores [items, conditions] rise with the conditions; the mean of a cluster counts as one item.

    Raises:
        StatisticsError: no items, fewer than two conditions, scores that are not finite, or labels that don't fit.

    Source: Page, J. Am. Stat. Assoc. 58 (1963) 216. `scipy.stats.page_trend_test` takes the variance of ranks without
    ties, which for right and wrong answers makes it blind; here the variance is that of the ranks as they are.
    """
    from scipy import stats

    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise StatisticsError(f"a trend needs scores [items, two conditions or more]; given {table.shape}")
    columns = [_sample(column, clusters) for column in table.T]
    blocks = np.stack([column.sums()[:, 0] / column.sizes()[:, 0] for column in columns], axis=1)
    # Means of equal scores may differ in the last bit and would not be ties.
    ranks = stats.rankdata(blocks.round(12), axis=1)
    order = np.arange(1, table.shape[1] + 1)
    statistic = float((ranks @ order).sum())
    centred, steps = ranks - ranks.mean(axis=1, keepdims=True), order - order.mean()
    variance = float((centred**2).sum() * (steps**2).sum() / (len(order) - 1))
    z = float((centred @ steps).sum()) / math.sqrt(variance) if variance else 0.0
    return Trend(statistic, float(special.ndtr(-z)) if variance else 1.0, len(blocks))


def spearman(
    first: Scores,
    second: Scores,
    clusters: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Spearman's rank correlation of two values [items], in [-1, 1], and its interval by resampling clusters.

    Ranks are taken anew in every resample; a resample in which one of the two is constant is left out.

    Raises:
        StatisticsError: different lengths, no items, values that are not finite, a constant, or less than four
            clusters.
    """
    sample, other = _sample(first, clusters), _sample(second, clusters)
    if len(sample.values) != len(other.values):
        raise StatisticsError(f"a correlation needs pairs; given {len(sample.values)} and {len(other.values)} values")
    for one in (sample, other):
        if one.values.min() == one.values.max():
            raise StatisticsError(f"all {len(one.values)} values are {one.values[0]:g}: a constant has no correlation")
    if sample.clusters < 4:
        raise StatisticsError(
            f"the correlation of {sample.units()} has no usable interval; give four clusters, or items by themselves"
        )
    rho = _rank_correlations(np.ones((1, len(sample.values))), sample.values, other.values)[0]
    draws = _drawn(np.ones(sample.clusters), resamples, seed, per_draw=len(sample.values))
    found = np.concatenate(
        [_rank_correlations(counts[:, sample.cluster], sample.values, other.values) for counts in draws]
    )
    low, high = _ends(found[np.isfinite(found)], confidence)
    return Interval(float(rho), low, high, confidence, f"bootstrap of {sample.units()}")


def majority_answer(golds: Sequence[str]) -> tuple[str, float]:
    """The constant answer that scores best on these golds and its accuracy; ties go to the first in the alphabet.

    Raises:
        StatisticsError: no golds.
    """
    if not golds:
        raise StatisticsError("no majority answer without items")
    answer, count = min(Counter(golds).items(), key=lambda entry: (-entry[1], entry[0]))
    return answer, count / len(golds)


def percent(share: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _two_sided_quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise StatisticsError(f"confidence={confidence} is not between 0 and 1; use 0.95")
    return float(special.ndtri(0.5 + confidence / 2))


@dataclass(frozen=True)
class _Sample:
    """Values of items with the clusters they come in and the groups whose means are averaged."""

    values: np.ndarray
    """[items] float."""
    cluster: np.ndarray
    """[items]: number of the item's cluster."""
    clusters: int
    group: np.ndarray
    """[items]: number of the item's group."""
    names: list[str]
    """Of the groups."""
    shares: np.ndarray
    """[groups]: weight of every group's mean, 1 together."""

    def sums(self, values: np.ndarray | None = None) -> np.ndarray:
        """[clusters, groups]."""
        cell = self.cluster * len(self.names) + self.group
        cells = self.clusters * len(self.names)
        counted = np.bincount(cell, self.values if values is None else values, cells)
        return counted.reshape(self.clusters, len(self.names))

    def sizes(self) -> np.ndarray:
        """[clusters, groups]: number of items."""
        return self.sums(np.ones_like(self.values))

    @property
    def reach(self) -> np.ndarray:
        """[groups]: number of clusters that a group stands in."""
        return (self.sizes() > 0).sum(axis=0)

    def means(self) -> np.ndarray:
        """[groups]."""
        return self.sums().sum(axis=0) / self.sizes().sum(axis=0)

    def estimate(self) -> float:
        """The weighted mean of the groups' means."""
        return float(self.means() @ self.shares)

    def contributions(self) -> np.ndarray:
        """[clusters]: what each adds to the estimate."""
        return self.sums() @ (self.shares / self.sizes().sum(axis=0))

    def residuals(self) -> np.ndarray:
        """[clusters]: what each adds to the error of the estimate."""
        sizes = self.sizes()
        return (self.sums() - sizes * self.means()) @ (self.shares / sizes.sum(axis=0))

    def spread(self) -> bool:
        """Whether clusters differ by more than rounding."""
        return bool(np.abs(self.residuals()).max() > 1e-12 * max(1.0, np.abs(self.values).max()))

    def standard_error(self) -> float:
        return math.sqrt(self.clusters / (self.clusters - 1) * float((self.residuals() ** 2).sum()))

    def units(self) -> str:
        """What is resampled, in words."""
        items = f"{len(self.values):,} items"
        return items if self.clusters == len(self.values) else f"{self.clusters:,} clusters of {items}"

    def resampled(self, resamples: int, seed: int) -> np.ndarray:
        """[resamples]: the estimate for clusters drawn with replacement.

        Clusters with the same sums and sizes are interchangeable, so it is drawn how often each kind comes, and not
        which clusters do. A group that a draw misses keeps its mean.
        """
        kinds, counts = np.unique(np.hstack([self.sums(), self.sizes()]), axis=0, return_counts=True)
        means = self.means()
        estimates = []
        for drawn in _drawn(counts, resamples, seed):
            sums, sizes = np.split(drawn @ kinds, 2, axis=1)
            estimates.append(np.where(sizes > 0, sums / np.maximum(sizes, 1), means) @ self.shares)
        return np.concatenate(estimates)


def _sample(
    values: Scores,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    shares: Mapping[str, float] | None = None,
) -> _Sample:
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or numbers.size == 0:
        raise StatisticsError(f"a statistic needs one value an item, one item or more; given {numbers.shape}")
    unusable = np.flatnonzero(~np.isfinite(numbers))
    if unusable.size:
        raise StatisticsError(
            f"{unusable.size} of {numbers.size} values are not finite, first {numbers[unusable[0]]} at item "
            f"{unusable[0]}; give every item a score"
        )
    for name, given in (("clusters", clusters), ("groups", groups)):
        if given is not None and len(given) != numbers.size:
            raise StatisticsError(f"{len(given)} {name} for {numbers.size} items; give one label an item")
    numbered: dict[str | int, int] = {}
    alone = [""] * numbers.size
    labels = alone if clusters is None else clusters
    cluster = [numbered.setdefault(label or item, len(numbered)) for item, label in enumerate(labels)]
    names, group = np.unique(alone if groups is None else groups, return_inverse=True)
    of_name = {str(name): 1 / len(names) for name in names} if shares is None else dict(shares)
    if of_name.keys() != set(names.tolist()) or min(of_name.values()) <= 0 or abs(sum(of_name.values()) - 1) > 1e-9:
        raise StatisticsError(
            f"shares {of_name} don't fit the groups {names.tolist()}; give every group of the items a positive share, "
            "1 together"
        )
    return _Sample(
        numbers, np.array(cluster), len(numbered), group, names.tolist(), np.array([of_name[name] for name in names])
    )


def _within(scores: Scores, low: float, high: float) -> np.ndarray:
    numbers = np.asarray(scores, dtype=float)
    outside = np.flatnonzero((numbers < low) | (numbers > high))
    if outside.size:
        raise StatisticsError(
            f"{outside.size} of {numbers.size} scores are not in [{low:g}, {high:g}], first "
            f"{numbers.flat[outside[0]]:g} at item {outside[0]}; divide by the largest score"
        )
    return numbers


def _right_or_wrong(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _drawn(counts: np.ndarray, resamples: int, seed: int, per_draw: int = 0) -> Iterator[np.ndarray]:
    """How often each kind comes where as many are drawn as there are: [draws, kinds], piece by piece."""
    generator = np.random.default_rng(seed)
    total = int(counts.sum())
    for size in _pieces(resamples, max(len(counts), per_draw)):
        yield generator.multinomial(total, counts / total, size=size).astype(float)


def _pieces(draws: int, per_draw: int) -> Iterator[int]:
    """`draws` in pieces whose numbers fit the memory, where a draw takes `per_draw` of them."""
    at_once = max(1, _DRAWN_AT_ONCE // per_draw)
    yield from (min(at_once, draws - start) for start in range(0, draws, at_once))


def _ends(estimates: np.ndarray, confidence: float) -> tuple[float, float]:
    _two_sided_quantile(confidence)
    low, high = np.quantile(estimates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _sign_flip_test(contributions: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p-value that signs drawn by coins give a sum as far from zero as that of `contributions` [clusters]."""
    sizes, counts = np.unique(np.abs(contributions).round(15), return_counts=True)
    found = abs(float(contributions.sum())) - 1e-12
    generator = np.random.default_rng(seed)
    as_far = 0
    for size in _pieces(resamples, len(counts)):
        ahead = generator.binomial(counts, 0.5, size=(size, len(counts)))
        as_far += int((np.abs((2.0 * ahead - counts) @ sizes) >= found).sum())
    return (as_far + 1) / (resamples + 1)


def _rank_correlations(weights: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[draws]: Spearman's correlation where an item counts `weights` [draws, items] times; nan for a constant."""
    middle = weights.sum(axis=1, keepdims=True) / 2
    one, two = _midranks(weights, first) - middle, _midranks(weights, second) - middle
    covariance = (weights * one * two).sum(axis=1)
    scale = np.sqrt((weights * one**2).sum(axis=1) * (weights * two**2).sum(axis=1))
    return np.divide(covariance, scale, out=np.full_like(scale, np.nan), where=scale > 0)


def _midranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[draws, items]: half a rank less than the usual one, which centres the ranks at half their number."""
    levels, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, level]


def _verdict(low: float, high: float, p_value: float, confidence: float) -> str:
    return "differs" if (low > 0.0 or high < 0.0) and p_value <= 1 - confidence else "within noise"
