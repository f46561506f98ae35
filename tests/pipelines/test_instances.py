"""The three Dagster instances agree, and what limits the steps that use a GPU depends on where they run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
import yaml

# What the launcher is made of.
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import WorkerStatus

from assets import factory
from assets.dispatch import StageRunner
from pipelines import launching, schedules
from tests.project import CHECKOUT, environment
from valr_ops import stages

INSTANCES = {
    "machine": CHECKOUT / "infra" / "local" / "dagster.yaml",
    "team": CHECKOUT / "infra" / "local" / "dagster-postgres.yaml",
    "cluster": CHECKOUT / "infra" / "k8s" / "base" / "instance" / "dagster.yaml",
}
MAY_DIFFER = {
    "team": {"storage": "PostgreSQL instead of files"},
    "cluster": {
        "storage": "PostgreSQL instead of files",
        "compute_logs": "the pods' root is read-only",
        "local_artifact_storage": "the pods' root is read-only",
    },
}


def settings(name: str) -> dict[str, Any]:
    """A Dagster instance's settings, without how many runs go at once, which may differ everywhere."""
    found: dict[str, Any] = yaml.safe_load(INSTANCES[name].read_text())
    found["concurrency"]["runs"].pop("max_concurrent_runs")
    return found


@pytest.mark.parametrize("name", ["team", "cluster"])
def test_instances_differ_only_in_where_they_write_and_how_many_runs_go_at_once(name: str) -> None:
    there, here = settings(name), settings("machine")
    assert {key for key in there if there[key] != here.get(key)} == set(MAY_DIFFER[name])
    assert not set(here) - set(there)


def test_every_instance_starts_lost_runs_again_and_lets_one_unasked_run_go_at_a_time() -> None:
    here = settings("machine")
    assert here["run_retries"] == {"enabled": True, "max_retries": 2, "retry_on_asset_or_op_failure": False}
    assert here["concurrency"]["runs"]["tag_concurrency_limits"] == [{"key": schedules.WHY, "limit": 1}]
    assert here["concurrency"]["pools"] == {"default_limit": 1, "granularity": "op"}


def test_the_cluster_takes_as_many_runs_as_its_quota_has_gpus() -> None:
    limits = yaml.safe_load_all((CHECKOUT / "infra" / "k8s" / "base" / "limits.yaml").read_text())
    (quota,) = [one for one in limits if one["kind"] == "ResourceQuota"]
    runs = yaml.safe_load(INSTANCES["cluster"].read_text())["concurrency"]["runs"]["max_concurrent_runs"]
    assert runs == int(quota["spec"]["hard"]["requests.nvidia.com/gpu"])


@pytest.mark.parametrize(("dispatch", "pools"), [("local", ["gpu"]), ("kubernetes", [None])])
def test_the_gpu_of_this_machine_is_a_pool_and_a_cluster_s_is_not(dispatch: str, pools: list[str | None]) -> None:
    script = (
        "import json; from assets.factory import stage_assets; from valr_ops.stages import stage;"
        "pools = {one.op.pool for one in stage_assets if stage(one.key.to_user_string()).resources == 'gpu'};"
        "print(json.dumps(list(pools)))"
    )
    env = environment(CHECKOUT) | {"VALR_SET": json.dumps({"scale": "paper", "cluster.dispatch": dispatch})}
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == pools


def test_the_imports_found_in_the_text_are_those_of_the_syntax_tree() -> None:
    for path in sorted((CHECKOUT / "valr_ops").rglob("*.py")):
        assert set(stages._imports(path)) == _parsed(path), path


def _parsed(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    inside = {name for name in names if name.startswith("valr_ops.")}
    return inside | {name.rsplit(".", 1)[0] for name in inside if name.count(".") > 1}


class Interrupted(StageRunner):
    """Loses the database of Dagster as often as the last of `LOSSES` says."""

    def materialize(self, context: dg.AssetExecutionContext, stage: str, root: Path) -> Any:
        if context.retry_number < LOSSES[-1]:
            raise ConnectionError("the server closed the connection unexpectedly")
        checks = [dg.AssetCheckResult(check_name=spec.name, passed=True) for spec in context.assets_def.check_specs]
        return [dg.MaterializeResult(check_results=checks)]


LOSSES: list[int] = []


@pytest.mark.parametrize(("losses", "succeeds"), [(2, True), (3, False)])
def test_what_befell_dagster_and_not_the_stage_is_tried_again(
    losses: int, succeeds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "ON_A_LAPTOP", False)
    monkeypatch.setattr(factory, "WAITS_SECONDS", (0.01, 0.02))
    LOSSES.append(losses)
    asset = factory.stage_asset(stages.stage("ablation_table"))
    done = dg.materialize([asset], resources={"stages": Interrupted()}, raise_on_error=False)
    assert done.success == succeeds
    if not succeeds:
        (failure,) = [event for event in done.all_node_events if event.is_step_failure]
        assert failure.step_failure_data.user_failure_data.description.startswith("ConnectionError: the server closed")


def test_a_code_server_that_does_not_answer_gets_minutes_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def can_cancel_execution(self, request: Any) -> str:
            raise DagsterUserCodeUnreachableError("connection refused")

    launcher, run = launching.WatchingRunLauncher(), SimpleNamespace(run_id="lost")
    clock = [1000.0]
    monkeypatch.setattr(launching.time, "monotonic", lambda: clock[0])
    for client, seconds, status in [
        (None, 0, WorkerStatus.RUNNING),
        (Silent(), 0, WorkerStatus.RUNNING),
        (Silent(), launching._SECONDS_TO_COME_BACK - 1, WorkerStatus.RUNNING),
        (Silent(), 2, WorkerStatus.FAILED),
    ]:
        clock[0] += seconds
        monkeypatch.setattr(launcher, "_get_grpc_client_for_termination", lambda run_id, answer=client: answer)
        assert launcher.check_run_worker_health(run).status == status
