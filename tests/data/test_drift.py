from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.made import recipe
from valr_ops.data.corpus import CorpusRecord, ImageReference, write_records
from valr_ops.data.drift import (
    DISTRIBUTION_FILE,
    HISTOGRAMS,
    corpus_drift,
    distance_by_chance,
    distribution,
    total_variation,
)
from valr_ops.data.records import Step

Shape = dict[str, Any]


def usual(number: int) -> Shape:
    """Of four records one is of the second source and has three steps."""
    return {"source": "scenes" if number % 4 == 0 else "zebra_cot", "steps": 3 if number % 4 == 0 else 1}


def corpus(folder: Path, records: int, shape: Callable[[int], Shape] = usual) -> Path:
    """A corpus of records of a shape: source, number of steps and of images, and characters of a step."""

    def record(number: int) -> CorpusRecord:
        made = {"source": "zebra_cot", "steps": 1, "images": 1, "characters": 10, **shape(number)}
        return CorpusRecord(
            id=f"{made['source']}/{number}",
            source=made["source"],
            license="CC0-1.0",
            split="train",
            kind="single_view",
            question="Which?",
            answer="this",
            images=(ImageReference("0" * 64, "input", 8, 8),) * made["images"],
            steps=(Step("x" * made["characters"]),) * made["steps"],
        )

    folder.mkdir()
    write_records(folder, map(record, range(records)))
    return folder


def published(folder: Path, records: int, **data: Any) -> Path:
    """A version that an earlier night published."""
    corpus(folder, records)
    assert corpus_drift(folder, None, recipe(**data)).passed
    return folder


def test_the_distribution_counts_sources_steps_characters_and_images(tmp_path: Path) -> None:
    shapes = [
        {"source": "scenes", "steps": 2, "images": 3, "characters": 10},
        {"source": "scenes", "steps": 1, "images": 1, "characters": 21},
        {"source": "zebra_cot", "steps": 1, "images": 1, "characters": 22},
    ]
    folder = corpus(tmp_path / "staged", 3, shapes.__getitem__)
    # Question and answer have six and four characters.
    found = distribution(folder, recipe().data)
    assert found["records"] == 3
    assert found["histograms"] == {
        "source": {"scenes": 2, "zebra_cot": 1},
        "steps": {"1": 2, "2": 1},
        "images": {"1": 2, "3": 1},
        "characters": {"16 to 31": 2, "32 to 63": 1},
    }


def test_the_file_and_the_words_of_a_passed_check_do_not_depend_on_the_version_before(tmp_path: Path) -> None:
    staged = corpus(tmp_path / "staged", 4000)
    first = corpus_drift(staged, None, recipe())
    alone = (staged / DISTRIBUTION_FILE).read_bytes()
    second = corpus_drift(staged, published(tmp_path / "published", 3000), recipe())
    assert first.passed and second.passed and first.name == "corpus_drift"
    assert first.detail == second.detail and (staged / DISTRIBUTION_FILE).read_bytes() == alone
    assert not first.metadata["compared"] and second.metadata["compared"]
    assert [one["histogram"] for one in second.metadata["histograms"]] == list(HISTOGRAMS)
    assert json.loads(json.dumps(second.metadata)) == second.metadata


@pytest.mark.parametrize(
    ("histogram", "shape", "moved"),
    [
        ("by source", {"source": "scenes"}, "scenes went from 25.0% to 100.0%"),
        ("by number of steps", {"steps": 2}, "2 went from 0.0% to 100.0%"),
        ("by characters", {"characters": 40}, "16 to 31 went from 75.0% to 0.0%"),
        ("by number of images", {"images": 2}, "1 went from 100.0% to 0.0%"),
    ],
)
def test_a_corpus_that_drifted_is_blocked_with_what_moved_most_and_how_to_go_on(
    tmp_path: Path, histogram: str, shape: Shape, moved: str
) -> None:
    before = published(tmp_path / "published", 4000)
    check = corpus_drift(corpus(tmp_path / "staged", 4000, lambda number: usual(number) | shape), before, recipe())
    assert not check.passed
    assert histogram in check.detail and moved in check.detail
    assert "though the data part of the recipe is the same" in check.detail
    assert "Correct the source" in check.detail and "--set data.max_drift=null" in check.detail


