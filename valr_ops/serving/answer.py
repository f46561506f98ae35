"""One question to one model: what the verb `generate` does.

In: a model folder or the name of a stage, image files and a question. Out: the reasoning as it comes, on request with
every latent segment in its place, and what there is to know about the answer.
Always: images and question are checked before the model is loaded, with the bounds of training data; a plain
Qwen2.5-VL, a stage-1 model and a model with latents run through the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import PIL.Image
import torch

from valr_ops.data.images import ImageLimits, check_image, decode
from valr_ops.data.records import BadRecord, Image, check_text
from valr_ops.evaluation.answers import answer_text
from valr_ops.model.answering import Sampling, generate_answers
from valr_ops.model.decoding import LatentSegment, ValrForConditionalGeneration, fed_slots
from valr_ops.model.qwen import load_model
from valr_ops.recipe.recipe import DataRecipe, EvaluationRecipe
from valr_ops.store.artifacts import model_folder
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor  # noqa: E402

_DATA = DataRecipe()
IMAGE_LIMITS = ImageLimits(_DATA.min_image_side, _DATA.max_image_pixels)
"""The bounds that training data has."""
MAX_SEGMENTS = EvaluationRecipe().max_segments
"""Bound on latent segments in one answer, that of evaluation."""


class AnswerError(ValueError):
    """A question that can't be put to a model: the message names the option and what to give instead."""


@dataclass(frozen=True)
class Options:
    """What the verb `generate` was told."""

    model: str
    """A folder, or a stage whose artifact is a model."""
    images: Sequence[Path]
    question: str
    max_new_tokens: int = EvaluationRecipe().max_new_tokens
    """Text and control tokens; slots are not counted."""
    sampling: Sampling | None = None
    """None is greedy."""
    slots: int | None = None
    """See `generate_answers`, also for the next three."""
    force_latent: bool = False
    latents: bool = True
    settle: float | None = None
    show_latents: bool = False
    """Whether a line about each latent segment stands in its place."""
    device: str | None = None
    """None takes the GPU, if there is one."""


def answer(options: Options, out: TextIO) -> dict[str, Any]:
    """Ask, and write the answer to `out` piece by piece.

    Returns:
        The isolated answer, the visible text, the segments with their figures, counts, finish reason and seconds.

    Raises:
        AnswerError: no such model, or options that don't fit it.
        ModelError: another kind of model, or its files are not whole.
        BadRecord: an image or a question that training would have rejected.
        DecodingError: a prompt that is too long for the model, or a number out of its range.
    """
    question = check_text(options.question, "--question", empty="empty_question")
    images = [read_picture(path) for path in options.images]
    model, processor = open_model(model_folder(options.model), options.device)
    _check_latents(options, model.config)
    shown, line_ended = 0, True

    def say(piece: str) -> None:
        nonlocal line_ended
        out.write(piece)
        out.flush()
        line_ended = piece.endswith("\n")

    def show(segment: LatentSegment) -> None:
        nonlocal shown
        shown += 1
        before = "" if line_ended else "\n"
        say(f"{before}{segment_line(shown, segment)}\n")

    (said,) = generate_answers(
        model,
        processor,
        [(images, question)],
        max_new_tokens=options.max_new_tokens,
        max_segments=MAX_SEGMENTS,
        slots=options.slots,
        force_first_latent=options.force_latent,
        latents=options.latents,
        settle=options.settle,
        sampling=options.sampling,
        on_text=lambda row, piece: say(piece),
        on_segment=(lambda row, segment: show(segment)) if options.show_latents else None,
    )
    say("\n")
    return {
        "answer": answer_text(said.visible_text),
        "text": said.visible_text,
        "latents": [_rounded(segment) for segment in said.latents],
        "prompt_tokens": said.prompt_tokens,
        "text_tokens": said.text_tokens,
        "latent_steps": said.latent_steps,
        "decode_steps": said.decode_steps,
        "finish_reason": said.finish_reason,
        "seconds": round(said.seconds, 3),
    }


def _rounded(segment: LatentSegment) -> dict[str, Any]:
    """The segment for JSON, its figures at six digits."""
    norm, *moved = [float(f"{figure:.6g}") for figure in (segment.norm, *segment.moved)]
    return {"slots": segment.slots, "norm": norm, "moved": moved}


def segment_line(number: int, segment: LatentSegment) -> str:
    """A segment for people: its slots, the length of its states, how far they moved at first and at last."""
    parts = [f"{segment.slots} slot{'' if segment.slots == 1 else 's'}"]
    if segment.slots:
        parts.append(f"norm {segment.norm:.2f}")
    if segment.moved:
        parts.append(f"moved {segment.moved[0]:.2g} → {segment.moved[-1]:.2g}")
    return f"‹latent {number}: {', '.join(parts)}›"


def read_picture(path: Path) -> PIL.Image.Image:
    """RGB pixels of an image file.

    Raises:
        AnswerError: there is no such file.
        BadRecord: it is no image, or beyond the bounds of training data.
    """
    if not path.is_file():
        raise AnswerError(f"--image {path}: no such file; give the path of a PNG, JPEG, WebP, BMP, GIF or TIFF file")
    return decode(checked_image(path.read_bytes(), f"--image {path}").data)


def checked_image(data: bytes, where: str) -> Image:
    """`check_image` within `IMAGE_LIMITS`, whose messages name no field of a recipe, for there is none here.

    Raises:
        BadRecord: as `check_image`.
    """
    try:
        return check_image(data, "input", IMAGE_LIMITS, where)
    except BadRecord as error:
        bounds = {
            "image_unreadable": "no image that can be read; give a PNG, JPEG, WebP, BMP, GIF or TIFF file",
            "image_too_large": f"more than {IMAGE_LIMITS.max_pixels:,} pixels; give a smaller image",
            "image_too_small": f"a side below {IMAGE_LIMITS.min_side} pixels; give a larger image",
        }
        detail = f"{where}: {bounds[error.reason]}" if error.reason in bounds else error.detail
        raise BadRecord(error.reason, detail) from None


def open_model(at: Path, device: str | None = None) -> tuple[ValrForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The model in a folder that a stage wrote, or a plain Qwen2.5-VL, which has no latents.

    Args:
        device: "cpu" (float32), "cuda" (bfloat16), or None for the GPU if there is one.

    Raises:
        AnswerError: no such device.
        ModelError: another kind of model, or its files are not whole.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise AnswerError("--device cuda: PyTorch finds no GPU here; leave the option out, or run `valr doctor`")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bfloat16" if where == "cuda" else "float32"
    return load_model(at, where, precision, ValrForConditionalGeneration, plain=True)


def _check_latents(options: Options, config: Qwen2_5_VLConfig) -> None:
    wanted = {
        "--slots": options.slots is not None,
        "--force-latent": options.force_latent,
        "--settle": options.settle is not None,
    }
    given = [name for name, there in wanted.items() if there]
    if given and not options.latents:
        raise AnswerError(f"{given[0]} goes with latent segments, which --no-latents rules out; leave one of them out")
    if given and not fed_slots(config):
        raise AnswerError(
            f"{given[0]}: {options.model} has no latents; leave it out, or take the artifact of a stage 2"
        )
