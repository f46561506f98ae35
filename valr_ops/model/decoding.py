"""Generation in two modes: prompts in, answers with their latent segments out.

A row is in latent mode from `<latent>` until K slots have passed; there the next input is the last hidden state instead
of a token's embedding. The mode is a pure function of the ids so far: `SegmentRules` forces the id stream (after
`<latent>` K slot ids, then `</latent>`), and `ValrForConditionalGeneration` feeds the state wherever the id is a slot.
So the stock `generate` does the rest, for rows in different modes side by side, and finished rows can't wake up.

Always: what is fed here equals what `latents.forward` feeds for the same ids; a slot id is never chosen, only forced;
a model without latents decodes as the stock class does, with the three control tokens ruled out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor

from valr_ops.data.rewriting import ControlTokens, prompt_messages
from valr_ops.model.qwen import control_tokens
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMode  # noqa: E402


class DecodingError(ValueError):
    """A generation that latents can't go with: the message names the argument and what to set it to."""


def fed_slots(config: Qwen2_5_VLConfig, slots: int | None = None) -> int:
    """Positions a segment feeds back according to ``config.valr``: K, K - 2 where the control tokens count, or 0.

    Args:
        slots: another K than the model was trained with, for an experiment.
    """
    settings = getattr(config, "valr", None) or {}
    if "slots" not in settings:
        return 0
    counted = 2 if settings.get("control_tokens") == "inside" else 0
    return int(slots or settings["slots"]) - counted


