"""The client to a chat endpoint: trouble is waited out or named, nothing is paid twice, the key is shown nowhere."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import BaseModel

from tests.data.endpoint import Asked, Endpoint, Says, completion, error, saying, serving
from valr_ops.store import chat
from valr_ops.store.chat import REFUSED, Chat, Clock, Failure, Names, Question, Reply, Unusable

CHECKOUT = Path(__file__).resolve().parents[2]
KEY_VARIABLE = "VALR_TESTED_API_KEY"
KEY = "sk-planted-4f1d0c9a77"


class AskingError(RuntimeError):
    """What the user of the client expects."""


NAMES = Names(AskingError, "asking", "asking.url", "asking.model", "asking.max_dollars", KEY_VARIABLE, "Raise it")


class FakeClock(Clock):
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits: list[float] = []
        self.lock = threading.Lock()

    def now(self) -> float:
        return self.time

    def wait(self, stop: threading.Event, seconds: float) -> None:
        with self.lock:
            self.time += seconds
            self.waits.append(seconds)


def opened(
    endpoint: Endpoint | str,
    replies: Path | None = None,
    said: list[str] | None = None,
    clock: Clock | None = None,
    **changes: Any,
) -> Chat:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    asked = chat.Endpoint(url, "gpt-4o-2024-08-06", NAMES, **{"patience": 1, **changes})
    return Chat(asked, replies, "tests", ([] if said is None else said).append, clock or FakeClock())


def read_yes(text: str) -> None:
    if text != "yes":
        raise Unusable("say yes")


def question(number: int = 0, **changes: Any) -> Question:
    def messages() -> chat.Messages:
        return [{"role": "user", "content": f"Question {number}?"}]

    return replace(Question(f"key {number}", messages, 64, read_yes, 100, f"row {number}"), **changes)


def numbers(endpoint: Endpoint) -> list[int]:
    """Of the questions, in the order of the requests."""
    return [number(one) for one in endpoint.asked]


def number(asked: Asked) -> int:
    return int(asked.body["messages"][0]["content"].split()[1].rstrip("?"))


def texts(outcomes: Sequence[Reply | Failure]) -> list[str]:
    return [one.text if isinstance(one, Reply) else f"none: {one.reason}" for one in outcomes]


YES = completion("yes")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEY_VARIABLE, "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


# What is sent, and what comes back.


def test_a_question_is_asked_greedily_and_its_reply_says_how_it_ended_and_what_it_took() -> None:
    with saying(completion("yes", (40, 2), "max_tokens", valr={"segments": 1})) as endpoint:
        asking = opened(endpoint, dollars_per_million_input_tokens=2.5, dollars_per_million_output_tokens=10.0)
        (reply,) = asking.ask_all([question()])
    (asked,) = endpoint.asked
    assert asked.path == "/v1/chat/completions"
    assert "Authorization" not in asked.headers
    assert asked.body == {
        "model": "gpt-4o-2024-08-06",
        "messages": [{"role": "user", "content": "Question 0?"}],
        "temperature": 0,
        "max_tokens": 64,
        "response_format": {"type": "json_object"},
    }
    assert isinstance(reply, Reply) and reply.more is not None
    assert (reply.text, reply.finish_reason, reply.output_tokens) == ("yes", "length", 2)
    assert reply.more["valr"] == {"segments": 1}
    assert asking.usage == chat.Usage(1, 40, 2, pytest.approx((40 * 2.5 + 2 * 10) / 1e6))


def test_a_question_whose_reply_nobody_reads_may_be_answered_in_any_form() -> None:
    with saying(completion("by all means")) as endpoint:
        assert texts(opened(endpoint).ask_all([question(read=None)])) == ["by all means"]
    assert "response_format" not in endpoint.asked[0].body


def test_replies_come_in_the_order_of_the_questions_and_equal_questions_are_asked_once() -> None:
    def answer(asked: Asked) -> Says:
        return replace(completion(str(number(asked))), after=0.02 * (5 - number(asked)))

    order = [0, 1, 2, 1, 3, 4]
    with serving(answer) as endpoint:
        found = opened(endpoint).ask_all([question(one, read=None) for one in order])
    assert texts(found) == list(map(str, order))
    assert sorted(numbers(endpoint)) == [0, 1, 2, 3, 4]


def test_after_an_unusable_reply_the_model_is_told_why_and_the_third_one_counts_either_way(tmp_path: Path) -> None:
    with saying(completion("no"), completion("perhaps"), completion("never"), YES) as endpoint:
        asking = opened(endpoint, tmp_path / "replies.jsonl")
        assert texts(asking.ask_all([question()])) == ["never"]
        assert texts(asking.ask_all([question()])) == ["never"]
    assert len(endpoint.asked) == 3
    _, said, told = endpoint.asked[1].body["messages"]
    assert (said["role"], said["content"], told["role"]) == ("assistant", "no", "user")
    assert "say yes" in told["content"]


@pytest.mark.parametrize("text", ['{"a": 1}', '```json\n{"a": 1}\n```', '```{"a": 1}```\n'])
def test_an_object_is_read_with_or_without_a_fence_of_markdown(text: str) -> None:
    class Form(BaseModel):
        a: int

    assert chat.read_object(text, Form).a == 1
    with pytest.raises(Unusable, match="no JSON object"):
        chat.read_object(f"Here it is: {text}", Form)
    with pytest.raises(Unusable, match="a: Field required"):
        chat.read_object(text.replace("a", "b", 1) if text[0] == "{" else "{}", Form)


# An endpoint that is busy, broken or wrong.


def test_a_429_is_asked_again_after_the_time_that_the_endpoint_names() -> None:
    said: list[str] = []
    clock = FakeClock()
    with saying(error(429, "slow down", Retry_After="17"), YES) as endpoint:
        assert texts(opened(endpoint, said=said, clock=clock).ask_all([question()])) == ["yes"]
    assert len(endpoint.asked) == 2
    assert clock.waits[0] == 17
    assert said == [f"asking: {endpoint.url}: answered 429 (slow down); asking again in 17 s"]


def test_a_date_in_retry_after_is_understood() -> None:
    clock = FakeClock()
    with saying(error(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), YES) as endpoint:
        opened(endpoint, clock=clock).ask_all([question()])
    assert clock.waits[0] == 2


def test_an_endpoint_that_asks_for_an_hour_is_not_waited_for() -> None:
    clock = FakeClock()
    with saying(error(429, "over", Retry_After="3600")) as endpoint:
        found = opened(endpoint, clock=clock).ask_all([question()])
    assert texts(found) == ["none: gave no answer: answered 429 (over)"]
    assert len(endpoint.asked) == 1
    assert clock.time < 60


BROKEN = {
    "500": error(500, "oops"),
    "half an answer": replace(YES, sent=20),
    "no answer": replace(YES, sent=0),
    "a page": Says(b"<html>welcome</html>", headers={"Content-Type": "text/html"}),
    "no choices": Says(b'{"choices": []}'),
    "too large a reply": completion("x" * (1 << 20)),
}


@pytest.mark.parametrize("says", BROKEN.values(), ids=BROKEN)
def test_a_broken_reply_is_asked_for_again(says: Says) -> None:
    with saying(says, YES) as endpoint:
        assert texts(opened(endpoint).ask_all([question()])) == ["yes"]
    assert len(endpoint.asked) == 2


def test_a_reply_that_does_not_come_is_asked_for_again() -> None:
    with saying(replace(YES, after=2.0), YES) as endpoint:
        assert texts(opened(endpoint, silence_seconds=0.2).ask_all([question()])) == ["yes"]


def test_a_reply_that_drips_is_given_up() -> None:
    class Racing(FakeClock):
        def now(self) -> float:
            self.time += 100
            return self.time

    with saying(completion(" " * 900_000)) as endpoint:
        found = opened(endpoint, clock=Racing()).ask_all([question()])
    assert texts(found) == ["none: gave no answer: a reply that takes more than 300 seconds"]
    assert len(endpoint.asked) == 6


def test_a_question_that_gets_no_answer_harms_no_other_until_patience_ends() -> None:
    def answer(asked: Asked) -> Says:
        return error(500, "oops") if number(asked) in (1, 3, 4) else error(400, "long") if number(asked) == 5 else YES

    with serving(answer) as endpoint:
        # One at a time, so that failures follow each other in this order.
        asking = opened(endpoint, patience=3, requests_per_minute=1)
        found = asking.ask_all([question(one) for one in range(8)])
    assert texts(found) == [
        *("yes", "none: gave no answer: answered 500 (oops)", "yes"),
        *["none: gave no answer: answered 500 (oops)"] * 2,
        "none: answered 400 (long)",
        *["none: not asked, because 3 before it in a row had no answer"] * 2,
    ]
    assert f"asking.url={endpoint.url} answered 400 (long), at row 5. Check asking.url" in str(asking.stopped)
    assert set(numbers(endpoint)) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("code", ["content_filter", "context_length_exceeded"])
def test_a_refusal_that_lies_in_the_question_is_its_reply_and_is_kept(tmp_path: Path, code: str) -> None:
    with saying(error(400, "no", code), YES) as endpoint:
        asking = opened(endpoint, tmp_path / "replies.jsonl", requests_per_minute=1)
        found = asking.ask_all([question(0), question(1)])
        again = opened(endpoint, tmp_path / "replies.jsonl").ask_all([question(0)])
    assert texts(found) == [f"refused: {code}", "yes"]
    assert again == [Reply(f"refused: {code}", REFUSED)]
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (
            error(404, "no such model"),
            r"answered 404 \(no such model\), at row 0. Check asking.url .* asking.model",
        ),
        (error(400, "gone", "model_not_found"), r"answered 400 \(gone\)"),
        (error(429, "pay", "insufficient_quota"), r"answered 429 \(pay\)"),
        (error(401, "who are you"), f"asks for a key, which belongs in {KEY_VARIABLE}"),
    ],
)
def test_what_would_meet_every_question_is_raised_at_once(says: Says, expected: str) -> None:
    with saying(says) as endpoint, pytest.raises(AskingError, match=expected):
        opened(endpoint, patience=9, requests_per_minute=1).ask_all([question(0), question(1)])
    assert len(endpoint.asked) == 1


def test_a_pinned_model_may_not_answer_under_another_name() -> None:
    with saying(completion("yes", model="gpt-4o-2024-08-06"), completion("yes", model="gpt-5")) as endpoint:
        asking = opened(endpoint, pinned=True)
        assert texts(asking.ask_all([question(0)])) == ["yes"]
        with pytest.raises(AskingError, match=r"answered asking.model=gpt-4o-2024-08-06 as gpt-5, at row 1. Give that"):
            asking.ask_all([question(1)])


def test_a_redirect_is_not_followed() -> None:
    with saying(YES) as elsewhere:
        moved = error(307, Location=f"{elsewhere.url}/chat/completions")
        with saying(moved) as endpoint, pytest.raises(AskingError, match="a redirect, which is not followed"):
            opened(endpoint).ask_all([question()])
    assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ftp://example.com/v1", "is no address"),
        ("https://", "is no address"),
        ("https://example.com:99999/v1", "is no address"),
        ("https://user:word@example.com/v1", "carries a user name"),
        ("https://example.com/v1?api_key=word", "carries a user name, a password or a query"),
        ("http://example.com/v1", "in the clear"),
    ],
)
def test_an_address_that_would_leak_something_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch, address: str, expected: str
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(AskingError, match=expected) as raised:
        opened(address)
    assert "word@" not in str(raised.value) and "=word" not in str(raised.value)


# Replies on the disk.


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    with saying(completion("yes", None, "length")) as endpoint:
        opened(endpoint, tmp_path / "replies.jsonl").ask_all([question()])
        again = opened(endpoint, tmp_path / "replies.jsonl")
        assert again.estimate([question()]).answered == 1
        assert again.ask_all([question()]) == [Reply("yes", "length")]
    assert len(endpoint.asked) == 1


def test_a_half_written_last_line_is_ignored_and_written_over_by_none(tmp_path: Path) -> None:
    path, questions = tmp_path / "replies.jsonl", [question(one) for one in range(3)]
    with saying(YES) as endpoint:
        opened(endpoint, path, requests_per_minute=1).ask_all(questions)
        whole = path.read_bytes()
        cut = whole[: whole.rindex(b"reply")]
        path.write_bytes(cut)
        del endpoint.asked[:]
        opened(endpoint, path).ask_all(questions)
        assert numbers(endpoint) == [2]
        assert path.read_bytes().startswith(cut + b"\n")
        opened(endpoint, path).ask_all(questions)
        assert len(endpoint.asked) == 1


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_chat import opened, question
opened(sys.argv[1], Path(sys.argv[2]), requests_per_minute=10).ask_all([question(number) for number in range(6)])
"""


