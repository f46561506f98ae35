"""PostgreSQL away in the middle of a run of the project: what a stage made meanwhile is not made again."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from filelock import FileLock

from tests.pipelines.servers import ask, serving, until
from tests.pipelines.test_at_once import STAGE, waiting
from tests.pipelines.test_queue import answered, succeeded
from tests.project import copy_project, digests, environment, valr
from tests.store import postgres
from tests.store.postgres import PASSWORD

pytestmark = [pytest.mark.services, pytest.mark.slow]

DEFINITIONS = f'''
import dagster as dg

from assets.dispatch import StageRunner
from assets.factory import stage_asset
from valr_ops.stages import stage

defs = dg.Definitions(
    [stage_asset(stage(name)) for name in ("recipe", "{STAGE}")],
    jobs=[dg.define_asset_job("again", selection="key:{STAGE}")],
    resources={{"stages": StageRunner()}},
    executor=dg.in_process_executor,
)
'''


def test_a_stage_that_ends_while_postgresql_is_away_is_found_made_by_the_run_s_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dagster_postgres", reason="pip install -c constraints.txt -e '.[team]'")
    root = copy_project(tmp_path / "project")
    (root / "team.py").write_text(DEFINITIONS)
    valr(root, "run", "recipe")
    locks = root / ".valr" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with postgres.serving() as database:
        address = database.create("dagster").replace("postgresql:", "postgresql+psycopg2:")
        monkeypatch.setenv("VALR_DAGSTER_DATABASE", address)
        env = environment(root) | {"VALR_DAGSTER_DATABASE": address}
        with (
            serving(tmp_path / "servers", "team", root, env, "dagster-postgres.yaml") as servers,
            dg.DagsterInstance.from_config(str(servers.home)) as instance,
            servers.workspace(instance) as process,
        ):
            # Held until the database is away, so that the stage does its work without it.
            with FileLock(locks / f"{STAGE}.lock"):
                (run,) = ask(process, "again")
                until(lambda: waiting(root) == 1, 180, servers.log)
                database.stop()
            until(lambda: STAGE in digests(root) and waiting(root) == 0, 180, servers.log)
            made = (root / "artifacts" / STAGE / "manifest.json").stat().st_mtime_ns
            database.start()
            until(lambda: answered(lambda: succeeded(instance, run)), 400, servers.log)
            event = until(lambda: instance.get_latest_materialization_event(dg.AssetKey(STAGE)), 60)
            assert PASSWORD not in servers.log()
    assert (root / "artifacts" / STAGE / "manifest.json").stat().st_mtime_ns == made, "it was made once"
    recorded = event.asset_materialization
    assert recorded.tags["dagster/data_version"] == digests(root)[STAGE] and "DVC digest" in recorded.metadata
