"""What the runner adds to a stage: room before it begins, and what it took beside what was planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from valr_ops import runner
from valr_ops.recipe import price, recipes
from valr_ops.recipe.recipe import Recipe, override
from valr_ops.stages import Stage, stage
from valr_ops.store import lineage
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.store.objects import DiskFullError
from valr_ops.store.progress import asset_metadata, open_progress

GIB = 1 << 30
PLANNED = ("planned_seconds_low", "planned_seconds_high", "actual_seconds", "seconds_over_plan")
BEGAN: list[str] = []


def quick(context: StageContext) -> StageReport:
    """A stage that does nothing."""
    BEGAN.append(context.stage)
    (context.out / "made").write_text("x", encoding="utf-8")
    return StageReport(summary={}, timings={"generation_seconds": 1.0})


def knows_better(context: StageContext) -> StageReport:
    """A stage that compares itself with its plan, as training does."""
    return replace(quick(context), timings={"actual_seconds": 7.0})


class Made:
    """A stage with another function, run in an empty project: what was recorded and what Dagster was told."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.told, self.metadata = root, [], dict[str, Any]()
        monkeypatch.chdir(root)
        monkeypatch.setattr(Stage, "code_digest", lambda self, root: "code")
        monkeypatch.setattr(lineage, "record", lambda root, run, **_: lineage.spool(run, root) and None)
        BEGAN.clear()

    def run(self, name: str, recipe: Recipe, function: Any = quick) -> dict[str, float]:
        """The timings that were recorded."""
        row = replace(stage(name), function=f"{__name__}:{function.__name__}", checks=())
        progress = open_progress(self.root, name)
        progress.say = self.told.append  # type: ignore[method-assign]
        progress.materialized = self._materialized  # type: ignore[method-assign]
        runner._make(self.root, row, recipe, None, ("it was asked for",), progress, 0.0)
        (spooled,) = (self.root / ".valr" / "spool").glob("*/record.json")
        timings: dict[str, float] = json.loads(spooled.read_text(encoding="utf-8"))["timings"]
        return timings

    def _materialized(self, report: StageReport, *_: Any, **__: Any) -> None:
        self.metadata = asset_metadata(
            summary=report.summary, timings=report.timings, tables={}, plots=[], report=None, links={}
        )


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["scores_valr_s", "latent_check", "base_model", "teacher_features_dinov3"])
def test_a_gpu_stage_is_recorded_and_shown_beside_its_plan(made: Made, name: str) -> None:
    recipe = recipes.tiny()
    timings = made.run(name, recipe)
    low, high = price.price(recipe, name).working_seconds
    assert (timings["planned_seconds_low"], timings["planned_seconds_high"]) == (low, high)
    assert 0 < timings["actual_seconds"] < low
    assert timings["seconds_over_plan"] == pytest.approx(timings["actual_seconds"] / (low * high) ** 0.5)
    assert timings["generation_seconds"] == 1.0
    assert all(made.metadata[figure]["raw_value"] == timings[figure] for figure in PLANNED)


def test_training_says_it_itself(made: Made) -> None:
    assert made.run("stage1_sft", recipes.tiny(), knows_better)["actual_seconds"] == 7.0


@pytest.mark.parametrize(("name", "left"), [("scores_base", "answers.jsonl"), ("ablation_table", None)])
def test_half_a_run_and_a_stage_of_the_cpu_are_not_held_against_a_plan(made: Made, name: str, left: str | None) -> None:
    if left is not None:
        work = made.root / ".valr" / "work" / name
        work.mkdir(parents=True)
        (work / left).write_text("{}", encoding="utf-8")
    assert not set(PLANNED) & set(made.run(name, recipes.tiny()))


def test_a_stage_whose_price_is_not_known_runs(made: Made) -> None:
    mine = override(recipes.tiny(), {"data.sources": {"mine": {"format": "jsonl", "path": "data/mine"}}})
    assert not set(PLANNED) & set(made.run("scores_base", mine))


# ---------------------------------------------------------------------------------------------------------------- room


def free(monkeypatch: pytest.MonkeyPatch, bytes_: float) -> None:
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(bytes_)))


def test_a_training_that_will_not_fit_does_not_begin(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = price.price(recipes.paper(), "stage1_sft").written_bytes
    free(monkeypatch, needed - GIB)
    with pytest.raises(DiskFullError, match=r"stage1_sft with its checkpoints: .*GiB needed.*make room there"):
        made.run("stage1_sft", recipes.paper())
    assert BEGAN == [] and not (made.root / ".valr" / "staging" / "stage1_sft").exists()


def test_what_an_earlier_run_left_counts(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    work = made.root / ".valr" / "work" / "stage1_sft" / "checkpoints"
    work.mkdir(parents=True)
    with (work / "weights").open("wb") as file:
        file.truncate(2 * GIB)
    free(monkeypatch, price.price(recipes.paper(), "stage1_sft").written_bytes - GIB)
    made.run("stage1_sft", recipes.paper())
    assert BEGAN == ["stage1_sft"]


def test_a_size_that_is_assumed_is_only_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 50 * GIB)
    made.run("cot_corpus", recipes.paper())
    assert any("168 GiB will be written" in one and "50 GiB are free" in one for one in made.told)
