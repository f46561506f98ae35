"""A recipe, tokenizer, processor, model and a few sequences small enough for tests: all made in about a second."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.data.records import Box
from valr_ops.data.rewriting import (
    INSTRUCTION,
    LATENT,
    LATENT_END,
    LATENT_PAD,
    ControlTokens,
    image_grid,
    prompt_messages,
    response_pieces,
)
from valr_ops.data.sequences import Segment, Sequence
from valr_ops.model.qwen import make_processor, tiny_model, train_tokenizer
from valr_ops.recipe.recipe import Recipe, override, read
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor  # noqa: E402

STEPS = (
    "row 1: red circle, blue square, green triangle, red star.",
    "row 2: blue circle, blue star, green square, yellow triangle.",
    "row 3: yellow circle, red square, green star, blue triangle.",
)
QUESTION = "What is in column 2 of each row?"


def recipe(**changes: Any) -> Recipe:
    """A recipe at scale tiny with the smallest widths that keep every shape different; dotted `changes` apply."""
    training = {"learning_rate": 3e-3, "projector_learning_rate": 3e-3, "micro_batch": 2, "accumulation": 2}
    teacher = {"architecture": "timm", "model": "vit_small_patch16_dinov3", "image_pixels": 64}
    smallest = read(
        {
            "scale": "tiny",
            "data": {"max_length": 512, "reserved_slots": 4, "synthetic": {"train_records": 24, "test_records": 8}},
            "base": {
                "from_scratch": {
                    "hidden_size": 32,
                    "layers": 3,
                    "attention_heads": 2,
                    "key_value_heads": 1,
                    "intermediate_size": 48,
                    "vision_hidden_size": 16,
                    "vision_layers": 2,
                    "vocabulary_size": 448,
                    "rope_theta": 10.0,
                    "tower_pretraining_steps": 2,
                },
                "max_pixels": 65536,
            },
            "latents": {"slots": 4},
            "alignment": {"block": 1, "projector_width": 24},
            "teachers": {"dinov3": teacher},
            "stage1": training,
            "stage2": training,
        }
    )
    return override(smallest, changes)


@functools.cache
def processor() -> Qwen2_5_VLProcessor:
    """The processor of the tiny model; shared, never changed."""
    base = recipe().base
    assert base.from_scratch is not None
    texts = [*STEPS, QUESTION, INSTRUCTION, "Answer: blue square", "true false yes no 0 1 2 3 4 5 6 7 8 9"]
    return make_processor(train_tokenizer(texts, base.from_scratch.vocabulary_size), base)


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen2_5_VLForConditionalGeneration:
    """A new tiny model with random weights."""
    widths = recipe().base.from_scratch
    assert widths is not None
    return tiny_model(widths, processor(), seed).to(dtype)


def image(number: int, width: int = 64, height: int = 64) -> PIL.Image.Image:
    """Coloured noise, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.NEAREST)


class Images:
    """What `ImageStore` offers, in memory; the digest of an image is its name here."""

    def __init__(self, images: dict[str, PIL.Image.Image]) -> None:
        self.images = images
        self.loads = 0

    def load(self, digest: str, box: Box | None = None) -> PIL.Image.Image:
        self.loads += 1
        return self.images[digest] if box is None else self.images[digest].crop(box)


def images() -> Images:
    """Three images: two of a 4 x 4 grid and a wide one of 400 x 100 pixels."""
    return Images({"a": image(0), "b": image(1), "wide": image(2, 400, 100)})


