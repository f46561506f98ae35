"""Checkpoints in object storage, on a real S3 server."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.store.weed import Weed
from valr_ops.model import checkpoint
from valr_ops.model.checkpoint import Mirror, restore
from valr_ops.store import objects
from valr_ops.store.objects import S3Files, StorageError

pytestmark = pytest.mark.services

RUN = {"seed": 0}


@pytest.fixture
def location(s3_store: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(checkpoint, "_LOOK_SECONDS", 0.05)
    return f"s3://test/{tmp_path.name}"


def write(folder: Path, step: int) -> Path:
    tensors = [("moving", torch.full((2, 3), float(step))), ("frozen", torch.arange(5000))]
    return checkpoint.write(folder, step, iter(tensors), {"run": RUN, "step": step}, keep=1)


@functools.cache
def files(location: str) -> S3Files:
    """One client for many looks."""
    return S3Files(location)


def mirrored(location: str) -> list[str]:
    return [name for name in files(location).names(".json") if "/" not in name]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def newest_step(folder: Path) -> int:
    found = checkpoint.newest(folder, RUN)
    assert found is not None
    tensors = dict(found.tensors())
    assert torch.equal(tensors["moving"], torch.full((2, 3), float(found.state["step"])))
    return int(found.state["step"])


def test_the_newest_checkpoints_come_back_on_another_machine(location: str, tmp_path: Path) -> None:
    said: list[str] = []
    with Mirror(tmp_path / "work", location, said.append):
        for step in (1, 2, 3):
            write(tmp_path / "work", step)
            until(lambda step=step: f"checkpoint-{step:08d}.json" in mirrored(location))
    assert said == []
    assert mirrored(location) == ["checkpoint-00000002.json", "checkpoint-00000003.json"]
    # Two of three lists, and of two files each what no kept one has is gone.
    assert len([name for name in files(location).names() if name.endswith(".dir")]) == 2
    assert restore(tmp_path / "other", [location], said.append)
    assert newest_step(tmp_path / "other") == 3
    assert "checkpoint-00000003 fetched" in said[-1]
    assert restore(tmp_path / "other", [location], said.append) and len(said) == 1, "it is there already"
    checkpoint.discard(location)
    assert files(location).names() == []
    assert not restore(tmp_path / "third", [location], said.append)


def test_a_run_that_is_stopped_waits_for_the_copy_of_its_last_checkpoint(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_LOOK_SECONDS", 60)
    with pytest.raises(RuntimeError, match="SIGTERM"), Mirror(tmp_path / "work", location, print):
        write(tmp_path / "work", 7)
        raise RuntimeError("SIGTERM")
    assert mirrored(location) == ["checkpoint-00000007.json"]


def test_what_was_there_before_is_not_copied_again(location: str, tmp_path: Path) -> None:
    write(tmp_path / "work", 1)
    with pytest.raises(KeyError), Mirror(tmp_path / "work", location, print):
        raise KeyError
    assert mirrored(location) == []


def test_of_several_attempts_the_furthest_counts(location: str, tmp_path: Path) -> None:
    for name, step in (("first", 9), ("second", 4)):
        with pytest.raises(KeyError), Mirror(tmp_path / name, f"{location}/{name}", print):
            write(tmp_path / name, step)
            raise KeyError
    assert restore(tmp_path / "work", [f"{location}/second", f"{location}/first", f"{location}/none"], print)
    assert newest_step(tmp_path / "work") == 9


def test_a_checkpoint_damaged_in_the_store_is_said_and_passed_over(
    s3_store: Weed, location: str, tmp_path: Path
) -> None:
    said: list[str] = []
    with Mirror(tmp_path / "work", location, said.append):
        for step in (1, 2):
            made = write(tmp_path / "work", step)
            until(lambda step=step: f"checkpoint-{step:08d}.json" in mirrored(location))
    for file in made.iterdir():
        digest = hashlib.md5(file.read_bytes()).hexdigest()
        name = f"{location.removeprefix('s3://test/')}/files/md5/{digest[:2]}/{digest[2:]}"
        s3_store.client().put_object(Bucket="test", Key=name, Body=b"x" * file.stat().st_size)
    assert restore(tmp_path / "other", [location], said.append)
    assert newest_step(tmp_path / "other") == 1
    assert "checkpoint-00000002 can't be used, going on from the one before it" in said[0]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["checkpoint-00000001"]
    assert mirrored(location) == ["checkpoint-00000001.json"]
    with pytest.raises(KeyError), Mirror(tmp_path / "other", location, said.append):
        write(tmp_path / "other", 2)
        raise KeyError
    assert restore(tmp_path / "third", [location], said.append) and newest_step(tmp_path / "third") == 2


def test_training_goes_on_while_the_store_is_away(
    s3_store: Weed, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PATIENT_ATTEMPTS", 1)
    monkeypatch.setattr(objects, "_ATTEMPTS", 1)
    said: list[str] = []
    with Mirror(tmp_path / "work", location, said.append):
        with s3_store.away():
            write(tmp_path / "work", 1)
            until(lambda: len(said) > 0)
            write(tmp_path / "work", 2)
        until(lambda: mirrored(location) == ["checkpoint-00000002.json"])
    assert "checkpoint-00000001 is not in the store yet, training goes on meanwhile" in said[0]


def test_a_store_that_can_not_be_read_is_no_empty_store(location: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="access denied"):
        restore(tmp_path / "work", [location], print)