def test_after_a_kill_only_the_rest_is_asked(tmp_path: Path) -> None:
    hanging, killed = threading.Event(), threading.Event()

    def answer(asked: Asked) -> Says:
        if number(asked) == 4 and not killed.is_set():
            hanging.set()
            killed.wait(60)
        return YES

    path = tmp_path / "replies.jsonl"
    with serving(answer) as endpoint:
        # One at a time, so that exactly four are answered when the fifth one hangs.
        arguments = [endpoint.url, str(path), str(Path(__file__).parent)]
        process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=CHECKOUT)
        try:
            assert hanging.wait(60)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed.set()
        assert numbers(endpoint) == [0, 1, 2, 3, 4]
        del endpoint.asked[:]
        found = opened(endpoint, path, requests_per_minute=10).ask_all([question(one) for one in range(6)])
    assert texts(found) == ["yes"] * 6
    assert numbers(endpoint) == [4, 5]


# Price and rate.

DEAR = {"dollars_per_million_input_tokens": 2.5, "dollars_per_million_output_tokens": 10.0}


def test_the_price_counts_every_question_once_and_is_said() -> None:
    said: list[str] = []
    questions = [question(0), question(1), question(0)]
    price = opened("http://127.0.0.1:1/v1", said=said, **DEAR).estimate(iter(questions))
    assert price == chat.Price(2, 200, 128, pytest.approx((200 * 2.5 + 128 * 10) / 1e6), 0)
    assert "asking: 2 questions to gpt-4o-2024-08-06 at http://127.0.0.1:1/v1 cost about $0.00 (200 input" in said[0]


