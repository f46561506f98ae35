"""Which failed stages are tried again, and when: the kind of the failure decides, by the stage's exit status.

In: the `Failure` of a stage, with its ``exit_status`` among its metadata. Out: the same failure, or a request to try
again. A configuration or data problem (42) never is: it needs a person. A stage that stopped at a checkpoint (75) goes
on at once, as often as it takes. Anything else gets a few tries with growing waits; also what befell Dagster itself
while it waited for the stage, as when its database was away.
Always: what a person cancelled stays cancelled. That is why no asset has a `RetryPolicy`: Dagster applies one to
interrupts as well.
"""

from collections.abc import Sequence
from typing import NoReturn

import dagster as dg

from valr_ops.exits import EXIT_AT_CHECKPOINT

WAITS_SECONDS = (30.0, 120.0, 600.0)
"""Before each try after an unexplained failure: a lost node or a store that restarts is back within minutes."""

_RESUMES = 1000
"""Far more than a run of days on spot machines needs; a stage that stops at every start ends some day."""


def raise_for(failure: dg.Failure, context: dg.AssetExecutionContext, waits_seconds: Sequence[float]) -> NoReturn:
    """Raise `failure`, or what makes Dagster try the step again.

    Args:
        failure: what the stage's end was turned into; it may not allow a retry.
        context: of the step, which knows its earlier tries.
        waits_seconds: before each try after an unexplained failure; empty where a person is waiting for the answer.
    """
    status = failure.metadata.get("exit_status")
    if status is not None and status.value == EXIT_AT_CHECKPOINT:
        raise dg.RetryRequested(max_retries=_RESUMES) from failure
    waited = _waits(context)
    if not failure.allow_retries or waited >= len(waits_seconds):
        raise failure
    raise dg.RetryRequested(context.retry_number + 1, waits_seconds[waited]) from failure


def _waits(context: dg.AssetExecutionContext) -> int:
    """How many tries of this step came after a wait, those that went on at a checkpoint not counted."""
    step = context.get_step_execution_context().step.key
    tries = context.instance.get_records_for_run(
        context.run.run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY
    ).records
    events = [record.event_log_entry.get_dagster_event() for record in tries]
    return sum(event.step_key == step and bool(event.step_retry_data.seconds_to_wait) for event in events)
