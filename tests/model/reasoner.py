"""A small model that reasons in latent segments, questions for it, and its answers; for tests of decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from tests import tiny
from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model.answering import Generation, encode_prompts, generate_answers
from valr_ops.model.decoding import LatentSegment
from valr_ops.model.qwen import save_model

SLOTS = 4
VOCABULARY = 448
CONTROL = tiny.control()
END = tiny.processor().tokenizer.eos_token_id
PAD = tiny.processor().tokenizer.pad_token_id
Question = tuple[list[PIL.Image.Image], str]


def save_reasoner(folder: Path) -> None:
    """A stage-2 artifact with random weights, large enough for varied text, that likes segments and ends."""
    model: Any = tiny.model(seed=1)
    width = model.lm_head.in_features
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.language_model"):
                parameter *= 5.0
        rows = 0.15 * torch.randn(3, width, generator=torch.Generator().manual_seed(1))
        model.lm_head.weight[[CONTROL.latent, CONTROL.latent_pad, END]] = rows
    save_model(model, tiny.processor(), folder, {"slots": SLOTS, "control_tokens": "outside"})


def prompts(count: int) -> list[Question]:
    """Ragged prompts with no, one or two images of different sizes."""
    images = [[], [tiny.image(5)], [tiny.image(6, 96, 32)], [tiny.image(7), tiny.image(8, 32, 64)]]
    return [(images[row % 4], "What is in row " + "1, " * (row % 7) + f"column {row}?") for row in range(count)]


def answers(model: Any, rows: Any, **changes: Any) -> list[Generation]:
    """Answers to the prompts `rows`, of 24 tokens and 3 segments at most; `changes` are other arguments."""
    arguments = {"max_new_tokens": 24, "max_segments": 3} | changes
    return generate_answers(model, tiny.processor(), rows, **arguments)


def record(generation: Generation) -> Generation:
    """Without what differs in the last bits: the seconds, and figures of the latents' movement."""
    segments = tuple(LatentSegment(segment.slots, 0.0, ()) for segment in generation.latents)
    return replace(generation, seconds=0.0, latents=segments)


def encoded(rows: list[Question]) -> Any:
    """What the processor makes of `rows`."""
    return encode_prompts(tiny.processor(), rows)


def batch_of(inputs: Any, ids: Tensor, mask: Tensor) -> Batch:
    """Rows `ids` [rows, length] that begin with the prompts in `inputs`, as training would see them."""
    slots = ids == CONTROL.latent_pad
    segment_rows, opened = (ids == CONTROL.latent).nonzero(as_tuple=True)
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=torch.full_like(ids, IGNORED),
        pixel_values=inputs.get("pixel_values"),
        image_grid_thw=inputs.get("image_grid_thw"),
        mm_token_type_ids=(ids == tiny.processor().image_token_id).long(),
        slot_mask=slots,
        segment_rows=segment_rows,
        segment_starts=opened + 1,
        targets=[None] * len(opened),
        record_ids=[str(row) for row in range(len(ids))],
    )