def test_a_price_above_the_bound_is_an_error() -> None:
    with pytest.raises(AskingError, match=r"more than asking.max_dollars=0.0001. Nothing was asked. Raise it"):
        opened("http://127.0.0.1:1/v1", max_dollars=1e-4, **DEAR).estimate([question()])


def test_answers_that_cost_more_than_the_bound_stop_the_run_and_are_kept(tmp_path: Path) -> None:
    with saying(completion("yes", (4000, 0))) as endpoint:
        asking = opened(endpoint, tmp_path / "replies.jsonl", max_dollars=0.02, requests_per_minute=1, **DEAR)
        with pytest.raises(AskingError, match=r"was paid about \$0.02 in this run, .* 2 answers are kept in"):
            asking.ask_all([question(one) for one in range(4)])
    assert len(endpoint.asked) == 2


def test_what_is_free_may_be_asked_with_nothing_to_spend() -> None:
    with saying(YES) as endpoint:
        assert texts(opened(endpoint, max_dollars=0.0).ask_all([question(0), question(1)])) == ["yes", "yes"]


def test_an_image_costs_the_larger_of_tiles_and_pixels() -> None:
    assert chat.image_tokens(512, 512, 512) == 350
    assert chat.image_tokens(100, 100, 512) == 255
    assert chat.image_tokens(4000, 2000, 512) == 255
    assert chat.image_tokens(1024, 1024, 2048) == 1399


