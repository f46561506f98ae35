"""A model behind an OpenAI-compatible endpoint: questions in, replies out. The one module that asks over the network.

In: where and at what price (`Endpoint`), and questions, each with its messages and, for JSON, a function that reads it.
Out: for every question, in order, a `Reply`, or a `Failure` that says why there is none; the price before, and the
usage after.
Always: several questions are open at once, at the endpoint's rate and within the bound on money; trouble that may pass
is waited out, trouble that would meet every question is raised; a reply is on disk before it is used, so that an
interrupted run pays for nothing twice; the key, which comes from an environment variable, is in no file or message.
"""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import PIL.Image
import tenacity
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

REFUSED = "refused"
"""Finish reason of a reply that stands for the endpoint's refusal to answer that question."""

Form = TypeVar("Form", bound=BaseModel)
Messages = list[dict[str, Any]]
"""As the protocol has them."""

AGAIN = "That answer can't be used: {problem}. Answer again, with the JSON object alone."
"""What a model is told of an unusable answer; belongs to the digest of a prompt."""
# Where a server does not know response_format, models like to answer in Markdown.
_FENCED = re.compile(r"\s*```(?:json)?(.*)```\s*", re.DOTALL)
_ANSWERS_ASKED_FOR = 3
_ATTEMPTS_A_REQUEST = 6
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 60.0
_LONGEST_RETRY_AFTER_SECONDS = 300.0
_CONNECT_SECONDS = 10.0
_MAX_REPLY_BYTES = 1 << 20
_SECONDS_AN_ANSWER = 6.0
_MOST_REQUESTS_AT_ONCE = 32
_LONGEST_SHOWN = 200

# What servers call the two ends of an answer; a reply without a word for it came whole.
_FINISHED = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens"), "length"),
}
_BUSY = {408, 409, 425, 429}
# What these say is said to every question. Other refusals may lie in the one question.
_ABOUT_EVERY_QUESTION = {401, 402, 403, 404, 405}
_CODES_ABOUT_EVERY_QUESTION = {"model_not_found", "insufficient_quota"}
_CODES_ABOUT_THE_QUESTION = {"content_filter", "content_policy_violation", "context_length_exceeded"}


@dataclass(frozen=True)
class Names:
    """How its user calls the settings of an endpoint, and the error that the user expects."""

    error: type[Exception]
    """Raised with one message: what, where, how to mend it."""
    who: str
    """Begins the lines that are said."""
    url: str
    model: str
    max_dollars: str
    key: str
    """Environment variable with the key; unset for an endpoint that needs none."""
    cheaper: str
    """What to do where the price is above the bound."""


@dataclass(frozen=True)
class Endpoint:
    """Which model is asked, and within what bounds."""

    url: str
    """Ends in /v1."""
    model: str
    names: Names
    requests_per_minute: float = math.inf
    dollars_per_million_input_tokens: float = 0.0
    dollars_per_million_output_tokens: float = 0.0
    max_dollars: float = math.inf
    pinned: bool = False
    """Whether a reply under another name than `model`, such as the one that an alias stands for now, is an error."""
    patience: int = 3
    """After so many questions in a row without a reply nobody is asked any more."""
    silence_seconds: float = 120.0
    """A reply of which nothing comes for so long counts as none."""
    reply_seconds: float = 300.0
    """So does one that is not whole after so long."""

    def dollars(self, input_tokens: int, output_tokens: int) -> float:
        """The price of so many tokens."""
        rates = self.dollars_per_million_input_tokens, self.dollars_per_million_output_tokens
        return (input_tokens * rates[0] + output_tokens * rates[1]) / 1e6


@dataclass(frozen=True)
class Price:
    """What questions will cost, every one asked once."""

    requests: int
    input_tokens: int
    output_tokens: int
    """The most that the answers may have."""
    dollars: float
    answered: int
    """Questions whose answers are there already."""


