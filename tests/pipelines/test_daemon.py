"""The daemon for real: what it asks for, whom it tells, and what a clock that is wrong makes of it.

The project is a private copy with the shipped assets, jobs, schedule and sensors. Its recipe and its sources are made
for real; of the other stages it is only noted that they were asked for. Sensors look each second.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

# What the daemon is made of; Dagster's own way to set the clock is not exported either.
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.test_utils import freeze_time
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._scheduler.scheduler import launch_scheduled_runs
from PIL import Image

from pipelines.schedules import WHY
from tests.pipelines.servers import INSTANCES, LOCATION, Servers, ask, backfill_of, ended, serving, until
from tests.pipelines.test_notifying import Hook, Mailbox, self_signed, served
from tests.project import MICRO, copy_project, environment, valr
from valr_ops.stages import ABLATION

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(1800)]

CELLS = ["valr_no_va", "valr_qwen_encoder"]
PASSWORD = "planted-password-of-the-mail-server"
DEFINITIONS = '''
import dagster as dg

from assets.ablation import ablation as cells
from assets.dispatch import StageRunner
from assets.factory import stage_assets
from pipelines import jobs, schedules, sensors


class Quick(StageRunner):
    """Makes the first stages, takes the others for made, and lets stage1_sft fail where a file says so."""

    def materialize(self, context, stage, root):
        if stage in ("recipe", "sources"):
            return super().materialize(context, stage, root)
        if stage == "stage1_sft" and (root / "fail").exists():
            raise dg.Failure("the loss is not finite", metadata={"exit_status": 42}, allow_retries=False)
        passed = [dg.AssetCheckResult(check_name=spec.name, passed=True) for spec in context.assets_def.check_specs]
        return [dg.MaterializeResult(check_results=passed)]


defs = dg.Definitions(
    assets=[*stage_assets, cells],
    jobs=[jobs.everything],
    schedules=[schedules.weekly],
    sensors=[sensors.new_data, sensors.stale_report, sensors.failed_run],
    resources={"stages": Quick()},
    executor=dg.in_process_executor,
)
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one given source, whose first stages are made."""
    sources = {"mine": {"format": "jsonl", "path": "mine", "limit": 64}}
    root = copy_project(tmp_path_factory.mktemp("daemon") / "project", {**MICRO, "data.sources": sources})
    (root / "mine").mkdir()
    Image.new("RGB", (32, 32), "red").save(root / "mine" / "a.png")
    for name in ("train", "test"):
        write_records(root, name, 3)
    (root / "quick.py").write_text(DEFINITIONS)
    sensors = root / "pipelines" / "sensors.py"
    looks = re.sub(r"minimum_interval_seconds=\w+", "minimum_interval_seconds=1", sensors.read_text())
    sensors.write_text(looks)
    valr(root, "run", "sources")
    return root


def write_records(root: Path, name: str, count: int) -> None:
    record = {"images": ["a.png"], "question": "Red?", "steps": [{"text": "It is red."}], "answer": "yes"}
    lines = [json.dumps({"id": f"{name}{number}", **record}) for number in range(count)]
    (root / "mine" / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    yield from served(Hook())


@pytest.fixture(scope="module")
def mailbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mailbox]:
    yield from served(Mailbox(self_signed(tmp_path_factory.mktemp("certificate"))))


@pytest.fixture(scope="module")
def servers(project: Path, hook: Hook, mailbox: Mailbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    env = environment(project) | {
        "VALR_AUTOMATION": "on",
        "VALR_NOTIFY_WEBHOOK": f"http://127.0.0.1:{hook.server_port}/services/T0/B0/very-secret",
        "VALR_NOTIFY_SMTP": f"127.0.0.1:{mailbox.server_address[1]}",
        "VALR_NOTIFY_MAIL_FROM": "valr@example.org",
        "VALR_NOTIFY_MAIL_TO": "a@example.org",
        "VALR_NOTIFY_SMTP_USER": "valr",
        "VALR_NOTIFY_SMTP_PASSWORD": PASSWORD,
        "SSL_CERT_FILE": str(mailbox.certificate),
    }
    with serving(tmp_path_factory.mktemp("servers"), "quick", project, env) as started:
        yield started


@pytest.fixture(scope="module")
def instance(servers: Servers) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(servers.home)) as opened:
        yield opened


