"""A model asked while something inside it is changed, and its attention while it wrote what it wrote.

In: a model, questions with their judges, and what to change: what the latent slots are fed, or from which step on the
images are hidden. Out: an `Answered` a question, with the states that its slots were fed; and how each position of an
answer divides its attention.
Always: float32 on every device, greedy, under the limits of the scores, so that two conditions differ in nothing but
the intervention; a question is one and the same item under every condition; the attention is that of the states which
were really fed, computed by the blocks' own modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from valr_ops.model.answering import Generation, encode_prompts, ends_of_steps, generate_answers
from valr_ops.model.blocks import attend, causal_mask, finish, key_value, normed, query
from valr_ops.model.decoding import Intervention, Slot, ValrForConditionalGeneration, embed_prompts, fed_slots
from valr_ops.model.qwen import control_tokens, load_model
from valr_ops.recipe.recipe import EvaluationRecipe, Recipe
from valr_ops.store.progress import Progress
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLProcessor  # noqa: E402

Condition = Literal["normal", "zeroed", "noised", "other", "markers"]
CONDITIONS: tuple[Condition, ...] = ("normal", "zeroed", "noised", "other", "markers")
"""What latent slots are fed: the model's own states; zeros; noise of the same norm; the states of another item. At
`markers` there are none, the two control tokens stand alone."""
LOOKED_AT = ("image", "prompt", "latents", "answer")
"""What attention goes to: images and videos, the rest of the prompt, segments with their control tokens, and text."""

_REPLAYED_TOGETHER = 8


class ProbeError(ValueError):
    """A study that can't be made of this model or these items: the message says why and what to change."""


@dataclass(frozen=True)
class StudyItem:
    """One question that a study asks, under every condition."""

    id: str
    prompt: tuple[list[PIL.Image.Image], str]
    judge: Callable[[Generation], bool]
    """Whether an answer is right."""
    cluster: str = ""
    """Items of one label share their luck; see `valr_ops.evaluation.statistics`."""


@dataclass(frozen=True)
class Subject:
    """A model under study."""

    model: ValrForConditionalGeneration
    processor: Qwen2_5_VLProcessor
    limits: EvaluationRecipe

    @property
    def has_latents(self) -> bool:
        return fed_slots(self.model.config) > 0


@dataclass(frozen=True)
class Answered:
    """What a model said to one item."""

    generation: Generation
    correct: bool
    fed: list[Tensor]
    """By segment, [slots, hidden]: what its slots were fed. The last one may be cut off."""
    steps: tuple[int, ...]
    """Of each id, the number of the step (line) that it belongs to, from 1; the last line is the answer's."""


def open_subject(folder: Path, recipe: Recipe) -> Subject:
    """The model in `folder`, in float32. Raises `ModelError`."""
    torch.set_num_threads(recipe.runtime.threads)
    model, processor = load_model(folder, recipe.runtime.device, "float32", ValrForConditionalGeneration, plain=True)
    return Subject(model, processor, recipe.evaluation)


def ask(
    subject: Subject,
    items: Sequence[StudyItem],
    intervention: Intervention | None = None,
    *,
    label: str = "answers",
    progress: Progress | None = None,
) -> list[Answered]:
    """What the model says to every item, in order; the rows that `intervention` hears of are places in `items`.

    Args:
        label: what the bar of `progress` counts.
    """
    intervention, limits, size = intervention or Intervention(), subject.limits, subject.limits.batch_size
    starts = range(0, len(items), size)
    ends = ends_of_steps(subject.processor.tokenizer)
    found: list[Answered] = []
    for start in (progress or Progress()).track(starts, f"{label}, batches"):
        batch = items[start : start + size]
        feeding = _Feeding(start, len(batch), intervention.slot_inputs)
        generations = generate_answers(
            subject.model,
            subject.processor,
            [item.prompt for item in batch],
            max_new_tokens=limits.max_new_tokens,
            max_segments=limits.max_segments,
            force_first_latent=limits.force_first_latent,
            settle=limits.latent_settle,
            intervention=replace(intervention, slot_inputs=feeding),
        )
        for item, generation, fed in zip(batch, generations, feeding.fed, strict=True):
            states = [torch.stack(segment) for segment in fed]
            found.append(Answered(generation, item.judge(generation), states, _steps(generation.ids, ends)))
    return found


