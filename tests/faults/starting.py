"""`valr` from where its imports end: a process that has imported what stages need, and a fork of it for each start.

In: arguments of `valr` and the project to run them in. Out: a process of its own session, its CPU seconds, its exit
status. Always: the fork has done nothing but imports before, so it is what a new ``python -m valr_ops`` is once its
imports are over; twenty kills of a stage cost its imports once. What they are is learned from starts that ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tests.project import environment

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Started:
    """A verb that runs."""

    pid: int
    """Also its session and its process group."""
    log: Path
    _answers: IO[bytes]

    def running(self) -> bool:
        """Whether it has not ended by itself."""
        return not select.select([self._answers], [], [], 0)[0]

    def wait(self, seconds: float = 1800) -> int:
        """Its exit status; negative for the signal that ended it. Raises `TimeoutError` after so many seconds."""
        if not select.select([self._answers], [], [], seconds)[0]:
            raise TimeoutError(f"process {self.pid} still runs after {seconds} s; its words are in {self.log}")
        return int(self._answers.readline())

    def cpu_seconds(self) -> float:
        """What it and its children have used so far; 0 once it is gone."""
        ticks, waiting = 0, [self.pid]
        while waiting:
            process = Path(f"/proc/{waiting.pop()}")
            with contextlib.suppress(OSError):
                ticks += sum(map(int, _stat(process)[11:15]))
                for children in process.glob("task/*/children"):
                    waiting += map(int, children.read_text().split())
        return ticks / _TICKS_PER_SECOND

    def wait_for_moment(self, cpu_seconds: float) -> tuple[bool, float]:
        """Return once it has used so many CPU seconds, or has ended: whether it came so far, and what it has used."""
        used = 0.0
        while self.running():
            used = max(used, self.cpu_seconds())
            if used >= cpu_seconds:
                return True, used
            time.sleep(0.01)
        return False, used

    def kill(self) -> None:
        """SIGKILL to its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def ask_to_stop(self, how: signal.Signals) -> None:
        """A signal to the process alone, as a cluster sends it to the first process of a container."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)

    def left_behind(self, seconds: float = 5) -> list[int]:
        """Processes of its session that are still there so many seconds after its own end."""
        until = time.monotonic() + seconds
        while left := _of_session(self.pid):
            if time.monotonic() > until:
                return left
            time.sleep(0.02)
        return []

    def said(self) -> str:
        """What it printed, standard error included."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> dict[str, Any]:
        """The JSON document that ends the output of every verb; empty where there is none."""
        for line in reversed(self.said().splitlines()):
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    return dict(json.loads(line))
        return {}


class Starter:
    """Context in which verbs start without imports. One runs at a time.

    Args:
        code: the project whose code is imported.
        imported: the file that holds what earlier starts had imported in the end.
    """

    def __init__(self, code: Path, imported: Path) -> None:
        self._code, self._imported = code, imported

    def __enter__(self) -> Starter:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.starting", str(self._imported)],
            cwd=self._code,
            env=environment(self._code),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout
        if self._process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the imports failed; try: python -m tests.faults.starting {self._imported}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def start(self, root: Path, arguments: list[str], log: Path) -> Started:
        """``valr ARGUMENTS`` in the project at `root`."""
        variables = environment(root) | {"DVC_SITE_CACHE_DIR": str(root / ".dvc" / "site")}
        asked = {"root": str(root), "arguments": arguments, "log": str(log), "variables": variables}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return Started(int(self._process.stdout.readline()), log, self._process.stdout)


def _stat(process: Path) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the command before it may hold anything."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def _of_session(session: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = _stat(process)
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(process.name))
    return found


def _become(asked: dict[str, Any]) -> None:
    """Be ``valr``, in the process that was forked for it."""
    os.setsid()
    os.write(1, f"{os.getpid()}\n".encode())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(asked["variables"])
    os.chdir(asked["root"])
    sys.argv = ["valr", *asked["arguments"]]
    from valr_ops.__main__ import main

    status = main()
    Path(asked["imported"]).write_text("\n".join(sys.modules), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    # Taking down thousands of modules, most of them other stages', takes as long as a stage.
    os._exit(status)


def _serve(imported: Path) -> None:
    _import(imported)
    os.write(1, b"ready\n")
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked | {"imported": str(imported)})
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        _import(imported)
        os.write(1, f"{status}\n".encode())


def _import(imported: Path) -> None:
    """Import what a start that came to its end had imported."""
    from valr_ops.torchvision_guard import ensure_torchvision

    names = imported.read_text(encoding="utf-8").split() if imported.is_file() else []
    if "torch" in names:
        ensure_torchvision()
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    # A fork that collects garbage would look at all of it, and so copy it.
    gc.freeze()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