def test_a_source_that_vanished_overnight_is_named_with_its_share(tmp_path: Path) -> None:
    before = published(tmp_path / "published", 4000, max_drift=0.1)
    staged = corpus(tmp_path / "staged", 3000, lambda number: {"source": "zebra_cot", "steps": 1})
    check = corpus_drift(staged, before, recipe(max_drift=0.1))
    assert not check.passed and "scenes went from 25.0% to 0.0%" in check.detail
    assert "data.max_drift=0.1" in check.detail and "drifted by 0.250" in check.detail


def test_a_changed_recipe_explains_a_changed_corpus(tmp_path: Path) -> None:
    before = published(tmp_path / "published", 4000)
    staged = corpus(tmp_path / "staged", 4000, lambda number: {"steps": 5})
    assert not corpus_drift(staged, before, recipe()).passed
    check = corpus_drift(staged, before, recipe(max_steps=32))
    assert check.passed and not check.metadata["compared"]
    assert "recipe changed" in check.metadata["why_not_compared"]


def test_another_limit_is_no_changed_recipe(tmp_path: Path) -> None:
    before = published(tmp_path / "published", 4000)
    staged = corpus(tmp_path / "staged", 4000, lambda number: {"steps": 5})
    assert not corpus_drift(staged, before, recipe(max_drift=0.5)).passed
    check = corpus_drift(staged, before, recipe(max_drift=None))
    assert check.passed and check.metadata["compared"]
    steps = next(one for one in check.metadata["histograms"] if one["histogram"] == "steps")
    assert steps["distance"] == 1.0
    assert steps["moved_most"][0] == {"category": "5", "before": 0.0, "now": 1.0}


def test_a_version_without_a_distribution_is_nothing_to_compare_with(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    staged = corpus(tmp_path / "staged", 40)
    for previous in (None, tmp_path / "absent", tmp_path / "published"):
        check = corpus_drift(staged, previous, recipe())
        assert check.passed and "no published version" in check.metadata["why_not_compared"]
    (tmp_path / "published" / DISTRIBUTION_FILE).write_text('{"histograms": {"colour": {}}}')
    check = corpus_drift(staged, tmp_path / "published", recipe())
    assert check.passed and "counted something else" in check.metadata["why_not_compared"]


def test_two_nights_of_ten_records_never_drift_however_different_they_are(tmp_path: Path) -> None:
    before = published(tmp_path / "published", 10, max_drift=0.0)
    staged = corpus(tmp_path / "staged", 10, lambda number: {"source": "other", "steps": 9, "images": 4})
    check = corpus_drift(staged, before, recipe(max_drift=0.0))
    assert check.passed and check.metadata["compared"]
    assert all(one["allowed_by_chance"] >= 1 for one in check.metadata["histograms"])


@pytest.mark.parametrize(("records", "categories"), [(20, 4), (100, 4), (100, 60), (3000, 20)])
def test_samples_of_one_distribution_stay_within_chance(records: int, categories: int) -> None:
    random = np.random.default_rng(7)
    distances, allowed = [], []
    for _ in range(500):
        shares = random.dirichlet(np.ones(categories))
        one, other = (
            {str(number): int(count) for number, count in enumerate(random.multinomial(records, shares))}
            for _ in range(2)
        )
        distances.append(total_variation(one, other))
        allowed.append(distance_by_chance(one, other))
    assert all(distance <= bound for distance, bound in zip(distances, allowed, strict=True))
    # It is chance that is subtracted, not a constant: the bound is of the size of what is seen.
    assert np.mean(allowed) < 8 * np.mean(distances)


def test_what_chance_allows_falls_below_one_hundredth_for_a_large_corpus() -> None:
    assert distance_by_chance({"a": 150_000, "b": 300_000}, {"a": 160_000, "b": 290_000}) < 0.01
    assert total_variation({"a": 1, "b": 1}, {"a": 2, "b": 2}) == 0.0
    assert total_variation({"a": 1}, {"b": 5}) == 1.0
    assert total_variation({"a": 3, "b": 1}, {"a": 1, "b": 1}) == 0.25