@pytest.fixture(scope="module")
def process(servers: Servers, instance: dg.DagsterInstance) -> Iterator[WorkspaceProcessContext]:
    with servers.workspace(instance) as opened:
        yield opened


def ticks(process: WorkspaceProcessContext, sensor: str) -> list[Any]:
    """What a sensor found, the last look first."""
    location = process.create_request_context().get_code_location(LOCATION)
    found = next(iter(location.get_repositories().values())).get_sensor(sensor)
    return list(process.instance.get_ticks(found.get_remote_origin_id(), found.selector_id))


def looked_again(process: WorkspaceProcessContext, sensor: str, servers: Servers, times: int = 3) -> None:
    """Wait until a sensor has looked some more times."""
    seen = max([tick.tick_id for tick in ticks(process, sensor)], default=0)
    until(lambda: len([one for one in ticks(process, sensor) if one.tick_id > seen]) >= times, 120, servers.log)


def unasked(instance: dg.DagsterInstance, why: str) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs() if why in run.tags.get(WHY, "")]


def test_a_changed_source_asks_for_one_run_which_takes_it_in(
    project: Path, servers: Servers, instance: dg.DagsterInstance, process: WorkspaceProcessContext
) -> None:
    until(lambda: "as they were" in str([one.skip_reason for one in ticks(process, "new_data")]), 120, servers.log)
    inventory = project / "artifacts" / "sources" / "inventory.json"
    before = inventory.read_text()
    write_records(project, "train", 4)
    (run,) = until(lambda: unasked(instance, "source mine changed: train.jsonl"), 120, servers.log)
    until(lambda: ended(instance, [run.run_id]), 240, servers.log)
    looked_again(process, "new_data", servers)
    (only,) = unasked(instance, "source mine changed")
    assert only.status == dg.DagsterRunStatus.SUCCESS and inventory.read_text() != before
    event = instance.get_latest_materialization_event(dg.AssetKey("sources"))
    assert event is not None and event.run_id == run.run_id


def test_a_failed_run_reaches_the_chat_and_the_mail_once_and_the_password_only_what_is_encrypted(
    project: Path,
    servers: Servers,
    instance: dg.DagsterInstance,
    process: WorkspaceProcessContext,
    hook: Hook,
    mailbox: Mailbox,
) -> None:
    (project / "fail").touch()
    try:
        (run,) = ask(process, "everything")
        until(lambda: ended(instance, [run]) and hook.got and mailbox.got, 240, servers.log)
        looked_again(process, "failed_run", servers)
    finally:
        (project / "fail").unlink()
    (said,), (mail,) = hook.got, mailbox.got
    sentence, advice, link = said["text"].splitlines()
    assert sentence == "stage1_sft failed: the loss is not finite." and link.endswith(f"/runs/{run}")
    assert "materialize stage1_sft again" in advice and mail["Subject"].strip() == sentence.rstrip(".")
    assert mailbox.logins == [f"\0valr\0{PASSWORD}"]
    assert not [line for line in mailbox.read_in_plain if "AUTH" in line or "MAIL" in line]
    assert len(instance.get_runs(dg.RunsFilter(tags={"dagster/root_run_id": run}))) == 0, (
        "a failed stage is no lost run"
    )
    assert PASSWORD not in servers.log() and "very-secret" not in servers.log()


def test_a_backfill_makes_each_of_its_cells_in_a_run(
    servers: Servers, instance: dg.DagsterInstance, process: WorkspaceProcessContext
) -> None:
    key = dg.AssetKey(ABLATION)
    both = backfill_of("both", process.create_request_context().asset_graph, CELLS, instance)
    instance.add_backfill(both)

    def over() -> bool:
        found = instance.get_backfill("both")
        return found is not None and found.status == BulkActionStatus.COMPLETED_SUCCESS

    until(over, 240, servers.log)
    runs = instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": "both"}))
    assert sorted(run.tags["dagster/partition"] for run in runs) == CELLS
    assert instance.get_materialized_partitions(key) == set(CELLS)
    said = [entry.user_message for run in runs for entry in instance.all_logs(run.run_id)]
    assert len([line for line in said if "2 together: " in line]) == 2


