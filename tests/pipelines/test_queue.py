"""The queue of runs by Dagster's real processes: what it lets go at once, and what a killed server or database costs.

On files as on one machine, and in PostgreSQL as for a team, with the settings that are shipped. The runs are those of a
small module, so that fifty of them take minutes; the project's own stages go through the queue in test_daemon.py.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import dagster as dg
import pytest
import yaml

from tests.pipelines.servers import Servers, ask, ended, serving, until
from tests.store import postgres
from tests.store.postgres import Postgres

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(1800)]

MODULE = '''
import os
import time
from pathlib import Path

import dagster as dg

from pipelines.launching import keep_looking

keep_looking()
HERE = Path(__file__).parent


def work(name, run):
    """Takes its time, and leaves a file of a name that no second execution could have."""
    began = time.time()
    seconds = 120 if name == "held" else 60 if "long" in run.tags else 3
    until = time.monotonic() + seconds
    while time.monotonic() < until and not (name == "held" and (HERE / "go").exists()):
        time.sleep(0.1)
    (HERE / "spans" / f"{name} {run.run_id} {os.getpid()}").write_text(f"{began} {time.time()}")


@dg.asset(pool="gpu")
def on_gpu(context):
    work("on_gpu", context.run)


@dg.asset
def elsewhere(context):
    work("elsewhere", context.run)


@dg.asset
def first(context):
    work("first", context.run)


@dg.asset(deps=[first])
def held(context):
    (HERE / "holding").touch()
    work("held", context.run)


defs = dg.Definitions(
    [on_gpu, elsewhere, first, held],
    jobs=[
        dg.define_asset_job("gpu_job", selection=[on_gpu]),
        dg.define_asset_job("other_job", selection=[elsewhere]),
        dg.define_asset_job("held_job", selection=[first, held]),
    ],
    executor=dg.in_process_executor,
)
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The folder of the module ``toy``."""
    (tmp_path / "toy" / "spans").mkdir(parents=True)
    (tmp_path / "toy" / "toy.py").write_text(MODULE)
    return tmp_path / "toy"


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    pytest.importorskip("dagster_postgres", reason="pip install -c constraints.txt -e '.[team]'")
    with postgres.serving() as server:
        yield server


@pytest.fixture
def servers(
    request: pytest.FixtureRequest, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Servers]:
    monkeypatch.setenv("PYTHONPATH", str(project))
    if request.param == "dagster-postgres.yaml":
        address = request.getfixturevalue("database").create(f"dagster_{time.monotonic_ns()}")
        monkeypatch.setenv("VALR_DAGSTER_DATABASE", address.replace("postgresql:", "postgresql+psycopg2:"))
    with serving(tmp_path / "servers", "toy", project, os.environ, request.param) as started:
        yield started


def spans(project: Path) -> list[tuple[str, str, float, float]]:
    """(asset, run, begin, end) of everything that was executed."""
    found = []
    for path in (project / "spans").iterdir():
        name, run, _ = path.name.split()
        begin, end = map(float, path.read_text().split())
        found.append((name, run, begin, end))
    return found


def most_at_once(intervals: list[tuple[float, float]]) -> int:
    """How many of the intervals overlap where most do."""
    steps = sorted([(begin, 1) for begin, _ in intervals] + [(end, -1) for _, end in intervals])
    at_once, most = 0, 0
    for _, step in steps:
        at_once += step
        most = max(most, at_once)
    return most


