"""What starts a run by itself, and that nothing does before someone says so."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime

import dagster as dg
import pytest

from pipelines import definitions, schedules, sensors


def test_a_week_asks_for_everything_up_to_the_report() -> None:
    context = dg.build_schedule_context(scheduled_execution_time=datetime(2026, 1, 5, 2, tzinfo=UTC))
    (request,) = schedules.weekly.evaluate_tick(context).run_requests
    assert request.tags[schedules.WHY]
    job = definitions.defs.resolve_job_def(schedules.weekly.job_name)
    made = {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
    assert {"sources", "cot_corpus", "stage2_valr_m", "report"} <= made and "stage2_ablation" not in made


@pytest.mark.parametrize(("said", "runs"), [(None, False), ("off", False), ("on", True)])
def test_nothing_runs_by_itself_unless_automation_is_on(
    said: str | None, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VALR_AUTOMATION", raising=False)
    if said:
        monkeypatch.setenv("VALR_AUTOMATION", said)
    try:
        importlib.reload(schedules)
        importlib.reload(sensors)
        found = [schedules.weekly, sensors.new_data, sensors.stale_report, sensors.failed_run]
        assert {one.default_status.value == "RUNNING" for one in found} == {runs}
    finally:
        monkeypatch.undo()
        importlib.reload(schedules)
        importlib.reload(sensors)
