"""Decoding in two modes: encoded prompts in, ids with their latent segments out.

A row is in latent mode from `<latent>` until K slots have passed; there the next input is the last hidden state instead
of a token's embedding. `Grammar` says which id must or may follow in each row; `Rows` takes the step over the same
`CachedDecoder` that the training roll-out uses. Two loops stand on them: `ValrForConditionalGeneration.generate`, for
whoever knows transformers, and `answering.generate_answers`, for batches of questions.

Always: what is fed here equals what `latents.forward` feeds for the same ids; a slot id is never chosen, only forced,
and no processor of scores touches a forced id; a finished row can't wake up; neighbours never change a row's answer; a
model without latents decodes as the stock class does, with the control tokens, where it has any, ruled out.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.data.rewriting import ControlTokens, RewritingError, load_processor
from valr_ops.model.cached import CachedDecoder
from valr_ops.model.qwen import control_tokens, input_embeddings, rope_positions, write_model
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    GenerationConfig,
    LogitsProcessorList,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    StoppingCriteriaList,
)
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.generation import GenerationMode  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers.generation.utils import GenerateDecoderOnlyOutput  # noqa: E402

_FREE = -1
"""In place of an id: any may follow."""
_OUTSIDE = -1
"""In place of a number of slots: no segment is open."""
_COLUMNS_AT_FIRST = 512
"""Room in the cache behind the prompt; it grows for longer answers. On a GPU every step looks at all of it."""


class DecodingError(ValueError):
    """A generation that can't be done: the message names the argument and what to set it to."""


def fed_slots(config: Qwen2_5_VLConfig, slots: int | None = None) -> int:
    """Positions a segment feeds back according to ``config.valr``: K, K - 2 where the control tokens count, or 0.

    Args:
        slots: another K than the model was trained with, for an experiment.

    Raises:
        DecodingError: `slots` are given but the model has no latents, or they leave no position to feed.
    """
    settings = getattr(config, "valr", None) or {}
    if "slots" not in settings:
        if slots is not None:
            raise DecodingError(
                f"slots={slots}, but this model has no latents (config.valr has no slots); leave slots out, "
                "or take the artifact of a stage 2"
            )
        return 0
    counted = 2 if settings.get("control_tokens") == "inside" else 0
    fed = int(settings["slots"] if slots is None else slots) - counted
    if fed < 1:
        raise DecodingError(f"slots={slots} leaves no position to feed; set it to {counted + 1} or more")
    return fed


@dataclass(frozen=True)
class SegmentRules:
    """How segments run; the same for all rows of a batch."""

    slots: int
    """Positions fed back in a segment; 0 rules latents out."""
    max_segments: int | None = None
    """A row that has opened so many gets no `<latent>` any more."""
    force_first_latent: bool = False
    """Every row begins with a segment, whether the model wants one or not."""
    settle: float | None = None
    """A segment ends early, after one slot at least, once the state to be fed next has at least this cosine to the
    state fed last. None or 1 and more: never."""
    markers_only: bool = False
    """Segments end before their first slot, for an experiment: the control tokens alone."""


Slot = tuple[int, int, int]
"""Where a slot stands: number of the row among the prompts, of the segment in it, of the slot in that; from zero."""


@dataclass(frozen=True)
class Intervention:
    """What is done to a model while it answers, to see what it uses. Nothing by default."""

    slot_inputs: Callable[[Sequence[Slot], Tensor], Tensor] | None = None
    """What slots are fed, [slots, hidden], from where they stand and the states that they would be fed, of that shape;
    called at every step with all slots of that step."""
    markers_only: bool = False
    """See `SegmentRules.markers_only`."""
    image_steps: int | None = None
    """After so many steps (lines) of an answer nothing looks at the prompt's images and videos any more; at 0 nothing
    ever does, the prompt's text included. None: no limit."""