def test_a_picture_is_sent_in_its_url() -> None:
    url = chat.data_url(PIL.Image.new("RGB", (3, 2)), "PNG")
    assert url.startswith("data:image/png;base64,")


def test_requests_keep_to_the_rate() -> None:
    clock = FakeClock()
    with saying(YES) as endpoint:
        asking = opened(endpoint, clock=clock, requests_per_minute=10)
        asking.ask_all([question(one) for one in range(3)])
        asking.ask_all([question(one) for one in range(3, 5)])
    assert len(endpoint.asked) == 5
    assert clock.waits == [6.0] * 4


def test_no_more_than_the_bounded_number_of_requests_is_open_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MOST_REQUESTS_AT_ONCE", 3)
    lock, together = threading.Lock(), threading.Barrier(3, timeout=20)
    open_now: list[int] = []
    most: list[int] = []

    def answer(asked: Asked) -> Says:
        with lock:
            open_now.append(1)
            most.append(len(open_now))
        # Passes only if three are open at once; a fourth would be counted.
        together.wait()
        with lock:
            open_now.pop()
        return YES

    with serving(answer) as endpoint:
        opened(endpoint).ask_all([question(one) for one in range(6)])
    assert max(most) == 3


# The key.


def everything_in(error: BaseException) -> str:
    """The texts of an error, of all that led to it, and of what it carries."""
    shown = [str(error), repr(error), repr(error.args), repr(vars(error))]
    shown += [everything_in(cause) for cause in (error.__cause__, error.__context__) if cause is not None]
    return "\n".join(shown)


