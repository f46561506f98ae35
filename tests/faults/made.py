"""A project whose stages were made once undisturbed, and what must hold after one of them was disturbed.

In: a folder. Out: the project in it, what each stage's undisturbed run left and took (`Undisturbed`), and copies of the
project in which one artifact and its record are gone. Always: the code is that of the day on which the folder was
made, whatever becomes of the checkout meanwhile; a folder that is there is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tests.faults.starting import Started, Starter
from tests.project import CHECKOUT, command, copy_project, valr
from valr_ops.stages import REQUESTED_PIPELINE, upstream
from valr_ops.store.artifacts import directory_digest, folder, read_manifest

_LOCKS = ("dvc.lock", str(Path(REQUESTED_PIPELINE).with_suffix(".lock")))
_DELIVER = "from pathlib import Path; from valr_ops.store import lineage; lineage.deliver(Path.cwd())"
_LEFT_BY_NONE = ("staging", "trash", "refused")
"""Folders below .valr in which a run that ended well leaves nothing."""


@dataclass(frozen=True)
class Undisturbed:
    """One stage's run that nobody disturbed."""

    digest: str
    comparable: str
    """`digest`, or where measured seconds stand in the artifact, a digest without them."""
    seconds: float
    """After the imports, to the end of the process."""
    cpu_seconds: float
    written_bytes: int
    """By which the project grew."""


@dataclass(frozen=True)
class Made:
    """The undisturbed project."""

    folder: Path
    commit: str
    stages: dict[str, Undisturbed]

    @property
    def root(self) -> Path:
        return self.folder / "undisturbed"

    @property
    def said(self) -> str:
        """What kind of project it is, in words."""
        changed = yaml.safe_load((self.root / "params.yaml").read_text(encoding="utf-8"))
        short = " with fewer records and updates" if len(changed) > 1 else ""
        return f"scale {changed['scale']}{short}"

    def starter(self) -> Starter:
        """What starts verbs by the project's code."""
        return Starter(self.root, self.folder / "imported.txt")

    def copy(self, name: str, to: Path, with_artifact: bool = False) -> None:
        """Copy the project to `to` without the artifact of the stage `name`, its record and its bytes in the cache.

        Args:
            with_artifact: artifact and record stay, the rest goes.
        """
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self.root, to, symlinks=True)
        forget(to, name, with_artifact)


def make(where: Path, stages: Iterable[str], recipe: dict[str, Any]) -> Made:
    """Make the named stages and what they need in ``where/undisturbed``, as far as that was not done yet."""
    root, figures = where / "undisturbed", where / "undisturbed.json"
    names = list(dict.fromkeys(["recipe", *(row.name for row in upstream(stages))]))
    if not (root / ".dvc").is_dir() or not figures.is_file():
        shutil.rmtree(root, ignore_errors=True)
        copy_project(root, recipe)
        (where / "logs").mkdir(exist_ok=True)
        figures.write_text(json.dumps({"commit": _commit(), "stages": {}}), encoding="utf-8")
        # What the first command of a project makes is nobody's measurement.
        valr(root, "run", "recipe")
        forget(root, "recipe")
    known = json.loads(figures.read_text(encoding="utf-8"))
    if wanted := [name for name in names if name not in known["stages"]]:
        with Starter(root, where / "imported.txt") as starter:
            for name in wanted:
                known["stages"][name] = asdict(_undisturbed(starter, root, name, where / "logs" / f"{name}.log"))
                figures.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return Made(where, known["commit"], {name: Undisturbed(**known["stages"][name]) for name in names})


def _undisturbed(starter: Starter, root: Path, name: str, log: Path) -> Undisturbed:
    forget(root, name)
    before, started = _size(root), time.monotonic()
    running = starter.start(root, ["run", name], log)
    _, cpu = running.wait_for_moment(math.inf)
    status, seconds = running.wait(), time.monotonic() - started
    if status:
        raise RuntimeError(f"{name} undisturbed ended with {status}:\n{running.said()[-3000:]}")
    digest = str(running.last_line()["digest"])
    print(f"undisturbed {name:28} {seconds:7.1f} s {cpu:7.1f} CPU s", flush=True)
    return Undisturbed(digest, comparable(root, name), round(seconds, 2), round(cpu, 2), max(_size(root) - before, 0))


def forget(root: Path, name: str, but_artifact: bool = False) -> None:
    """Remove the artifact of a stage, its record, and all that an earlier run could be brought back from."""
    for state in ("work", "cache", "staging", "trash"):
        shutil.rmtree(root / ".valr" / state / name, ignore_errors=True)
    (root / ".valr" / "metrics" / f"{name}.jsonl").unlink(missing_ok=True)
    shutil.rmtree(root / ".dvc" / "cache" / "runs", ignore_errors=True)
    recorded = records(root)
    gone = _objects(root, recorded.pop(name)) if name in recorded else set()
    for one in gone.difference(*(_objects(root, row) for row in recorded.values())):
        _object(root, one).unlink(missing_ok=True)
    if but_artifact:
        return
    shutil.rmtree(folder(root, name), ignore_errors=True)
    for lock in _LOCKS:
        known = _yaml(root / lock)
        if known.get("stages", {}).pop(name, None):
            (root / lock).write_text(yaml.safe_dump(known, sort_keys=False), encoding="utf-8")


