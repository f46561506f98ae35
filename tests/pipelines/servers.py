"""Dagster's real processes for tests, arranged as in the cluster: a code server, the daemon, and one instance for both.

The code server and the daemon are processes of their own, which a test can kill; the test itself asks for runs as the
pages do. What the two print goes into files, and all of it ends with the block.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg

# What the pages and the command line ask for runs by, and Dagster does not export.
from dagster._cli.job import _create_run
from dagster._core.execution.backfill import PartitionBackfill
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import GrpcServerTarget
from dagster._grpc.client import DagsterGrpcClient

from tests.project import CHECKOUT
from tests.store.postgres import free_port
from valr_ops.stages import ABLATION

LOCATION = "project"
INSTANCES = CHECKOUT / "infra" / "local"


class Servers:
    """The code server of one module, the daemon, and the instance in ``folder/home``."""

    def __init__(self, folder: Path, module: str, cwd: Path, env: Mapping[str, str], settings: str) -> None:
        self.home, self._folder, self._module, self._cwd = folder / "home", folder, module, cwd
        self.home.mkdir(parents=True)
        shutil.copyfile(INSTANCES / settings, self.home / "dagster.yaml")
        self.env = {**env, "DAGSTER_HOME": str(self.home), "DAGSTER_DISABLE_TELEMETRY": "true"}
        self.port = free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        workspace = f"load_from: [grpc_server: {{host: localhost, port: {self.port}, location_name: {LOCATION}}}]\n"
        (folder / "workspace.yaml").write_text(workspace)

    def start_code(self) -> None:
        """Start the code server, and wait until it has loaded the definitions."""
        self._start("code", "dagster", "api", "grpc", "-h", "localhost", "-p", str(self.port), "-m", self._module)
        client = DagsterGrpcClient(host="localhost", port=self.port)

        def answers() -> bool:
            with suppress(Exception):
                return bool(client.ping("") is not None)
            return False

        until(answers, 120, self.log)

    def start_daemon(self) -> None:
        """Start the daemon: the queue, schedules, sensors, backfills, and what became of lost runs."""
        self._start("daemon", "dagster._daemon", "run", "-w", str(self._folder / "workspace.yaml"))

    def kill(self, name: str) -> None:
        """As if its machine went away: the server and all processes that it started."""
        server = self._running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    def stop(self) -> None:
        """Everything that was started, the daemon first, so that it says nothing of a code server that went away."""
        for name in ("daemon", "code"):
            if name in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(self._running[name].pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    self._running[name].wait(10)
                self.kill(name)

    def log(self) -> str:
        """What both said last."""
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in self._folder.glob("*.log"))

    @contextmanager
    def workspace(self, instance: dg.DagsterInstance) -> Iterator[WorkspaceProcessContext]:
        """What the pages know of the code server."""
        target = GrpcServerTarget(host="localhost", port=self.port, socket=None, location_name=LOCATION)
        with WorkspaceProcessContext(instance, target) as process:
            yield process

    def _start(self, name: str, *words: str) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self._cwd,
                env=self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


@contextmanager
def serving(
    folder: Path, module: str, cwd: Path, env: Mapping[str, str], settings: str = "dagster.yaml"
) -> Iterator[Servers]:
    """Both servers; at the end neither is left, nor any run."""
    servers = Servers(folder, module, cwd, env, settings)
    try:
        servers.start_code()
        servers.start_daemon()
        yield servers
    finally:
        servers.stop()


def ask(process: WorkspaceProcessContext, job: str, tags: Mapping[str, str] | None = None, times: int = 1) -> list[str]:
    """Put runs of a job into the queue, as the button does; their ids."""
    workspace, instance = process.create_request_context(), process.instance
    location = workspace.get_code_location(LOCATION)
    repository = next(iter(location.get_repositories().values()))
    runs = []
    for _ in range(times):
        run = _create_run(
            instance=instance,
            code_location=location,
            remote_repo=repository,
            remote_job=repository.get_full_job(job),
            run_config={},
            tags=dict(tags or {}),
            op_selection=None,
            run_id=None,
        )
        instance.submit_run(run.run_id, workspace)
        runs.append(run.run_id)
    return runs


def until(holds: Callable[[], Any], seconds: float, otherwise: Callable[[], str] = str) -> Any:
    """Wait for something; its value. Raises AssertionError with what `otherwise` says."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := holds():
            return value
        time.sleep(0.2)
    raise AssertionError(f"not in {seconds:.0f} s\n{otherwise()}")


def ended(instance: dg.DagsterInstance, runs: list[str]) -> bool:
    """Whether all of the runs are over."""
    found = instance.get_runs(dg.RunsFilter(run_ids=runs))
    return len(found) == len(runs) and all(run.is_finished for run in found)


def backfill_of(name: str, graph: Any, cells: Sequence[str], instance: dg.DagsterInstance) -> PartitionBackfill:
    """What Dagster's page makes when a person chooses several cells of the ablation in the asset graph `graph`."""
    return PartitionBackfill.from_asset_partitions(
        backfill_id=name,
        asset_graph=graph,
        partition_names=list(cells),
        asset_selection=[dg.AssetKey(ABLATION)],
        backfill_timestamp=time.time(),
        tags={},
        dynamic_partitions_store=instance,
        all_partitions=False,
        title=None,
        description=None,
        run_config=None,
    )
