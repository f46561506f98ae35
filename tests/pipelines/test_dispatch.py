"""A stage that fails under Dagster fails with its own sentence."""

from pathlib import Path

import dagster as dg

from assets.dispatch import StageRunner
from tests.project import copy_project, environment


def test_a_failed_stage_says_in_dagster_what_it_says_on_the_command_line(tmp_path: Path, monkeypatch) -> None:
    root = copy_project(tmp_path / "project")
    for name, value in environment(root).items():
        monkeypatch.setenv(name, value)

    @dg.asset
    def stage2_valr_m(context: dg.AssetExecutionContext, stages: StageRunner):
        yield from stages.materialize(context, "stage2_valr_m", root)

    done = dg.materialize([stage2_valr_m], resources={"stages": StageRunner()}, raise_on_error=False)
    assert not done.success
    (failure,) = [event for event in done.all_node_events if event.is_step_failure]
    data = failure.step_failure_data
    assert "valr materialize +stage2_valr_m" in (data.user_failure_data.description or "")
