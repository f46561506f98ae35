"""One asset materialized by several commands at the same moment: one does the work, the others find it done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml
from filelock import FileLock

from tests.pipelines.servers import until
from tests.project import copy_project, digests, environment, valr
from valr_ops.workspace import environment as activated

pytestmark = [pytest.mark.services, pytest.mark.slow]

STAGE = "sources"
PYTHON = [sys.executable, "-m"]
COMMANDS = {
    "valr materialize": [*PYTHON, "valr_ops", "materialize", STAGE],
    "valr materialize, again": [*PYTHON, "valr_ops", "materialize", STAGE],
    "dagster": [*PYTHON, "dagster", "asset", "materialize", "--select", f"key:{STAGE}"],
    "valr run": [*PYTHON, "valr_ops", "run", STAGE],
}


def waiting(root: Path) -> int:
    """Processes of the stage in this project."""
    found = 0
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = process.info["cmdline"] or []
        found += process.info["cwd"] == str(root) and words[-3:] == ["valr_ops", "run", STAGE]
    return found


def test_four_commands_at_once_make_an_asset_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy_project(tmp_path / "project")
    valr(root, "run", "recipe")
    env = environment(root) | activated(root) | {"MLFLOW_TRACKING_URI": environment(root)["MLFLOW_TRACKING_URI"]}
    valr(root, "env")
    locks = root / ".valr" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    # Held until all four have come to the stage, so that they do meet.
    with FileLock(locks / f"{STAGE}.lock"):
        running = {
            name: subprocess.Popen(
                words, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            for name, words in COMMANDS.items()
        }
        try:
            until(lambda: waiting(root) == len(COMMANDS), 180)
        except AssertionError:
            for process in running.values():
                process.kill()
            raise
    said = {name: process.communicate(timeout=300)[0].decode() for name, process in running.items()}
    assert {name: process.returncode for name, process in running.items()} == dict.fromkeys(COMMANDS, 0), said

    # Made once: of the four, three found it up to date.
    by_hand = json.loads(said["valr run"].strip().splitlines()[-1])["how"]
    with dg.DagsterInstance.from_config(str(root / ".valr" / "dagster")) as instance:
        records = instance.fetch_materializations(dg.AssetKey(STAGE), limit=10).records
    recorded = [record.asset_materialization for record in records]
    how = ["hit" if one.metadata["how"].value == "up to date" else one.metadata["how"].value for one in recorded if one]
    assert sorted([by_hand, *how]) == ["hit", "hit", "hit", "made"], (by_hand, how)

    # The lock file is whole, and everybody was told the same digest.
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    assert set(lock["stages"]) == {"recipe", STAGE}
    assert {one.tags["dagster/data_version"] for one in recorded if one} == {digests(root)[STAGE]}
    assert "up to date" in valr(root, "materialize", STAGE).stdout
