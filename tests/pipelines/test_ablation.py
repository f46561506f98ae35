"""The cells of the paper's tables: a stage each for the verb and for DVC, a partition each for Dagster."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets import factory, retrying
from assets.ablation import CELLS, ablation
from assets.dispatch import StageRunner
from tests.pipelines.servers import backfill_of
from tests.project import CHECKOUT, copy_project
from valr_ops import orchestration, runner, workspace
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import RecipeError
from valr_ops.stages import STAGES, UnknownStageError, ablation_cells, requested_yaml, stage, upstream
from valr_ops.store.artifacts import Ledger, folder

SFT_CELL = "figure3_vanilla_sft_10k"


def test_every_trained_model_of_the_paper_is_a_stage_or_a_cell_and_none_is_both() -> None:
    own = {row.variant for row in STAGES if row.variant}
    assert set(ablation_cells()) | {"valr_s", "valr_m"} == {*recipes.paper().variants, *recipes.mini().variants}
    assert not own & set(ablation_cells())


def test_a_cell_reads_the_features_that_it_is_aligned_to_and_no_others() -> None:
    for cell, row in ablation_cells().items():
        scale = recipes.paper() if cell in recipes.paper().variants else recipes.mini()
        features = {name.removeprefix("teacher_features_") for name in row.inputs if name.startswith("teacher_")}
        teachers = set(scale.for_variant(cell).alignment.teachers)
        assert features == (set() if "sft" in cell else teachers), cell
        assert f"variants.{cell}" in row.parameters and row.variant == cell
    assert stage(f"stage2_ablation@{SFT_CELL}").function.endswith("build_stage1")


def test_the_pipeline_of_the_cells_is_what_the_table_generates() -> None:
    written = CHECKOUT / "ablation" / "dvc.yaml"
    assert written.read_text(encoding="utf-8") == requested_yaml(), "run: valr stages --write"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stage2_ablation", "is made by cell, as stage2_ablation@CELL; cells: figure3_valr_m_100k, "),
        ("stage2_ablation@table5_clipp", "did you mean stage2_ablation@table5_clip"),
        ("stage2_ablation@valr_s", "has no cell 'valr_s'"),
    ],
)
def test_what_is_no_cell_is_refused_with_the_cells(name: str, said: str) -> None:
    with pytest.raises(UnknownStageError, match=re.escape(said)):
        stage(name)


def test_a_plus_selects_what_a_cell_needs_and_dagster_is_given_its_partition() -> None:
    name = "stage2_ablation@table5_clip"
    chosen = orchestration.select([f"+{name}", "stage2_ablation@valr_no_va"])
    assert chosen[-2:] == (name, "stage2_ablation@valr_no_va")
    assert "teacher_features_clip" in chosen and "teacher_features_dinov3" not in chosen
    assert [row.name for row in upstream([name])][-1] == name
    words = workspace.materialize_command((name,))
    assert words[-3:] == ["key:stage2_ablation", "--partition", "table5_clip"]


# ----------------------------------------------------------------------------------------------------------------- DVC


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project at scale small in which everything that the cells need is there and recorded, though empty."""
    root = copy_project(tmp_path_factory.mktemp("cells") / "project", {"scale": "small"})
    recipe = folder(root, "recipe")
    recipe.mkdir(parents=True)
    (recipe / "recipe.yaml").write_text(yaml.safe_dump(recipes.small().model_dump(mode="json")))
    for row in ablation_cells().values():
        for name in row.inputs:
            write(root, name, name)
    return root


def write(root: Path, name: str, content: str) -> None:
    made = folder(root, name)
    made.mkdir(parents=True, exist_ok=True)
    (made / "manifest.json").unlink(missing_ok=True)
    (made / "manifest.json").write_text(json.dumps(content))


