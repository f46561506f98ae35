"""A chat endpoint on loopback that answers as a test tells it, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """The text parts of the user's first message."""
        return [part["text"] for part in self.body["messages"][1]["content"] if part["type"] == "text"]

    @property
    def pictures(self) -> list[str]:
        """Its data URLs."""
        parts = self.body["messages"][1]["content"]
        return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]

    @property
    def question(self) -> str:
        """What the record asks."""
        return self.texts[-1].split("\n")[0].removeprefix("Question: ")


@dataclass(frozen=True)
class Says:
    """One reply."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None
    """So many bytes are sent before the connection breaks; None for all."""
    after: float = 0.0
    """Seconds until it comes."""


def completion(
    content: str | None, usage: tuple[int, int] | None = None, finish_reason: str | None = None, **more: Any
) -> Says:
    """The reply of a model that answers `content`; `more` are other fields of it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    body: dict[str, Any] = {"choices": [choice], **more}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return Says(json.dumps(body).encode())


def matches(*images: int | None) -> Says:
    """The reply that matches the steps 1, 2 ... to these pictures."""
    pairs = [{"step": number, "image": image} for number, image in enumerate(images, start=1)]
    return completion(json.dumps({"matches": pairs}))


def error(status: int, message: str = "", code: str | None = None, **headers: str) -> Says:
    """A reply in the form of OpenAI's errors."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Says(json.dumps({"error": {"message": message, "code": code}}).encode(), status, names)


@dataclass
class Endpoint:
    """A running server."""

    url: str
    """Ends in /v1."""
    asked: list[Asked] = field(default_factory=list)

    @property
    def questions(self) -> list[str]:
        """In the order of the requests."""
        return [one.question for one in self.asked]


@contextmanager
def serving(answer: Callable[[Asked], Says]) -> Iterator[Endpoint]:
    """A server that answers with `answer`, which several threads may call at once."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(self.path, dict(self.headers.items()), body)
            endpoint.asked.append(asked)
            says = answer(asked)
            time.sleep(says.after)
            try:
                self.send_response(says.status)
                for name, value in says.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(says.body)))
                self.end_headers()
                self.wfile.write(says.body[: says.sent])
            except OSError:
                # The client has gone away, as some tests want it to.
                self.close_connection = True
            if says.sent is not None:
                self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def saying(*replies: Says) -> Iterator[Endpoint]:
    """A server that gives these replies in order, and the last one ever after."""
    left, lock = list(replies), threading.Lock()

    def answer(_: Asked) -> Says:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    with serving(answer) as endpoint:
        yield endpoint
