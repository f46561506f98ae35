"""What a score is worth: intervals, paired tests and the baseline that needs no model.

In: counts, or one boolean per item in the same item order for two models.
Out: proportions in [0, 1] and p-values; nothing here draws random numbers, so equal answers give equal figures.
Always: an interval or a test of a difference is paired, because both models answered the same items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special


class StatisticsError(ValueError):
    """Counts or answers from which no statistic follows: the message says which and why."""


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion: (low, high) within [0, 1]; also meaningful at 0 and at `n`.

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
        excludes_zero = self.low > 0.0 or self.high < 0.0
        return "differs" if excludes_zero and self.p_value <= 1 - self.confidence else "within noise"


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


def smallest_detectable_difference(
    n: int, discordant_share: float, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Difference in accuracy that `n` paired items show with probability `power`, in [0, 1].

    `discordant_share` is the share of items on which the two models disagree; where it is 0, one item is assumed.

    Source: Miettinen, Biometrics 24 (1968) 339, the leading term of the sample size of McNemar's test.
    """
    if n <= 0:
        raise StatisticsError(f"no detectable difference for n={n}; it needs at least one item")
    quantiles = _two_sided_quantile(confidence) + float(special.ndtri(power))
    return min(1.0, quantiles * math.sqrt(max(discordant_share, 1 / n) / n))


def majority_answer(golds: Sequence[str]) -> tuple[str, float]:
    """The constant answer that scores best on these golds and its accuracy; ties go to the first in the alphabet.

    Raises:
        StatisticsError: no golds.
    """
    if not golds:
        raise StatisticsError("no majority answer without items")
    answer, count = min(Counter(golds).items(), key=lambda entry: (-entry[1], entry[0]))
    return answer, count / len(golds)


def _two_sided_quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise StatisticsError(f"confidence={confidence} is not between 0 and 1; use 0.95")
    return float(special.ndtri(0.5 + confidence / 2))
