"""The model that is served: checked prompts in, answers of a batch out.

In: a `ChatRequest`. Out: an `Ask`, whose prompt the model can take, and the function that answers a batch of them.
Always: everything that one row could get wrong is refused before the row has neighbours: an image is decoded once to
its last row, text never opens a latent segment or a turn, and prompt and answer fit the model's positions. The
messages are the client's own, word for word; a model trained here has learned to answer behind `INSTRUCTION`.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from valr_ops.data.images import decode
from valr_ops.data.records import BadRecord, Image, check_text, shortened
from valr_ops.data.rewriting import IMAGE_PAD, INSTRUCTION, image_grid, load_processor
from valr_ops.model.answering import Sampling, generate_answers
from valr_ops.model.decoding import fed_slots, position_limit
from valr_ops.serving.answer import IMAGE_LIMITS, MAX_SEGMENTS, AnswerError, checked_image, open_model
from valr_ops.serving.batcher import Ask
from valr_ops.serving.protocol import Answer, ApiError, ChatRequest, ImagePart, Message, image_bytes
from valr_ops.store.artifacts import model_folder
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor  # noqa: E402

_MOST_CHARACTERS = 32
"""A position; longer text than that is not even tokenized, which takes seconds."""


@dataclass(frozen=True)
class PromptLimits:
    """What one request may ask for."""

    max_tokens: int
    """Of an answer; also what a request without a limit gets, as far as the model's positions reach."""
    max_images: int