def records(root: Path) -> dict[str, Any]:
    """What DVC recorded, by stage. Raises `ValueError` where a lock file is damaged."""
    found: dict[str, Any] = {}
    for lock in _LOCKS:
        recorded = _yaml(root / lock)
        if recorded and not isinstance(recorded.get("stages"), dict):
            raise ValueError(f"{lock} is damaged")
        found |= recorded.get("stages", {})
    return found


def after_a_kill(root: Path, name: str, made: Made, before: dict[str, Any]) -> Iterator[str]:
    """What is wrong right after a kill: only the artifact that was being made may be missing, and none be half."""
    try:
        now = records(root)
    except (ValueError, yaml.YAMLError) as error:
        yield f"a lock file of DVC is damaged ({str(error)[:100]})"
        return
    for other in sorted(before):
        if other != name and now.get(other) != before[other]:
            yield f"the record of {other} is {'another' if other in now else 'gone'}"
    artifact = folder(root, name)
    if artifact.is_dir() and comparable(root, name) != made.stages[name].comparable:
        yield f"{artifact.relative_to(root)} is there and not whole"


def after_a_failure(root: Path, name: str, made: Made, before: dict[str, Any]) -> Iterator[str]:
    """What is wrong after a run that ended with an error: nothing may have changed."""
    if records(root) != before:
        yield "dvc.lock changed"
    if directory_digest(folder(root, name)) != made.stages[name].digest:
        yield f"the artifact of {name} changed"
    yield from _left(root)


def after_the_end(root: Path, name: str, made: Made, ended: Started, before: dict[str, Any]) -> Iterator[str]:
    """What is wrong after a run that ended well, whatever became of those before it."""
    yield from after_a_kill(root, name, made, before)
    if (digest := ended.last_line().get("digest")) != directory_digest(folder(root, name)):
        yield f"{name} says {digest}, and its folder has another digest"
    if records(root).get(name, {}).get("outs", [{}])[0].get("md5") != digest:
        yield f"dvc.lock has another digest of {name} than {digest}"
    for other, row in made.stages.items():
        if other != name and other in before and directory_digest(folder(root, other)) != row.digest:
            yield f"the artifact of {other} changed"
    yield from _left(root)
    for left in (root / ".valr" / "work").glob(f"{name}*"):
        yield f".valr/work/{left.name} is still there"
    for one in sorted(_objects(root, records(root)[name])):
        if hashlib.md5(_object(root, one).read_bytes()).hexdigest() != one.removesuffix(".dir"):
            yield f"DVC's cache has another content under {one}"
    yield from _tracked(root)
    again = valr(root, "run", name, check=False)
    if '"how": "hit"' not in again.stdout:
        yield f"the same command again was no hit but ended with {again.returncode}: {again.stdout[-200:].strip()}"


def comparable(root: Path, name: str) -> str:
    """The digest of an artifact; of `scaling_curve`, which holds measured seconds, of what else is in its table."""
    artifact = folder(root, name)
    if name != "scaling_curve":
        return directory_digest(artifact)
    # The table and both pictures show them too.
    rows = pq.read_table(artifact / "scaling.parquet").drop_columns(["mean_seconds"]).to_pylist()
    known = [rows, read_manifest(artifact)["summary"], sorted(path.name for path in artifact.iterdir())]
    return hashlib.md5(json.dumps(known, sort_keys=True).encode()).hexdigest()


def machine() -> str:
    """The machine in a few words."""
    return f"{os.cpu_count()} cores, {platform.machine()}"


def _left(root: Path) -> Iterator[str]:
    for state in _LEFT_BY_NONE:
        if left := sorted(path.name for path in (root / ".valr" / state).glob("*")):
            yield f".valr/{state} still has {', '.join(left)}"


def _tracked(root: Path) -> Iterator[str]:
    """What is wrong with the measurements, once those of a run that was killed before it delivered them went out."""
    spool = root / ".valr" / "spool"
    if list(spool.glob("[!.]*")):
        # The next stage that is made would do it.
        command(root, sys.executable, "-c", _DELIVER)
    if left := sorted(path.name for path in spool.glob("[!.]*")):
        yield f".valr/spool still has {', '.join(left)}"
    with sqlite3.connect(f"file:{root}/.valr/mlflow.db?mode=ro", uri=True) as tracking:
        if (damage := tracking.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            yield f"mlflow.db is damaged: {damage}"
        for status, count in tracking.execute("SELECT status, COUNT(*) FROM runs GROUP BY status"):
            if status != "FINISHED":
                yield f"MLflow has {count} runs with status {status}"


def _objects(root: Path, row: dict[str, Any]) -> set[str]:
    """Digests of the cached objects of a recorded stage."""
    found = {out["md5"] for out in row.get("outs", [])}
    for one in list(found):
        listed = _object(root, one)
        if one.endswith(".dir") and listed.is_file():
            found |= {entry["md5"] for entry in json.loads(listed.read_bytes())}
    return found


def _object(root: Path, digest: str) -> Path:
    return root / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]


def _yaml(path: Path) -> dict[str, Any]:
    loaded = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader) if path.is_file() else {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path.name} is damaged: it holds {type(loaded).__name__}")
    return loaded


def _size(root: Path) -> int:
    return sum(path.lstat().st_size for path in root.rglob("*"))


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.strip()
