"""The stage `benchmarks`: every benchmark is drawn in its layout, read back, asked about and scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluation.scenes import context
from valr_ops.evaluation.benchmark_data import build_benchmarks, changed_benchmarks
from valr_ops.evaluation.benchmarks import BenchmarkError, Picture
from valr_ops.evaluation.drawn import Drawing, write_benchmark
from valr_ops.evaluation.questions import Showing, benchmark_of_recipe
from valr_ops.evaluation.scoring import BENCHMARKS, score
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import SyntheticRecipe, override
from valr_ops.store.artifacts import StageContext


def at(folder: Path, **benchmarks: object) -> StageContext:
    changed = override(recipes.tiny(), {"evaluation.benchmarks": benchmarks})
    return replace(context("benchmarks", folder), recipe=changed)


def test_every_benchmark_is_drawn_read_and_answered_rightly(tmp_path: Path) -> None:
    asked = at(tmp_path, **{name: {"drawn": 5} for name in BENCHMARKS})
    report = build_benchmarks(asked)
    listed = json.loads((asked.out / "benchmarks.json").read_text())
    assert set(listed) == set(BENCHMARKS)
    assert report.summary["benchmarks"] == len(BENCHMARKS) == 12
    assert (asked.out / "preview.png").is_file()
    for name in BENCHMARKS:
        opened = benchmark_of_recipe(name, asked.recipe, asked.out, Showing.of(asked))
        assert opened.drawn
        assert opened.revision == listed[name]["revision"]
        assert all(opened.prompt(item)[0] for item in opened.items)
        if name == "mm_halu":  # A judge rates it.
            continue
        right = [opened.case(item, item.gold) for item in opened.items]
        assert {one.score for one in score(right, opened.format, opened.profile)} == {1.0}, name


def test_the_same_seed_draws_the_same_bytes(tmp_path: Path) -> None:
    made = [at(tmp_path / name, vsi_bench={"drawn": 4}, hr_bench={"drawn": 4}) for name in ("one", "other")]
    for each in made:
        build_benchmarks(each)
    one, other = ({p.relative_to(m.out): p.read_bytes() for p in m.out.rglob("*") if p.is_file()} for m in made)
    assert one == other


def test_a_damaged_first_picture_is_left_out_of_the_preview(tmp_path: Path) -> None:
    given = tmp_path / "given"
    write_benchmark(given, Drawing("vstar", 0, 4, SyntheticRecipe()))
    asked = at(tmp_path, vstar={"path": str(given), "limit": 4})
    opened = benchmark_of_recipe("vstar", asked.recipe, asked.out, Showing.of(asked))
    (shown,) = opened.items[0].images
    assert isinstance(shown, Picture)
    (given / shown.file).write_bytes(b"damaged")
    assert build_benchmarks(asked).summary["benchmarks"] == 1
    assert (asked.out / "preview.png").is_file()


def test_a_given_folder_is_counted_and_noticed_when_it_changes(tmp_path: Path) -> None:
    given = tmp_path / "given"
    write_benchmark(given, Drawing("vstar", 0, 6, SyntheticRecipe()))
    with pytest.raises(BenchmarkError, match="is not the whole data set"):
        build_benchmarks(at(tmp_path, vstar={"path": str(given)}))
    with pytest.raises(BenchmarkError, match="is no folder; get it with"):
        build_benchmarks(at(tmp_path, vstar={"path": str(tmp_path / "none")}))
    asked = at(tmp_path, vstar={"path": str(given), "limit": 4})
    build_benchmarks(asked)
    assert not (asked.out / "vstar").exists(), "a given benchmark is never copied"
    assert changed_benchmarks(asked.recipe, asked.out) is None
    table = given / "test_questions.jsonl"
    table.write_text(table.read_text().replace("row", "line"))
    assert changed_benchmarks(asked.recipe, asked.out) == "the files of benchmark vstar changed"
    table.unlink()
    assert "can't be read any more" in (changed_benchmarks(asked.recipe, asked.out) or "")
