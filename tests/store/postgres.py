"""A real PostgreSQL on loopback for tests: Debian's package, run by a user other than root."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PASSWORD = "planted-password-of-postgres"


class Postgres:
    """One server with its data in a folder; it can be stopped at once, as by a power cut, and started again."""

    def __init__(self, folder: Path, programs: Path, user: str | None) -> None:
        self._folder, self._programs, self._user = folder, programs, user
        self._port = free_port()
        password = folder / "password"
        password.write_text(PASSWORD)
        if user:
            for path in (folder, password):
                shutil.chown(path, user)
        options = ["-U", "mlops", "--auth-host=scram-sha-256", "--auth-local=trust", "-E", "UTF8", "--locale=C"]
        self._run("initdb", *options, f"--pwfile={password}", "-D", str(folder / "data"))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = f"-c listen_addresses=127.0.0.1 -c fsync=off -p {self._port} -k {self._folder}"
        self._run(
            "pg_ctl", "-D", str(self._folder / "data"), "-l", str(self._folder / "log"), "-w", "-o", settings, "start"
        )

    def stop(self) -> None:
        """Without a word to its clients."""
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-w", "-m", "immediate", "stop")

    def create(self, database: str) -> str:
        """Make an empty database; its address, with the password."""
        self._run("createdb", "-h", str(self._folder), "-p", str(self._port), "-U", "mlops", database)
        return f"postgresql://mlops:{PASSWORD}@127.0.0.1:{self._port}/{database}"

    def dump(self, database: str) -> str:
        """Everything in it, as text."""
        return self._run("pg_dump", "-h", str(self._folder), "-p", str(self._port), "-U", "mlops", database)

    def _run(self, program: str, *options: str) -> str:
        # Not a pipe: the server would inherit it, and reading it would not end before the server does.
        with tempfile.TemporaryFile("w+") as said:
            words = [str(self._programs / program), *options]
            done = subprocess.run(words, user=self._user, cwd=self._folder, stdout=said, stderr=said, timeout=60)
            said.seek(0)
            text = said.read()
        assert done.returncode == 0, f"{program}: {text[-2000:]}"
        return text


@contextmanager
def serving() -> Iterator[Postgres]:
    """A server that is stopped and forgotten at the end; the test is skipped where there is none to start."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb")
    if not programs and not found:
        pytest.skip("PostgreSQL is not installed; Debian, Ubuntu: apt-get install postgresql")
    # initdb refuses to run as root, and root's temporary folders are closed to others.
    user = "postgres" if os.geteuid() == 0 else None
    if user and user not in {entry.pw_name for entry in pwd.getpwall()}:
        user = "nobody"
    with tempfile.TemporaryDirectory(prefix="valr-postgres-", dir="/tmp") as folder:
        server = Postgres(Path(folder), programs[-1] if programs else Path(found or "").resolve().parent, user)
        server.start()
        try:
            yield server
        finally:
            with suppress(AssertionError):
                server.stop()


def free_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
