"""Answers to questions: a batch of prompts in, a `Generation` each out, with the text as it comes.

Every row has its own limit, its own way of drawing ids and its own end; the rows' step is that of `decoding`.

Always: a row's answer depends on nothing but its prompt, its limit and its `Sampling`; its pieces of text are whole
characters and make up its visible text; what follows a row's end, `on_end`, does not wait for its neighbours.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from valr_ops.data.rewriting import ANSWER_CUE, ControlTokens, prompt_messages
from valr_ops.model.decoding import (
    DecodingError,
    Intervention,
    LatentSegment,
    Rows,
    SegmentRules,
    embed_prompts,
    fed_slots,
    position_limit,
)
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

Prompt = tuple[Sequence[PIL.Image.Image], str] | list[dict[str, Any]]
"""Images and a question, worded as in training; or chat messages as the chat template takes them, images decoded."""


@dataclass(frozen=True)
class Sampling:
    """How the ids of a row are drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Only the likeliest ids that together have this probability are drawn."""
    seed: int = 0
    """Rows with the same seed draw the same numbers, whatever their neighbours."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise DecodingError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise DecodingError(f"top_p={self.top_p} must be above 0 and at most 1 (everything may be drawn)")
        if self.seed < 0:
            raise DecodingError(f"seed={self.seed} must be 0 or more")


@dataclass(frozen=True)
class Generation:
    """One generated answer."""

    text: str
    """Everything generated, control tokens and slots included."""
    ids: tuple[int, ...]
    """What `text` was decoded from."""
    visible_text: str
    """Without control tokens, slots and the end of turn."""
    latents: tuple[LatentSegment, ...]
    """The segments opened, in order."""
    text_tokens: int
    """Tokens outside segments, the end of turn included."""
    decode_steps: int
    """All positions: text tokens, slots and control tokens."""
    prompt_tokens: int
    """Tokens of the prompt, those of its images included."""
    finish_reason: Literal["stop", "length", "length_in_segment", "cancelled"]
    """`stop` at the end of turn; `length` at max_new_tokens or the model's last position, `length_in_segment` where
    that fell inside a segment; `cancelled` by the caller."""
    seconds: float
    """Wall-clock seconds from the call until this row ended, prefill included: what its asker waits. Rows of a batch
    share them; a batch takes as long as its longest row."""

    @property
    def segments(self) -> int:
        """Number of latent segments opened."""
        return len(self.latents)

    @property
    def latent_steps(self) -> int:
        """Slots fed."""
        return sum(segment.slots for segment in self.latents)