class Grammar:
    """Which id must or may follow in each row, from the ids so far. Its tensors are [rows] and stay on the CPU."""

    def __init__(self, rules: SegmentRules, control: ControlTokens | None, last_ids: Tensor, pad: int) -> None:
        """The grammar of rows whose prompts end in `last_ids`; an open `<latent>` there begins a segment.

        Args:
            control: None for a model that has no control tokens.
            last_ids: [rows] int64.
            pad: the id of rows that have finished.
        """
        absent = ControlTokens(_FREE, _FREE, _FREE)
        self.rules, self.control, self.pad = rules, control or absent, pad
        self.used = torch.full_like(last_ids, _OUTSIDE, device="cpu")
        """Slots fed in the open segment; `_OUTSIDE` where none is open."""
        self.opened = torch.zeros_like(self.used)
        """Segments begun."""
        self.settled = torch.zeros_like(self.used, dtype=torch.bool)
        """Whether the open segment may end before its last slot."""
        self.finished = torch.zeros_like(self.settled)
        self.closed = torch.zeros_like(self.settled)
        """Where no segment may begin any more."""
        never = [self.control.latent_pad, self.control.latent_end, *([] if rules.slots else [self.control.latent])]
        self._never = [token for token in never if token != _FREE]
        if control is not None:
            self.advance(last_ids.cpu())
        self._at_start = True

    def forced(self) -> Tensor:
        """[rows] int64: the id that must follow; -1 where the model chooses."""
        close = self.settled | (self.used == (0 if self.rules.markers_only else self.rules.slots))
        inside = torch.where(close, self.control.latent_end, self.control.latent_pad)
        outside = (
            self.control.latent if self._at_start and self.rules.slots and self.rules.force_first_latent else _FREE
        )
        forced = torch.where(self.in_segment(), inside, outside)
        return torch.where(self.finished, self.pad, forced)

    def rule_out(self, scores: Tensor) -> Tensor:
        """`scores` [rows, vocabulary], with minus infinity written at the ids that may not follow."""
        for token in self._never:
            scores[:, token] = float("-inf")
        if self.rules.slots:
            most = self.rules.max_segments
            spent = self.closed if most is None else self.closed | (self.opened >= most)
            scores[:, self.control.latent].masked_fill_(spent.to(scores.device), float("-inf"))
        return scores

    def in_segment(self) -> Tensor:
        """[rows] bool: where a segment is open."""
        return self.used != _OUTSIDE

    def at_slot(self, ids: Tensor) -> Tensor:
        """[rows] bool: where the next input is the last hidden state."""
        return (ids == self.control.latent_pad) & ~self.finished

    def advance(self, ids: Tensor) -> None:
        """Take note of the ids [rows] that follow."""
        opening = (ids == self.control.latent) & bool(self.rules.slots)
        self.used = torch.where(self.at_slot(ids), self.used + 1, torch.where(opening, 0, _OUTSIDE))
        self.opened += opening
        self.settled = torch.zeros_like(self.settled)
        self._at_start = False

    def keep(self, rows: Tensor) -> None:
        """Forget all other rows."""
        for name in ("used", "opened", "settled", "finished", "closed"):
            setattr(self, name, getattr(self, name)[rows])


@dataclass(frozen=True)
class LatentSegment:
    """What the states fed in one segment did."""

    slots: int
    """Slots used: K, or fewer where the segment settled or the answer was cut off."""
    norm: float
    """Mean norm of the states over the mean norm of the token embeddings of the row's prompt; 0 without slots."""
    moved: tuple[float, ...]
    """1 minus the cosine of each state to the one before it; `slots` - 1 of them."""