def sequence(
    name: str,
    digests: tuple[str, ...],
    targets: tuple[tuple[str, Box | None] | None, ...],
    store: Images | None = None,
) -> Sequence:
    """A sequence about the images `digests` of `store` with one segment and step for each of `targets`."""
    made, store = processor(), store or images()
    grids = tuple(image_grid(*store.images[digest].size, made) for digest in digests)
    prompt = made.apply_chat_template(prompt_messages(QUESTION, len(digests)), add_generation_prompt=True)
    for _, height, width in grids:
        prompt = prompt.replace("<|image_pad|>", "<pads>" * (height * width // 4), 1)
    ids = made.tokenizer.encode(prompt.replace("<pads>", "<|image_pad|>"))
    prompt_length, segments = len(ids), []
    *steps, answer = response_pieces(STEPS[: len(targets)], "blue square")
    for step, (text, target) in enumerate(zip(steps, targets, strict=True)):
        digest, box = target or (None, None)
        segments.append(Segment(len(ids), digest, box, step))
        ids += made.tokenizer.encode(LATENT + LATENT_END + text)
    ids += made.tokenizer.encode(answer)
    return Sequence(
        id=f"tiny/{name}",
        source="tiny",
        split="train",
        kind="single_view",
        input_ids=np.array(ids, dtype=np.int32),
        prompt_length=prompt_length,
        segments=tuple(segments),
        image_digests=digests,
        image_grids=grids,
        question=QUESTION,
        answer="blue square",
    )


def sequences() -> list[Sequence]:
    """Four ragged ones: three segments (one without target), one segment, two about two images, and none at all."""
    return [
        sequence("three", ("a",), (("a", (0, 0, 64, 16)), None, ("a", (0, 32, 64, 48)))),
        sequence("one", ("wide",), (("wide", (0, 0, 100, 100)),)),
        sequence("two", ("a", "b"), (("a", None), ("b", None))),
        sequence("none", ("b",), ()),
    ]


def digest(name: str) -> str:
    """The digest under which an image of `images` is stored on disk, where digests are hexadecimal."""
    return hashlib.sha256(name.encode()).hexdigest()


def stored(sequence: Sequence) -> Sequence:
    """The same sequence about images that are stored on disk."""
    segments = (
        replace(segment, digest=None if segment.digest is None else digest(segment.digest))
        for segment in sequence.segments
    )
    return replace(sequence, segments=tuple(segments), image_digests=tuple(map(digest, sequence.image_digests)))


def control() -> ControlTokens:
    """Ids of the tiny tokenizer's control tokens."""
    return ControlTokens.of(processor().tokenizer)


def video(number: int, frames: int, width: int = 48, height: int = 32) -> list[PIL.Image.Image]:
    """A clip of coloured noise, another one for every number; sides are multiples of 16 pixels."""
    return [image(1000 * number + frame, width, height) for frame in range(frames)]


def video_batch(slots: int = 4) -> Batch:
    """Four rows made by the real processor, which mix images, videos and text alone.

    Row 0 has an image and a video, row 1 text alone, row 2 a video, row 3 a video, an image and a video, in this order.
    They have 1, 2, 0 and 3 segments of `slots` slots; the videos differ in frames, size and frames per second.
    """
    made, ids = processor(), control()
    rows: list[tuple[tuple[str, ...], int]] = [
        (("image", "video"), 1),
        ((), 2),
        (("video",), 0),
        (("video", "image", "video"), 3),
    ]
    texts, response_lengths = [], []
    for parts, segments in rows:
        content = [*({"type": part} for part in parts), {"type": "text", "text": QUESTION}]
        prompt = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        *steps, answer = response_pieces(STEPS[:segments], "blue square")
        response = "".join(LATENT + LATENT_PAD * slots + LATENT_END + step for step in steps) + answer
        texts.append(prompt + response)
        response_lengths.append(len(made.tokenizer.encode(response)))
    clips = [video(0, 4), video(1, 6, 32, 48), video(2, 8, 32, 32), video(3, 3, 64, 32)]
    inputs = made(
        text=texts,
        images=[image(0), image(1)],
        videos=clips,
        video_metadata=[
            {"fps": fps, "total_num_frames": len(clip)} for fps, clip in zip((2.0, 1.0, 3.0, 0.5), clips, strict=True)
        ],
        do_sample_frames=False,
        videos_kwargs={"do_resize": False, "cap_pixels_per_frame": False},
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = inputs["input_ids"].clone()
    for row, (length, response_length) in enumerate(
        zip(inputs["attention_mask"].sum(1), response_lengths, strict=True)
    ):
        labels[row, : length - response_length] = IGNORED
        labels[row, length:] = IGNORED
    labels[(labels == ids.latent_pad) | (labels == ids.latent_end)] = IGNORED
    slot_mask = inputs["input_ids"] == ids.latent_pad
    segments_at = (slot_mask & ~torch.nn.functional.pad(slot_mask, (1, 0))[:, :-1]).nonzero()
    return Batch(
        **inputs,
        labels=labels,
        slot_mask=slot_mask,
        segment_rows=segments_at[:, 0],
        segment_starts=segments_at[:, 1],
        targets=[None] * len(segments_at),
        record_ids=["tiny/both", "tiny/text", "tiny/video", "tiny/mixed"],
    )
