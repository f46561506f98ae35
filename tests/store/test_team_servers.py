"""MLflow and Dagster for a team: both on PostgreSQL, files in S3, for real, and what a restart of PostgreSQL costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.project import CHECKOUT, copy_project, digests, environment
from tests.store import postgres, weed
from tests.store.postgres import PASSWORD, Postgres, free_port
from tests.store.test_lineage import a_run, runs, spooled
from valr_ops import workspace
from valr_ops.store.lineage import find_runs, record

SECONDS_TO_START = 120


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres.serving() as server:
        yield server


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> weed.Weed:
    return weed.shared(request.config)


@contextmanager
def started(words: list[str], cwd: Path, env: Mapping[str, str], address: str, log: Path) -> Iterator[psutil.Process]:
    """A server that answers at `address`, in a session of its own, ended with all its processes."""
    with log.open("wb") as stream:
        server = subprocess.Popen(
            words,
            cwd=cwd,
            env=dict(env),
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + SECONDS_TO_START
        while server.poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        else:
            raise AssertionError(f"{words} does not answer: {log.read_text()[-3000:]}")
        yield psutil.Process(server.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            finally:
                os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def tracking(
    database: Postgres, store: weed.Weed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, psutil.Process, Path]]:
    """(address, process, log) of the team's tracking server, as mlflow/serve.sh starts it."""
    port, log = free_port(), tmp_path_factory.mktemp("tracking") / "log"
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    env = {
        **ours,
        **weed.environment(store),
        "MLFLOW_BACKEND_STORE_URI": database.create("mlflow"),
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://test/mlflow",
        "MLFLOW_PORT": str(port),
    }
    address = f"http://127.0.0.1:{port}"
    with started([str(CHECKOUT / "mlflow" / "serve.sh")], CHECKOUT, env, f"{address}/health", log) as server:
        yield address, server, log


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which the process and its children wait for connections."""
    family = [process, *process.children(recursive=True)]
    return {
        connection.laddr.ip
        for one in family
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.services
def test_runs_lie_in_postgresql_and_their_files_in_s3_and_nothing_shows_a_secret(
    tracking: tuple[str, psutil.Process, Path],
    database: Postgres,
    store: weed.Weed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, server, log = tracking
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    run, warnings = a_run(tmp_path), list[str]()
    url = record(tmp_path, run, warn=warnings.append)
    assert warnings == [] and url is not None and url.startswith(address)
    (found,) = runs(tmp_path, run)
    assert [row.dataset.digest for row in found.inputs.dataset_inputs] == [run.input_digests["cot_corpus"]]
    keys = [row["Key"] for row in store.client().list_objects_v2(Bucket="test", Prefix="mlflow/")["Contents"]]
    assert any(key.endswith("plots/loss.png") for key in keys) and any(key.endswith("table.md") for key in keys)
    (known,) = find_runs(tmp_path, "output.digest", [run.output_digest])[run.output_digest]
    assert (known.input_digests, known.git_commit, known.url) == (run.input_digests, run.git_commit, url)

    dumped = database.dump("mlflow")
    assert run.output_digest in dumped
    processes = [server, *server.children(recursive=True)]
    said = [dumped, log.read_text(), *(" ".join(one.cmdline()) for one in processes)]
    for secret in (PASSWORD, weed.SECRET):
        assert not any(secret in text for text in said)
    assert listening(server) == {"127.0.0.1"}


@pytest.mark.services
def test_a_restart_of_postgresql_during_training_costs_one_line_and_no_metric(
    tracking: tuple[str, psutil.Process, Path], database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking[0])
    warnings = list[str]()
    before, during, after = (a_run(tmp_path) for _ in range(3))
    assert record(tmp_path, before, warn=warnings.append) is not None
    curve = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "time": 1_700_000_000.0 + step, "metrics": {"loss": 1 / step}} for step in range(1, 51)]
    curve.write_text("".join(json.dumps(row) + "\n" for row in rows))
    during = a_run(tmp_path, metrics_file=curve)
    database.stop()
    try:
        assert record(tmp_path, during, warn=warnings.append) is None
    finally:
        database.start()
    assert len(warnings) == 1 and "goes out with the next stage" in warnings[0] and PASSWORD not in warnings[0]
    assert spooled(tmp_path) == [during.id]
    # The stage ends, and with it goes its file.
    curve.unlink()
    assert record(tmp_path, after, warn=warnings.append) is not None
    assert len(warnings) == 1 and spooled(tmp_path) == []
    assert [len(runs(tmp_path, run)) for run in (before, during, after)] == [1, 1, 1]
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=tracking[0])
    history = client.get_metric_history(runs(tmp_path, during)[0].info.run_id, "steps/loss")
    assert [(point.step, point.value) for point in history] == [(row["step"], 1 / row["step"]) for row in rows]


@pytest.mark.services
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "MLFLOW_BACKEND_STORE_URI is no postgresql:// address"),
        (
            {"MLFLOW_BACKEND_STORE_URI": "postgresql://u:hunter22@h/d"},
            "MLFLOW_ARTIFACTS_DESTINATION is no s3:// address",
        ),
    ],
)
def test_a_tracking_server_without_its_settings_says_which_and_does_not_start(given: dict[str, str], said: str) -> None:
    env = {"PATH": os.environ["PATH"], **given}
    done = subprocess.run([CHECKOUT / "mlflow" / "serve.sh"], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 42 and said in done.stderr and "hunter22" not in done.stderr


@pytest.fixture(scope="module")
def team_project(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A project whose Dagster instance is in PostgreSQL, and the environment of a shell in it."""
    pytest.importorskip("dagster_postgres", reason="the extra `team` is not installed")
    root = copy_project(tmp_path_factory.mktemp("team") / "project")
    workspace.prepare(root)
    shutil.copyfile(root / "infra" / "local" / "dagster-postgres.yaml", root / ".valr" / "dagster" / "dagster.yaml")
    address = database.create("dagster").replace("postgresql:", "postgresql+psycopg2:")
    return root, environment(root) | workspace.environment(root) | {"VALR_DAGSTER_DATABASE": address}