def test_dvc_records_each_cell_and_says_why_one_is_out_of_date(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    aligned, fine_tuned = names = ["stage2_ablation@table5_clip", f"stage2_ablation@{SFT_CELL}"]
    ledger = Ledger(project)
    assert {state.reasons for state in ledger.states(names).values()} == {("it was not made yet",)}
    for name in names:
        write(project, name, f"model of {name}")
    assert ledger.commit(aligned) != ledger.commit(fine_tuned)
    assert (project / "artifacts" / "stage2_ablation" / "table5_clip").is_dir()
    assert all(state.up_to_date for state in ledger.states(names).values())
    assert not (project / "dvc.lock").exists(), "the cells have a lock file of their own"

    write(project, "teacher_features_clip", "others")
    parameters = project / "artifacts" / "recipe" / "recipe.yaml"
    recipe = yaml.safe_load(parameters.read_text())
    recipe["variants"]["table5_clip"]["slots"] = 9
    parameters.write_text(yaml.safe_dump(recipe))
    states = Ledger(project).states(names)
    assert states[fine_tuned].up_to_date
    assert set(states[aligned].reasons) == {
        "recipe field variants.table5_clip.slots: null -> 9",
        "input teacher_features_clip changed",
    }


def test_all_cells_can_be_resolved_by_dvc(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    stages = Ledger(project).repo.stage.load_all("ablation/dvc.yaml")
    studies = [row for row in STAGES if row.on_request]
    assert {one.name for one in stages} == {row.name for row in (*ablation_cells().values(), *studies)}
    for one in stages:
        row = stage(one.name)
        needed = {str(dep) for dep in one.deps if str(dep).startswith("artifacts/")} - {"artifacts/recipe/recipe.yaml"}
        assert needed == {f"artifacts/{name}" for name in row.inputs}, one.name
        assert {str(dep) for dep in one.deps} >= set(row.code)
        assert one.cmd == f"python -m valr_ops run {row.name}"
        assert [str(out) for out in one.outs] == ["artifacts/" + row.name.replace("@", "/")]


def test_the_prices_of_the_chosen_cells_are_shown_with_their_sum(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["stage2_ablation@valr_no_va", "stage2_ablation@table5_clip"]
    orchestration._show_prices(project, names)
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "2 together" in shown and "dollars" in shown
    orchestration._show_prices(project, [])
    assert capsys.readouterr().out == ""


def test_a_cell_that_the_recipe_does_not_have_is_refused_before_anything_is_made(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    recipe = folder(project, "recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipes.tiny().model_dump(mode="json")))
    with pytest.raises(RecipeError, match="there is no variant 'table6_block4' at scale tiny"):
        runner.out_of_date(project, ("stage2_ablation@table6_block4",))


# ------------------------------------------------------------------------------------------------------------- Dagster


ASKED: list[str] = []
FAILURES: list[int | None] = []


class Recording(StageRunner):
    """Makes nothing: notes in `ASKED` what it was asked for, and fails as `FAILURES` says, try after try."""

    def materialize(self, context: dg.AssetExecutionContext, stage: str, root: Path) -> Any:
        ASKED.append(stage)
        if FAILURES and (status := FAILURES.pop(0)) is not None:
            metadata = {} if status == 1 else {"exit_status": status}
            raise dg.Failure(f"ended with {status}", metadata=metadata, allow_retries=status != 42)
        checks = [dg.AssetCheckResult(check_name=spec.name, passed=True) for spec in context.assets_def.check_specs]
        yield dg.MaterializeResult(metadata={"cell": stage}, check_results=checks)


@pytest.fixture(autouse=True)
def nothing_asked_yet() -> None:
    ASKED.clear()
    FAILURES.clear()


def test_the_partitions_are_the_cells_of_the_recipe_at_its_scale() -> None:
    at_tiny = [cell for cell in ablation_cells() if cell in recipes.tiny().variants]
    assert list(CELLS) == at_tiny == ["valr_no_va", "valr_qwen_encoder"]
    assert ablation.partitions_def is not None and ablation.partitions_def.get_partition_keys() == at_tiny


def test_each_cell_is_a_run_of_its_own() -> None:
    instance = dg.DagsterInstance.ephemeral()
    for cell in CELLS:
        done = dg.materialize([ablation], partition_key=cell, instance=instance, resources={"stages": Recording()})
        assert done.success
    assert [f"stage2_ablation@{cell}" for cell in CELLS] == ASKED
    assert instance.get_materialized_partitions(dg.AssetKey("stage2_ablation")) == set(CELLS)


def test_a_run_says_what_its_cell_costs_and_all_that_were_chosen_with_it() -> None:
    instance = dg.DagsterInstance.ephemeral()
    graph = dg.Definitions(assets=[ablation], resources={"stages": Recording()}).resolve_asset_graph()
    chosen = backfill_of("two", graph, CELLS, instance)
    instance.add_backfill(chosen)
    said = {}
    for tags in ({}, {"dagster/backfill": "two"}):
        resources = {"stages": Recording()}
        done = dg.materialize([ablation], partition_key="valr_no_va", instance=instance, resources=resources, tags=tags)
        lines = [entry.user_message for entry in instance.all_logs(done.run_id) if "dollars" in entry.user_message]
        said[len(tags)] = "".join(lines)
    assert "valr_no_va: " in said[0] and "together" not in said[0]
    assert "valr_no_va: " in said[1] and "; 2 together: " in said[1]


def test_steps_on_the_gpu_are_kept_apart_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "ON_A_LAPTOP", False)
    pools = {row.name: factory.stage_asset(row).op.pool for row in STAGES}
    assert {name for name, pool in pools.items() if pool == "gpu"} == {
        row.name for row in STAGES if row.resources == "gpu"
    }
    assert ablation.op.pool is None, "at scale tiny nothing needs the GPU"


def test_a_step_waits_while_another_run_has_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "ON_A_LAPTOP", False)
    shutil.copyfile(CHECKOUT / "infra" / "local" / "dagster.yaml", tmp_path / "dagster.yaml")
    asset = factory.stage_asset(stage("base_model"))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance, ThreadPoolExecutor(1) as threads:
        events = instance.event_log_storage
        events.initialize_concurrency_limit_to_default("gpu")
        assert events.claim_concurrency_slot("gpu", "another run", "stage2_valr_m").is_claimed
        running = threads.submit(dg.materialize, [asset], instance=instance, resources={"stages": Recording()})
        time.sleep(3)
        assert ASKED == [] and not running.done()
        events.free_concurrency_slots_for_run("another run")
        assert running.result(60).success and ASKED == ["base_model"]


# ------------------------------------------------------------------------------------------------------------- retries


def tried(failures: list[int | None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The end of a run of a stage away from a laptop that ends with these statuses, one a try (None: it is made)."""
    monkeypatch.setattr(factory, "ON_A_LAPTOP", False)
    monkeypatch.setattr(factory, "WAITS_SECONDS", (0.01, 0.02))
    FAILURES.extend(failures)
    asset = factory.stage_asset(stage("ablation_table"))
    return dg.materialize([asset], resources={"stages": Recording()}, raise_on_error=False)


@pytest.mark.parametrize(
    ("failures", "tries", "succeeds"),
    [
        ([42, None], 1, False),
        ([1, 1, None], 3, True),
        ([1, 1, 1, None], 3, False),
        ([75] * 6 + [None], 7, True),
        ([75, 75, 75, 1, 75, 1, None], 7, True),
        ([75, 75, 1, 1, 1, None], 5, False),
        ([1, 42, None], 2, False),
    ],
)
def test_the_kind_of_the_failure_decides_how_often_a_stage_is_tried(
    failures: list[int | None],
    tries: int,
    succeeds: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = tried(failures, monkeypatch)
    assert (len(ASKED), done.success) == (tries, succeeds)


def test_the_last_failure_is_told_in_the_stages_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "_RESUMES", 2)
    for failures in ([1, 1, 1], [75, 75, 75]):
        done = tried(list(failures), monkeypatch)
        (failure,) = [event for event in done.all_node_events if event.is_step_failure]
        assert failure.step_failure_data.user_failure_data.description == f"ended with {failures[-1]}"


def test_on_a_laptop_a_failure_is_told_at_once() -> None:
    FAILURES.append(1)
    done = dg.materialize(
        [ablation], partition_key="valr_no_va", resources={"stages": Recording()}, raise_on_error=False
    )
    assert not done.success and len(ASKED) == 1
