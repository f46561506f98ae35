"""The HTTP application around one model: OpenAI's routes and the state they share.

In: ``POST /v1/chat/completions`` (whole or as a stream), ``GET /v1/models``, ``GET /health``. Out: OpenAI's objects,
with a `valr` object that says what the latents did.
Always: a request holds a place in the bounded queue before its body is read; every error is OpenAI's error object, and
the traceback of a failure stays in the server's log; the row of a client that went away is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from valr_ops.serving.batcher import Ask, Batcher, Event, Failure, Generate, Job, QueueFull
from valr_ops.serving.protocol import ApiError, ChatRequest, Reply, read_request

STEP_SECONDS = 10
"""For the model to notice that a row is given up: a step, or a long prompt."""
BODY_SECONDS = 60
"""For a client to send its body, while it holds a place in the queue."""
_HEARD_OUT = 4
"""Times the largest body: what is larger still is cut off."""
_RETRY_SECONDS = {"Retry-After": "1"}
_LOG = logging.getLogger(__name__)


class Served(Protocol):
    """What the routes need of a model; `valr_ops.serving.served.ServedModel` is one."""

    @property
    def name(self) -> str: ...
    @property
    def details(self) -> Mapping[str, Any]: ...
    @property
    def check(self) -> Callable[[ChatRequest], Ask]: ...
    @property
    def answer(self) -> Generate: ...


class Service:
    """What the routes share: the model once it is loaded, its batcher, and counts."""

    def __init__(self, *, rows: int, wait_seconds: float, queue: int, body_bytes: int, key: str | None = None) -> None:
        """A service without a model yet.

        Args:
            rows: as in `Batcher`, also for the next two.
            body_bytes: most of a request.
            key: the bearer token that requests must bring; None lets everyone in.
        """
        self.rows, self.wait_seconds, self.queue, self.body_bytes, self.key = rows, wait_seconds, queue, body_bytes, key
        self.created = int(time.time())
        self.model: Served | None = None
        self.batcher: Batcher | None = None
        self.stopping = False
        self.answered = 0
        self.failed = 0

    def open(self, model: Served) -> None:
        """Answer with `model` from now on."""
        self.batcher = Batcher(model.answer, rows=self.rows, wait_seconds=self.wait_seconds, queue=self.queue)
        self.model = model

    def ready(self) -> tuple[Served, Batcher]:
        """The model and its batcher.

        Raises:
            ApiError: 503: not loaded yet, about to end, or without its GPU.
        """
        if self.model is None or self.batcher is None or self.status() != "ok":
            raise ApiError(503, f"the server is {self.status()}", code=self.status(), headers=_RETRY_SECONDS)
        return self.model, self.batcher

    def status(self) -> str:
        """`ok` if a request would be answered, else what the server does instead."""
        if self.stopping:
            return "stopping"
        if self.batcher is None:
            return "loading"
        return "broken" if self.batcher.broken else "ok"

    def begin_to_stop(self) -> None:
        """Refuse what comes and what waits; what runs goes on."""
        self.stopping = True
        if self.batcher is not None:
            self.batcher.close()

    def give_up(self) -> None:
        """End what runs at its next step."""
        if self.batcher is not None:
            self.batcher.give_up()

    def stop(self) -> None:
        """Give up what still runs; a thread inside the model must not outlive the interpreter, which would abort."""
        self.stopping = True
        if self.batcher is not None and not self.batcher.stop(STEP_SECONDS):
            _LOG.warning("the model does not end its batch; it is left behind")


def create_app(service: Service) -> FastAPI:
    """The application around `service`."""
    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="valr", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(_open_routes)
    app.include_router(_routes)
    app.add_exception_handler(ApiError, _as_response)
    app.add_exception_handler(404, _no_such_route)
    app.add_exception_handler(405, _no_such_route)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _check_key(request: Request) -> None:
    """Raise `ApiError` unless the request brings the service's key, compared in constant time."""
    key: str | None = request.app.state.service.key
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key is not None and not (
        scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())
    ):
        raise ApiError(
            401,
            "this server wants its key as the bearer token: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


_open_routes = APIRouter()
_routes = APIRouter(prefix="/v1", dependencies=[Depends(_check_key)])


@_open_routes.get("/health")
async def _health(request: Request) -> Response:
    """200 while requests are answered; 503 before the model is loaded, after its GPU is lost, and while it ends."""
    service: Service = request.app.state.service
    status = service.status()
    counts = service.batcher.counts() if service.batcher is not None else {}
    model = {"model": service.model.name} if service.model is not None else {}
    return JSONResponse({"status": status, **model, **counts}, 200 if status == "ok" else 503)


@_routes.get("/models")
async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_card(request.app.state.service)]})


@_routes.get("/models/{name:path}")
async def _model(request: Request, name: str) -> Response:
    card = _model_card(request.app.state.service)
    _check_name(name, card["id"])
    return JSONResponse(card)