class Rows:
    """The rows of one decode in lock step: which ids follow, and the step that feeds them; for both loops."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        prompts: EmbeddedPrompts,
        rules: SegmentRules,
        pad: int,
        columns: int,
        slot_inputs: Callable[[Sequence[Slot], Tensor], Tensor] | None = None,
    ) -> None:
        """Run the left-padded `prompts` through `model`.

        Args:
            pad: the id of rows that have finished.
            columns: how many may follow.
            slot_inputs: see `Intervention.slot_inputs`.
        """
        self.model, self.device = model, prompts.ids.device
        self.grammar = Grammar(rules, _control_tokens(model.config), prompts.ids[:, -1], pad)
        self.text_norm = (prompts.inputs.norm(dim=-1) * prompts.is_text).sum(1) / prompts.is_text.sum(1)
        """[rows]: mean norm of the embeddings of the prompt's text, the measure of a latent's norm."""
        count, length = prompts.ids.shape
        self.decoder = CachedDecoder(model.model.language_model, count, length + min(columns, _COLUMNS_AT_FIRST))
        last = torch.full((count,), length - 1, device=self.device)
        self.state = self.decoder.extend(prompts.inputs, prompts.positions.movedim(1, 0), prompts.visible, at=last)
        """[rows, hidden]: post-norm state of the last position, which the next one is fed if it is a slot."""
        self.position = prompts.positions[:, :, -1].T
        self.fed: deque[Tensor] = deque(maxlen=max(1, rules.slots))
        """[rows, hidden] each: the inputs of the last K columns that had a slot in any row."""
        self._numbers = list(range(count))
        self._images = prompts.visible & ~prompts.is_text
        self._slot_inputs = slot_inputs

    def next_ids(self, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """[rows] int64 on the CPU: the ids that follow. Where all are forced, the head is not even run.

        Args:
            choose: from scores [rows, vocabulary], float32, to ids [rows].
        """
        forced = self.grammar.forced()
        free = forced == _FREE
        if not free.any():
            return forced
        scores = self.model.lm_head(self.state).to(copy=True, dtype=torch.float32)
        return torch.where(free, choose(self.grammar.rule_out(scores)).cpu(), forced)

    def feed(self, ids: Tensor) -> None:
        """Append a column with `ids`, [rows] on the CPU: a slot is fed the last state, all others their embedding."""
        at_slot = self.grammar.at_slot(ids)
        if self._slot_inputs is not None and at_slot.any():
            self._intervene(at_slot, self._slot_inputs)
        if at_slot.all():
            inputs = self.state
        else:
            inputs = self.model.get_input_embeddings()(ids.to(self.device))
            if at_slot.any():
                inputs = torch.where(at_slot.to(self.device)[:, None], self.state, inputs)
        if at_slot.any():
            self.fed.append(inputs)
        self.position = self.position + 1
        self.state = self.decoder.step(inputs, self.position)
        self.grammar.advance(ids)
        settle = self.grammar.rules.settle
        if settle is not None and settle < 1.0 and at_slot.any():
            resting = F.cosine_similarity(self.state.float(), inputs.float(), dim=-1) >= settle
            self.grammar.settled = at_slot & resting.cpu()

    def _intervene(self, at_slot: Tensor, slot_inputs: Callable[[Sequence[Slot], Tensor], Tensor]) -> None:
        rows = at_slot.nonzero().flatten()
        places = [
            (self._numbers[row], int(self.grammar.opened[row]) - 1, int(self.grammar.used[row]))
            for row in rows.tolist()
        ]
        rows = rows.to(self.device)
        self.state = self.state.index_copy(0, rows, slot_inputs(places, self.state[rows]))

    def hide_images(self, rows: Sequence[bool]) -> None:
        """Let nothing that follows in `rows` look at the images and videos of the prompt."""
        self.decoder.hide(self._images & torch.tensor(rows, device=self.device)[:, None])

    def segment(self, row: int) -> LatentSegment:
        """Figures of the segment that is open in `row`."""
        used = int(self.grammar.used[row])
        if used < 1:
            return LatentSegment(0, 0.0, ())
        states = torch.stack([fed[row] for fed in list(self.fed)[-used:]]).float()
        norm = states.norm(dim=-1).mean() / self.text_norm[row]
        moved = 1.0 - F.cosine_similarity(states[1:], states[:-1], dim=-1)
        return LatentSegment(used, float(norm), tuple(moved.tolist()))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        kept = torch.tensor(rows)
        self.grammar.keep(kept)
        kept = kept.to(self.device)
        self.decoder.select(kept)
        self.state, self.position, self.text_norm = self.state[kept], self.position[:, kept], self.text_norm[kept]
        self.fed = deque((fed[kept] for fed in self.fed), maxlen=self.fed.maxlen)
        self._numbers, self._images = [self._numbers[row] for row in rows], self._images[kept]


def _control_tokens(config: Qwen2_5_VLConfig) -> ControlTokens | None:
    """None for a plain Qwen2.5-VL."""
    return control_tokens(config) if getattr(config, "valr", None) else None


@dataclass(frozen=True)
class EmbeddedPrompts:
    """Left-padded prompts, embedded; the first dimension of everything is the row."""

    ids: Tensor
    """[rows, length] int64."""
    visible: Tensor
    """[rows, length] bool; False at padding."""
    is_text: Tensor
    """[rows, length] bool; False at padding, images and videos."""
    inputs: Tensor
    """[rows, length, hidden]: input embeddings."""
    positions: Tensor
    """[rows, 3, length] int64: M-RoPE positions."""


def embed_prompts(model: Qwen2_5_VLForConditionalGeneration, encoded: Mapping[str, Any]) -> EmbeddedPrompts:
    """What the processor made of prompts, on the model's device, with its images and videos looked at.

    Raises:
        DecodingError: slots in a prompt, a prompt longer than the model's positions, sliding-window attention.
    """
    ids, mask, seconds = encoded["input_ids"], encoded.get("attention_mask"), encoded.get("second_per_grid_ts")
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        labels=torch.full_like(ids, IGNORED),
        pixel_values=encoded.get("pixel_values"),
        image_grid_thw=encoded.get("image_grid_thw"),
        pixel_values_videos=encoded.get("pixel_values_videos"),
        video_grid_thw=encoded.get("video_grid_thw"),
        second_per_grid_ts=None if seconds is None else torch.as_tensor(seconds),
        mm_token_type_ids=(ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long(),
        slot_mask=torch.zeros_like(ids, dtype=torch.bool),
        segment_rows=torch.zeros(0, dtype=torch.int64),
        segment_starts=torch.zeros(0, dtype=torch.int64),
        targets=[],
        record_ids=[f"prompt {row}" for row in range(len(ids))],
    ).to(model.device)
    _check_prompts(model, batch)
    visible = batch.attention_mask.bool()
    return EmbeddedPrompts(
        ids=batch.input_ids,
        visible=visible,
        is_text=visible & (batch.mm_token_type_ids == 0),
        inputs=input_embeddings(model, batch),
        positions=rope_positions(model, batch).movedim(0, 1),
    )


def _check_prompts(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> None:
    control = _control_tokens(model.config)
    if control is not None and bool((batch.input_ids == control.latent_pad).any()):
        raise DecodingError(
            f"a prompt contains the slot id {control.latent_pad}, but the states fed there are not known; "
            "leave whole segments out of the prompt, or let it end in <latent>"
        )
    longest, limit = int(batch.attention_mask.sum(1).max()), position_limit(model.config)
    if longest >= limit:
        raise DecodingError(
            f"a prompt has {longest} tokens, but this model has {limit} positions (max_position_embeddings); "
            "shorten the question, or send fewer or smaller images"
        )
    if model.model.language_model.has_sliding_layers:
        raise DecodingError("the model uses sliding-window attention; set use_sliding_window to false in its config")


def position_limit(config: Qwen2_5_VLConfig) -> int:
    """Positions of the model, which prompt and answer share."""
    return int(config.get_text_config().max_position_embeddings)


class ValrForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose ``generate(**processor(...))`` runs latent segments as ``config.valr`` describes them.

    It has no parameter and no forward of its own. Without ``config.valr["slots"]`` it generates what the stock class
    does; what the projectors of the training learned is not part of it.
    """

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        slots: int | None = None,
        max_segments: int | None = None,
        force_first_latent: bool = False,
        latents: bool = True,
        settle: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, greedy or sampled; `max_new_tokens` counts slots and control tokens as well.

        A `streamer` gets the prompt, then the ids of a single row one by one, but no slots.

        Args:
            slots: K; None is the K the model was trained with, anything else is an experiment.
            max_segments: limit of a row, in latent segments.
            force_first_latent: every row begins with a segment.
            latents: False rules segments out.
            settle: see `SegmentRules.settle`.

        Returns:
            [rows, length] int64, prompts included; a `GenerateDecoderOnlyOutput` with ``return_dict_in_generate``.

        Raises:
            DecodingError: slot ids in the prompt, or what this class can't do (beams, assistants, recorded scores ...).
        """
        continued = ("past_key_values", "inputs_embeds", "position_ids", "mm_encoder_outputs")
        given = [name for name in continued if kwargs.get(name) is not None]
        if given:
            raise DecodingError(f"{given[0]}: the loop embeds the prompt by itself; give all of it as input_ids")
        per_segment = fed_slots(self.config, slots)
        rules = SegmentRules(per_segment if latents else 0, max_segments, force_first_latent, settle)
        loop = functools.partial(_generate, rules=rules)
        return super().generate(inputs, generation_config, custom_generate=loop, **kwargs)  # type: ignore[misc]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        processor: Qwen2_5_VLProcessor | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write config, weights (safetensors) and processor with its chat template; the stock class reads them too.

        Args:
            processor: None copies the one of the folder that the model was loaded from.

        Raises:
            DecodingError: no processor is given and that folder has none.
        """
        if processor is None:
            give = "give the processor: save_pretrained(folder, processor=...)"
            if not self.name_or_path:
                raise DecodingError(f"this model was not loaded from a folder; {give}")
            try:
                processor = load_processor(Path(self.name_or_path))
            except RewritingError as error:
                raise DecodingError(f"{error}. Or {give}") from None
        write_model(self, Path(save_directory), max_shard_size)
        processor.save_pretrained(save_directory)

    def _extract_generation_mode_kwargs(self, custom_generate: Any, *others: Any) -> dict[str, Any]:
        """What transformers' own loop would get: it keeps a streamer and a tokenizer from other loops."""
        return super()._extract_generation_mode_kwargs(None, *others)

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, generation_mode_kwargs
        )
        stock = f"or load the folder with {Qwen2_5_VLForConditionalGeneration.__name__}, which knows no latents"
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise DecodingError(
                f"{generation_mode.value} reorders or drops rows, and the latent states would not follow; "
                f"set num_beams=1 and leave assistant models out, {stock}"
            )
        if not generation_config.use_cache:
            raise DecodingError(
                f"use_cache=False would embed the slots of earlier steps as tokens; set use_cache=True, {stock}"
            )
        recorded = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        asked = [name for name in recorded if getattr(generation_config, name)]
        if asked:
            raise DecodingError(f"{' and '.join(asked)}: nothing but ids is recorded; leave it out, {stock}")
        if generation_config.guidance_scale not in (None, 1):
            raise DecodingError(f"guidance_scale would decode a second prompt without latents; leave it out, {stock}")

    def _prepare_position_ids_for_generation(self, *others: Any) -> None:
        """Nothing: `embed_prompts` computes them, without a state that an earlier call left behind."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *others: Any
    ) -> dict[str, Any]:
        """The prompts, embedded while a row is still one prompt; transformers repeats them for several returns."""
        return vars(embed_prompts(self, {**model_kwargs, "input_ids": inputs_tensor}))

    def _prepare_cache_for_generation(self, *others: Any) -> None:  # type: ignore[override]
        """Nothing: the loop makes its own cache."""


# transformers finds the names of a checkpoint's weights by class name; without them it loads a random decoder.
register_checkpoint_conversion_mapping(
    ValrForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
    overwrite=True,
)


def _generate(
    model: ValrForConditionalGeneration,
    input_ids: torch.LongTensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    rules: SegmentRules,
    streamer: BaseStreamer | None = None,
    visible: Tensor,
    is_text: Tensor,
    inputs: Tensor,
    positions: Tensor,
    **unused: Any,
) -> Any:
    """The loop inside transformers' `generate`, which has prepared everything else."""
    if streamer is not None and len(input_ids) > 1:
        raise DecodingError("a streamer follows one row; give one prompt, or use generate_answers with on_text")
    ids: Any = input_ids.to(model.device)
    prompts = EmbeddedPrompts(ids, visible, is_text, inputs, positions)
    padding = generation_config._pad_token_tensor
    pad = 0 if padding is None else int(padding)
    rows = Rows(model, prompts, rules, pad, generation_config.max_length - ids.shape[1])

    def choose(scores: Any) -> Tensor:
        scores = rows.grammar.rule_out(logits_processor(ids, scores))
        if generation_config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
        return scores.argmax(dim=-1)

    while True:
        following = rows.next_ids(choose)
        ids = torch.cat([ids, following.to(ids.device)[:, None]], dim=1)
        if streamer is not None and not rows.grammar.at_slot(following).any():
            streamer.put(following)
        rows.grammar.finished |= stopping_criteria(ids, None).cpu()
        if rows.grammar.finished.all():
            break
        rows.feed(following)
    if streamer is not None:
        streamer.end()
    ids = ids.to(input_ids.device)
    return GenerateDecoderOnlyOutput(sequences=ids) if generation_config.return_dict_in_generate else ids
