"""How Dagster learns that a run died: the daemon asks its code server, and the code server keeps looking.

In: a run that Dagster takes for started. Out: whether its process is there. Dagster's own launcher can't tell: when the
code server is killed, as with its pod or with ``valr ui``, its runs stay started for ever and keep their places in the
queue and in the pools. With this one they fail, and the instance's run_retries start them again: what is made is found,
a Job that goes on is joined, and a training resumes from its checkpoint.
Always: a server that does not answer gets minutes to come back, for its runs may go on behind a broken network; a run
that no code server started (``valr materialize``) is none of this launcher's business.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from typing import Any

import dagster as dg

# Dagster's launchers are made of these, and it does not export them.
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

_SECONDS_TO_COME_BACK = 300.0
"""A code server that restarts has loaded the project within seconds, a new pod with its image within minutes."""


class WatchingRunLauncher(DefaultRunLauncher):
    """Launches runs in the code server as Dagster does by itself, and knows which of them are gone."""

    def __init__(self, inst_data: Any = None) -> None:
        super().__init__(inst_data)
        self._silent_since: dict[str, float] = {}

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Asked by the daemon before it asks for a run's health."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the run's code server still has a process for it."""
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "no code server started it")
        try:
            answer = client.can_cancel_execution(CanCancelExecutionRequest(run_id=run.run_id))
        except DagsterUserCodeUnreachableError:
            since = self._silent_since.setdefault(run.run_id, time.monotonic())
            silent = time.monotonic() - since
            if silent < _SECONDS_TO_COME_BACK:
                return CheckRunHealthResult(WorkerStatus.RUNNING, f"its code server is silent for {silent:.0f} s")
            return CheckRunHealthResult(WorkerStatus.FAILED, f"its code server did not come back in {silent:.0f} s")
        self._silent_since.pop(run.run_id, None)
        if deserialize_value(answer, CanCancelExecutionResult).can_cancel:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(WorkerStatus.FAILED, "its code server was started again and does not know it")


def keep_looking() -> None:
    """In a code server: go on looking for runs whose process ended, also after PostgreSQL was away.

    The thread in which Dagster 1.13 looks ends with its first error. A run that died while the database could not be
    asked for a quarter of a minute would stay started for ever, and so would every run that dies after it.
    """
    module = sys.modules.get("dagster._grpc.server")
    if module is None or hasattr(module.DagsterApiServer._check_for_orphaned_runs, "__wrapped__"):
        return
    look = module.DagsterApiServer._check_for_orphaned_runs

    @functools.wraps(look)
    def look_and_stay(server: Any) -> None:
        try:
            look(server)
        except Exception as error:
            logging.getLogger("dagster").warning(
                f"what became of the runs can't be told now, and is asked again: {error}"
            )

    module.DagsterApiServer._check_for_orphaned_runs = look_and_stay