@pytest.mark.parametrize(
    "says",
    [
        error(401, f"Incorrect API key provided: {KEY}"),
        error(400, "x" * 180 + KEY),
        error(500, f"upstream refused {KEY}"),
        error(429, f"{KEY} is over its quota"),
        completion(f"Your key is {KEY}."),
        error(400, KEY, "content_filter"),
        Says(KEY.encode()),
        Says(KEY.encode(), status=502),
        Says(KEY.encode(), sent=5),
        completion("yes", model=KEY),
        YES,
    ],
    ids=["401", "400", "500", "429", "in the answer", "refused", "no JSON", "page", "half", "as a name", "good"],
)
def test_the_key_is_sent_and_stands_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, says: Says
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with saying(says) as endpoint:
        asking = opened(endpoint, tmp_path / "replies.jsonl", said, pinned=True)
        asking.estimate([question()])
        try:
            shown = repr(asking.ask_all([question()]))
        except AskingError as raised:
            shown = everything_in(raised)
    if asking.stopped:
        shown += everything_in(asking.stopped)
    assert {one.headers["Authorization"] for one in endpoint.asked} == {f"Bearer {KEY}"}
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    everything = "\n".join([shown, *said, *written, caplog.text, repr(vars(asking))])
    # Not even its beginning, which cutting a text to length could leave.
    assert KEY[:8] not in everything


def test_a_key_that_could_not_be_sent_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}\r\nX-Other: 1")
    with pytest.raises(AskingError, match=f"{KEY_VARIABLE} holds no key") as raised:
        opened("https://127.0.0.1:1/v1")
    assert KEY[:8] not in everything_in(raised.value)


@contextmanager
def unvouched(folder: Path) -> Iterator[tuple[int, list[bytes]]]:
    """An HTTPS server on loopback whose certificate it signed itself: its port, and what was sent to it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    with context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                        received.append(connection.recv(1000))
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], received


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with unvouched(tmp_path) as (port, received):
        (found,) = opened(f"https://127.0.0.1:{port}/v1").ask_all([question()])
    assert isinstance(found, Failure) and "CERTIFICATE_VERIFY_FAILED" in found.reason
    assert received == []


def test_a_line_of_replies_says_what_it_depends_on(tmp_path: Path) -> None:
    with saying(YES) as endpoint:
        opened(endpoint, tmp_path / "deep" / "replies.jsonl").ask_all([question()])
    written = json.loads((tmp_path / "deep" / "replies.jsonl").read_text())
    assert written == {"key": "key 0", "by": "tests", "reply": "yes"}
