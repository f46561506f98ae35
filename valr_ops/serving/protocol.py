"""The wire: OpenAI's chat completions, from the bytes of a request to checked values, and back to its answers.

In: a JSON body as OpenAI's clients write it. Out: a `ChatRequest`, and the JSON objects of answers, chunks and errors.
Always: what is wrong is an `ApiError` that names the field and never shows a traceback. A field that we can't honour
is refused by name, because an answer that ignores it would be another answer than the one asked for. What changes
nothing is accepted: null and empty lists, a field at the value it has when it is left out (`NEUTRAL`), and labels that
clients attach for themselves (`LABELS`). Nothing is ever fetched: an image is a data URL or an error.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, ValidationError
from pydantic_core import from_json

from valr_ops.data.records import shortened

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "stop": (),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
}
"""Fields of OpenAI's that are not supported, each with the values that ask for nothing."""
LABELS = frozenset(
    {
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Fields that can't change an answer of this server; ignored."""

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_MOST = 2**63
"""OpenAI's integers are below it."""


class ApiError(Exception):
    """A request that gets no answer: status, reason and, where there is one, the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Wire(BaseModel):
    """Strict: a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(_Wire):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Wire):
    """Where an image is: in the URL itself."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted and ignored: the model's own pixel bounds decide, and a larger image costs nothing but tokens."""


class ImagePart(_Wire):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: object) -> object:
    """`content` with a plain string as the one text part that it stands for."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart, Discriminator("type")]


class Message(_Wire):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]


class StreamOptions(_Wire):
    """What a stream brings beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and ignored: padding against eavesdroppers, which loopback does not have."""


class ChatRequest(_Wire):
    """What is read of a request; everything else was refused or changes nothing."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=1, lt=_MOST)] | None = None
    """Text and control tokens of the answer; latent slots are not counted."""
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_MOST)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 decodes greedily, as the paper does and as every score is reached; so it is the default, unlike OpenAI's 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-_MOST, lt=_MOST)] | None = None

    @property
    def new_tokens(self) -> int | None:
        """The limit asked for, under either name."""
        return self.max_completion_tokens or self.max_tokens


def read_request(body: bytes) -> ChatRequest:
    """The request in `body`.

    Raises:
        ApiError: 400 with the reason and the field: no JSON, a field of the wrong kind, unsupported or unknown.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {shortened(str(error), 200)}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(raw).__name__}", code="invalid_json")
    raw = _present(raw)
    if isinstance(raw.get("messages"), list):
        raw["messages"] = [_present(turn) if isinstance(turn, dict) else turn for turn in raw["messages"]]
    for name in [name for name in raw if name not in ChatRequest.model_fields]:
        _check_dropped(name, raw.pop(name))
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        raise _first(error) from None
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return request


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` without null and empty lists, which clients send for what they leave out."""
    return {name: value for name, value in fields.items() if value is not None and value != []}


def _check_dropped(name: str, value: object) -> None:
    """Raise `ApiError` unless leaving the field out gives the answer that was asked for."""
    if name in LABELS or any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(name, ())):
        return
    if name in NEUTRAL:
        raise ApiError(
            400, f"{name} is not supported by this server; leave it out", param=name, code="unsupported_parameter"
        )
    shown = shortened(name)
    raise ApiError(400, f"unknown field {shown!r}; leave it out", param=shown, code="unknown_parameter")


_PLAIN = {
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
    "union_tag_not_found": "Input should have a type, 'text' or 'image_url'",
}
"""For what pydantic says of Python."""


def _first(error: ValidationError) -> ApiError:
    """The first thing that is wrong; the value itself is shown only where it is short."""
    found = error.errors(include_url=False)[0]
    param = ""
    for index, step in enumerate(found["loc"]):
        if index >= 2 and found["loc"][index - 2] == "content" and step in ("text", "image_url"):
            continue  # pydantic's name for the kind of part, which is no field
        param += f"[{step}]" if isinstance(step, int) else f".{shortened(step)}" if param else shortened(step)
    message = _PLAIN.get(found["type"], found["msg"])
    given = found["input"]
    what = f", not {shortened(given)!r}" if isinstance(given, str | int | float) else ""
    if found["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_field")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported; leave it out", param=param, code="unsupported_parameter")
    return ApiError(400, f"{param}: {message}{what}", param=param, code="invalid_value")


def image_bytes(url: str, param: str) -> bytes:
    """The encoded image inside a data URL.

    Raises:
        ApiError: 400: another kind of URL, or no base64.
    """
    found = _DATA_URL.match(url)
    if found is None:
        raise ApiError(
            400,
            f"{param}: {shortened(url, 40)!r} is no data:image/...;base64, URL; this server fetches nothing, "
            "neither from the network nor from its disk, so put the image's bytes into the request",
            param=param,
            code="invalid_image_url",
        )
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: not base64 ({error})", param=param, code="invalid_image_url") from None


class Latents(Protocol):
    """What is told of one latent segment."""

    @property
    def slots(self) -> int: ...


class Answer(Protocol):
    """What is told of one generated answer; `valr_ops.model.answering.Generation` is one."""

    @property
    def visible_text(self) -> str: ...
    @property
    def latents(self) -> Sequence[Latents]: ...
    @property
    def latent_steps(self) -> int: ...
    @property
    def decode_steps(self) -> int: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class Reply:
    """The JSON objects of one answer: whole, or in chunks."""

    def __init__(self, name: str, model: str, created: int, prompt_tokens: int) -> None:
        """Those of the answer called `name` to a prompt of `prompt_tokens` positions.

        Args:
            created: seconds since 1970.
        """
        self._head = {"id": name, "created": created, "model": model}
        self._prompt_tokens = prompt_tokens

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one object."""
        message = {"role": "assistant", "content": answer.visible_text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer)}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(answer),
            "valr": self._latents(answer),
        }

    def first_chunk(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def text_chunk(self, text: str) -> dict[str, Any]:
        """A piece of the answer."""
        return self._chunk({"content": text})

    def last_chunks(self, answer: Answer, include_usage: bool) -> list[dict[str, Any]]:
        """The chunk with the finish reason and, if it was asked for, one with the usage and no choice."""
        chunks = [{**self._chunk({}, _finish_reason(answer)), "valr": self._latents(answer)}]
        if include_usage:
            chunks.append({**self._chunk({}), "choices": [], "usage": self._usage(answer)})
        return chunks

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self, answer: Answer) -> dict[str, int]:
        """Completion tokens are those that `max_tokens` bounds; slots, which it does not, are in the `valr` object."""
        written = answer.decode_steps - answer.latent_steps
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt_tokens + written,
        }

    def _latents(self, answer: Answer) -> dict[str, Any]:
        return {
            "segments": len(answer.latents),
            "slots_used": [segment.slots for segment in answer.latents],
            "latent_steps": answer.latent_steps,
            "decode_steps": answer.decode_steps,
            "finish_reason": answer.finish_reason,
            "seconds": round(answer.seconds, 4),
        }


def _finish_reason(answer: Answer) -> str:
    return "stop" if answer.finish_reason == "stop" else "length"