@pytest.mark.services
def test_dagster_records_in_postgresql_and_its_pages_outlive_a_restart_of_it(
    team_project: tuple[Path, dict[str, str]], database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    root, shell = team_project
    words = [sys.executable, "-m", "dagster", "asset", "materialize", "--select", "recipe"]
    done = subprocess.run(words, cwd=root, env=shell, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list((root / ".valr" / "dagster").rglob("*.db")), "nothing of it is in SQLite"
    monkeypatch.setenv("VALR_DAGSTER_DATABASE", shell["VALR_DAGSTER_DATABASE"])
    port = free_port()
    page = f"http://127.0.0.1:{port}"
    server_words = [sys.executable, "-m", "dagster_webserver", "-m", "pipelines.definitions", "-p", str(port)]
    with dg.DagsterInstance.from_config(str(root / ".valr" / "dagster")) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("recipe"))
        assert event is not None and event.asset_materialization is not None
        assert event.asset_materialization.tags["dagster/data_version"] == digests(root)["recipe"]
        with started(server_words, root, shell, f"{page}/server_info", tmp_path / "log") as server:
            assert latest(page) == event.run_id
            assert listening(server) == {"127.0.0.1"}
            database.stop()
            database.start()
            # Dagster notices a connection that died by a request that fails.
            for _ in range(10):
                with suppress(urllib.error.HTTPError):
                    shown = latest(page)
                    break
            assert shown == event.run_id
            again = instance.get_latest_materialization_event(dg.AssetKey("recipe"))
            assert again is not None and again.run_id == event.run_id
    said = database.dump("dagster") + (tmp_path / "log").read_text() + done.stdout + done.stderr
    assert PASSWORD not in said and event.run_id in said


def latest(page: str) -> Any:
    """The run that last materialized the recipe, as the page shows it."""
    query = (
        '{ assetOrError(assetKey: {path: ["recipe"]}) { ... on Asset { assetMaterializations(limit: 1) { runId } } } }'
    )
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{page}/graphql", json.dumps({"query": query}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        document = json.load(answer)
    assert "errors" not in document, document
    return document["data"]["assetOrError"]["assetMaterializations"][0]["runId"]
