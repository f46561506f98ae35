"""The harness of kills, stops and full disks on one cheap stage each, and what it found, one test a fault."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.faults import full_disk, kills, made
from tests.project import MICRO, environment, last_line, valr
from valr_ops import runner
from valr_ops.store import artifacts, lineage
from valr_ops.store.objects import DiskFullError
from valr_ops.store.progress import ShowingProgress

TRAINING = MICRO | {"stage1.max_updates": 6, "stage1.checkpoint_every": 2}


@pytest.mark.slow
def test_a_stage_that_is_killed_twice_leaves_what_it_leaves_undisturbed(tmp_path: Path) -> None:
    project = made.make(tmp_path / "work", ["benchmarks"], MICRO)
    with project.starter() as starter:
        row = kills.disturb(project, starter, "benchmarks", 2, seed=0, how=signal.SIGKILL)
    assert row["wrong"] == [] and row["equal_digest"] and row["kills"] == 2
    # One that comes after the record stands, and before the rest is removed; and what another run needs.
    work, made_file = (project.root / ".valr" / "work" / name for name in ("benchmarks", "benchmarks.made"))
    for by_it in (True, False):
        (work / "checkpoint").mkdir(parents=True)
        if by_it:
            shutil.copyfile(project.root / "artifacts" / "benchmarks" / "manifest.json", made_file)
        assert last_line(valr(project.root, "run", "benchmarks"))["how"] == "hit"
        assert work.exists() is not by_it and not made_file.exists()


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_goes_on_to_the_same_digest(tmp_path: Path) -> None:
    project = made.make(tmp_path / "work", ["stage1_sft"], TRAINING)
    with project.starter() as starter:
        row = kills.disturb(project, starter, "stage1_sft", 2, seed=1, how=signal.SIGTERM)
    assert row["wrong"] == [] and row["equal_digest"] and row["kills"] == 2


ON_A_SMALL_DISK = """
import json, sys
from pathlib import Path
from tests.faults import full_disk, made
from tests.project import MICRO
project, disk = made.make(Path(sys.argv[1]), ["benchmarks"], MICRO), Path(sys.argv[2])
with project.starter() as starter:
    print(json.dumps(full_disk.fill(project, starter, disk, "benchmarks")))
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_costs_nothing_but_time(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path / "work"), str(tmp_path / "disk")]
    done = full_disk.on_a_small_disk(tmp_path / "disk", words, env=environment(Path.cwd()), stdout=subprocess.PIPE)
    if "unshare failed" in done.stderr or "not permitted" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("this machine allows no small disk to be mounted")
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["wrong"] == [] and row["equal_digest"] and row["full"] >= 2
    assert "make room there" in row["said"] and row["said"].startswith("valr: benchmarks: the disk of ")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with two artifacts, the first of which is recorded."""
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    stages = {name: {"cmd": f"make {name}", "outs": [f"artifacts/{name}"]} for name in ("first", "second")}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for name in stages:
        (tmp_path / "artifacts" / name).mkdir(parents=True)
        (tmp_path / "artifacts" / name / "manifest.json").write_text(name)
    monkeypatch.chdir(tmp_path)
    artifacts.Ledger(tmp_path).commit("first")
    return tmp_path


def test_records_are_whole_while_dvc_writes_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, lock, seen = artifacts.Ledger(root), root / "dvc.lock", []
    before = lock.read_bytes()

    def no_room(path: Path) -> None:
        seen.append(lock.read_bytes())
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "_flush", no_room)
        with pytest.raises(OSError, match="No space left"):
            ledger.commit("second")
    assert seen == [before] and lock.read_bytes() == before
    ledger.commit("second")
    assert set(artifacts.Ledger(root).recorded()) == {"first", "second"}


@pytest.mark.parametrize("left", ["torn", "of a process whose number another one has now"])
def test_what_a_killed_commit_leaves_of_dvcs_locks_stops_no_other(root: Path, left: str) -> None:
    rwlock = root / ".dvc" / "tmp" / "rwlock"
    user = {"pid": os.getpid(), "cmd": "valr run second"}
    rwlock.write_text("" if left == "torn" else json.dumps({"read": {}, "write": {str(root / "artifacts"): user}}))
    os.utime(rwlock, (1, 1))
    artifacts.Ledger(root).commit("second")
    assert set(artifacts.Ledger(root).recorded()) == {"first", "second"}


def test_a_path_that_a_living_process_uses_is_left_to_it(root: Path) -> None:
    from dvc.lock import LockError

    user = {"pid": os.getpid(), "cmd": "dvc repro second"}
    (root / ".dvc" / "tmp" / "rwlock").write_text(
        json.dumps({"read": {}, "write": {str(root / "artifacts" / "second"): user}})
    )
    with pytest.raises(LockError, match="busy"):
        artifacts.Ledger(root).commit("second")


@pytest.mark.parametrize("was_there", [True, False])
def test_what_cannot_be_recorded_is_not_published(tmp_path: Path, was_there: bool) -> None:
    staged, final = tmp_path / "staged", tmp_path / "artifacts" / "stage"
    staged.mkdir()
    (staged / "new").touch()
    if was_there:
        final.mkdir(parents=True)
        (final / "old").touch()
    with pytest.raises(OSError, match="no room"), artifacts.published(staged, final, tmp_path / "trash"):
        assert (final / "new").exists()
        raise OSError("no room")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["artifacts", *(["old", "stage"] if was_there else [])]


NO_ROOM = {
    "by its number": OSError(errno.ENOSPC, "No space left on device", "artifacts/half"),
    "by a library, in words": ValueError("I/O error: No space left on device (os error 28)"),
    "by SQLite, in other words": sqlite3.OperationalError("disk I/O error"),
}


@pytest.mark.parametrize("told", NO_ROOM)
def test_a_full_disk_is_one_sentence_that_allows_a_retry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    staging = tmp_path / ".valr" / "staging" / "sources"

    def fails(*_: object) -> None:
        staging.mkdir(parents=True)
        (staging / "half").write_bytes(bytes(100))
        try:
            raise NO_ROOM[told]
        except Exception as error:
            raise RuntimeError("what a stage says in its own words") from error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "project_root", lambda: tmp_path)
    monkeypatch.setattr(runner, "_run", fails)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(
        DiskFullError, match=f"^sources: the disk of {tmp_path}.* is full .*; make room there"
    ) as raised:
        runner.run("sources")
    assert raised.value.exit_status == 1
    assert not staging.exists()


def test_a_status_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "status").touch()
    shown = io.StringIO()
    progress = ShowingProgress("stage", status_file=tmp_path / "status" / "stage.json", console=Console(file=shown))
    assert list(progress.track(range(3), "things")) == [0, 1, 2]
    progress.failed("the disk is full")
    assert "the disk is full" in shown.getvalue()


def test_a_checkpoint_without_room_leaves_the_one_before_and_nothing_half_written(tmp_path: Path) -> None:
    import torch

    from valr_ops.model import checkpoint

    def no_room() -> Iterator[tuple[str, Any]]:
        yield "weight", torch.zeros(3)
        raise OSError(errno.ENOSPC, "No space left on device")

    run = {"stage": "stage1_sft"}
    checkpoint.write(tmp_path, 1, [("weight", torch.ones(3))], {"run": run}, keep=1)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 2, no_room(), {"run": run}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    found = checkpoint.newest(tmp_path, run)
    assert found is not None and dict(found.tensors())["weight"].tolist() == [1, 1, 1]


def test_measurements_without_room_leave_nothing_and_those_of_a_killed_run_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loss.png").write_bytes(b"picture")
    run = lineage.RunRecord(
        "stage1_sft", "training", "1.dir", {}, "f", "c", "d", {}, {}, {}, artifact=tmp_path, plots=["loss.png"]
    )
    killed = tmp_path / ".valr" / "spool" / ".killed"
    killed.mkdir(parents=True)
    os.utime(killed, (1, 1))

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", no_room)
        with pytest.raises(OSError, match="No space left"):
            lineage.spool(run, tmp_path)
    assert list(killed.parent.iterdir()) == []
    entry = lineage.spool(run, tmp_path)
    assert (entry / "files" / "loss.png").read_bytes() == b"picture"
