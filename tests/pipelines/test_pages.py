"""The two pages as a person uses them: real servers on loopback, a real browser."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.project import copy_project, environment, valr
from valr_ops.store import lineage

CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}
"""
STATUS = "query Status($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A project with ``valr ui`` running: (root, address of Dagster, address of MLflow)."""
    root = copy_project(tmp_path_factory.mktemp("pages") / "project")
    valr(root, "run", "recipe")
    ports = [_free_port(), _free_port()]
    words = [sys.executable, "-m", "valr_ops", "ui", "--dagster-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    server = subprocess.Popen(
        words, cwd=root, env=environment(root), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "Ctrl-C" in line:
            break
    else:
        raise AssertionError(f"valr ui ended with {server.wait()}")
    yield root, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    server.terminate()
    assert server.wait(60) == 0
    assert not any(_listens(port) for port in ports), "ending it must stop both servers"


@pytest.mark.services
def test_an_asset_materialized_in_the_page_is_recorded(pages: tuple[Path, str, str]):
    _, dagster, _ = pages
    selector = {
        "repositoryLocationName": "pipelines.definitions",
        "repositoryName": "__repository__",
        "pipelineName": "__ASSET_JOB",
        "assetSelection": [{"path": ["sources"]}],
        "assetCheckSelection": [],
    }
    answer = _graphql(dagster, LAUNCH, {"params": {"selector": selector, "mode": "default", "runConfigData": {}}})
    launched = answer["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    until = time.monotonic() + 120
    status = ""
    while status not in ("SUCCESS", "FAILURE", "CANCELED") and time.monotonic() < until:
        time.sleep(1)
        status = _graphql(dagster, STATUS, {"id": launched["run"]["runId"]})["runOrError"]["status"]
    assert status == "SUCCESS"


@pytest.mark.services
def test_the_run_is_in_mlflow(pages: tuple[Path, str, str]):
    _, _, mlflow = pages
    request = urllib.request.Request(
        f"{mlflow}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 10}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        names = [row["name"] for row in json.load(answer)["experiments"]]
    assert "valr_ops" in names


@pytest.mark.services
def test_a_port_in_use_is_said_in_one_sentence(pages: tuple[Path, str, str]):
    root, dagster, _ = pages
    done = valr(root, "ui", "--dagster-port", dagster.rsplit(":", 1)[1], check=False)
    assert done.returncode == 42
    assert re.search(r"port \d+ is in use; .*--dagster-port", done.stderr) and "Traceback" not in done.stderr


@pytest.mark.browser
def test_a_person_sees_the_grouped_graph_and_the_experiment(pages: tuple[Path, str, str], tmp_path: Path):
    playwright = pytest.importorskip("playwright.sync_api")
    root, dagster, mlflow = pages
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.goto(f"{dagster}/asset-groups")
        for words in ("preparation", "teachers", "training", "evaluation"):
            page.get_by_text(words).first.wait_for(timeout=60_000)
        page.goto(f"{dagster}/assets/stage2_valr_m")
        page.get_by_text("VaLR-M: stage 1 continued").first.wait_for(timeout=60_000)
        page.goto(lineage.runs_page(root, int(mlflow.rsplit(":", 1)[1])))
        page.get_by_text("recipe@").first.wait_for(timeout=60_000)
        browser.close()


def _graphql(address: str, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/graphql",
        data=json.dumps({"query": query, "variables": variables}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        document: dict[str, Any] = json.load(answer)
    assert "errors" not in document, document
    return document["data"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
