"""The server as OpenAI's clients and their mistakes see it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from tests import tiny
from tests.project import CHECKOUT
from tests.serving.asked import PATIENCE, Echo, body, data_url, options, shown
from valr_ops.model.answering import Sampling, generate_answers
from valr_ops.model.qwen import save_model
from valr_ops.serving.answer import AnswerError
from valr_ops.serving.app import Service, create_app
from valr_ops.serving.protocol import ApiError, read_request
from valr_ops.serving.served import PromptChecker, PromptLimits, ServedModel
from valr_ops.serving.server import ServingError, serve
from valr_ops.store.artifacts import ArtifactError

CHAT = "/v1/chat/completions"


def service(**changes: Any) -> Service:
    """A small service without a model."""
    return Service(**{"rows": 4, "wait_seconds": 0.0, "queue": 8, "body_bytes": 2**20, **changes})


class Server:
    """An application around an echo, without a socket."""

    def __init__(self, key: str | None = None, **changes: Any) -> None:
        self.echo = Echo()
        self.service = service(key=key, **changes)
        self.service.open(self.echo)
        self.client = TestClient(create_app(self.service), raise_server_exceptions=False)

    def post(self, content: Any = "one two", **fields: Any) -> Any:
        return self.client.post(CHAT, json=body(content, **fields))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with made.client:
        yield made
    made.service.stop()


def events(text: str) -> list[Any]:
    """The server-sent events in `text`; [DONE] is the string."""
    sent = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in sent]


def test_an_answer_is_openais_object_with_what_the_latents_did(server: Server):
    answered = server.post("one two", max_tokens=20)
    assert answered.status_code == 200, answered.text
    completion = answered.json()
    assert completion.pop("id").startswith("chatcmpl-")
    assert isinstance(completion.pop("created"), int)
    assert completion == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "one two", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14},
        "valr": {
            "segments": 2,
            "slots_used": [4, 2],
            "latent_steps": 6,
            "decode_steps": 13,
            "finish_reason": "stop",
            "seconds": 0.25,
        },
    }
    assert server.echo.asks[0].max_new_tokens == 20


def test_a_stream_brings_the_same_text_in_chunks_then_the_reason_the_usage_and_done(server: Server):
    answered = server.post("one two three", stream=True, stream_options={"include_usage": True})
    assert answered.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answered.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {"content": " two three"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-2]["valr"]["slots_used"] == [4, 2]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 7


def test_a_stream_without_stream_options_ends_without_usage(server: Server):
    *chunks, done = events(server.post(stream=True).text)
    assert done == "[DONE]" and all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_the_models_are_listed_and_found_by_name(server: Server):
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list" and [card["id"] for card in listed["data"]] == ["echo"]
    assert listed["data"][0]["valr"] == {"slots": 4, "positions": 99, "instruction": "Echo."}
    assert server.client.get("/v1/models/echo").json() == listed["data"][0]
    assert server.client.get("/v1/models/other").status_code == 404


def test_health_is_ready_only_with_a_model_and_not_while_stopping():
    made = service()
    with TestClient(create_app(made)) as client:
        assert (client.get("/health").status_code, client.get("/health").json()) == (503, {"status": "loading"})
        refused = client.post(CHAT, json=body())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        made.open(Echo())
        ready = client.get("/health")
        assert ready.json() == {"status": "ok", "model": "echo", "waiting": 0, "running": 0}
        assert ready.status_code == 200
        made.begin_to_stop()
        assert client.get("/health").status_code == 503
        assert client.post(CHAT, json=body()).json()["error"]["code"] == "stopping"


@pytest.mark.parametrize(
    ("sent", "param", "why"),
    [
        (b"{", None, "no JSON"),
        (b"\xff\xfe", None, "no JSON"),
        (b'{"model": "echo", "temperature": NaN}', None, "no JSON"),
        (b'{"model": "\\ud800"}', None, "no JSON"),
        (b"[" * 100_000, None, "no JSON"),
        (b"[1]", None, "JSON object"),
        ({}, "model", "missing"),
        ({"model": "echo", "messages": []}, "messages", "missing"),
        (body(7), "messages[0].content", "list"),
        (body([{"type": "video_url", "video_url": {"url": "x"}}]), "messages[0].content[0]", "'text', 'image_url'"),
        (body([{"type": "image_url", "image_url": "x"}]), "messages[0].content[0].image_url", "an object"),
        (body([{"type": "text"}]), "messages[0].content[0].text", "missing"),
        (body() | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
        (body() | {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "not supported"),
        (body(max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (body(max_tokens="9"), "max_tokens", "'9'"),
        (body(max_tokens=10**400), "max_tokens", "less than"),
        (body(max_tokens=3, max_completion_tokens=4), "max_tokens", "differ"),
        (body(temperature=3), "temperature", "less than or equal to 2"),
        (body(top_p=0), "top_p", "greater than 0"),
        (body(seed=2**63), "seed", "less than"),
        (body(stream="yes"), "stream", "boolean"),
        (body(n=2), "n", "not supported"),
        (body(n=True), "n", "not supported"),
        (body(stop=["\n"]), "stop", "not supported"),
        (body(logprobs=True), "logprobs", "not supported"),
        (body(tools=[{"type": "function"}]), "tools", "not supported"),
        (body(response_format={"type": "json_object"}), "response_format", "not supported"),
        (body(reasoning_effort="high"), "reasoning_effort", "not supported"),
        (body(best_of=2), "best_of", "unknown field"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_gets_400_with_the_reason_and_the_field(server: Server, sent: Any, param: str | None, why: str):
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    answered = server.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answered.status_code == 400, answered.text
    error = answered.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert why in error["message"] and len(error["message"]) < 400 and "Traceback" not in answered.text
    assert server.echo.asks == []


def test_what_changes_nothing_is_accepted(server: Server):
    neutral = {
        "n": 1, "stop": None, "tools": [], "tool_choice": "auto", "logprobs": False, "presence_penalty": 0,
        "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False, "max_tokens": None,
    }  # fmt: skip
    assert server.post(**neutral).status_code == 200
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]
    answered = server.client.post(CHAT, json=body() | {"messages": history})
    assert answered.json()["choices"][0]["message"]["content"] == "again"


def test_wrong_addresses_methods_kinds_and_models_are_errors_in_openais_form(server: Server):
    answers = {
        404: server.client.get("/v1/nothing"),
        405: server.client.get(CHAT),
        415: server.client.post(CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"}),
    }
    for status, answered in answers.items():
        assert answered.status_code == status
        assert set(answered.json()["error"]) == {"message", "type", "param", "code"}
    other = server.client.post(CHAT, json=body() | {"model": "gpt"})
    assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found"
    assert server.client.get("/docs").status_code == 404, "its page would load scripts from elsewhere"


def test_a_body_that_is_too_large_is_refused_announced_or_not():
    server = Server(rows=1, queue=0)
    large = json.dumps(body("x" * 2**20)).encode()
    announced = server.client.post(CHAT, content=large, headers={"Content-Type": "application/json"})
    in_pieces = server.client.post(
        CHAT, content=iter([large[:1000], large[1000:]]), headers={"Content-Type": "application/json"}
    )
    far_too_large = server.client.post(CHAT, json=body("x" * (5 * 2**20)))
    for answered in (announced, in_pieces, far_too_large):
        assert answered.status_code == 413 and answered.json()["error"]["code"] == "body_too_large"
    assert server.post().status_code == 200, "the one place in the queue is free again"


def test_a_key_is_asked_of_everyone_but_the_health_check():
    guarded = Server(key="sesame")
    with guarded.client as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            refused = client.post(CHAT, json=body(), headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert "sesame" not in refused.text
        assert client.get("/v1/models").status_code == 401
        assert client.post(CHAT, json=body(), headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_a_full_queue_is_429_with_a_time_to_retry():
    server = Server(rows=1, queue=0)
    server.echo.go.clear()
    with server.client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post)
        assert server.echo.started.acquire(timeout=PATIENCE)
        refused = server.post("more")
        assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) > 0
        server.echo.go.set()
        assert running.result(PATIENCE).status_code == 200
        assert server.post("more").status_code == 200


def test_a_model_that_fails_is_500_with_an_id_and_its_reason_stays_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
):
    failed = server.post("bad")
    error = failed.json()["error"]
    assert failed.status_code == 500 and error["type"] == "server_error"
    assert failed.headers["x-request-id"] in error["message"] and failed.headers["x-request-id"] in caplog.text
    assert "secret" not in failed.text and "secret" in caplog.text
    streamed = events(server.post("bad", stream=True).text)
    assert streamed[-1]["error"]["code"] == "model_failed", "the status of a stream that has begun can't change"
    assert server.post("good").status_code == 200


def test_a_lost_gpu_makes_the_server_not_ready_and_the_log_says_why(server: Server, caplog: pytest.LogCaptureFixture):
    server.echo.error = torch.AcceleratorError("CUDA error: device-side assert triggered", 710)
    assert server.post("bad").status_code == 500
    health = server.client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "broken"
    for refused in (server.post("again"), server.client.get("/v1/models")):
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "broken"
    assert "device-side assert" in caplog.text and "start the server again" in caplog.text


def test_requests_that_come_together_share_a_batch():
    server = Server(rows=3, wait_seconds=PATIENCE)
    with server.client, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(server.post, ["a", "b", "c"]))
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["a", "b", "c"]
    assert [sorted(batch) for batch in server.echo.batches] == [["a", "b", "c"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(server: Server, stream: bool):
    server.echo.go.clear()

    async def leave() -> None:
        """Speaks ASGI: sends the request and is gone once the model has begun."""
        sent = iter([{"type": "http.request", "body": json.dumps(body("one two", stream=stream)).encode()}])

        def begun() -> None:
            assert server.echo.started.acquire(timeout=PATIENCE)
            server.echo.started.release()

        async def receive() -> dict[str, Any]:
            if (message := next(sent, None)) is not None:
                return message
            await asyncio.to_thread(begun)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b"", "app": None}
        await asyncio.wait_for(server.client.app({**scope, "asgi": {}}, receive, send), PATIENCE)  # type: ignore[arg-type]

    asyncio.run(leave())
    until_free(server)
    assert server.echo.given_up == ["one two"]


def until_free(server: Server) -> None:
    """Wait until no row runs."""
    assert server.service.batcher is not None
    free = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if server.service.batcher.counts() == {"waiting": 0, "running": 0}:
            return
        free.wait(0.01)
    raise AssertionError("the row still runs")


def test_options_that_make_no_sense_are_refused_by_name():
    with pytest.raises(ServingError, match="--batch 0: give 1 or more"):
        options(batch=0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServingError, match="in use"):
        serve(options(port=taken.getsockname()[1]))
    with pytest.raises(ServingError, match=r"no-such-host\.invalid:0 \([^-(]*\); choose another"):
        serve(options(host="no-such-host.invalid"))
    with pytest.raises(ArtifactError, match="--model nowhere: neither a folder"):
        serve(options(model="nowhere"))


@pytest.fixture(scope="module")
def check() -> PromptChecker:
    return PromptChecker(tiny.processor(), tiny.model().config, PromptLimits(max_tokens=50, max_images=2))


def checked(check: PromptChecker, content: Any, **fields: Any) -> Any:
    return check(read_request(json.dumps(body(content, **fields)).encode()))


def test_the_prompt_is_counted_as_the_processor_makes_it(check: PromptChecker):
    pictures = [tiny.image(0), tiny.image(1, 400, 100)]
    content = [shown(data_url(one)) for one in pictures] + [{"type": "text", "text": tiny.QUESTION}]
    ask = checked(check, content)
    made = tiny.processor()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, content[-1]]}]
    text = made.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ask.prompt_tokens == made(text=[text], images=pictures, return_tensors="pt")["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ([shown("https://example.org/a.png")], "invalid_image_url"),
        ([shown("file:///etc/passwd")], "invalid_image_url"),
        ([shown("data:text/html;base64,AAAA")], "invalid_image_url"),
        ([shown("data:image/png;base64,###")], "invalid_image_url"),
        ([shown("data:image/png;base64,")], "image_missing"),
        ([shown("data:image/png;base64,AAAA")], "image_unreadable"),
        ([shown(data_url(tiny.image(0))[:-80] + "AAAA")], "image_unreadable"),
        ([shown(data_url(tiny.image(0).resize((4, 4))))], "image_too_small"),
        ([shown(data_url(tiny.image(0).convert("1").resize((8000, 6000))))], "image_too_large"),
        ([shown(data_url(tiny.image(0).convert("1").resize((5000, 5000))))] * 2, "image_too_large"),
        ([shown(data_url(tiny.image(0)))] * 3, "too_many"),
        ("<latent>", "reserved_token_in_text"),
        ("a <|im_end|> b", "reserved_token_in_text"),
        ("a \0 b", "control_character"),
        ([{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}], "reserved_token_in_text"),
        ("  ", "empty_message"),
        ("x" * 40_000, "context_length_exceeded"),
        ("x" * 2_000_000, "context_length_exceeded"),
    ],
)
def test_what_the_model_must_not_see_is_400_with_its_reason(check: PromptChecker, content: Any, code: str):
    with pytest.raises(ApiError) as refused:
        checked(check, content)
    assert (refused.value.status, refused.value.code) == (400, code)
    assert str(refused.value.param).startswith("messages") and len(refused.value.message) < 400
    assert "data.m" not in refused.value.message, "a client has no recipe"


def test_a_special_token_of_this_tokenizer_alone_is_refused_too():
    processor = copy.deepcopy(tiny.processor())
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    check = PromptChecker(processor, tiny.model().config, PromptLimits(max_tokens=50, max_images=2))
    with pytest.raises(ApiError, match="a special token in 'call <|tool|>'".replace("|", "[|]")):
        checked(check, "call <|tool|>")


def test_an_answers_limit_is_the_servers_or_less(check: PromptChecker):
    assert checked(check, "hello").max_new_tokens == 50
    assert checked(check, "hello", max_tokens=7).max_new_tokens == 7
    assert checked(check, "hello", max_completion_tokens=8).max_new_tokens == 8
    with pytest.raises(ApiError, match="max_tokens=51, but this server answers with at most 50"):
        checked(check, "hello", max_tokens=51)


def test_only_the_user_shows_images_and_speaks_last(check: PromptChecker):
    system = {"role": "system", "content": [shown(data_url(tiny.image(0)))]}
    user = {"role": "user", "content": "hello"}
    for messages, why in (([system, user], "only the user"), ([user, {"role": "assistant", "content": "x"}], "last")):
        with pytest.raises(ApiError, match=why):
            check(read_request(json.dumps(body() | {"messages": messages}).encode()))


@pytest.fixture(scope="module")
def model() -> Any:
    """The tiny model, with a liking for latent segments."""
    made = tiny.model()
    with torch.no_grad():
        made.lm_head.weight[tiny.control().latent] *= -8
    return made


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("served") / "tiny-model"
    save_model(model, tiny.processor(), folder, {"slots": 4})
    return folder


def test_a_real_model_says_what_it_says_alone_whole_and_streamed(model: Any, saved: Path):
    made = service(rows=2, wait_seconds=PATIENCE)
    made.open(ServedModel(str(saved), PromptLimits(max_tokens=24, max_images=2), device="cpu"))
    text = {"type": "text", "text": tiny.QUESTION}
    requests = [
        body([shown(data_url(tiny.image(0))), text], max_tokens=20, temperature=1.0, seed=3),
        body(tiny.STEPS[0], max_tokens=5),
    ]
    with TestClient(create_app(made)) as client, ThreadPoolExecutor(2) as pool:

        def post(**fields: Any) -> list[Any]:
            sent = [one | fields | {"model": "tiny-model"} for one in requests]
            return list(pool.map(lambda one: client.post(CHAT, json=one), sent))

        whole = [answered.json() for answered in post()]
        streams = [events(answered.text) for answered in post(stream=True)]
    for completion, chunks in zip(whole, streams, strict=True):
        streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        assert streamed == completion["choices"][0]["message"]["content"]
        assert chunks[-2]["valr"]["decode_steps"] == completion["valr"]["decode_steps"]
    prompt = [{"role": "user", "content": [{"type": "image", "image": tiny.image(0)}, text]}]
    [alone] = generate_answers(
        model, tiny.processor(), [prompt], max_new_tokens=20, max_segments=64, sampling=Sampling(1.0, seed=3)
    )
    assert whole[0]["choices"][0]["message"]["content"] == alone.visible_text
    assert whole[0]["usage"]["prompt_tokens"] == alone.prompt_tokens
    assert whole[0]["valr"]["segments"] == alone.segments > 0
    assert whole[0]["valr"]["slots_used"] == [4] * alone.segments
    assert whole[1]["usage"]["completion_tokens"] <= 5


def test_settling_needs_latents(saved: Path):
    with pytest.raises(AnswerError, match="--settle"):
        ServedModel(str(saved), PromptLimits(max_tokens=24, max_images=2), device="cpu", latents=False, settle=0.9)


@contextlib.contextmanager
def running_verb(folder: Path, max_tokens: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``valr serve`` in a process of its own, and its address."""
    words = [sys.executable, "-m", "valr_ops", "serve", "--model", str(folder), "--port", "0"]
    words += ["--max-tokens", str(max_tokens)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        words, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None and server.stderr is not None
        address = server.stdout.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:"), address + server.stderr.read()
        yield server, address
    finally:
        server.kill()
        server.wait()


@pytest.mark.services
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_verb_serves_concurrent_streams_and_ends_in_order(saved: Path, number: int, status: int):
    with running_verb(saved, max_tokens=200) as (server, address):
        with ThreadPoolExecutor(6) as pool:
            sent = [body(step, stream=True, max_tokens=24) | {"model": saved.name} for step in tiny.STEPS * 2]
            answers = [events(text) for text in pool.map(lambda one: _post(address, one), sent)]
        texts = ["".join(c["choices"][0]["delta"].get("content", "") for c in answer[:-1]) for answer in answers]
        assert texts[:3] == texts[3:] and all(answer[-1] == "[DONE]" for answer in answers)
        with pytest.raises(urllib.error.HTTPError, match="413"):
            _post(address, body("x" * (33 * 2**20)))
        with _open(address, body("go on", stream=True, temperature=1.0) | {"model": saved.name}) as running:
            begun = running.readline()
            server.send_signal(number)
            assert events((begun + running.read()).decode())[-1] == "[DONE]", "what runs is finished"
        rest, complaints = server.communicate(timeout=60)
        assert server.returncode == status, complaints
        assert json.loads(rest.splitlines()[-1])["answered"] == 7
        assert "Traceback" not in complaints


@pytest.mark.services
def test_a_second_ctrl_c_gives_up_what_runs_in_good_order(model: Any, tmp_path: Path):
    endless = copy.deepcopy(model)
    with torch.no_grad():
        endless.lm_head.weight[tiny.processor().tokenizer.eos_token_id] = 0
    save_model(endless, tiny.processor(), tmp_path / "endless", {"slots": 4})
    with running_verb(tmp_path / "endless", max_tokens=30_000) as (server, address):
        with _open(address, body("go on", stream=True) | {"model": "endless"}) as running:
            begun = running.readline()
            server.send_signal(signal.SIGINT)
            # Refused, or cut off: which of both depends on whether the socket closes before or after it accepted.
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                for _ in range(int(PATIENCE / 0.01)):
                    urllib.request.urlopen(f"{address}/models", timeout=PATIENCE).close()
            server.send_signal(signal.SIGINT)
            assert events((begun + running.read()).decode())[-1]["error"]["code"] == "stopping"
        rest, complaints = server.communicate(timeout=60)
    assert server.returncode == 130
    assert json.loads(rest.splitlines()[-1])["answered"] == 0
    assert "Traceback" not in complaints and "CancelledError" not in complaints


def _open(address: str, value: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(value).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def _post(address: str, value: Any) -> str:
    with _open(address, value) as answered:
        return str(answered.read().decode())
