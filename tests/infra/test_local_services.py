"""``infra/local/up.sh``: four servers with one command, and none of them left after an interrupt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.infra.tools import CHECKOUT
from tests.project import copy_project
from tests.store.postgres import free_port

pytestmark = pytest.mark.services


@pytest.fixture
def project() -> Iterator[Path]:
    """A copy in a folder that the user postgres may enter, which pytest's own are not."""
    import tempfile

    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("PostgreSQL is missing; apt-get install postgresql")
    pytest.importorskip("dagster_postgres", reason="pip install -c constraints.txt -e '.[team]'")
    with tempfile.TemporaryDirectory(prefix="valr-up-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        root = copy_project(folder / "project")
        (root / ".venv").symlink_to(CHECKOUT / ".venv")
        yield root


def _ports() -> dict[str, str]:
    """Ports that are free now; the store takes three after its own, and those 10,000 above."""
    store = 20000 + os.getpid() % 2500 * 4
    return {name: str(free_port()) for name in ("POSTGRES_PORT", "MLFLOW_PORT", "DAGSTER_PORT")} | {
        "S3_PORT": str(store)
    }


def _up(root: Path, ports: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [root / "infra" / "local" / "up.sh"],
        env={"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], **ports},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _until_ready(server: subprocess.Popen[str]) -> str:
    said = ""
    assert server.stdout is not None
    for line in server.stdout:
        said += line
        if "Ctrl-C" in line:
            return said
    raise AssertionError(said)


def _processes_of(root: Path) -> list[str]:
    """Command lines of what works in or with the project's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(root) in words or str(process.info["cwd"] or "").startswith(str(root)):
            found.append(words)
    return found


def _materializations(port: str, asset: str) -> list[Any]:
    """Those of the asset that the page of Dagster shows."""
    shown = "... on Asset { assetMaterializations { runId } }"
    query = f'{{ assetOrError(assetKey: {{path: ["{asset}"]}}) {{ {shown} }} }}'
    body, headers = json.dumps({"query": query}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: list[Any] = json.load(answer)["data"]["assetOrError"].get("assetMaterializations", [])
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_servers_start_keep_what_they_hold_and_leave_nothing_running(project: Path) -> None:
    ports = _ports()
    server = _up(project, ports)
    try:
        said = _until_ready(server)
        pages = [
            f"http://127.0.0.1:{ports['MLFLOW_PORT']}/health",
            f"http://127.0.0.1:{ports['DAGSTER_PORT']}/server_info",
        ]
        for page in pages:
            with urllib.request.urlopen(page, timeout=10) as answer:
                assert answer.status == 200
        shown = (project / ".valr" / "services" / "environment.sh").read_text()
        secrets = (project / ".valr" / "services" / "secrets.sh").read_text()
        values = [line.partition("=")[2] for line in secrets.splitlines()]
        assert len(values) == 3 and all(len(value) == 36 for value in values)
        assert not any(value in said for value in values)
        assert not any(value in words for value in values for words in _processes_of(project))
        for name in ("environment.sh", "secrets.sh", "s3.json"):
            assert (project / ".valr" / "services" / name).stat().st_mode & 0o077 == 0
        listening = {
            one.laddr.ip
            for one in psutil.net_connections("inet")
            if one.status == "LISTEN" and str(one.laddr.port) in ports.values()
        }
        assert listening == {"127.0.0.1"}
        assert "MLFLOW_TRACKING_URI" in shown
        # As another shell does it. The verb is shown by these servers, and not by the project's private Dagster.
        words = "source .valr/services/environment.sh && exec .venv/bin/python -m valr_ops materialize sources"
        shell = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-c", words], cwd=project, env=shell, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(_materializations(ports["DAGSTER_PORT"], "sources")) == 1
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(90)
    assert server.returncode == 0, server.stdout.read() if server.stdout else ""
    until = time.monotonic() + 10
    while _processes_of(project) and time.monotonic() < until:
        time.sleep(0.2)
    assert _processes_of(project) == []
    assert (project / ".valr" / "services" / "secrets.sh").read_text() == secrets


def test_a_port_in_use_is_named_before_anything_starts(project: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = _up(project, _ports() | {"MLFLOW_PORT": str(port)})
        said, _ = server.communicate(timeout=60)
    assert server.returncode == 1
    assert f"port {port} is in use" in said and "MLFLOW_PORT" in said
    assert not (project / ".valr" / "services").exists()