# ------------------------------------------------------------------------------------------- a clock that is put wrong
# The scheduler's and the sensors' own iterations, with the time of Dagster set, against the running code server, so
# that nothing has to wait for a Monday. The instance has no daemon: what is asked for stays in the queue.

MONDAY = datetime(2026, 1, 5, 2, tzinfo=UTC)
"""A tick of the schedule."""


@pytest.fixture
def clocked(servers: Servers, tmp_path: Path) -> Iterator[WorkspaceProcessContext]:
    shutil.copyfile(INSTANCES / "dagster.yaml", tmp_path / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(tmp_path)) as alone, servers.workspace(alone) as opened:
        yield opened


def scheduled(process: WorkspaceProcessContext, *times: datetime) -> list[str]:
    """The ticks for which the scheduler asked for a run, when it was woken at these times by its clock."""
    for now in times:
        with freeze_time(now):
            problems = [one for one in launch_scheduled_runs(process, logging.getLogger(), now, {}) if one]
        assert not problems, problems
    runs = process.instance.get_runs(dg.RunsFilter(tags={"dagster/schedule_name": "weekly"}))
    assert all(run.status == dg.DagsterRunStatus.QUEUED and run.tags[WHY] == "the week is over" for run in runs)
    found = next(iter(process.create_request_context().get_code_location(LOCATION).get_repositories().values()))
    weekly = found.get_schedule("weekly")
    asked = process.instance.get_ticks(weekly.get_remote_origin_id(), weekly.selector_id)
    assert len(runs) == len(asked)
    return sorted(datetime.fromtimestamp(tick.timestamp, UTC).isoformat() for tick in asked)


def test_a_clock_that_is_put_back_and_forth_by_a_day_neither_repeats_nor_loses_a_tick(
    clocked: WorkspaceProcessContext,
) -> None:
    day, minute, week = timedelta(days=1), timedelta(minutes=1), timedelta(days=7)
    assert scheduled(clocked, MONDAY - 2 * day, MONDAY - minute) == []
    once = [MONDAY.isoformat()]
    assert scheduled(clocked, MONDAY + minute) == once
    assert scheduled(clocked, MONDAY + minute - day, MONDAY - minute, MONDAY, MONDAY + 2 * minute) == once
    # Forward over the next tick: asked for when the clock says so, and not again when it was wrong.
    early = MONDAY + week - timedelta(hours=12)
    twice = [*once, (MONDAY + week).isoformat()]
    assert scheduled(clocked, early, early + day) == twice
    assert scheduled(clocked, early, MONDAY + week - minute, MONDAY + week + minute) == twice
    # A daemon that was away for three weeks asks once: one run brings everything up to date.
    assert len(scheduled(clocked, MONDAY + 4 * week + minute)) == 3


def test_a_sensor_whose_clock_is_put_back_asks_for_nothing_twice_and_looks_again_when_its_time_has_come(
    project: Path, clocked: WorkspaceProcessContext
) -> None:
    def look(*times: datetime) -> int:
        for now in times:
            with freeze_time(now):
                list(execute_sensor_iteration(clocked, logging.getLogger(), None, None))
        return len(unasked(clocked.instance, "source mine changed"))

    now, day, seconds = datetime.now(UTC), timedelta(days=1), timedelta(seconds=10)
    valr(project, "run", "sources")
    assert look(now, now + seconds, now + 2 * seconds) == 0
    write_records(project, "test", 5)
    assert look(now + 3 * seconds, now + 4 * seconds) == 1
    assert look(now + 4 * seconds - day, now + 5 * seconds - day, now + 5 * seconds) == 1
    valr(project, "run", "sources")
    write_records(project, "test", 6)
    assert look(now + day, now + day + seconds) == 2
    assert look(now + 6 * seconds, now + day + 2 * seconds) == 2