@torch.inference_mode()
def generate_answers(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int],
    max_segments: int,
    slots: int | None = None,
    force_first_latent: bool = False,
    latents: bool = True,
    settle: float | None = None,
    max_reasoning_tokens: int | None = None,
    intervention: Intervention | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_segment: Callable[[int, LatentSegment], None] | None = None,
    on_end: Callable[[int, Generation], None] | None = None,
    stopped: Callable[[int], bool] | None = None,
) -> list[Generation]:
    """Decode all `prompts` in one left-padded batch, greedily unless told otherwise (paper, section 4: greedy).

    Args:
        model: a Qwen2.5-VL, with or without latents, of our class or the stock one.
        prompts: images and question of each row, or its chat messages.
        max_new_tokens: limit of a row, in text and control tokens; slots are not counted.
        max_segments: limit of a row, in latent segments.
        slots: K; None is the K the model was trained with, anything else is an experiment.
        force_first_latent: every row begins with a segment, whether the model wants one or not.
        latents: False rules segments out; so does a model without ``config.valr["slots"]``.
        settle: ends segments early, see `SegmentRules.settle`.
        max_reasoning_tokens: after so many tokens outside segments the answer has to begin: its opening words are put
            down for the model where it has not written them, and no segment begins any more. None leaves the length to
            the model.
        intervention: what is changed inside the model, for studies of what it uses; None is nothing.
        sampling: of all rows, or one a row; None is greedy.
        on_text: called with a row's number and its newly finished text, whole characters without control tokens.
        on_segment: called with a row's number and its segment when that closes.
        on_end: called with a row's number and its answer when that ends, however long its neighbours go on; the last
            call about a row.
        stopped: asked after every step whether the row of this number is no longer wanted.

    Returns:
        One `Generation` a prompt, in order; a row's pieces of text make up its `visible_text`.

    Raises:
        DecodingError: slots in a prompt, a prompt that is too long, or arguments that don't fit the model.
    """
    if not prompts:
        return []
    started, intervention = time.perf_counter(), intervention or Intervention()
    per_segment, image_steps = fed_slots(model.config, slots) if latents else 0, intervention.image_steps
    rules = SegmentRules(per_segment, max_segments, force_first_latent, settle, intervention.markers_only)
    embedded = embed_prompts(model, encode_prompts(processor, prompts))
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    samplings = [sampling] * len(prompts) if sampling is None or isinstance(sampling, Sampling) else list(sampling)
    columns = max(limits) * (1 + rules.slots)
    seen = replace(embedded, visible=embedded.is_text) if image_steps == 0 else embedded
    pad = int(processor.tokenizer.pad_token_id)
    rows = Rows(model, seen, rules, pad, columns, intervention.slot_inputs)
    control, ends = rows.grammar.control, _ends_of_turn(model, processor)
    step_ends = ends_of_steps(processor.tokenizer) if image_steps else frozenset()
    answers = [
        _Answer(row, tokens, limit, position_limit(model.config) - tokens, one or Sampling(temperature=0.0))
        for row, (tokens, limit, one) in enumerate(
            zip(embedded.visible.sum(1).tolist(), limits, samplings, strict=True)
        )
    ]
    if on_text is not None:
        for answer in answers:
            answer.text = _TextStream(processor.tokenizer, control, functools.partial(on_text, answer.row))
    ended: dict[int, Generation] = {}

    def end(answer: _Answer) -> None:
        if answer.text is not None:
            answer.text.end()
        ended[answer.row] = answer.generation(processor.tokenizer, control, time.perf_counter() - started)
        if on_end is not None:
            on_end(answer.row, ended[answer.row])

    held = answers
    while True:
        ids = rows.next_ids(functools.partial(_choose, held=held))
        for place, (answer, token) in enumerate(zip(held, ids.tolist(), strict=True)):
            if answer.finish_reason is not None:
                continue
            answer.take(token, control, ends)
            if max_reasoning_tokens is not None and answer.bound(max_reasoning_tokens, processor.tokenizer, control):
                rows.grammar.closed[place] = True
            answer.steps += token in step_ends
            if token == control.latent_end or answer.finish_reason == "length_in_segment":
                answer.latents.append(rows.segment(place))
                if on_segment is not None:
                    on_segment(answer.row, answer.latents[-1])
            if answer.finish_reason is not None:
                end(answer)

        alive = [place for place, answer in enumerate(held) if answer.finish_reason is None]
        if not alive:
            break
        rows.grammar.finished[[place for place in range(len(held)) if place not in alive]] = True
        # Copying the cache costs about a step, so rows are dropped by halves and wait as padding until then.
        if 2 * len(alive) <= len(held):
            rows.keep(alive)
            ids, held = ids[alive], [held[place] for place in alive]
        rows.feed(ids)
        if image_steps:
            rows.hide_images([answer.steps >= image_steps for answer in held])
        for place, answer in enumerate(held):
            if stopped is not None and answer.finish_reason is None and stopped(answer.row):
                answer.finish_reason = "cancelled"
                rows.grammar.finished[place] = True
                if rows.grammar.in_segment()[place]:
                    answer.latents.append(rows.segment(place))
                end(answer)
    return [ended[row] for row in range(len(prompts))]


def encode_prompts(processor: Qwen2_5_VLProcessor, prompts: Sequence[Prompt]) -> Any:
    """The processor's output for the prompts; their last ids stand in the last column."""
    texts: list[str] = []
    images: list[PIL.Image.Image] = []
    for prompt in prompts:
        if isinstance(prompt, tuple):
            images += prompt[0]
            messages = prompt_messages(prompt[1], len(prompt[0]))
        else:
            messages = prompt
            contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
            images += [part["image"] for content in contents for part in content if part["type"] == "image"]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt")