@pytest.mark.parametrize("servers", ["dagster.yaml", "dagster-postgres.yaml"], indirect=True)
def test_fifty_runs_in_the_queue_all_end_within_the_limits(servers: Servers, project: Path) -> None:
    limit = yaml.safe_load((servers.home / "dagster.yaml").read_text())["concurrency"]["runs"]["max_concurrent_runs"]
    with dg.DagsterInstance.from_config(str(servers.home)) as instance, servers.workspace(instance) as process:
        started = time.monotonic()
        # Some that last longer than it takes to launch as many as may go at once.
        runs = ask(process, "other_job", {"long": "yes"}, times=limit + 1)
        runs += ask(process, "gpu_job", times=20)
        unasked = ask(process, "other_job", {"valr/why": "a sensor asked"}, times=5)
        runs += unasked
        runs += ask(process, "other_job", times=50 - len(runs))
        until(lambda: ended(instance, runs), 1500, servers.log)
        seconds = time.monotonic() - started
        records = instance.get_run_records(dg.RunsFilter(run_ids=runs))
    assert Counter(record.dagster_run.status for record in records) == {dg.DagsterRunStatus.SUCCESS: 50}
    done = spans(project)
    assert Counter(run for _, run, _, _ in done) == Counter(runs), "each once, none twice"
    lived = {record.dagster_run.run_id: (record.start_time or 0, record.end_time or 0) for record in records}
    at_once = most_at_once(list(lived.values()))
    on_gpu = most_at_once([(begin, end) for name, _, begin, end in done if name == "on_gpu"])
    alone = most_at_once([lived[run] for run in unasked])
    print(f"50 runs in {seconds:.0f} s, at most {at_once} at once of {limit}, {on_gpu} on the GPU, {alone} unasked")
    assert at_once == limit and on_gpu == 1 and alone == 1


@pytest.mark.parametrize("servers", ["dagster.yaml"], indirect=True)
def test_runs_of_a_killed_code_server_are_started_again_and_those_in_the_queue_wait(
    servers: Servers, project: Path
) -> None:
    with dg.DagsterInstance.from_config(str(servers.home)) as instance, servers.workspace(instance) as process:
        (lost,) = ask(process, "held_job")
        queued = ask(process, "other_job", times=4)
        until((project / "holding").exists, 120, servers.log)
        servers.kill("code")
        time.sleep(10)
        (project / "go").touch()
        servers.start_code()
        until(lambda: all(succeeded(instance, run) for run in [lost, *queued]), 300, servers.log)
        died = instance.get_run_by_id(lost)
    assert died is not None and died.status == dg.DagsterRunStatus.FAILURE
    made = Counter(name for name, _, _, _ in spans(project))
    assert made["first"] == 1 and made["held"] == 1, "what was made is not made again"


def succeeded(instance: dg.DagsterInstance, run: str) -> bool:
    """Whether a run, or one that Dagster started in its place, came to its end."""
    again = instance.get_runs(dg.RunsFilter(tags={"dagster/root_run_id": run}))
    states = [one.status for one in [instance.get_run_by_id(run), *again] if one is not None]
    return dg.DagsterRunStatus.SUCCESS in states


@pytest.mark.parametrize("servers", ["dagster-postgres.yaml"], indirect=True)
@pytest.mark.parametrize("seconds_away", [0, 30, 120])
def test_a_run_outlives_a_restart_of_postgresql_or_is_started_again(
    servers: Servers, project: Path, database: Postgres, seconds_away: float
) -> None:
    with dg.DagsterInstance.from_config(str(servers.home)) as instance, servers.workspace(instance) as process:
        (run,) = ask(process, "held_job")
        until((project / "holding").exists, 120, servers.log)
        database.stop()
        (project / "go").touch()
        time.sleep(seconds_away)
        database.start()
        until(lambda: answered(lambda: succeeded(instance, run)), 400, servers.log)
        runs = [(one.run_id, one.status.value) for one in instance.get_runs()]
    print(f"PostgreSQL away for {seconds_away} s: {runs}")
    made = Counter(name for name, _, _, _ in spans(project))
    assert made["first"] == 1, "what was recorded is not made again"
    assert len(runs) <= 2, "it goes on, or is started again once"


def answered(question: Callable[[], bool]) -> bool:
    """The answer; no, while the database has none: a pool of connections finds out one by one that they are dead."""
    with suppress(Exception):
        return question()
    return False
