"""Several processes for one stage: torchrun on this machine, its first rank heard and its report brought back.

In: the context of a stage whose recipe asks for several processes. Out: the stage's report, as if it had been computed
here; the artifact's files were written by rank 0 into ``context.out``. Where torchrun started this process already (on
a cluster), nothing is launched.
Always: a signal that arrives here reaches all ranks, which stop together at a checkpoint; if this process is killed,
its ranks end at their next line of output.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from valr_ops.exits import EXIT_AT_CHECKPOINT
from valr_ops.recipe.recipe import read
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.training.stop import StopSignals, TrainingInterrupted

T = TypeVar("T")
_MARK = "valr-rank-0 "
_SHUTDOWN_SECONDS = 600
"""Time for the ranks to finish their update and to write a checkpoint; torchrun's own 30 s is too short for 100 GB."""


class RankError(RuntimeError):
    """One of the launched processes failed; the message is its own."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def must_launch(context: StageContext) -> bool:
    """Whether the recipe wants several processes and torchrun did not start this one."""
    return context.recipe.runtime.processes > 1 and "RANK" not in os.environ


def run_ranks(context: StageContext, function: str) -> StageReport:
    """Run ``function`` ("module:name") on `context` in `runtime.processes` processes of this machine.

    Raises:
        TrainingInterrupted: a signal came and the ranks wrote their checkpoint.
        RankError: a rank failed.
    """
    folder = context.work / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    job, answer = folder / "job.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    job.write_text(json.dumps(_job(context, function)), encoding="utf-8")
    runtime = context.recipe.runtime
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={runtime.processes}"),
        *(f"--shutdown-timeout={_SHUTDOWN_SECONDS}", "-m", __name__, str(job.resolve())),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(runtime.threads)}
    last: deque[str] = deque(maxlen=20)
    with StopSignals() as stop:
        # A session of its own: a terminal's Ctrl-C reaches the ranks once, from here.
        processes = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        stop.then(processes.terminate)
        try:
            assert processes.stdout is not None
            _hear(processes.stdout, context.progress, last)
        finally:
            processes.terminate()
            processes.wait()
    told = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if "report" in told:
        report = told["report"]
        return StageReport(**{**report, "checks": tuple(Check(**check) for check in report["checks"])})
    if told.get("exit_status") == EXIT_AT_CHECKPOINT:
        raise TrainingInterrupted(told["message"])
    if stop.requested():
        raise RankError(f"stopped by {stop.received} before a checkpoint could be written", EXIT_AT_CHECKPOINT)
    message = told.get("message") or "a training process ended without saying why; its last lines:\n" + "\n".join(last)
    raise RankError(message, int(told.get("exit_status", 1)))


def _job(context: StageContext, function: str) -> dict[str, Any]:
    return {
        "function": function,
        "stage": context.stage,
        "recipe": context.recipe.model_dump(mode="json"),
        "inputs": {name: str(path.resolve()) for name, path in context.inputs.items()},
        "out": str(context.out.resolve()),
        "work": str(context.work.resolve()),
    }


def _hear(lines: Iterable[str], progress: Progress, last: deque[str]) -> None:
    """Pass on what rank 0 tells its progress; keep the `last` other lines."""
    counts: dict[str, _Counter] = {}
    for line in lines:
        # Other processes write to the same pipe, in front of a message or behind it.
        before, mark, message = line.rstrip().partition(_MARK)
        told: dict[str, Any] = {"what": "nothing"}
        end = 0
        if mark:
            told, end = json.JSONDecoder().raw_decode(message)
        last.extend(filter(None, (before, message[end:])))
        match told.pop("what"):
            case "say":
                progress.say(**told)
            case "log":
                progress.log(**told)
            case "begin":
                counts[told["description"]] = _Counter(progress, **told)
            case "next":
                counts[told["description"]].advance()


class _Counter:
    """A `Progress.track` that is advanced from outside."""

    def __init__(self, progress: Progress, description: str, total: int | None, done: int) -> None:
        items = itertools.repeat(None) if total is None else itertools.repeat(None, total - done)
        self._track = progress.track(items, description, total, done)
        self.advance()

    def advance(self) -> None:
        next(self._track, None)


class _TellingProgress(Progress):
    """Rank 0's progress: lines of JSON on standard output, for the process that launched it."""

    def say(self, message: str) -> None:
        self._tell(what="say", message=message)

    def track(self, items: Iterable[T], description: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        self._tell(what="begin", description=description, total=total, done=done)
        for item in items:
            yield item
            self._tell(what="next", description=description)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tell(what="log", step=step, metrics=dict(metrics))

    def _tell(self, **what: Any) -> None:
        # In one piece: where Python doesn't buffer, print writes the end of the line by itself.
        sys.stdout.write(f"{_MARK}{json.dumps(what)}\n")
        sys.stdout.flush()


def main(job_file: Path) -> int:
    """One rank: read the job, compute, and (rank 0, or the rank that failed first) write the answer."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    first = os.environ["RANK"] == "0"
    out, work = Path(job["out"]), Path(job["work"])
    context = StageContext(
        stage=job["stage"],
        recipe=read(job["recipe"]),
        inputs={name: Path(path) for name, path in job["inputs"].items()},
        out=out,
        work=work,
        progress=_TellingProgress() if first else Progress(),
    )
    module, name = job["function"].split(":")
    function: Callable[[StageContext], StageReport] = getattr(importlib.import_module(module), name)
    answer = job_file.with_name("answer.json")
    try:
        report = function(context)
    except Exception as error:
        ours = type(error).__module__.startswith("valr_ops")
        status = int(getattr(error, "exit_status", 42 if ours else 1))
        message = str(error) if ours else f"rank {os.environ['RANK']}: {type(error).__name__}: {error}"
        _answer(answer, {"message": message, "exit_status": status})
        if not ours:
            raise
        return status
    if first:
        _answer(answer, {"report": asdict(report)})
    return 0


def _answer(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole or not at all; the first of several failures stands."""
    mine = path.with_suffix(f".{os.environ['RANK']}")
    mine.write_text(json.dumps(content), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(mine, path)
    mine.unlink()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