@dataclass
class Usage:
    """What asking has cost so far."""

    requests: int = 0
    """Sent, those that brought nothing included."""
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float = 0.0


@dataclass(frozen=True)
class Reply:
    """What the model said."""

    text: str
    finish_reason: str = "stop"
    """`stop`, `length`, `REFUSED`, or another word of the endpoint's."""
    output_tokens: int = 0
    """0 for a reply from the disk, as is what follows."""
    seconds: float = 0.0
    """Of the request that brought it."""
    more: dict[str, Any] | None = field(default=None, repr=False)
    """What the endpoint said beyond the protocol."""


@dataclass(frozen=True)
class Failure:
    """No reply, and why."""

    reason: str


@dataclass(frozen=True)
class Question:
    """What is asked of the model."""

    key: str
    """Equal for questions that have the same answer."""
    messages: Callable[[], Messages]
    """Called from the calling thread, just before they are sent."""
    most_output_tokens: int
    read: Callable[[str], object] | None = None
    """Reads a reply that is to be one JSON object. Raises `Unusable`; then the model is told why, and asked again."""
    input_tokens: int = 0
    """For the price, see `text_tokens` and `image_tokens`."""
    about: str = ""
    """For messages."""


class Unusable(Exception):
    """A reply that has not the form that was asked for: why, in words that the model understands."""


class Clock:
    """The time that the rate limit and the pauses go by; tests bring their own."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, stop: threading.Event, seconds: float) -> None:
        """Return after `seconds`, or as soon as `stop` is set."""
        stop.wait(seconds)


class _Busy(Exception):
    """No answer this time; another attempt may bring one."""

    def __init__(self, problem: str, retry_after: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


class _NoReply(Exception):
    """No answer to this question: why, and how to mend it if it meets others too."""

    def __init__(self, problem: str, how: str) -> None:
        super().__init__(problem)
        self.how = how


class _Stopped(Exception):
    """Another thread has failed, or nobody is asked any more."""


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    """What is read of a reply of /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None
    model: str = ""


class _Complaint(BaseModel):
    message: str = ""
    code: str | int | None = None


class _Refusal(BaseModel):
    """What is read of a reply with another status than 200."""

    error: _Complaint = _Complaint()