class _Feeding:
    """What the slots of a batch are fed, kept as it goes in; `start` is the place of its first item."""

    def __init__(self, start: int, rows: int, inner: Callable[[Sequence[Slot], Tensor], Tensor] | None) -> None:
        self._start, self._inner = start, inner
        self.fed: list[list[list[Tensor]]] = [[] for _ in range(rows)]
        """By row and segment."""

    def __call__(self, slots: Sequence[Slot], states: Tensor) -> Tensor:
        if self._inner is not None:
            states = self._inner([(self._start + row, segment, slot) for row, segment, slot in slots], states)
        for (row, _, slot), state in zip(slots, states, strict=True):
            if slot == 0:
                self.fed[row].append([])
            self.fed[row][-1].append(state)
        return states


def _steps(ids: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    finished = np.cumsum([0, *(token in ends for token in ids[:-1])])
    return tuple((1 + finished).tolist())


# ------------------------------------------------------------------------------------------- what latents are fed


def latent_intervention(
    condition: Condition, items: Sequence[StudyItem], normal: Sequence[Answered], seed: int
) -> Intervention:
    """What makes `condition`.

    Args:
        normal: what the model said to `items` by itself; `other` takes its states.
        seed: of the noise, which depends on nothing else but the slot's place.

    Raises:
        ProbeError: `other`, but no two items with latents show different pictures.
    """
    if condition == "normal":
        return Intervention()
    if condition == "markers":
        return Intervention(markers_only=True)
    if condition == "zeroed":
        return Intervention(slot_inputs=lambda slots, states: torch.zeros_like(states))
    if condition == "noised":
        return Intervention(slot_inputs=functools.partial(_noise, seed=seed))
    taken = donors(items, normal)
    return Intervention(slot_inputs=lambda slots, states: _lent(slots, states, taken, normal))


def donors(items: Sequence[StudyItem], normal: Sequence[Answered]) -> list[int]:
    """For every item the place of the next one that opened a segment and shows other pictures.

    Raises:
        ProbeError: an item has none.
    """
    # Of items without pictures the questions differ.
    shown = [[image.tobytes() for image in item.prompt[0]] or [item.prompt[1].encode()] for item in items]
    found = []
    for place, item in enumerate(items):
        following = [(place + step) % len(items) for step in range(1, len(items))]
        able = [other for other in following if normal[other].fed and shown[other] != shown[place]]
        if not able:
            raise ProbeError(
                f"item {item.id}: no other of the {len(items)} items shows other pictures and opened a latent segment, "
                "so there are no latents to take from another item; raise evaluation.study_items, or set "
                "evaluation.force_first_latent"
            )
        found.append(able[0])
    return found


def _noise(slots: Sequence[Slot], states: Tensor, seed: int) -> Tensor:
    """[slots, hidden]: noise of the norms of `states`."""
    drawn = np.stack([np.random.default_rng((seed, *slot)).standard_normal(states.shape[1]) for slot in slots])
    noise = torch.from_numpy(drawn).to(states)
    return noise * (states.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))


def _lent(slots: Sequence[Slot], states: Tensor, taken: Sequence[int], normal: Sequence[Answered]) -> Tensor:
    """[slots, hidden]: the donors' states at the same places; a donor with fewer segments or slots begins again."""
    lent = []
    for row, segment, slot in slots:
        segments = normal[taken[row]].fed
        of_segment = segments[segment % len(segments)]
        lent.append(of_segment[slot % len(of_segment)])
    return torch.stack(lent).to(states)


# ------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class Attention:
    """How the positions of one answer, the last id left out because it was never fed, divide their attention."""

    shares: Tensor
    """[blocks, positions, 4], mean over heads: to each of `LOOKED_AT`; they add up to 1."""
    even: Tensor
    """[positions, 4]: the same if it were spread evenly over all that a position may look at."""
    in_segment: Tensor
    """[positions] bool: the position is a slot or a control token of a segment."""


