"""A bad network between a test and a server on loopback: slow, cut off, or lying."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_BLOCK = 1 << 14


class Proxy:
    """Passes bytes on between its own `endpoint` and the server's; what it does to them can change at any moment."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._server = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.seconds_a_block = 0.0
        """Delay of each block of 16 KiB."""
        self.cut_after: int | None = None
        """Bytes after which a connection is cut, while there are `cuts` left."""
        self.cuts = 0
        self.lies = 0
        """Connections still to come in which one byte of the answer, or of what is sent, is another."""
        self.lie_to = "client"
        self.after_bytes: tuple[int, Callable[[], None]] | None = None
        """Called once, when so many bytes have passed in all."""
        self.passed = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server, timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            state = {"bytes": 0}
            for source, to, towards in ((client, server, "server"), (server, client, "client")):
                threading.Thread(target=self._pump, args=(source, to, towards, state), daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket, towards: str, state: dict[str, int]) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                time.sleep(self.seconds_a_block)
                to.sendall(self._treated(block, towards, state))
                if self._must_cut(state):
                    break
        for one in (source, to):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _treated(self, block: bytes, towards: str, state: dict[str, int]) -> bytes:
        call = None
        with self._lock:
            state["bytes"] += len(block)
            self.passed += len(block)
            if self.after_bytes is not None and self.passed >= self.after_bytes[0]:
                call, self.after_bytes = self.after_bytes[1], None
            # A whole block is not a header: what is bent is content.
            if self.lies > 0 and towards == self.lie_to and len(block) == _BLOCK and state["bytes"] > 2 * _BLOCK:
                self.lies -= 1
                block = bytes([block[0] ^ 1]) + block[1:]
        if call is not None:
            call()
        return block

    def _must_cut(self, state: dict[str, int]) -> bool:
        with self._lock:
            if self.cut_after is None or self.cuts <= 0 or state["bytes"] < self.cut_after:
                return False
            self.cuts -= 1
            return True


@contextmanager
def between(endpoint: str) -> Iterator[Proxy]:
    """A proxy before a server, closed at the end."""
    proxy = Proxy(endpoint)
    try:
        yield proxy
    finally:
        proxy.close()