class PromptChecker:
    """Turns requests into prompts for one model; safe to call from several threads."""

    def __init__(self, processor: Qwen2_5_VLProcessor, config: Qwen2_5_VLConfig, limits: PromptLimits) -> None:
        """A checker for the model of `config`.

        Args:
            processor: one of its own: a tokenizer that pads a batch in another thread must not be borrowed here.
        """
        self.processor, self.limits = processor, limits
        self.positions = position_limit(config)
        self._special = set(processor.tokenizer.all_special_ids)
        self._image_pad = processor.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self._one_at_a_time = threading.Lock()

    def __call__(self, request: ChatRequest) -> Ask:
        """The prompt of `request`.

        Raises:
            ApiError: 400, naming the message and its part, or what does not fit.
        """
        if request.messages[-1].role != "user":
            raise ApiError(400, "the last message must be the user's, for that is what is answered", param="messages")
        images = sum(isinstance(part, ImagePart) for message in request.messages for part in message.content)
        if images > self.limits.max_images:
            raise ApiError(
                400,
                f"{images} images, at most {self.limits.max_images} are allowed (--max-images)",
                param="messages",
                code="too_many",
            )
        characters = sum(
            len(part.text) for message in request.messages for part in message.content if part.type == "text"
        )
        if characters > _MOST_CHARACTERS * self.positions:
            raise _too_long(f"the messages have {characters} characters", self.positions)
        # One request's pixels at a time; and a tokenizer does not take two callers.
        with self._one_at_a_time:
            messages = tuple(
                self._message(message, f"messages[{index}]") for index, message in enumerate(request.messages)
            )
            pixels = sum(image.width * image.height for image in _images(messages))
            if pixels > IMAGE_LIMITS.max_pixels:
                raise ApiError(
                    400,
                    f"the images have {pixels} pixels together, at most {IMAGE_LIMITS.max_pixels} are allowed",
                    param="messages",
                    code="image_too_large",
                )
            prompt_tokens = self._prompt_tokens(messages)
        return Ask(
            messages=messages,
            prompt_tokens=prompt_tokens,
            max_new_tokens=self._new_tokens(request, prompt_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
        )

    def _message(self, message: Message, where: str) -> dict[str, Any]:
        """The message as chat templates take it; text parts side by side are one, as they are in the prompt."""
        parts: list[dict[str, Any]] = []
        for index, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                parts.append({"type": "image", "image": self._image(message, part, f"{where}.content[{index}]")})
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += part.text
            else:
                parts.append({"type": "text", "text": part.text})
        texts = [part["text"] for part in parts if part["type"] == "text"]
        for text in texts:
            self._check_text(text, f"{where}.content")
        if message.role == "user" and len(texts) == len(parts) and not "".join(texts).strip():
            raise ApiError(400, f"{where}.content is empty", param=f"{where}.content", code="empty_message")
        return {"role": "system" if message.role == "developer" else message.role, "content": parts}

    def _image(self, message: Message, part: ImagePart, where: str) -> Image:
        if message.role != "user":
            raise ApiError(400, f"{where}: only the user shows images, not the {message.role}", param=where)
        data = image_bytes(part.image_url.url, f"{where}.image_url.url")
        try:
            return checked_image(data, where)
        except BadRecord as error:
            raise ApiError(400, str(error), param=where, code=error.reason) from None

    def _check_text(self, text: str, where: str) -> None:
        """Raise `ApiError` where `text` would open a turn, an image or a latent segment: the rule of training data."""
        try:
            check_text(text, where, empty="empty_question")
        except BadRecord as error:
            if error.reason != "empty_question":
                raise ApiError(400, str(error), param=where, code=error.reason) from None
        if self._special.intersection(self.processor.tokenizer.encode(text, add_special_tokens=False)):
            raise ApiError(
                400,
                f"reserved_token_in_text: {where}: a special token in {shortened(text)!r}",
                param=where,
                code="reserved_token_in_text",
            )

    def _prompt_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        """Positions of the rendered prompt, each image as many as it has merged patches."""
        rendered = self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids = self.processor.tokenizer.encode(rendered, add_special_tokens=False)
        merged = self.processor.image_processor.merge_size**2
        grids = [image_grid(image.width, image.height, self.processor) for image in _images(messages)]
        return len(ids) - ids.count(self._image_pad) + sum(height * width // merged for _, height, width in grids)

    def _new_tokens(self, request: ChatRequest, prompt_tokens: int) -> int:
        """The limit of the answer; slots that find no position left end it earlier, as `length`."""
        asked = request.new_tokens
        if asked is not None and asked > self.limits.max_tokens:
            raise ApiError(
                400,
                f"max_tokens={asked}, but this server answers with at most {self.limits.max_tokens} (--max-tokens)",
                param="max_tokens",
                code="invalid_value",
            )
        room = self.positions - prompt_tokens
        wanted = asked or min(self.limits.max_tokens, max(room, 1))
        if wanted > room:
            raise _too_long(f"the prompt has {prompt_tokens} positions, and {wanted} are to follow", self.positions)
        return wanted


class ServedModel:
    """A loaded model: its name, what to know about it, its prompts' checker, and `answer` for one thread only."""

    def __init__(
        self,
        path_or_stage: str,
        limits: PromptLimits,
        *,
        device: str | None = None,
        latents: bool = True,
        settle: float | None = None,
    ) -> None:
        """Load a model.

        Args:
            path_or_stage: its folder, or the stage that made it.
            device: as in `open_model`.
            latents: False rules latent segments out.
            settle: as in `generate_answers`.

        Raises:
            AnswerError: no such model or device, or `settle` without latents.
            ModelError: its files are not whole.
        """
        folder = model_folder(path_or_stage)
        self.name = folder.resolve().name
        self._model, self._processor = open_model(folder, device)
        slots = fed_slots(self._model.config) if latents else 0
        if settle is not None and not slots:
            raise AnswerError("--settle ends latent segments early, and there are none here; leave it out")
        self._latents, self._settle = latents, settle
        self.check = PromptChecker(load_processor(folder), self._model.config, limits)
        self.details = {
            "slots": slots,
            "positions": self.check.positions,
            "instruction": INSTRUCTION,
        }

    def answer(
        self,
        asks: Sequence[Ask],
        on_text: Callable[[int, str], None],
        on_end: Callable[[int, Answer], None],
        stopped: Callable[[int], bool],
    ) -> None:
        """Decode `asks` together; see `batcher.Generate`."""
        generate_answers(
            self._model,
            self._processor,
            [[_opened(message) for message in ask.messages] for ask in asks],
            max_new_tokens=[ask.max_new_tokens for ask in asks],
            max_segments=MAX_SEGMENTS,
            latents=self._latents,
            settle=self._settle,
            sampling=[Sampling(ask.temperature, ask.top_p, ask.seed) for ask in asks],
            on_text=on_text,
            on_end=on_end,
            stopped=stopped,
        )


def _too_long(what: str, positions: int) -> ApiError:
    return ApiError(
        400,
        f"{what}, but the model has {positions} positions; shorten the prompt, show smaller or fewer images, or lower "
        "max_tokens",
        param="messages",
        code="context_length_exceeded",
    )


def _images(messages: Iterable[dict[str, Any]]) -> list[Image]:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def _opened(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its images as pixels."""
    parts = [
        part if part["type"] == "text" else {"type": "image", "image": decode(part["image"].data)}
        for part in message["content"]
    ]
    return {**message, "content": parts}
