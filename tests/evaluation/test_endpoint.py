"""An endpoint that answers as the model under test: what it is sent, and what becomes of each of its answers."""

from __future__ import annotations

import base64
import io
import json
import threading
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest

from tests.data.endpoint import Asked, Endpoint, Says, completion, error, saying, serving
from valr_ops.evaluation.endpoint import KEY_VARIABLE, EndpointError, open_endpoint
from valr_ops.evaluation.models import Generate, Prompt, Said
from valr_ops.serving.protocol import ImagePart, TextPart, image_bytes, read_request
from valr_ops.store.chat import Clock

RED, BLUE = PIL.Image.new("RGB", (5, 4), "red"), PIL.Image.effect_noise((30, 20), 90).convert("RGB")


class Hasty(Clock):
    """A clock whose waits are over at once."""

    def wait(self, stop: threading.Event, seconds: float) -> None:
        pass


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def opened(endpoint: Endpoint | str, max_new_tokens: int = 64) -> Generate:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return open_endpoint(url, "some-model", max_new_tokens, say=lambda line: None, clock=Hasty())


def prompts(count: int) -> list[Prompt]:
    return [([], f"Question {number}?") for number in range(count)]


def words(asked: Asked) -> str:
    return str(asked.body["messages"][0]["content"][-1]["text"])


def same_but_time(said: Said, **expected: Any) -> bool:
    return replace(said, seconds=0.0) == Said(**expected)


def test_a_prompt_is_sent_greedily_with_its_pictures_without_loss_before_its_words() -> None:
    with saying(completion("Blue.", (900, 3), "stop")) as endpoint:
        (said,) = opened(endpoint, 2048)([([RED, BLUE], "Which colour?")])
    (asked,) = endpoint.asked
    assert (asked.body["model"], asked.body["temperature"], asked.body["max_tokens"]) == ("some-model", 0, 2048)
    (message,) = asked.body["messages"]
    first, second, last = message["content"]
    assert last == {"type": "text", "text": "Which colour?"}
    for sent, picture in ((first, RED), (second, BLUE)):
        data = base64.b64decode(sent["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert PIL.Image.open(io.BytesIO(data)).tobytes() == picture.tobytes()
    assert same_but_time(said, text="Blue.", text_tokens=3, finish_reason="stop")
    assert said.seconds > 0


def test_our_own_server_understands_what_is_sent() -> None:
    with saying(completion("Blue.")) as endpoint:
        opened(endpoint, 2048)([([RED], "Which colour?")])
    request = read_request(json.dumps(endpoint.asked[0].body).encode())
    picture, text = request.messages[0].content
    assert (request.model, request.temperature, request.new_tokens) == ("some-model", 0.0, 2048)
    assert isinstance(picture, ImagePart) and image_bytes(picture.image_url.url, "url")
    assert isinstance(text, TextPart) and text.text == "Which colour?"


def test_a_batch_is_asked_at_once_and_answered_in_order() -> None:
    together = threading.Barrier(4, timeout=20)

    def answer(asked: Asked) -> Says:
        # Passes only if all four are open at once.
        together.wait()
        return completion(words(asked).upper())

    with serving(answer) as endpoint:
        said = opened(endpoint)(prompts(4))
    assert [one.text for one in said] == [f"QUESTION {number}?" for number in range(4)]


@pytest.mark.parametrize(
    ("reason", "expected"), [("stop", "stop"), ("end_turn", "stop"), (None, "stop"), ("length", "length")]
)
def test_how_an_answer_ended_is_said_in_our_words(reason: str | None, expected: str) -> None:
    with saying(completion("Blue.", (1, 2), reason)) as endpoint:
        (said,) = opened(endpoint)(prompts(1))
    assert same_but_time(said, text="Blue.", text_tokens=2, finish_reason=expected)


def test_an_empty_answer_is_an_answer() -> None:
    with saying(completion(None, (1, 0), "stop")) as endpoint:
        (said,) = opened(endpoint)(prompts(1))
    assert same_but_time(said, text="", text_tokens=0, finish_reason="stop")


def test_what_our_own_server_tells_of_latents_is_kept() -> None:
    latents = {"segments": 2, "latent_steps": 32, "slots_used": [16, 16], "finish_reason": "length_in_segment"}
    with saying(completion("Blue", (1, 9), "length", valr=latents)) as endpoint:
        (said,) = opened(endpoint)(prompts(1))
    assert same_but_time(
        said, text="Blue", text_tokens=9, finish_reason="length_in_segment", segments=2, latent_steps=32
    )


FAILED = {
    "too long": (error(400, "no", "context_length_exceeded"), "refused: context_length_exceeded"),
    "too large": (error(413, "at most 20 MB"), "answered 413 (at most 20 MB)"),
    "broken": (error(500, "oops"), "gave no answer: answered 500 (oops)"),
    "filtered": (completion("Bl", None, "content_filter"), "answered with finish_reason 'content_filter'"),
}


@pytest.mark.parametrize(("says", "why"), FAILED.values(), ids=FAILED)
def test_a_prompt_without_an_answer_says_why_and_the_others_of_its_batch_are_unharmed(says: Says, why: str) -> None:
    def answer(asked: Asked) -> Says:
        return says if words(asked) == "Question 1?" else completion("Blue.", (1, 2))

    with serving(answer) as endpoint:
        ask = opened(endpoint)
        first, failed, last = ask(prompts(3))
        assert same_but_time(ask(prompts(1))[0], text="Blue.", text_tokens=2, finish_reason="stop")
    assert failed == Said("", 0, "error", error=why)
    assert first.text == last.text == "Blue."


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (error(401, "who"), f"asks for a key, which belongs in {KEY_VARIABLE}. Set that environment variable"),
        (error(404, "no some-model here"), r"answered 404 \(no some-model here\). Check endpoint \(it ends in /v1\)"),
    ],
)
def test_what_would_meet_every_prompt_is_raised_with_how_to_mend_it(says: Says, expected: str) -> None:
    with saying(says) as endpoint, pytest.raises(EndpointError, match=expected):
        opened(endpoint)(prompts(1))
    assert len(endpoint.asked) == 1


def test_an_endpoint_that_has_gone_is_named_for_every_prompt_of_the_batch_and_then_raised() -> None:
    with saying(completion("")) as endpoint:
        gone = endpoint.url
    ask = opened(gone)
    assert {one.finish_reason for one in ask(prompts(12))} == {"error"}
    with pytest.raises(EndpointError, match=r"gave no answer: ConnectError.*Wait until it does"):
        ask(prompts(1))
