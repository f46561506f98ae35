"""The project on one machine: environment variables, the Dagster instance, and the two web pages.

Dagster reads neither pyproject.toml nor workspace.yaml for ``dagster asset materialize``: what makes it work as typed
are the variables of `environment`, which ``make setup`` writes into the activate script and ``valr env`` prints.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

DAGSTER_PORT = 3000
MLFLOW_PORT = 5000


class WorkspaceError(RuntimeError):
    """The machine can't do what was asked: a port in use, a server that does not start."""


def environment(root: Path) -> dict[str, str]:
    """Variables under which Dagster, DVC and MLflow work in this project.

    A Dagster home of this project stays, as that of infra/local/up.sh; one of another project does not.
    """
    given = os.environ.get("DAGSTER_HOME", "")
    is_ours = Path(given).is_absolute() and (root / ".valr").resolve() in Path(given).resolve().parents
    return {
        "DAGSTER_HOME": given if is_ours else str(root / ".valr" / "dagster"),
        "DAGSTER_CLI_ASSET_MATERIALIZE_MODULE_NAME": "pipelines.definitions",
        "DAGSTER_CLI_ASSET_LIST_MODULE_NAME": "pipelines.definitions",
        "DAGSTER_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.valr/mlflow.db"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GX_ANALYTICS_ENABLED": "false",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def prepare(root: Path) -> dict[str, str]:
    """Make what the variables point at, and return the whole environment for a child process."""
    home = root / ".valr" / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    settings, ours = home / "dagster.yaml", root / "infra" / "local" / "dagster.yaml"
    if not settings.is_file() and ours.is_file():
        shutil.copyfile(ours, settings)
    return {**os.environ, **environment(root)}


def materialize_command(names: Sequence[str]) -> list[str]:
    """The Dagster command that materializes the named assets, or one cell of a partitioned one (``asset@cell``)."""
    select = " or ".join(f"key:{name.partition('@')[0]}" for name in names)
    cells = [name.partition("@")[2] for name in names if "@" in name]
    words = ["dagster", "asset", "materialize", "-m", "pipelines.definitions", "--select", select]
    return [sys.executable, "-m", *words, *(word for cell in cells for word in ("--partition", cell))]


def serve_pages(root: Path, dagster_port: int = DAGSTER_PORT, mlflow_port: int = MLFLOW_PORT) -> None:
    """Start the pages of Dagster and MLflow on loopback, print their addresses, and stop both on Ctrl-C.

    Raises:
        WorkspaceError: a port is in use, or a server ended by itself.
    """
    with interruptible():
        _serve_pages(root, dagster_port, mlflow_port)


def _serve_pages(root: Path, dagster_port: int, mlflow_port: int) -> None:
    from valr_ops.store import lineage

    for name, port in (("dagster", dagster_port), ("mlflow", mlflow_port)):
        if in_use(port):
            raise WorkspaceError(
                f"port {port} is in use; stop what uses it, or choose another: valr ui --{name}-port N"
            )
    logs = root / ".valr" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    env = prepare(root)
    commands = {
        "dagster": [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(dagster_port)],
        "mlflow": lineage.server_command(root, port=mlflow_port),
    }
    pages = {
        "dagster": f"http://127.0.0.1:{dagster_port}/asset-groups",
        "mlflow": lineage.runs_page(root, mlflow_port),
    }
    servers = {name: start(command, root, env, (logs / f"{name}.log").open("wb")) for name, command in commands.items()}
    try:
        for name, server in servers.items():
            _wait_until_up(name, server, pages[name].split("/#")[0], logs / f"{name}.log")
            print(f"{name:8} {pages[name]}", flush=True)
        print("Ctrl-C stops both.", flush=True)
        while all(server.poll() is None for server in servers.values()):
            time.sleep(0.5)
        ended = next(name for name, server in servers.items() if server.poll() is not None)
        raise WorkspaceError(f"{ended} ended by itself; its last words are in .valr/logs/{ended}.log")
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
    finally:
        for server in servers.values():
            stop(server)


def in_use(port: int) -> bool:
    """Whether something listens on the loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Context in which SIGINT and SIGTERM both raise KeyboardInterrupt, here and in what is started meanwhile.

    A script that starts this process with `&` has it ignore SIGINT; Dagster then ignores SIGTERM too, and so does all
    that it starts. And a SIGTERM that ends this process must not leave behind what it started.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(command: Sequence[str], root: Path, env: Mapping[str, str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a process that writes to `log` and that Ctrl-C does not reach: it has a session of its own."""
    return subprocess.Popen(
        command,
        cwd=root,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_until_up(name: str, server: subprocess.Popen[bytes], address: str, log: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    tail = log.read_text(errors="replace").strip().splitlines()[-3:]
    raise WorkspaceError(f"{name} did not start; the end of {log.name}: {' / '.join(tail)}")


def stop(server: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Ask a server that `start` started to end, and end its whole session if it does not."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
