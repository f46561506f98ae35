"""Speed of what people wait for: ``make perf`` or ``python -m perf [NAME ...]``.

In: this checkout, copied into a temporary folder so that nothing of yours is touched. Out: perf/results.json, one row a
figure with its goal, machine and commit, and a table on the screen. Figures of short commands are medians of five runs;
the main job runs once for each of three seeds, which also gives its scores their spread.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.project import CHECKOUT, MICRO, copy_project, environment

RESULTS = CHECKOUT / "perf" / "results.json"
SEEDS = (0, 1, 2)
Row = dict[str, Any]


def start() -> Iterator[Row]:
    """What a person waits for before anything happens."""
    words = [sys.executable, "-m", "valr_ops", "--help"]
    yield _row("help_seconds", [_seconds(words) for _ in range(5)], "s", 0.5, "python -m valr_ops --help")
    words = [sys.executable, "-c", "import pipelines.definitions"]
    what = "importing the Dagster definitions in a new process"
    yield _row("definitions_seconds", [_seconds(words) for _ in range(5)], "s", 4.0, what)


def hit() -> Iterator[Row]:
    """A stage that is up to date."""
    with _project(MICRO) as root:
        words = [sys.executable, "-m", "valr_ops", "run", "sources"]
        _seconds(words, root)
        what = "valr run on a stage that is up to date"
        yield _row("hit_seconds", [_seconds(words, root) for _ in range(5)], "s", 1.0, what)


def main_job() -> Iterator[Row]:
    """The main job from nothing, once for each seed, and a second time when everything is up to date."""
    seconds, gibibytes, again, scores = [], [], [], []
    for seed in SEEDS:
        with _project({"scale": "tiny", "seed": seed}) as root:
            words = [sys.executable, "-m", "valr_ops", "demo"]
            with _peak_memory() as peak:
                seconds.append(_seconds(words, root))
            gibibytes.append(peak[0] / 2**30)
            again.append(_seconds(words, root))
            scores.append(_accuracies(root / "artifacts"))
    yield _row("main_job_seconds", seconds, "s", 300.0, "make demo after set-up, from nothing; one run a seed")
    yield _row("main_job_gibibytes", gibibytes, "GiB", 4.0, "largest memory of all its processes together (PSS)")
    yield _row("main_job_again_seconds", again, "s", 10.0, "make demo when everything is up to date")
    for model in scores[0]:
        found = [score[model] for score in scores]
        # Only the trained models have to beat the majority answer.
        goal = 0.0 if model in ("majority", "base") else max(score["majority"] for score in scores)
        what = f"accuracy of {model} on the 256 drawn test items, seeds {', '.join(map(str, SEEDS))}"
        yield _row(f"accuracy_{model}", found, "share", goal, what, better="higher")


def tests() -> Iterator[Row]:
    """The default test suite."""
    yield _row("tests_seconds", [_seconds(["make", "test"])], "s", 360.0, "make test, set up already; one run")


def setup() -> Iterator[Row]:
    """Setting up a fresh checkout."""
    with _project({"scale": "tiny"}) as root:
        words = ["make", "setup"]
        yield _row("setup_seconds", [_seconds(words, root)], "s", 240.0, "make setup in a fresh checkout; one run")
        again = [_seconds(words, root) for _ in range(5)]
        yield _row("setup_again_seconds", again, "s", 1.0, "make setup when it is complete")


BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {
    benchmark.__name__: benchmark for benchmark in (start, hit, main_job, setup, tests)
}


def main(names: Sequence[str]) -> int:
    """Run the named benchmarks, or all of them; keep the other rows of the results."""
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"perf: there is no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.is_file() else {}
    for name in names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            rows[row["name"]] = row
            spread = f"{row['lowest']} to {row['highest']}, n={row['runs']}"
            print(f"{row['name']:28} {row['value']:>8} {row['unit']:5} goal {row['goal']:<6} ({spread})", flush=True)
            RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    return 0


def _row(name: str, values: Sequence[float], unit: str, goal: float, what: str, better: str = "lower") -> Row:
    shown = [round(value, 3) for value in values]
    return {
        "name": name,
        "value": round(statistics.median(values), 3),
        "lowest": min(shown),
        "highest": max(shown),
        "runs": len(shown),
        "unit": unit,
        "goal": round(goal, 3),
        "better": better,
        "what": what,
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.machine()}",
        "commit": _commit(),
    }


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
def _peak_memory(poll_seconds: float = 0.5) -> Iterator[list[int]]:
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


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
