"""Whether the same recipe found other data than last time: a corpus that drifted is not published unseen.

In: the staged folder of `cot_corpus`, and the version that it will replace. Out: ``distribution.json`` in the staged
folder (how many records of each source, number of steps, length and number of images) and the blocking `Check`
``corpus_drift``.
Always: the file and the words of a check that passed depend on the corpus and the recipe only, never on the version
before; versions are compared only where the data part of the recipe is the same, because a changed recipe explains a
changed corpus and a bad night of data does not; records are read once, a chunk at a time.

Two corpora of the same kind differ by chance, small ones by much. A histogram drifted if its total variation distance
exceeds ``data.max_drift`` by more than chance gives: the expected distance of two samples of those sizes, and on top of
it what McDiarmid's inequality allows once in ten thousand comparisons (one record moves the distance by at most one
over the number of records). Of two corpora with ten records each nothing can be said, so they never drift; for 450,000
the allowance is below one hundredth.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from valr_ops.data.corpus import Records
from valr_ops.recipe.recipe import DataRecipe, Recipe
from valr_ops.store.artifacts import Check

DISTRIBUTION_FILE = "distribution.json"

HISTOGRAMS = {
    "source": "records by source",
    "steps": "records by number of steps",
    "characters": "records by characters of question, steps and answer",
    "images": "records by number of images",
}
"""What is counted, with the words for it."""

CHANCE_OF_A_FALSE_ALARM = 1e-4
"""At most this often two samples of one kind are called different, for each histogram."""

_SHOWN_CATEGORIES = 5

Histogram = dict[str, int]


@dataclass(frozen=True)
class _Moved:
    """One histogram beside the one before."""

    name: str
    distance: float
    """Total variation distance, 0 to 1: the share of records that stand in another category."""
    chance: float
    """The part of it that two samples of these sizes may show though nothing changed."""
    categories: list[dict[str, Any]]
    """Those that moved most, with their shares before and now."""

    @property
    def beyond_chance(self) -> float:
        return max(self.distance - self.chance, 0.0)


def corpus_drift(staged: Path, previous: Path | None, recipe: Recipe) -> Check:
    """Write the staged corpus' distribution and compare it with the one before.

    Args:
        staged: holds the shards called ``records``; ``distribution.json`` is written into it.
        previous: the published version, or None.
        recipe: ``data.max_drift`` is the largest share of records that may move between categories, None for any.

    Returns:
        a check named ``corpus_drift``; its metadata has the distances and the categories that moved most.

    Raises:
        ShardError: shards that are missing or damaged.
    """
    now = distribution(staged, recipe.data)
    (staged / DISTRIBUTION_FILE).write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    before, why_not = _comparable(previous, now)
    moved = [] if before is None else [_moved(name, before, now) for name in HISTOGRAMS]
    metadata: dict[str, Any] = {
        "compared": before is not None,
        "records": now["records"],
        "max_drift": "null" if recipe.data.max_drift is None else recipe.data.max_drift,
    }
    if before is None:
        metadata["why_not_compared"] = why_not
    else:
        metadata["records_before"] = before["records"]
        metadata["histograms"] = [
            {
                "histogram": one.name,
                "distance": round(one.distance, 4),
                "allowed_by_chance": round(one.chance, 4),
                "moved_most": one.categories,
            }
            for one in moved
        ]
    limit = recipe.data.max_drift
    drifted = [one for one in moved if limit is not None and one.beyond_chance > limit]
    if not drifted:
        histograms = ", ".join(HISTOGRAMS)
        detail = f"the distributions of {now['records']} records by {histograms} are in {DISTRIBUTION_FILE}"
        return Check("corpus_drift", True, detail, metadata)
    worst = max(drifted, key=lambda one: one.beyond_chance)
    most = worst.categories[0]
    detail = (
        f"{HISTOGRAMS[worst.name]} drifted by {worst.distance:.3f} (total variation distance to the published version, "
        f"of which chance explains at most {worst.chance:.3f}), more than data.max_drift={limit}, though the data part "
        f"of the recipe is the same: {most['category']} went from {most['before']:.1%} to {most['now']:.1%} of the "
        "records. Correct the source, or if this is the data that is wanted, raise data.max_drift or publish this "
        "version with --set data.max_drift=null"
    )
    return Check("corpus_drift", False, detail, metadata)


def distribution(folder: Path, recipe: DataRecipe) -> dict[str, Any]:
    """What ``distribution.json`` holds: ``records``, ``histograms`` (names to counts by category) and ``data_recipe``.

    Args:
        folder: with the shards called ``records``.
        recipe: the data part, of which a digest is kept.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in HISTOGRAMS}
    records = 0
    for batch in Records(folder).batches():
        records += len(batch)
        counts["source"].update(_counted(batch["source"]))
        counts["steps"].update(_counted(pc.list_value_length(batch["steps"])))
        counts["images"].update(_counted(pc.list_value_length(batch["images"])))
        characters = _characters(batch)
        # frexp gives the number of binary digits: 0, 1, 2 to 3, 4 to 7, ...
        digits, times = np.unique(np.frexp(characters)[1], return_counts=True)
        bins = ["0" if digit == 0 else f"{1 << digit - 1} to {(1 << digit) - 1}" for digit in digits.tolist()]
        counts["characters"].update(dict(zip(bins, times.tolist(), strict=True)))
    return {
        "records": records,
        "histograms": {name: dict(count) for name, count in counts.items()},
        "data_recipe": _data_digest(recipe),
    }