def ends_of_steps(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a step: a step is a line, as `response_pieces` writes it, and a line break ends its token."""
    # A byte-level vocabulary writes the byte 10 as this character.
    return frozenset(
        number
        for token, number in tokenizer.get_vocab().items()
        if "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}" in token
    )


class _Answer:
    """One answer while it is being written."""

    def __init__(self, row: int, prompt_tokens: int, limit: int, room: int, sampling: Sampling) -> None:
        """An empty answer.

        Args:
            row: number of its prompt.
            limit: ids that may be chosen or close a segment.
            room: ids that may be fed at all.
        """
        if limit < 1:
            raise DecodingError(f"max_new_tokens={limit} must be 1 or more")
        self.row, self.prompt_tokens, self.limit, self.room, self.sampling = row, prompt_tokens, limit, room, sampling
        self.ids: list[int] = []
        self.counted = 0
        """Ids that are no slots."""
        self.bounded = False
        """Whether the bound on the reasoning has been met."""
        self.cue: deque[int] = deque()
        """Ids that open the answer and are still to come."""
        self.steps = 0
        """Steps finished, where somebody counts them."""
        self.latents: list[LatentSegment] = []
        self.text: _TextStream | None = None
        """Who hears the text as it comes."""
        self.finish_reason: Literal["stop", "length", "length_in_segment", "cancelled"] | None = None
        self._draws = np.random.default_rng(sampling.seed).random(limit)

    @property
    def draw(self) -> float:
        """The random number in [0, 1) of the next id; it depends on nothing but the seed and the ids so far."""
        return float(self._draws[self.counted]) if self.finish_reason is None else 0.0

    def take(self, token: int, control: ControlTokens, ends: frozenset[int]) -> None:
        """Append an id, and finish if it is the last one."""
        self.ids.append(token)
        if self.cue and token == self.cue[0]:
            self.cue.popleft()
        self.counted += token != control.latent_pad
        if self.text is not None:
            self.text.put(token)
        if token in ends:
            self.finish_reason = "stop"
        elif self.counted == self.limit or len(self.ids) == self.room:
            in_segment = token in (control.latent, control.latent_pad)
            self.finish_reason = "length_in_segment" if in_segment else "length"

    def bound(self, tokens: int, tokenizer: PreTrainedTokenizerBase, control: ControlTokens) -> bool:
        """Open the answer where so many tokens outside segments did not; whether the reasoning ends with this."""
        text = [token for token in self.ids if token not in (control.latent, control.latent_end, control.latent_pad)]
        if self.bounded or len(text) < tokens:
            return False
        self.bounded = True
        written = str(tokenizer.decode(text))
        if ANSWER_CUE not in written:
            cue = ANSWER_CUE if not written or written.endswith("\n") else f"\n{ANSWER_CUE}"
            self.cue.extend(tokenizer.encode(cue, add_special_tokens=False))
        return True

    def generation(self, tokenizer: PreTrainedTokenizerBase, control: ControlTokens, seconds: float) -> Generation:
        """The finished answer."""
        assert self.finish_reason is not None
        text = [token for token in self.ids if token not in (control.latent, control.latent_end, control.latent_pad)]
        return Generation(
            text=str(tokenizer.decode(self.ids, skip_special_tokens=False)),
            ids=tuple(self.ids),
            visible_text=str(tokenizer.decode(text, skip_special_tokens=True)),
            latents=tuple(self.latents),
            text_tokens=len(text),
            decode_steps=len(self.ids),
            prompt_tokens=self.prompt_tokens,
            finish_reason=self.finish_reason,
            seconds=seconds,
        )


class _TextStream:
    """The visible text of one row in pieces; a character that is not whole yet is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: ControlTokens, say: Callable[[str], None]) -> None:
        self.tokenizer, self.control, self.say = tokenizer, control, say
        self.waiting: list[int] = []

    def put(self, token: int) -> None:
        """Say what `token` completes."""
        if token in (self.control.latent, self.control.latent_end, self.control.latent_pad):
            return
        self.waiting.append(token)
        text = self._decoded()
        # Bytes of a character that are still to come are decoded as U+FFFD.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._flush(text)

    def end(self) -> None:
        """Say the rest."""
        self._flush(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.waiting, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        self.waiting = []
        if text:
            self.say(text)


def _choose(scores: Tensor, held: Sequence[_Answer]) -> Tensor:
    """An id for each row, [rows]: drawn, or the next one of a cue."""
    ids = _draw(scores, held)
    for place, answer in enumerate(held):
        if answer.cue:
            ids[place] = answer.cue[0]
    return ids


def _draw(scores: Tensor, held: Sequence[_Answer]) -> Tensor:
    """An id for each row, [rows]: the likeliest, or drawn from the nucleus at the row's temperature."""
    likeliest = scores.argmax(dim=-1)
    if not any(answer.sampling.temperature for answer in held):
        return likeliest
    settings = [(answer.sampling.temperature, answer.sampling.top_p, answer.draw) for answer in held]
    temperature, top_p, drawn = scores.new_tensor(settings).T[:, :, None]
    shares = (scores / temperature.where(temperature > 0, 1.0)).softmax(dim=-1)
    shares, order = shares.sort(dim=-1, descending=True, stable=True)
    nucleus = shares * (shares.cumsum(dim=-1) - shares < top_p)
    reached = nucleus.cumsum(dim=-1)
    place = (reached <= drawn * reached[:, -1:]).sum(dim=-1, keepdim=True)
    # Rounding may push a draw just below 1 past the nucleus.
    place = place.minimum((nucleus > 0).sum(dim=-1, keepdim=True) - 1)
    return torch.where(temperature[:, 0] > 0, order.gather(1, place)[:, 0], likeliest)


def _ends_of_turn(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end of turn, and what the checkpoint's generation config adds."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    more = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return frozenset([int(processor.tokenizer.eos_token_id), *more])