def attention(subject: Subject, items: Sequence[StudyItem], answered: Sequence[Answered]) -> list[Attention]:
    """The attention with which the model wrote `answered` to `items`, teacher-forced, in order."""
    found: list[Attention] = []
    for start in range(0, len(items), _REPLAYED_TOGETHER):
        now = slice(start, start + _REPLAYED_TOGETHER)
        found += replay(subject, items[now], answered[now])[0]
    return found


@torch.inference_mode()
def replay(
    subject: Subject, items: Sequence[StudyItem], answered: Sequence[Answered]
) -> tuple[list[Attention], list[Tensor]]:
    """One parallel pass over prompts and answers, with what was fed at the slots in place.

    Returns:
        Of every item its attention, and [positions, vocabulary] the scores of the id that follows each position.
    """
    model, tokenizer = subject.model, subject.processor.tokenizer
    encoded = encode_prompts(subject.processor, [item.prompt for item in items])
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    width, lengths = ids.shape[1], [len(one.generation.ids) - 1 for one in answered]
    # Whatever an answer's ids are, an image's pad included, they were fed as text.
    embedded = embed_prompts(
        model,
        {
            **encoded,
            "input_ids": F.pad(ids, (0, max(lengths)), value=tokenizer.pad_token_id),
            "attention_mask": torch.cat([mask, _first(lengths).to(mask)], dim=1),
        },
    )
    kinds = torch.where(embedded.is_text, LOOKED_AT.index("prompt"), LOOKED_AT.index("image"))
    inputs, in_segment = embedded.inputs.clone(), torch.zeros_like(embedded.visible)
    control = control_tokens(model.config) if getattr(model.config, "valr", None) else None
    for row, (one, length) in enumerate(zip(answered, lengths, strict=True)):
        now = slice(width, width + length)
        written = torch.tensor(one.generation.ids[:-1], dtype=torch.int64, device=inputs.device)
        inputs[row, now] = model.get_input_embeddings()(written)
        if control is not None and subject.has_latents:
            slots = (written == control.latent_pad).nonzero().flatten()
            if len(slots):
                inputs[row, width + slots] = torch.cat(one.fed).to(inputs)
            in_segment[row, now] = torch.isin(written, torch.tensor([*vars(control).values()], device=inputs.device))
    kinds[:, width:] = torch.where(in_segment[:, width:], LOOKED_AT.index("latents"), LOOKED_AT.index("answer"))

    decoder = model.model.language_model
    seen = causal_mask(embedded.visible[:, :0], embedded.visible)
    of_kind = F.one_hot(kinds, len(LOOKED_AT)).to(inputs)
    turn = decoder.rotary_emb(inputs, embedded.positions.movedim(1, 0))
    hidden, shares = inputs, []
    for layer in decoder.layers:
        entering = normed(layer.input_layernorm, hidden)
        asked, (key, value) = query(layer, entering, turn), key_value(layer, entering, turn)
        keys = key.repeat_interleave(layer.self_attn.num_key_value_groups, dim=1)
        scores = asked[:, :, width:] @ keys.transpose(2, 3) * layer.self_attn.scaling
        weights = scores.masked_fill(~seen[:, :, width:], float("-inf")).softmax(dim=-1)
        shares.append(weights.mean(dim=1) @ of_kind)
        hidden = finish(layer, hidden, attend(layer, asked, key, value, seen))
    visible = seen[:, 0, width:].to(inputs)
    even = visible @ of_kind / visible.sum(dim=2, keepdim=True)
    scores = model.lm_head(normed(decoder.norm, hidden[:, width:]))
    by_block = torch.stack(shares)
    return (
        [
            Attention(by_block[:, row, :n].cpu(), even[row, :n].cpu(), in_segment[row, width : width + n].cpu())
            for row, n in enumerate(lengths)
        ],
        [scores[row, :n] for row, n in enumerate(lengths)],
    )


def _first(lengths: Sequence[int]) -> Tensor:
    """[rows, longest] bool: True at the first ``lengths[row]`` columns."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
