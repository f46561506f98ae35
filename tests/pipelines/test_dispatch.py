"""A stage that fails under Dagster fails with its own sentence; one that is a Kubernetes Job is joined to its run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.dispatch import StageRunner, _of_ending
from tests.project import MICRO, copy_project, digests, environment, valr
from tests.release.stub import StubCluster
from tests.release.test_dispatch import until
from tests.store import weed
from valr_ops.release.dispatch import RETRIED, Ending
from valr_ops.stages import stage

STORE = "s3://test/valr"


def materialized(name: str, root: Path, go: Path | None = None) -> dg.ExecuteInProcessResult:
    """Materialize one stage in this process; a Job's Pod begins once the file `go` is there."""
    if go is not None:
        from valr_ops.release import dispatch

        dispatch.stage_command = lambda row, recipe, url: [
            *(
                "sh",
                "-c",
                f"until test -e {go}; do sleep 0.1; done; exec python3 -m valr_ops run {row.name} --job {url}",
            )
        ]
    row = stage(name)

    @dg.asset(name=name, check_specs=[dg.AssetCheckSpec(check, asset=name, blocking=True) for check in row.checks])
    def made(context: dg.AssetExecutionContext, stages: StageRunner) -> Iterator[Any]:
        yield from stages.materialize(context, name, root)

    resources = {"stages": StageRunner(poll_seconds=0.2)}
    return dg.materialize([made], resources=resources, raise_on_error=False)


def failure(done: dg.ExecuteInProcessResult) -> Any:
    assert not done.success
    (event,) = [event for event in done.all_node_events if event.is_step_failure]
    return event.step_failure_data.user_failure_data


def test_a_failed_stage_says_in_dagster_what_it_says_on_the_command_line(tmp_path: Path, monkeypatch) -> None:
    root = copy_project(tmp_path / "project")
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)
    data = failure(materialized("stage2_valr_m", root))
    assert "valr materialize +stage2_valr_m" in data.description
    assert data.metadata["exit_status"].value == 42


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("resume", 75),
        ("evicted", 75),
        ("configuration", 42),
        ("memory", 42),
        ("image", 42),
        ("failed", 1),
        ("killed", 1),
    ],
)
def test_the_end_of_a_job_decides_whether_dagster_tries_again(kind: Any, status: int) -> None:
    said = _of_ending(Ending(kind, "what happened; what to do"), "stage1_sft")
    assert said.description == "what happened; what to do"
    assert said.metadata["exit_status"].value == status
    assert said.allow_retries == (kind in RETRIED) == (status != 42)


@pytest.fixture
def cluster_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, StubCluster]]:
    """A project whose GPU stages are Jobs of the stub, with a real bucket, made as far as it goes without a GPU."""
    settings = {"dispatch": "kubernetes", "namespace": "default", "bucket": STORE, "grace_seconds": 60}
    root = copy_project(tmp_path / "project", {**MICRO, "cluster": settings})
    with weed.serving(tmp_path / "weed") as server:
        for name, value in {**environment(root), **weed.environment(server)}.items():
            monkeypatch.setenv(name, value)
        cluster = StubCluster(cwd=root, disk=tmp_path / "disk")
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
        try:
            valr(root, "run", "sources")
            valr(root, "run", "cot_corpus")
            yield root, cluster
        finally:
            cluster.close()


@contextmanager
def orchestrator(name: str, root: Path, go: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`materialized` in a process of its own, which is killed at the end."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.pipelines.test_dispatch import materialized\n"
        "materialized(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    words = [sys.executable, "-c", script, name, str(root), str(go)]
    process = subprocess.Popen(words, cwd=root, env=os.environ)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.services
def test_a_stage_in_a_job_survives_cancelling_and_the_death_of_dagster(
    cluster_project: tuple[Path, StubCluster], tmp_path: Path
) -> None:
    root, cluster = cluster_project
    go = tmp_path / "go"

    # Cancelled: its Job goes, and nothing is recorded.
    with orchestrator("base_model", root, go) as cancelled:
        until(cluster.running, 120)
        cancelled.send_signal(signal.SIGTERM)
        until(lambda: not cluster.jobs)
        cancelled.wait(60)
    assert len(cluster.created) == 1 and "base_model" not in digests(root)

    # Killed: its Job stays, and the next run attaches to it.
    with orchestrator("base_model", root, go):
        until(cluster.running, 120)
    go.touch()
    done = materialized("base_model", root, go)
    assert done.success
    assert len(cluster.created) == 2, "one that was cancelled, and one that both of the others share"
    (made,) = done.asset_materializations_for_node("base_model")
    assert made.tags["dagster/data_version"] == digests(root)["base_model"]
    assert (root / "artifacts" / "base_model" / "config.json").is_file()

    # What is up to date needs no Job.
    assert materialized("base_model", root).success
    assert len(cluster.created) == 2

    # Deleted here and made anew: the bucket has its result, and tells the run what its Pod told.
    valr(root, "run", "latent_corpus")
    assert materialized("teacher_features_dinov3", root, go).success
    before = digests(root)["teacher_features_dinov3"]
    subprocess.run(["rm", "-r", str(root / "artifacts" / "teacher_features_dinov3")], check=True)
    again = materialized("teacher_features_dinov3", root, go)
    assert again.success and len(cluster.created) == 3
    (check,) = again.get_asset_check_evaluations()
    assert check.passed and check.check_name == "features_are_whole"
    assert digests(root)["teacher_features_dinov3"] == before


@pytest.mark.slow
@pytest.mark.services
def test_what_costs_too_much_is_not_dispatched(
    cluster_project: tuple[Path, StubCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cluster = cluster_project
    monkeypatch.setenv("VALR_SET", '{"cluster.dispatch": "local"}')
    valr(root, "run", "base_model")
    valr(root, "run", "latent_corpus")
    monkeypatch.setenv("VALR_SET", '{"price.max_hours": 1e-9}')
    data = failure(materialized("teacher_features_dinov3", root))
    assert "price.max_hours" in data.description and data.metadata["exit_status"].value == 42
    assert not cluster.created