def _model_card(service: Service) -> dict[str, Any]:
    model, _ = service.ready()
    return {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "valr-ops",
        "valr": dict(model.details),
    }


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(
            404, f"model {asked[:80]!r} is not served here, {served!r} is", param="model", code="model_not_found"
        )


@_routes.post("/chat/completions")
async def _complete(request: Request) -> Response:
    service: Service = request.app.state.service
    model, batcher = service.ready()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page in someone's browser may send other kinds of body here without asking.
        raise ApiError(415, "send the request as Content-Type: application/json")
    try:
        batcher.reserve()
    except QueueFull:
        raise ApiError(
            429,
            f"the queue is full, {service.queue} requests wait (--queue); try again",
            code="queue_full",
            headers=_RETRY_SECONDS,
        ) from None
    try:
        body = await _body(request, service.body_bytes)
        asked = await run_in_threadpool(read_request, body)
        _check_name(asked.model, model.name)
        ask = await run_in_threadpool(model.check, asked)
    except BaseException:
        batcher.release()
        raise
    name = f"chatcmpl-{uuid.uuid4().hex}"
    events, job = _job(name, ask)
    reply = Reply(name, model.name, int(time.time()), ask.prompt_tokens)
    batcher.submit(job)
    headers = {"x-request-id": name}
    first = await _first(request, job, events, whole=not asked.stream)
    if isinstance(first, Failure):
        raise _told(first, job, service)
    if not asked.stream:
        assert not isinstance(first, str)
        service.answered += 1
        return JSONResponse(reply.whole(first), headers=headers)
    stream = _stream(service, asked, reply, job, events, first)
    return StreamingResponse(stream, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})


async def _body(request: Request, most: int) -> bytes:
    """The request's body; one of more than `most` bytes is read but not kept, for who still sends hears no answer."""
    too_large = ApiError(413, f"the body has more than {most} bytes (--max-body-mb)", code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > _HEARD_OUT * most:
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > _HEARD_OUT * most:
                    raise too_large
                if size <= most:
                    body += chunk
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} seconds", code="timeout") from None
    if size > most:
        raise too_large
    return bytes(body)


def _job(name: str, ask: Ask) -> tuple[asyncio.Queue[Event], Job]:
    """A job whose events arrive in a queue of this event loop."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def notify(event: Event) -> None:
        # The loop is closed if the server ended without waiting for this row.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    return events, Job(name, ask, notify)


async def _first(request: Request, job: Job, events: asyncio.Queue[Event], whole: bool) -> Event:
    """The job's first event, or its last if `whole`; a client that goes away meanwhile cancels the job.

    A stream's status is sent after this, so that a row that fails at once is an HTTP error for streams too.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()
        events.put_nowait(Failure("cancelled"))

    watching = asyncio.create_task(watch())
    try:
        event = await events.get()
        while whole and isinstance(event, str):
            event = await events.get()
        return event
    except asyncio.CancelledError:
        job.cancel()
        raise
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _stream(
    service: Service, asked: ChatRequest, reply: Reply, job: Job, events: asyncio.Queue[Event], event: Event
) -> AsyncIterator[str]:
    """Server-sent events from `event` on, as OpenAI's clients read them."""
    try:
        yield _sent(reply.first_chunk())
        while isinstance(event, str):
            yield _sent(reply.text_chunk(event))
            event = await events.get()
        if isinstance(event, Failure):
            yield _sent(_told(event, job, service).body())
            return
        service.answered += 1
        for chunk in reply.last_chunks(event, asked.stream_options.include_usage):
            yield _sent(chunk)
        yield "data: [DONE]\n\n"
    finally:
        job.cancel()


def _sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _told(failure: Failure, job: Job, service: Service) -> ApiError:
    """What the client of a job without an answer is told."""
    if failure.reason == "shutting_down" or service.stopping:
        return ApiError(503, "the server is stopping", code="stopping", headers=_RETRY_SECONDS)
    if failure.reason == "broken":
        return ApiError(503, "the server is broken", code="broken", headers=_RETRY_SECONDS)
    if failure.reason == "cancelled":
        return ApiError(503, "the request was given up", code="cancelled")
    service.failed += 1
    return ApiError(
        500,
        f"the model failed on this request; the server's log says why under {job.name}",
        code="model_failed",
        headers={"x-request-id": job.name},
    )


async def _as_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 404))
    routes = "POST /v1/chat/completions, GET /v1/models, GET /health"
    told = ApiError(status, f"no {request.method} {request.url.path[:80]}; there are {routes}", code="no_such_route")
    return JSONResponse(told.body(), status, headers=getattr(error, "headers", None))


async def _unexpected(request: Request, error: Exception) -> Response:
    """The last resort; uvicorn logs the traceback."""
    return JSONResponse(ApiError(500, "unexpected error; the server's log says more").body(), 500)
