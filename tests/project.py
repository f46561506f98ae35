"""A private copy of the project in a temporary folder, for tests that make artifacts.

The copy has its own git and DVC repositories and a recipe small enough that every stage takes a second or two, so a
test can edit, break and kill things without touching the checkout.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from valr_ops.__main__ import main

CHECKOUT = Path(__file__).resolve().parents[1]

MICRO: dict[str, Any] = {
    "scale": "tiny",
    "data.synthetic.train_records": 16,
    "data.synthetic.test_records": 8,
    "base.from_scratch.tower_pretraining_steps": 2,
    "base.from_scratch.vocabulary_size": 512,
    "teachers.dinov3.pretraining_steps": 2,
    "teachers.siglip2.pretraining_steps": 2,
    "teachers.pi3.pretraining_steps": 2,
    "stage1.micro_batch": 8,
    "stage1.max_updates": 2,
    "stage2.micro_batch": 8,
    "stage2.max_updates": 2,
    "evaluation.max_new_tokens": 12,
    "evaluation.limit": 6,
    "evaluation.study_items": 4,
    "evaluation.benchmarks": {"vsi_bench": {"drawn": 6}, "blink": {"drawn": 6}},
}
"""The smallest recipe that still runs every stage for real."""


def copy_project(to: Path, recipe: dict[str, Any] | None = None) -> Path:
    """Copy what git would commit into `to`, with `recipe` as params.yaml, and make it a git and DVC project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (CHECKOUT / name).is_file() and name != "dvc.lock":
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, to / name)
    (to / "params.yaml").write_text(yaml.safe_dump(recipe or MICRO), encoding="utf-8")
    for command in (
        ["git", "init", "-q"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "project"],
    ):
        subprocess.run(command, cwd=to, check=True, capture_output=True)
    return to


def environment(root: Path) -> dict[str, str]:
    """The environment of a shell in which the project at `root` was activated."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("DVC_", "VALR_", "DAGSTER_"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/.valr/mlflow.db",
        "OMP_NUM_THREADS": "1",
    }


def valr(root: Path, *arguments: str, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """``valr ARGUMENTS`` in the project at `root`."""
    return command(root, sys.executable, "-m", "valr_ops", *arguments, check=check, timeout=timeout)


def valr_here(root: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """As `valr`, in this process, which has imported already what a process of its own would take seconds for."""
    out, err = io.StringIO(), io.StringIO()
    with patch.dict(os.environ, environment(root), clear=True), chdir(root), redirect_stdout(out), redirect_stderr(err):
        status = main(list(arguments))
    if check and status:
        raise AssertionError(f"valr {' '.join(arguments)} ended with {status}\n{out.getvalue()}\n{err.getvalue()}")
    return subprocess.CompletedProcess(["valr", *arguments], status, out.getvalue(), err.getvalue())


def command(root: Path, *words: str, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Any command in the project at `root`; with `check`, a failure shows what it printed."""
    done = subprocess.run(
        words,
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(words)} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON document that ends the standard output of every verb."""
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def digests(root: Path) -> dict[str, str]:
    """The recorded digest of every artifact, by stage."""
    lock = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))
    return {name: row["outs"][0]["md5"] for name, row in lock["stages"].items()}
