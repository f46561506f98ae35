"""Processes that work for another: they see its environment, end with it, and say when one is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from valr_ops.workers import WorkerLostError, workers

_LIGHT_MODULE = "time"


def test_what_begins_sees_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for now in ("one", "another"):
        monkeypatch.setenv("VALR_TEST_STORE", now)
        with workers(1, _LIGHT_MODULE) as pool:
            assert pool.submit(os.getenv, "VALR_TEST_STORE").result(60) == now


def test_an_error_here_ends_them_at_once() -> None:
    with pytest.raises(KeyError, match="here"), workers(1, _LIGHT_MODULE) as pool:
        identity = pool.submit(os.getpid).result(60)
        pool.submit(time.sleep, 3600)
        raise KeyError("here")
    _wait_for_the_end_of(identity)


def test_ctrl_c_is_left_to_the_process_that_they_work_for() -> None:
    with workers(1, _LIGHT_MODULE) as pool:
        identity = pool.submit(os.getpid).result(60)
        os.kill(identity, signal.SIGINT)
        assert pool.submit(os.getpid).result(60) == identity


def test_what_this_process_ignores_ends_them_all_the_same(tmp_path: Path) -> None:
    asked = "pool.submit(signal.getsignal, signal.SIGTERM).result().name"
    with _parent(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", f"print({asked})") as parent:
        assert parent.communicate(timeout=60)[0] == "SIG_DFL\n"


def test_one_that_is_killed_is_told_with_the_likely_reason() -> None:
    said = r"one of the 2 processes of time was killed, most likely for want of memory"
    with pytest.raises(WorkerLostError, match=said), workers(2, _LIGHT_MODULE) as pool:
        pool.submit(os.kill, pool.submit(os.getpid).result(60), signal.SIGKILL)
        pool.submit(time.sleep, 3600).result(60)


def test_they_end_where_the_process_that_they_work_for_is_killed(tmp_path: Path) -> None:
    sleeping = "print(pool.submit(os.getpid).result(), flush=True); pool.submit(time.sleep, 3600).result()"
    with _parent(tmp_path, "pass", sleeping) as parent:
        assert parent.stdout is not None
        identity = int(parent.stdout.readline())
        assert _runs(identity)
        parent.kill()
    _wait_for_the_end_of(identity)


def _parent(folder: Path, first: str, meanwhile: str) -> subprocess.Popen[str]:
    """A process that does `first`, and `meanwhile` while another works for it, the only one in `pool`."""
    (folder / "parent.py").write_text(
        "import os, signal, time\nfrom valr_ops.workers import workers\n"
        f"if __name__ == '__main__':\n    {first}\n    with workers(1, 'time') as pool:\n        {meanwhile}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, str(folder / "parent.py")]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


def _wait_for_the_end_of(identity: int) -> None:
    deadline = time.monotonic() + 60
    while _runs(identity):
        assert time.monotonic() < deadline, "it outlived the process that it worked for"
        time.sleep(0.05)


def _runs(identity: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        status = Path(f"/proc/{identity}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it may end between any two looks
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