class Chat:
    """Asks one model, from several threads at once."""

    def __init__(
        self,
        endpoint: Endpoint,
        replies: Path | None,
        by: str,
        say: Callable[[str], None],
        clock: Clock | None = None,
    ) -> None:
        """A conversation that can begin; nothing is sent yet.

        Args:
            endpoint: whom to ask.
            replies: file of JSON lines that outlives the run and is only ever appended to; None keeps no reply.
            by: stands in every line of it: what the replies depend on beside their question.
            say: one line for people; never called by two threads at once.
            clock: for tests.

        Raises:
            endpoint.names.error: the address or the key can't be used.
        """
        self.usage = Usage()
        self.stopped: Exception | None = None
        """Why nobody is asked any more; None while the endpoint answers."""
        self._endpoint = endpoint
        self._key = _key(endpoint.names)
        self._url = _address(endpoint, self._key is not None)
        self._replies = _Replies(replies)
        self._by = by
        self._say = say
        self._clock = clock or Clock()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next_turn = -math.inf
        self._failed_in_a_row = 0
        at_once = min(endpoint.requests_per_minute * _SECONDS_AN_ANSWER / 60, _MOST_REQUESTS_AT_ONCE)
        self._at_once = math.ceil(at_once)

    def estimate(self, questions: Iterable[Question]) -> Price:
        """The price of those that are not answered yet, which is also said.

        Raises:
            endpoint.names.error: more than `max_dollars`.
        """
        endpoint, names = self._endpoint, self._endpoint.names
        keys: set[str] = set()
        inputs = outputs = answered = 0
        for question in questions:
            if question.key in keys:
                continue
            keys.add(question.key)
            if question.key in self._replies:
                answered += 1
            else:
                inputs += question.input_tokens
                outputs += question.most_output_tokens
        price = Price(len(keys) - answered, inputs, outputs, endpoint.dollars(inputs, outputs), answered)
        what = (
            f"{price.requests:,} questions to {endpoint.model} at {endpoint.url} cost about ${price.dollars:,.2f} "
            f"({inputs:,} input and at most {outputs:,} output tokens)"
        )
        if price.dollars > endpoint.max_dollars:
            raise names.error(
                f"{what}, more than {names.max_dollars}={endpoint.max_dollars:g}. Nothing was asked. {names.cheaper}"
            )
        self._say(f"{names.who}: {what}; {answered:,} are answered already")
        return price

    def ask_all(self, questions: Sequence[Question]) -> list[Reply | Failure]:
        """The outcome of every question, in order; those with equal keys are asked once.

        The last reply of a question counts and is kept even where `read` finds it unusable.

        Raises:
            endpoint.names.error: the endpoint refuses the key, the model or the address, or the bound on money is
                reached. What was answered is kept.
        """
        self._stop.clear()
        self.stopped, self._failed_in_a_row = None, 0
        missing = {question.key: question for question in questions if question.key not in self._replies}
        asked = self._ask_missing(missing) if missing else {}
        return [asked.get(question.key) or self._replies[question.key] for question in questions]

    def _ask_missing(self, missing: dict[str, Question]) -> dict[str, Reply | Failure]:
        """Messages are made only as fast as they are sent, because they may hold pictures."""
        futures: dict[str, Future[Reply | Failure]] = {}
        with self._client() as client, ThreadPoolExecutor(min(self._at_once, len(missing))) as threads:
            running: set[Future[Reply | Failure]] = set()
            try:
                for key, question in missing.items():
                    while len(running) >= self._at_once:
                        running = _after_one(running)
                    if self._stop.is_set():
                        break
                    futures[key] = threads.submit(self._ask, client, question, question.messages())
                    running.add(futures[key])
                while running:
                    running = _after_one(running)
            except BaseException:
                self._stop.set()
                raise
        return {key: futures[key].result() if key in futures else self._not_asked() for key in missing}

    def _client(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self._key.get_secret_value()}"} if self._key else {}
        timeout = httpx2.Timeout(self._endpoint.silence_seconds, connect=_CONNECT_SECONDS)
        # Certificates are checked, which is the client's own default.
        return httpx2.Client(headers=headers, timeout=timeout, follow_redirects=False)

    def _ask(self, client: httpx2.Client, question: Question, messages: Messages) -> Reply | Failure:
        """Ask until a reply can be used, or often enough; keep the last one either way."""
        try:
            for _ in range(_ANSWERS_ASKED_FOR):
                reply = self._reply(client, question, messages)
                if question.read is None or reply.finish_reason == REFUSED:
                    break
                try:
                    question.read(reply.text)
                except Unusable as problem:
                    again = {"role": "user", "content": AGAIN.format(problem=problem)}
                    messages = [*messages, {"role": "assistant", "content": reply.text}, again]
                    continue
                break
        except _NoReply as problem:
            return self._failed(problem, question)
        except _Stopped:
            return self._not_asked()
        with self._lock:
            self._failed_in_a_row = 0
        self._replies.add(question.key, self._by, reply)
        return reply

    def _failed(self, problem: _NoReply, question: Question) -> Failure:
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= self._endpoint.patience and self.stopped is None:
                self.stopped = self._error(str(problem), problem.how, question)
                self._stop.set()
        return Failure(str(problem))

    def _not_asked(self) -> Failure:
        return Failure(f"not asked, because {self._endpoint.patience} before it in a row had no answer")

    def _reply(self, client: httpx2.Client, question: Question, messages: Messages) -> Reply:
        """One reply. Raises `_NoReply` after the last attempt, `_Stopped`, or the user's error."""
        body: dict[str, Any] = {
            "model": self._endpoint.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": question.most_output_tokens,
        }
        if question.read:
            body["response_format"] = {"type": "json_object"}
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Busy),
            stop=_given_up,
            wait=_pause,
            sleep=self._wait,
            before_sleep=self._say_pause,
            reraise=True,
        )
        try:
            return attempts(self._post, client, json.dumps(body).encode(), question)
        except _Busy as busy:
            problem = str(busy)
        raise _NoReply(f"gave no answer: {problem}", "Wait until it does, or ask at a lower rate")

    def _post(self, client: httpx2.Client, body: bytes, question: Question) -> Reply:
        """One request. Raises `_Busy`, `_NoReply`, `_Stopped` or the user's error."""
        self._take_turn(question)
        problem, began = "", self._clock.now()
        try:
            headers = {"Content-Type": "application/json"}
            with client.stream("POST", self._url, content=body, headers=headers) as response:
                data = self._bounded(response, began)
        except httpx2.RequestError as error:
            problem = self._shown(f"{type(error).__name__}: {error}")
        # Raised outside, because the client's own exception holds the request with its key.
        if problem:
            raise _Busy(problem)
        if response.status_code != 200:
            return self._refusal(response, data, question)
        try:
            return self._counted(_Completion.model_validate_json(data), question, self._clock.now() - began)
        except ValidationError:
            problem = "status 200 without a chat completion"
        raise _Busy(problem)

    def _bounded(self, response: httpx2.Response, began: float) -> bytes:
        data = bytearray()
        for piece in response.iter_bytes():
            data += piece
            if len(data) > _MAX_REPLY_BYTES:
                raise _Busy(f"a reply of more than {_MAX_REPLY_BYTES} bytes")
            if self._clock.now() > began + self._endpoint.reply_seconds:
                raise _Busy(f"a reply that takes more than {self._endpoint.reply_seconds:g} seconds")
        return bytes(data)

    def _counted(self, completion: _Completion, question: Question, seconds: float) -> Reply:
        said = completion.choices[0]
        text = said.message.content or said.message.refusal or ""
        usage = completion.usage
        inputs = usage.prompt_tokens if usage else question.input_tokens
        outputs = usage.completion_tokens if usage else text_tokens(text)
        with self._lock:
            self.usage.input_tokens += inputs
            self.usage.output_tokens += outputs
            self.usage.dollars += self._endpoint.dollars(inputs, outputs)
        named = completion.model
        if self._endpoint.pinned and named not in ("", self._endpoint.model):
            raise self._error(
                f"answered {self._endpoint.names.model}={self._endpoint.model} as {self._shown(named)}",
                "Give that name, so that what was said can be traced to who said it",
                question,
            )
        finish_reason = _FINISHED.get(said.finish_reason or "stop", said.finish_reason or "")
        return Reply(self._without_key(text), finish_reason, outputs, seconds, completion.model_extra)

    def _refusal(self, response: httpx2.Response, data: bytes, question: Question) -> Reply:
        """A refusal that belongs to the question. Raises what any other status than 200 means."""
        status, names = response.status_code, self._endpoint.names
        try:
            complaint = _Refusal.model_validate_json(data).error
        except ValidationError:
            complaint = _Complaint()
        said = self._shown(complaint.message or data.decode(errors="replace"))
        answered = f"answered {status}" + (f" ({said})" if said else "")
        if complaint.code in _CODES_ABOUT_THE_QUESTION:
            return Reply(f"refused: {complaint.code}", REFUSED)
        every = status in _ABOUT_EVERY_QUESTION or complaint.code in _CODES_ABOUT_EVERY_QUESTION
        if not every and (status in _BUSY or status >= 500):
            retry_after = _seconds(response.headers.get("retry-after"))
            if retry_after is not None:
                with self._lock:
                    # The others would only be told the same.
                    pause = min(retry_after, _LONGEST_RETRY_AFTER_SECONDS)
                    self._next_turn = max(self._next_turn, self._clock.now() + pause)
            raise _Busy(answered, retry_after)
        if status in (401, 403):
            # Servers like to repeat parts of the key here, so their words are left out.
            held = "does not accept the key in" if self._key else "asks for a key, which belongs in"
            raise self._error(f"answered {status}: it {held} {names.key}", "Set that environment variable", question)
        if 300 <= status < 400:
            raise self._error(
                f"{answered}, a redirect, which is not followed", "Give the address it leads to", question
            )
        how = f"Check {names.url} (it ends in /v1) and {names.model}"
        if every:
            raise self._error(answered, how, question)
        raise _NoReply(answered, how)

    def _take_turn(self, question: Question) -> None:
        """Wait until the rate allows one more request."""
        with self._lock:
            if 0 < self.usage.dollars >= self._endpoint.max_dollars:
                raise self._error(
                    f"was paid about ${self.usage.dollars:.2f} in this run, which reaches "
                    f"{self._endpoint.names.max_dollars}={self._endpoint.max_dollars:g}",
                    "Answers that had to be asked for again were not in the estimate; raise it, or go on as it is for "
                    "as much again",
                    question,
                )
            now = self._clock.now()
            turn = max(now, self._next_turn)
            self._next_turn = turn + 60 / self._endpoint.requests_per_minute
        self._wait(turn - now)
        with self._lock:
            self.usage.requests += 1

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._clock.wait(self._stop, seconds)
        if self._stop.is_set():
            raise _Stopped

    def _say_pause(self, state: tenacity.RetryCallState) -> None:
        with self._lock:
            self._say(
                f"{self._endpoint.names.who}: {self._endpoint.url}: {_failure(state)}; "
                f"asking again in {_pause(state):.0f} s"
            )

    def _error(self, what: str, how: str, question: Question) -> Exception:
        endpoint, path = self._endpoint, self._replies.path
        at = f", at {question.about}" if question.about else ""
        kept = f"{len(self._replies):,} answers are kept in {path}, and the same command goes on there"
        how = f"{how}; {kept}" if path else how
        return endpoint.names.error(f"{endpoint.names.url}={endpoint.url} {what}{at}. {how}")

    def _shown(self, text: str) -> str:
        # First the key, then the length: half a key is a secret too.
        return _line(self._without_key(text))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key.get_secret_value(), f"[{self._endpoint.names.key}]") if self._key else text


