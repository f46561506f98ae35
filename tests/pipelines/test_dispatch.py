"""A stage that fails under Dagster fails with its own sentence; one that is a Kubernetes Job is joined to its run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.dispatch import StageRunner, _of_ending
from tests.project import MICRO, copy_project, digests, environment, valr
from tests.release.stub import StubCluster
from tests.release.test_dispatch import until
from tests.store import weed
from valr_ops.recipe import price
from valr_ops.release.endings import RETRIED, Ending
from valr_ops.stages import stage
from valr_ops.store import objects

STORE = "s3://test/valr"


def materialized(name: str, root: Path, go: Path | None = None) -> dg.ExecuteInProcessResult:
    """Materialize one stage in this process; a Job's Pod begins once the file `go` is there."""
    if go is not None:
        from valr_ops.release import manifest

        manifest.stage_command = lambda row, recipe, url: [
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
        ("forbidden", 42),
        ("failed", 1),
        ("killed", 1),
    ],
)
def test_the_end_of_a_job_decides_whether_dagster_tries_again(kind: Any, status: int) -> None:
    said = _of_ending(Ending(kind, "what happened; what to do"), "stage1_sft")
    assert said.description == "what happened; what to do"
    assert said.metadata["exit_status"].value == status
    assert said.allow_retries == (kind in RETRIED) == (status != 42)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose GPU stages are Jobs, made as far as it goes without a GPU."""
    settings = {"dispatch": "kubernetes", "namespace": "default", "bucket": STORE, "grace_seconds": 60}
    root = copy_project(tmp_path_factory.mktemp("dispatch") / "project", {**MICRO, "cluster": settings})
    valr(root, "run", "sources")
    valr(root, "run", "cot_corpus")
    return root


@pytest.fixture
def project(prepared: Path, s3_store: weed.Weed, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, in which no GPU stage was made yet, with an empty store."""
    for name, value in environment(prepared).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VALR_SET", json.dumps({"cluster.bucket": f"{STORE}/{uuid.uuid4().hex}"}))
    lock = yaml.safe_load((prepared / "dvc.lock").read_text())
    lock["stages"] = {name: row for name, row in lock["stages"].items() if name in ("recipe", "sources", "cot_corpus")}
    (prepared / "dvc.lock").write_text(yaml.safe_dump(lock))
    for name in ("artifacts/base_model", ".valr/work"):
        shutil.rmtree(prepared / name, ignore_errors=True)
    return prepared


@pytest.fixture
def cluster(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubCluster]:
    made = StubCluster(cwd=project, disk=tmp_path / "disk")
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path / "kubeconfig")))
    yield made
    made.close()


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


@pytest.mark.services
def test_a_cancelled_run_stops_its_job_and_records_nothing(project: Path, cluster: StubCluster, tmp_path: Path) -> None:
    with orchestrator("base_model", project, tmp_path / "never") as cancelled:
        until(cluster.running, 300)
        cancelled.send_signal(signal.SIGTERM)
        until(lambda: not cluster.jobs)
        cancelled.wait(120)
    assert len(cluster.created) == 1 and "base_model" not in digests(project)


@pytest.mark.services
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_the_job_of_a_killed_run_is_joined_by_the_next_and_a_bucket_that_is_away_is_waited_for(
    project: Path,
    cluster: StubCluster,
    s3_store: weed.Weed,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: int,
) -> None:
    go = tmp_path / "go"
    with orchestrator("base_model", project, go):
        until(lambda: cluster.followed, 300)
    cluster.followed = False
    if seconds < 10:
        # Else a short while is no matter.
        monkeypatch.setattr(objects, "_ATTEMPTS", 1)

    def bucket_goes_away() -> None:
        until(lambda: cluster.followed, 300)
        with s3_store.away():
            time.sleep(seconds)
        go.touch()

    thread = threading.Thread(target=bucket_goes_away)
    thread.start()
    done = materialized("base_model", project, go)
    thread.join()
    said = capfd.readouterr()
    assert done.success, said.err
    assert len(cluster.created) == 1, "the one that was killed made it, and the next attached to it"
    assert said.err.count("what the Pod tells can't be read at the moment") == 1
    (made,) = done.asset_materializations_for_node("base_model")
    assert made.tags["dagster/data_version"] == digests(project)["base_model"]
    assert (project / "artifacts" / "base_model" / "config.json").is_file()

    # What is up to date needs no Job; nor does what was deleted here, for the bucket has the result.
    assert materialized("base_model", project).success
    shutil.rmtree(project / "artifacts" / "base_model")
    again = materialized("base_model", project, go)
    assert again.success and len(cluster.created) == 1
    assert (
        again.asset_materializations_for_node("base_model")[0].tags["dagster/data_version"]
        == digests(project)["base_model"]
    )


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(1200)
def test_what_a_pod_checked_is_told_again_to_who_joins_later(
    project: Path, cluster: StubCluster, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    go.touch()
    for name in ("base_model", "latent_corpus"):
        valr(project, "run", name)
    assert materialized("teacher_features_dinov3", project, go).success
    before = digests(project)["teacher_features_dinov3"]
    shutil.rmtree(project / "artifacts" / "teacher_features_dinov3")
    again = materialized("teacher_features_dinov3", project, go)
    assert again.success and len(cluster.created) == 1
    (check,) = again.get_asset_check_evaluations()
    assert check.passed and check.check_name == "features_are_whole"
    assert digests(project)["teacher_features_dinov3"] == before


@pytest.mark.services
def test_what_costs_too_much_is_not_dispatched(
    project: Path, cluster: StubCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise price.PriceRefusedError("it may take 9 hours; raise price.max_hours")

    monkeypatch.setattr(price, "refuse", refuse)
    data = failure(materialized("base_model", project))
    assert "price.max_hours" in data.description and data.metadata["exit_status"].value == 42
    assert not cluster.created
