"""The process around the application: ``valr serve --model PATH_OR_STAGE``.

In: the verb's options. Out: a listening server, from the first moment on, and an `Outcome` once it was asked to end.
Always: only loopback listens unless another host is typed; after SIGTERM or Ctrl-C what runs is finished, for
`GRACE_SECONDS` at most or until the second Ctrl-C.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from valr_ops.serving.app import STEP_SECONDS, Served, Service, create_app
from valr_ops.training.stop import StopSignals

KEY_VARIABLE = "VALR_API_KEY"
"""Environment variable; if it is set, every request but ``/health`` must bring it as its bearer token."""
GRACE_SECONDS = 30
"""For what runs when the server is asked to end."""


class ServingError(ValueError):
    """The server can't start as it was asked to; the message names the option."""


@dataclass(frozen=True)
class Options:
    """How to serve; the verb's options."""

    model: str
    """A folder, or a stage whose artifact is one."""
    host: str
    port: int
    """0 takes any free one."""
    batch: int
    """Most rows decoded together."""
    wait_ms: int
    """How long the first request of a batch waits for others, milliseconds."""
    queue: int
    """Requests that wait beside a full batch; more get 429."""
    max_tokens: int
    """Most tokens of an answer."""
    max_images: int
    """In a request."""
    max_body_mb: int
    """Of a request, MiB."""
    device: str | None
    """"cpu" or "cuda"; None takes the GPU if there is one."""
    latents: bool
    settle: float | None
    """As in `generate_answers`."""

    def __post_init__(self) -> None:
        least = {"port": 0, "batch": 1, "wait_ms": 0, "queue": 0, "max_tokens": 1, "max_images": 0, "max_body_mb": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ServingError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {bound} or more")


@dataclass(frozen=True)
class Outcome:
    """What a server did until it was asked to end."""

    answered: int
    failed: int
    seconds: float
    interrupted: bool
    """By Ctrl-C rather than SIGTERM."""


class _Server(uvicorn.Server):
    """Ends in good order: the first signal refuses what comes, a second Ctrl-C gives up what runs."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # The loop calls, not this handler: the signal may have come while this thread held the batcher's lock.
        if not self.should_exit:
            super().handle_exit(sig, frame)
            self._loop.call_soon_threadsafe(self._service.begin_to_stop)
            self._loop.call_soon_threadsafe(self._loop.call_later, GRACE_SECONDS, self._service.give_up)
        elif sig == signal.SIGINT:
            # uvicorn's own way would cut the connections, with a traceback for each of them.
            self._loop.call_soon_threadsafe(self._service.give_up)


def serve(options: Options) -> Outcome:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ServingError: the port can't be had.
        AnswerError: no such model, or no such device.
        ModelError: the model's files are not whole.
    """
    started = time.monotonic()
    listening = _listen(options.host, options.port)
    options = replace(options, port=listening.getsockname()[1])
    service = Service(
        rows=options.batch,
        wait_seconds=options.wait_ms / 1000,
        queue=options.queue,
        body_bytes=options.max_body_mb * 2**20,
        key=os.environ.get(KEY_VARIABLE) or None,
    )
    if service.key is None and not _is_loopback(options.host):
        print(f"valr: {options.host} is open to others; set {KEY_VARIABLE} to ask them for a key", file=sys.stderr)
    server = _Server(_uvicorn_config(create_app(service)), service)
    problems: list[Exception] = []

    def load() -> None:
        try:
            service.open(_load(options))
        except Exception as error:
            problems.append(error)
            server.should_exit = True
            return
        if not service.stopping:
            print(_greeting(options, service), flush=True)

    loading = threading.Thread(target=load, name="loading")
    with StopSignals() as signals, listening:
        loading.start()
        try:
            if not signals.requested():
                server.run(sockets=[listening])
        finally:
            loading.join()
            service.stop()
    if problems:
        raise problems[0]
    return Outcome(service.answered, service.failed, time.monotonic() - started, signals.received == "SIGINT")


def _load(options: Options) -> Served:
    # Imported here: loading torch takes seconds, in which /health already says that the server is loading.
    from valr_ops.serving.served import PromptLimits, ServedModel

    limits = PromptLimits(options.max_tokens, options.max_images)
    return ServedModel(options.model, limits, device=options.device, latents=options.latents, settle=options.settle)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        # Python adds the address that it tried, which stands before it here.
        why = str(getattr(error, "strerror", error)).partition(" (while ")[0]
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        raise ServingError(
            f"can't listen on {host}:{port} ({why}); {'stop what uses it, or ' if taken else ''}choose another: "
            "--host, --port"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """One line a request on standard error; standard output is the verb's."""
    handlers = {name: {**handler, "stream": "ext://sys.stderr"} for name, handler in LOGGING_CONFIG["handlers"].items()}
    loggers = {**LOGGING_CONFIG["loggers"], "valr_ops.serving": {"handlers": ["default"], "level": "INFO"}}
    loggers["uvicorn"] = {"handlers": ["default"], "level": "WARNING", "propagate": False}
    loggers["uvicorn.error"] = {"level": "WARNING"}
    return uvicorn.Config(
        app,
        log_config={**LOGGING_CONFIG, "handlers": handlers, "loggers": loggers},
        log_level=None,
        timeout_graceful_shutdown=GRACE_SECONDS + STEP_SECONDS,
        server_header=False,
    )


def _greeting(options: Options, service: Service) -> str:
    """The address, and a request to paste into a shell."""
    model = service.model
    assert model is not None
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{options.port}/v1"
    question = f"What is to the left of the red square?\n{model.details['instruction']}"
    body = json.dumps({"model": model.name, "messages": [{"role": "user", "content": question}]})
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if service.key else ""
    return (
        f"{model.name} answers at {address}\n"
        f"  curl {address}/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}\n"
        "Ctrl-C stops it once what runs is answered, a second Ctrl-C at once."
    )