class _Replies:
    """Replies by the key of their question: lines of JSON that are only ever appended.

    A line counts once it is whole, so that a process may end at any moment.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._by_key: dict[str, Reply] = {}
        text = path.read_bytes() if path and path.exists() else b""
        self._torn = bool(text) and not text.endswith(b"\n")
        for line in text.split(b"\n"):
            try:
                entry = json.loads(line)
                key, reply = entry["key"], entry["reply"]
            except (ValueError, TypeError, KeyError):
                # The rest of a line that was cut short: its question is asked again.
                continue
            if isinstance(key, str) and isinstance(reply, str):
                self._by_key[key] = Reply(reply, str(entry.get("finish_reason", "stop")))

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> Reply:
        return self._by_key[key]

    def add(self, key: str, by: str, reply: Reply) -> None:
        """On disk when this returns."""
        if self.path is None:
            return
        entry = {"key": key, "by": by, "reply": reply.text}
        if reply.finish_reason != "stop":
            entry["finish_reason"] = reply.finish_reason
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"\n" + line if self._torn else line)
                file.flush()
                os.fsync(file.fileno())
            self._torn = False
            self._by_key[key] = reply


def read_object(text: str, form: type[Form]) -> Form:
    """The JSON object of a reply, which may stand in a fence of Markdown. Raises `Unusable`."""
    fenced = _FENCED.fullmatch(text)
    try:
        return form.model_validate_json(fenced[1] if fenced else text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Unusable(f"{where}: {first['msg']}" if where else "it is no JSON object of that form") from None


def data_url(picture: PIL.Image.Image, form: str, **options: Any) -> str:
    """`picture` as a URL that holds it, encoded as `form` (``JPEG``, ``PNG``) with Pillow's options."""
    file = io.BytesIO()
    picture.save(file, format=form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def image_part(url: str) -> dict[str, Any]:
    """The part of a message that shows a picture."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """The part of a message that is words."""
    return {"type": "text", "text": text}


def image_tokens(width: int, height: int, side: int) -> int:
    """Input tokens of an image that is sent at most `side` pixels long, for the price.

    An assumption, on the high side: the larger of OpenAI's tiles (85 and 170 for each 512 px tile) and a token for
    every 750 pixels, which is about what other vendors and Qwen's 28 px patches come to.
    """
    scale = min(1.0, side / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    return max(85 + 170 * math.ceil(width / 512) * math.ceil(height / 512), math.ceil(width * height / 750))


def text_tokens(text: str) -> int:
    """Tokens of a text, for the price: three bytes of UTF-8 each, where English has about four; on the high side."""
    return math.ceil(len(text.encode(errors="replace")) / 3)


def _after_one(running: set[Future[Reply | Failure]]) -> set[Future[Reply | Failure]]:
    """The futures that still run after at least one has ended. Raises what one that ended has raised."""
    ended, others = wait(running, return_when=FIRST_COMPLETED)
    for future in ended:
        future.result()
    return others


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the endpoint asks for, and no less than doubling gives."""
    failure = _failure(state)
    doubling = min(_FIRST_PAUSE_SECONDS * 2 ** (state.attempt_number - 1), _LONGEST_PAUSE_SECONDS)
    return max(doubling, failure.retry_after or 0.0) if isinstance(failure, _Busy) else doubling


def _given_up(state: tenacity.RetryCallState) -> bool:
    """After the last attempt, or where the endpoint asks for more patience than a run should have."""
    return state.attempt_number >= _ATTEMPTS_A_REQUEST or _pause(state) > _LONGEST_RETRY_AFTER_SECONDS


def _seconds(retry_after: str | None) -> float | None:
    """Of a header Retry-After, in seconds or as a date (RFC 9110, 10.2.3); None if it is neither."""
    text = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _key(names: Names) -> SecretStr | None:
    key = os.environ.get(names.key, "").strip()
    if key and not re.fullmatch(r"[\x21-\x7e]{4,}", key):
        raise names.error(
            f"the environment variable {names.key} holds no key: four or more printable ASCII characters without "
            "spaces; set it again, or unset it for an endpoint that needs none"
        )
    return SecretStr(key) if key else None


def _address(endpoint: Endpoint, has_key: bool) -> str:
    """The URL that questions are sent to. Raises for one that would leak or hide something."""
    names = endpoint.names
    try:
        parts = urlsplit(endpoint.url)
        # Reading the port checks it.
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise names.error(
            f"{names.url}={_line(endpoint.url)!r} is no address; give one such as https://api.example.com/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise names.error(
            f"{names.url} at {parts.hostname} carries a user name, a password or a query, which would be written to "
            f"every log; give the bare address, and the key in {names.key}"
        )
    if has_key and parts.scheme == "http" and not is_loopback(endpoint.url):
        raise names.error(
            f"{names.url}={_line(endpoint.url)} would be sent the key in the clear; give an https:// address, or unset "
            f"{names.key}"
        )
    return endpoint.url.rstrip("/") + "/chat/completions"


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _line(text: str) -> str:
    """`text` as one printable ASCII line of bounded length, for messages."""
    shown = ascii(text[: 4 * _LONGEST_SHOWN])[1:-1]
    return shown if len(shown) <= _LONGEST_SHOWN else shown[: _LONGEST_SHOWN - 3] + "..."
