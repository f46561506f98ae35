"""A model behind an OpenAI-compatible endpoint as the one that answers: GPT-4o, Claude, vLLM, our own ``valr serve``.

In: its address and name, and batches of prompts. Out: one `Said` a prompt, in order, decoded greedily.
Always: pictures are sent as they are, without loss; a prompt that got no answer says why and harms no other of its
batch; what would meet every prompt (a wrong key, an unknown model, an endpoint that has gone) is raised once.
The key (`KEY_VARIABLE`) is in no file or message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pydantic import BaseModel, Field, ValidationError

from valr_ops.evaluation.models import Generate, Prompt, Said
from valr_ops.store.chat import (
    REFUSED,
    Chat,
    Clock,
    Endpoint,
    Failure,
    Messages,
    Names,
    Question,
    Reply,
    data_url,
    image_part,
    text_part,
)

KEY_VARIABLE = "VALR_ENDPOINT_API_KEY"
"""Environment variable with the key to the endpoint; unset for one that needs none."""

_SILENCE_SECONDS = 300.0
"""Servers that don't stream send nothing until a long answer is whole."""
_PATIENCE = 8
# A picture of 8K takes many seconds at Pillow's default.
_PNG_COMPRESSION = 1


class EndpointError(RuntimeError):
    """An endpoint that answers nobody: what it says, and how to mend it."""


_NAMES = Names(
    error=EndpointError,
    who="endpoint",
    url="endpoint",
    model="the model's name",
    max_dollars="max_dollars",
    key=KEY_VARIABLE,
    cheaper="Ask fewer questions",
)


class _Latents(BaseModel):
    """What `valr serve` tells of latents beside an answer."""

    segments: int = Field(ge=0)
    latent_steps: int = Field(ge=0)
    finish_reason: str


def open_endpoint(
    url: str,
    model: str,
    max_new_tokens: int,
    *,
    say: Callable[[str], None] = print,
    clock: Clock | None = None,
) -> Generate:
    """The function that answers prompts, several of a batch at once; nothing is sent yet.

    Args:
        url: base URL that ends in /v1.
        model: its name there.
        max_new_tokens: of each answer.
        say: one line for people, of pauses that the endpoint asks for.
        clock: for tests.

    Raises:
        EndpointError: the address or the key can't be used. Later, from the function: what would meet every prompt.
    """
    endpoint = Endpoint(url, model, _NAMES, patience=_PATIENCE, silence_seconds=_SILENCE_SECONDS)
    chat = Chat(endpoint, None, model, say, clock)

    def generate(prompts: list[Prompt]) -> Sequence[Said]:
        if chat.stopped:
            raise chat.stopped
        outcomes = chat.ask_all(
            [Question(str(number), partial(_messages, prompt), max_new_tokens) for number, prompt in enumerate(prompts)]
        )
        return [_said(outcome) for outcome in outcomes]

    return generate


def _messages(prompt: Prompt) -> Messages:
    images, words = prompt
    shown = [image_part(data_url(image, "PNG", compress_level=_PNG_COMPRESSION)) for image in images]
    return [{"role": "user", "content": [*shown, text_part(words)]}]


def _said(outcome: Reply | Failure) -> Said:
    if isinstance(outcome, Failure):
        return _nothing(outcome.reason)
    if outcome.finish_reason == REFUSED:
        return _nothing(outcome.text)
    if outcome.finish_reason not in ("stop", "length"):
        return _nothing(f"answered with finish_reason {outcome.finish_reason!r}")
    latents = _latents(outcome)
    # Ours says where the limit cut.
    cut_in = latents.finish_reason if latents and outcome.finish_reason == "length" else outcome.finish_reason
    return Said(
        text=outcome.text,
        text_tokens=outcome.output_tokens,
        finish_reason=cut_in,
        segments=latents.segments if latents else 0,
        latent_steps=latents.latent_steps if latents else 0,
        seconds=outcome.seconds,
    )


def _latents(reply: Reply) -> _Latents | None:
    try:
        return _Latents.model_validate((reply.more or {}).get("valr"))
    except ValidationError:
        return None


def _nothing(why: str) -> Said:
    return Said("", 0, "error", error=why)