def total_variation(one: Histogram, other: Histogram) -> float:
    """Half the sum of the absolute differences of shares: 0 for equal, 1 for disjoint histograms, neither empty."""
    ones, others = sum(one.values()), sum(other.values())
    return sum(abs(one.get(name, 0) / ones - other.get(name, 0) / others) for name in {*one, *other}) / 2


def distance_by_chance(one: Histogram, other: Histogram) -> float:
    """A bound on the total variation distance of two samples of one distribution, exceeded once in ten thousand times.

    The mean is at most half the sum of the standard deviations of the differences of shares (Jensen), with shares
    pooled from both; one sample changes the distance by at most one over the sample size (McDiarmid 1989).
    """
    ones, others = sum(one.values()), sum(other.values())
    variance = 1 / ones + 1 / others
    shares = ((one.get(name, 0) + other.get(name, 0)) / (ones + others) for name in sorted({*one, *other}))
    mean = sum(math.sqrt(share * (1 - share) * variance) for share in shares) / 2
    return mean + math.sqrt(math.log(1 / CHANCE_OF_A_FALSE_ALARM) / 2 * variance)


def _comparable(previous: Path | None, now: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The distribution to compare with, or None and why there is none."""
    if previous is None or not (previous / DISTRIBUTION_FILE).is_file():
        return None, "there is no published version with a distribution"
    before = json.loads((previous / DISTRIBUTION_FILE).read_text(encoding="utf-8"))
    if set(before.get("histograms", ())) != set(HISTOGRAMS):
        return None, "the published version counted something else"
    if before["data_recipe"] != now["data_recipe"]:
        return None, "the data part of the recipe changed, which explains a changed corpus"
    if not before["records"] or not now["records"]:
        return None, "one of the versions has no records"
    return before, ""


def _moved(name: str, before: dict[str, Any], now: dict[str, Any]) -> _Moved:
    old, new = before["histograms"][name], now["histograms"][name]
    shares = {one: (old.get(one, 0) / before["records"], new.get(one, 0) / now["records"]) for one in {*old, *new}}
    most = sorted(shares, key=lambda one: (-abs(shares[one][1] - shares[one][0]), one))[:_SHOWN_CATEGORIES]
    categories = [
        {"category": one, "before": round(shares[one][0], 4), "now": round(shares[one][1], 4)} for one in most
    ]
    return _Moved(name, total_variation(old, new), distance_by_chance(old, new), categories)


def _data_digest(recipe: DataRecipe) -> str:
    """Of all that says which records there are. The limit itself does not, and raising it must not end comparing."""
    values = recipe.model_dump(mode="json", exclude={"max_drift"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _counted(column: pa.Array) -> dict[str, int]:
    counts = pc.value_counts(column).flatten()
    return {str(value): times for value, times in zip(counts[0].to_pylist(), counts[1].to_pylist(), strict=True)}


def _characters(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """Of question, steps and answer of each record."""
    steps = batch["steps"]
    owners = pc.list_parent_indices(steps).to_numpy()
    texts = pc.utf8_length(pc.struct_field(steps.flatten(), "text")).fill_null(0).to_numpy(zero_copy_only=False)
    inside = np.bincount(owners, weights=texts, minlength=len(batch)).astype(np.int64)
    around = pc.add(pc.utf8_length(batch["question"]), pc.utf8_length(batch["answer"])).fill_null(0)
    return inside + around.to_numpy(zero_copy_only=False)
