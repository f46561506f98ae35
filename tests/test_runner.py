"""What the runner adds to a stage: room before it begins, what it took beside what was planned, and its record."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.project import CHECKOUT
from valr_ops import runner
from valr_ops.recipe import price, recipes
from valr_ops.recipe.recipe import Recipe, override
from valr_ops.stages import RECIPE_FILE, Stage, stage
from valr_ops.store import lineage
from valr_ops.store.artifacts import Check, StageContext, StageReport
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


# -------------------------------------------------------------------------------------------------------------- record


def record_of(name: str, function: Any) -> Stage:
    """The row of `name` with another function, and nothing to look at outside of the project."""
    return replace(stage(name), function=f"{__name__}:{function.__name__}", external_inputs=None, checks=())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with the recipe, and with `sources` made from code.py and the seed."""
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    (tmp_path / "params.yaml").write_text("scale: tiny\n", encoding="utf-8")
    (tmp_path / "code.py").write_text("first", encoding="utf-8")
    # As DVC may be killed when its command has ended, and before it has recorded what that made.
    command = f"{sys.executable} -c 'from {__name__} import under_dvc; under_dvc()' && test ! -e killed"
    stages = {
        "recipe": {"cmd": "make recipe", "deps": ["params.yaml"], "outs": ["artifacts/recipe"]},
        "sources": {
            "cmd": command,
            "deps": ["code.py"],
            "params": [{RECIPE_FILE: ["seed"]}],
            "outs": ["artifacts/sources"],
        },
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setattr(Stage, "code_digest", lambda self, root: (root / "code.py").read_text(encoding="utf-8"))
    monkeypatch.setattr(lineage, "record", lambda root, run, **_: RECORDED.append(run))
    RECORDED.clear()
    return tmp_path


RECORDED: list[lineage.RunRecord] = []


def made_of(project: Path) -> str:
    return (project / "artifacts" / "sources" / "made").read_text(encoding="utf-8")


def overtaken(context: StageContext) -> StageReport:
    """A stage during which the code is edited and another terminal gives another seed, each where code.py says so."""
    code = Path("code.py").read_text(encoding="utf-8")
    (context.out / "made").write_text(f"{code} {context.recipe.seed}", encoding="utf-8")
    if context.recipe.seed == 0 and code == "first":
        for change in json.loads(Path("changes.json").read_text(encoding="utf-8")):
            if change == "code":
                Path("code.py").write_text("second", encoding="utf-8")
            else:
                assert runner.refresh_recipe(Path.cwd(), {"seed": 7})
    return StageReport(summary={})


@pytest.mark.parametrize(
    ("changes", "made", "reasons"),
    [
        (["code"], "second 0", ("code code.py changed",)),
        (["seed"], "first 7", ("recipe field seed: 0 -> 7",)),
        (["code", "seed"], "second 7", ("code code.py changed", "recipe field seed: 0 -> 7")),
    ],
)
def test_what_changes_while_a_stage_runs_is_not_recorded_as_what_made_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], made: str, reasons: tuple[str, ...]
) -> None:
    monkeypatch.setattr(runner, "stage", lambda name: record_of(name, overtaken) if name == "sources" else stage(name))
    (project / "changes.json").write_text(json.dumps(changes), encoding="utf-8")
    assert runner.run("sources").how == "made" and made_of(project) == "first 0"
    recorded = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))["stages"]["sources"]
    assert recorded["params"] == {RECIPE_FILE: {"seed": 0}}
    assert [run.code_digest for run in RECORDED if run.stage == "sources"] == ["first"]
    seed = {"seed": 7} if "seed" in changes else {}
    again = runner.run("sources", seed)
    assert (again.how, again.reasons, made_of(project)) == ("made", reasons, made)
    assert runner.run("sources", seed).how == "hit"
    # And DVC's memory of runs is asked for what it was made from, too.
    (project / "code.py").write_text("first", encoding="utf-8")
    assert runner.run("sources").how == "restored" and made_of(project) == "first 0"


def nightly(context: StageContext) -> StageReport:
    """A stage with a checkpoint, which writes down what it found; its check refuses what code.py calls bad."""
    code, found = Path("code.py").read_text(encoding="utf-8"), context.work / "checkpoint"
    before = (context.previous / "made").read_text(encoding="utf-8") if context.previous else None
    with Path("found.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([before, found.exists()]) + "\n")
    found.touch()
    if code == "third":
        Path("code.py").write_text("fourth", encoding="utf-8")
    (context.out / "made").write_text(code, encoding="utf-8")
    return StageReport(summary={}, checks=(Check("is_good", code != "bad", "it is bad"),))


def under_dvc() -> None:
    """What `dvc repro` starts."""
    assert os.environ["DVC_STAGE"] == "sources"
    runner.stage = lambda name: record_of(name, nightly)
    lineage.record = lambda *_, **__: None  # type: ignore[assignment]
    Stage.code_digest = lambda self, root: (root / "code.py").read_text(encoding="utf-8")  # type: ignore[method-assign]
    runner.run("sources")


def test_under_dvc_a_stage_finds_the_version_before_and_its_checkpoints_until_they_are_recorded(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from dvc.exceptions import ReproductionError
    from dvc.repo import Repo

    monkeypatch.setattr(runner, "stage", lambda name: record_of(name, nightly) if name == "sources" else stage(name))
    code, killed, work = project / "code.py", project / "killed", project / ".valr" / "work"
    runner.run("recipe")
    Repo().reproduce("sources")
    killed.touch()
    code.write_text("second", encoding="utf-8")
    with pytest.raises(ReproductionError):
        Repo().reproduce("sources")
    killed.unlink()
    Repo().reproduce("sources")
    assert made_of(project) == "second"
    assert (work / "sources" / "checkpoint").exists(), "DVC records only what has ended"
    assert runner.run("sources").how == "hit"
    assert list(work.glob("sources*")) == []
    code.write_text("bad", encoding="utf-8")
    with pytest.raises(ReproductionError):
        Repo().reproduce("sources")
    assert made_of(project) == "second", "what was refused leaves the version before"
    assert [json.loads(line) for line in (project / "found.jsonl").read_text().splitlines()] == [
        [None, False],
        ["first", False],
        ["first", True],
        ["second", False],
    ]
    code.write_text("second", encoding="utf-8")
    assert runner.run("sources").how == "hit"
    assert "was edited while it ran" not in capfd.readouterr().err
    code.write_text("third", encoding="utf-8")
    Repo().reproduce("sources")
    assert "the code of sources was edited while it ran" in capfd.readouterr().err