class SegmentRules(LogitsProcessor):
    """Which ids may follow: inside a segment exactly one, outside everything but slots and `</latent>`."""

    def __init__(
        self,
        control: ControlTokens,
        slots: int,
        prompt_length: int = 0,
        max_segments: int | None = None,
        force_first_latent: bool = False,
    ):
        """Rules for segments of `slots` fed positions; 0 rules out latents altogether.

        Args:
            prompt_length: ids before this column belong to the prompt; only the next two arguments need it.
            max_segments: a row that has opened so many gets no `<latent>` any more.
            force_first_latent: every row begins with a segment.
        """
        self.control, self.slots, self.prompt_length = control, slots, prompt_length
        self.max_segments, self.force_first_latent = max_segments, force_first_latent

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [batch, vocabulary] with minus infinity at every id that may not follow `input_ids`."""
        latent, close, slot = self.control.latent, self.control.latent_end, self.control.latent_pad
        never = float("-inf")
        scores = scores.clone()
        scores[:, [slot, close]] = never
        if not self.slots:
            scores[:, latent] = never
            return scores
        if self.max_segments is not None:
            opened = (input_ids[:, self.prompt_length :] == latent).sum(1)
            scores[:, latent] = scores[:, latent].masked_fill(opened >= self.max_segments, never)
        forced = self._forced(input_ids)
        only = torch.full_like(scores, never).scatter_(1, forced.clamp(min=0)[:, None], 0.0)
        return torch.where((forced >= 0)[:, None], only, scores)

    def _forced(self, input_ids: Tensor) -> Tensor:
        """[batch]: the id that must follow; -1 outside segments."""
        latent, close, slot = self.control.latent, self.control.latent_end, self.control.latent_pad
        last = input_ids[:, -1]
        # Between two `<latent>` stand more than K ids, so the one K back, if it is one, opened the segment of `last`.
        behind = input_ids.shape[1] - 1 - self.slots
        full = (last == slot) & (input_ids[:, behind] == latent) if behind >= 0 else torch.zeros_like(last).bool()
        inside = torch.where(full, close, slot)
        outside = latent if self.force_first_latent and input_ids.shape[1] == self.prompt_length else -1
        return torch.where((last == slot) | (last == latent), inside, outside)


class ValrForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose ``generate(**processor(...))`` runs latent segments as ``config.valr`` describes them.

    It has no parameter and no forward of its own. Without ``config.valr["slots"]`` it is the stock class.
    """

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; `SegmentRules` in `logits_processor` take the place of those from ``config.valr``.

        Raises:
            DecodingError: slot ids in the prompt, or a way of decoding that would mix up the rows' states.
        """
        processors = LogitsProcessorList(logits_processor or [])
        if getattr(self.config, "valr", None):
            control = control_tokens(self.config)
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
            if prompt is not None and bool((prompt == control.latent_pad).any()):
                raise DecodingError(
                    f"the prompt contains the slot id {control.latent_pad}, but the states fed there are not known; "
                    "leave whole segments out of the prompt, or let it end in <latent>"
                )
            if not any(isinstance(processor, SegmentRules) for processor in processors):
                processors.insert(0, SegmentRules(control, fed_slots(self.config)))
        return super().generate(inputs, generation_config, processors, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, fed_state: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of one forward; `fed_state` [batch, 1, hidden] takes the place of a slot's embedding."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc, arg-type]
        if not fed_slots(self.config):
            return inputs
        inputs["output_hidden_states"] = inputs.get("output_hidden_states") or [-1]
        if fed_state is not None:
            ids = inputs.pop("input_ids")
            at_slot = (ids == self.config.valr["latent_pad_token_id"])[..., None]
            inputs["inputs_embeds"] = torch.where(at_slot, fed_state, self.get_input_embeddings()(ids))
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if fed_slots(self.config):
            model_kwargs["fed_state"] = outputs.hidden_states[-1][:, -1:]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, generation_mode_kwargs
        )
        if not fed_slots(self.config):
            return
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise DecodingError(
                f"{generation_mode.value} reorders or drops rows, and the latent states would not follow; "
                "set num_beams=1 and leave assistant models out"
            )
        if not generation_config.use_cache:
            raise DecodingError("use_cache=False would embed the slots of earlier steps as tokens; set use_cache=True")
        if isinstance(generation_config.output_hidden_states, list | tuple):
            raise DecodingError(
                "output_hidden_states must be True or False; a selection leaves out the state to be fed"
            )


# transformers finds the names of a checkpoint's weights by class name; without them it loads a random decoder.
register_checkpoint_conversion_mapping(
    ValrForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
    overwrite=True,
)


@dataclass(frozen=True)
class Generation:
    """One generated answer."""

    text: str
    """Everything generated, control tokens and slots included."""
    visible_text: str
    """Without control tokens, slots and the end of turn."""
    segments: int
    """Number of latent segments opened."""
    text_tokens: int
    """Tokens outside segments, the end of turn included."""
    latent_steps: int
    """Slots fed."""
    decode_steps: int
    """All positions: text tokens, slots and control tokens."""
    finish_reason: Literal["stop", "length", "length_in_segment"]
    """`stop` at the end of turn; `length` at max_new_tokens, `length_in_segment` where that fell inside a segment."""
    seconds: float
    """Wall-clock seconds of the batch over its rows, prefill included; latency is measured with one row a batch."""


class _TokenLimit(StoppingCriteria):
    """Ends a row that has `max_new_tokens` ids behind the prompt, slots not counted."""

    def __init__(self, slot: int, prompt_length: int, max_new_tokens: int):
        self.slot, self.prompt_length, self.max_new_tokens = slot, prompt_length, max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, self.prompt_length :] != self.slot).sum(1) >= self.max_new_tokens


@torch.inference_mode()
def generate_answers(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    prompts: Sequence[tuple[Sequence[PIL.Image.Image], str]],
    *,
    max_new_tokens: int,
    max_segments: int,
    slots: int | None = None,
    force_first_latent: bool = False,
    latents: bool = True,
) -> list[Generation]:
    """Decode all `prompts` greedily in one left-padded batch (paper, section 4: greedy decoding).

    Args:
        model: a `ValrForConditionalGeneration`; the stock class will do where latents are off.
        prompts: images and question of each row.
        max_new_tokens: limit of a row, in text and control tokens; slots are not counted.
        max_segments: limit of a row, in latent segments.
        slots: K; None is the K the model was trained with, anything else is an experiment.
        force_first_latent: every row begins with a segment, whether the model wants one or not.
        latents: False rules segments out; so does a model without ``config.valr["slots"]``.

    Returns:
        One `Generation` a prompt, in order.

    Raises:
        DecodingError: latents are wanted from a model class that can't feed them.
    """
    if not prompts:
        return []
    per_segment = fed_slots(model.config, slots) if latents else 0
    if per_segment and not isinstance(model, ValrForConditionalGeneration):
        raise DecodingError(
            f"{type(model).__name__} can't feed latents; load the model with model_class=ValrForConditionalGeneration"
        )
    started = time.perf_counter()
    control = control_tokens(model.config)
    inputs = _left_padded(processor, prompts).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    end_of_turn = processor.tokenizer.eos_token_id
    rules = SegmentRules(control, per_segment, prompt_length, max_segments, force_first_latent)
    output = model.generate(  # type: ignore[misc]
        **inputs,
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens + per_segment * min(max_segments, max_new_tokens),
            eos_token_id=end_of_turn,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        logits_processor=LogitsProcessorList([rules]),
        stopping_criteria=StoppingCriteriaList([_TokenLimit(control.latent_pad, prompt_length, max_new_tokens)]),
    )
    rows = output[:, prompt_length:].tolist()
    seconds = (time.perf_counter() - started) / len(rows)
    return [_generation(row, processor, control, end_of_turn, max_new_tokens, seconds) for row in rows]


def _left_padded(processor: Qwen2_5_VLProcessor, prompts: Sequence[tuple[Sequence[PIL.Image.Image], str]]) -> Any:
    """The processor's output for the prompts; their last ids stand in the last column."""
    texts = [
        processor.apply_chat_template(prompt_messages(question, len(images)), add_generation_prompt=True)
        for images, question in prompts
    ]
    images = [image for row, _ in prompts for image in row]
    return processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt")


def _generation(
    row: list[int],
    processor: Qwen2_5_VLProcessor,
    control: ControlTokens,
    end_of_turn: int,
    max_new_tokens: int,
    seconds: float,
) -> Generation:
    """One row's answer; what follows its end of turn or its limit is padding of the batch."""
    ids: list[int] = []
    counted = 0
    for token in row:
        ids.append(token)
        counted += token != control.latent_pad
        if token == end_of_turn or counted == max_new_tokens:
            break
    latent_steps, segments = ids.count(control.latent_pad), ids.count(control.latent)
    text = [token for token in ids if token not in (control.latent, control.latent_end, control.latent_pad)]
    in_segment = ids[-1] in (control.latent, control.latent_pad)
    return Generation(
        text=processor.tokenizer.decode(ids, skip_special_tokens=False),
        visible_text=processor.tokenizer.decode(text, skip_special_tokens=True),
        segments=segments,
        text_tokens=len(text),
        latent_steps=latent_steps,
        decode_steps=len(ids),
        finish_reason="stop" if ids[-1] == end_of_turn else "length_in_segment" if in_segment else "length",
        seconds=seconds,
    )
