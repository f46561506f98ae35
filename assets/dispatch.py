"""How a stage is carried out for Dagster: the same ``valr run`` verb in a process of its own, joined by Pipes."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

# Dagster raises it and does not export it.
from dagster._core.errors import DagsterPipesExecutionError

from valr_ops.__main__ import EXIT_CONFIGURATION


class StageRunner(dg.ConfigurableResource):
    """Runs ``python -m valr_ops run STAGE`` and streams its progress, checks and metadata into the materialization."""

    grace_seconds: float = 120.0
    """How long a cancelled stage may take to write its checkpoint."""

    def materialize(self, context: dg.AssetExecutionContext, stage: str, root: Path) -> Sequence[Any]:
        """One stage, start to end: the materialization and the check results that the stage reported.

        Raises:
            Failure: the stage failed; the description is the stage's own sentence.
        """
        client = dg.PipesSubprocessClient(termination_timeout_seconds=self.grace_seconds)
        try:
            run = client.run(
                context=context,
                command=[sys.executable, "-m", "valr_ops", "run", stage],
                cwd=str(root),
                env={**os.environ, "VALR_DAGSTER_RUN_ID": context.run.run_id},
            )
        except DagsterPipesExecutionError as error:
            raise _failure(root, stage, str(error)) from None
        return run.get_results()


def _failure(root: Path, stage: str, otherwise: str) -> dg.Failure:
    """The stage's own sentence instead of an exit code; a retry is allowed only where it can help."""
    status = root / ".valr" / "status" / f"{stage}.json"
    said = json.loads(status.read_text(encoding="utf-8")) if status.is_file() else {}
    message = said.get("message") or otherwise
    return dg.Failure(
        description=message, metadata={"stage": stage}, allow_retries=f"code {EXIT_CONFIGURATION}" not in otherwise
    )
