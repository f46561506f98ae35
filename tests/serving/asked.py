"""A model that echoes, for tests of what stands around a model; and the requests they send."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image

from valr_ops.serving.batcher import Ask
from valr_ops.serving.protocol import ChatRequest
from valr_ops.serving.server import Options

PATIENCE = 20.0
"""Seconds after which a test that waits has failed."""


@dataclass(frozen=True)
class Segment:
    """A latent segment."""

    slots: int


@dataclass(frozen=True)
class Said:
    """What the echo answered."""

    visible_text: str
    latents: tuple[Segment, ...] = (Segment(4), Segment(2))
    latent_steps: int = 6
    decode_steps: int = 13
    finish_reason: str = "stop"
    seconds: float = 0.25


@dataclass
class Echo:
    """Says the last text of every prompt word by word, in batches that a test can hold, count and break."""

    name: str = "echo"
    details: dict[str, Any] = field(default_factory=lambda: {"slots": 4, "positions": 99, "instruction": "Echo."})
    batches: list[list[str]] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    """Cleared, a batch stands still before its last word."""
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Counts batches begun."""
    error: Exception = field(default_factory=lambda: FloatingPointError("bad, says the secret /path/of/the/server"))
    """What happens to a batch with the text "bad"."""

    def __post_init__(self) -> None:
        self.go.set()

    def check(self, request: ChatRequest) -> Ask:
        text = request.messages[-1].content[-1].text  # type: ignore[union-attr]
        return ask(text, request.new_tokens or 100)

    def answer(
        self,
        asks: Sequence[Ask],
        on_text: Callable[[int, str], None],
        on_end: Callable[[int, Said], None],
        stopped: Callable[[int], bool],
    ) -> None:
        texts = [one.messages[-1]["content"][-1]["text"] for one in asks]
        self.batches.append(texts)
        self.asks += asks
        self.started.release()
        for row, text in enumerate(texts):
            on_text(row, text.split()[0])
        if "bad" in texts:
            raise self.error
        while not self.go.wait(0.01) and not all(stopped(row) for row in range(len(texts))):
            pass
        self.given_up += [text for row, text in enumerate(texts) if stopped(row)]
        for row, text in enumerate(texts):
            if not stopped(row):
                on_text(row, text.removeprefix(text.split()[0]))
            on_end(row, Said(text))


def ask(text: str, max_new_tokens: int = 100) -> Ask:
    """A prompt of one user message."""
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return Ask((message,), prompt_tokens=7, max_new_tokens=max_new_tokens)


def options(**changes: Any) -> Options:
    """Options of a small server."""
    given: dict[str, Any] = {
        "model": "echo",
        "host": "127.0.0.1",
        "port": 0,
        "batch": 4,
        "wait_ms": 0,
        "queue": 8,
        "max_tokens": 32,
        "max_images": 2,
        "max_body_mb": 1,
        "device": "cpu",
        "latents": True,
        "settle": None,
    }
    return Options(**given | changes)


def body(content: Any = "one two", **fields: Any) -> dict[str, Any]:
    """A request about `content`."""
    return {"model": "echo", "messages": [{"role": "user", "content": content}], **fields}


def data_url(picture: PIL.Image.Image, kind: str = "PNG") -> str:
    """`picture` as clients send it."""
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(url: str) -> dict[str, Any]:
    """The image part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}
