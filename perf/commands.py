"""Speed of the commands that people type: in copies of the checkout, so that nothing of yours is touched."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from perf.rows import CHECKOUT, Row, row
from tests.project import MICRO, copy_project, environment

SEEDS = (0, 1, 2)


def start() -> Iterator[Row]:
    """What a person waits for before anything happens."""
    words = [sys.executable, "-m", "valr_ops", "--help"]
    yield row("help_seconds", [_seconds(words) for _ in range(5)], "s", 0.5, "python -m valr_ops --help")
    words = [sys.executable, "-c", "import pipelines.definitions"]
    what = "importing the Dagster definitions in a new process"
    yield row("definitions_seconds", [_seconds(words) for _ in range(5)], "s", 4.0, what)


def hit() -> Iterator[Row]:
    """A stage that is up to date."""
    with _project(MICRO) as root:
        words = [sys.executable, "-m", "valr_ops", "run", "sources"]
        _seconds(words, root)
        what = "valr run on a stage that is up to date"
        yield row("hit_seconds", [_seconds(words, root) for _ in range(5)], "s", 1.0, what)


def main_job() -> Iterator[Row]:
    """The main job from nothing, once for each seed, and a second time when everything is up to date."""
    seconds, gibibytes, again, scores = [], [], [], []
    for seed in SEEDS:
        with _project({"scale": "tiny", "seed": seed}) as root:
            words = [sys.executable, "-m", "valr_ops", "demo"]
            with peak_memory() as peak:
                seconds.append(_seconds(words, root))
            gibibytes.append(peak[0] / 2**30)
            again.append(_seconds(words, root))
            scores.append(_accuracies(root / "artifacts"))
    yield row("main_job_seconds", seconds, "s", 300.0, "make demo after set-up, from nothing; one run a seed")
    yield row("main_job_gibibytes", gibibytes, "GiB", 4.0, "largest memory of all its processes together (PSS)")
    yield row("main_job_again_seconds", again, "s", 10.0, "make demo when everything is up to date")
    for model in scores[0]:
        found = [score[model] for score in scores]
        # Only the trained models have to beat the majority answer.
        goal = 0.0 if model in ("majority", "base") else max(score["majority"] for score in scores)
        what = f"accuracy of {model} on the 256 drawn test items, seeds {', '.join(map(str, SEEDS))}"
        yield row(f"accuracy_{model}", found, "share", goal, what, better="higher")


def tests() -> Iterator[Row]:
    """The default test suite."""
    yield row("tests_seconds", [_seconds(["make", "test"])], "s", 600.0, "make test, set up already; one run")


def setup() -> Iterator[Row]:
    """Setting up a fresh checkout."""
    with _project({"scale": "tiny"}) as root:
        words = ["make", "setup"]
        yield row("setup_seconds", [_seconds(words, root)], "s", 240.0, "make setup in a fresh checkout; one run")
        again = [_seconds(words, root) for _ in range(5)]
        yield row("setup_again_seconds", again, "s", 1.0, "make setup when it is complete")


def _seconds(words: Sequence[str], root: Path = CHECKOUT) -> float:
    started = time.monotonic()
    done = subprocess.run(words, cwd=root, env=environment(root), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"perf: {' '.join(words)} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return time.monotonic() - started


@contextmanager
def _project(recipe: dict[str, Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield copy_project(Path(folder) / "project", recipe)


@contextmanager
def peak_memory(poll_seconds: float = 0.5) -> Iterator[list[int]]:
    """The largest sum over this process's descendants of their proportional set sizes, in bytes, in a list of one."""
    peak, stopped = [0], threading.Event()

    def sample() -> None:
        while not stopped.wait(poll_seconds):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stopped.set()
        sampler.join()


def _accuracies(artifacts: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for model in ("base", "sft", "valr_s", "valr_m"):
        summary = json.loads((artifacts / f"scores_{model}" / "manifest.json").read_text())["summary"]
        found.setdefault("majority", summary["majority_scenes"])
        found[model] = summary["accuracy_scenes"]
    return found
