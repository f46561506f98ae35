"""Records: one question with its images, reasoning steps and answer, and what a reader yields instead of a bad one.

A reader yields `Record | Rejection` and nothing else. Ids are unique across sources because they begin with the
source's name. Text in a record never opens a latent segment: control and chat tokens in it are escaped by
`check_text`. Reason codes are stable; a parser raises `BadRecord` with one of `REASONS` and the reading loop turns it
into a `Rejection`. A folder in which there is nothing to read is no rejection but a `SourceError`.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the image, x1 and y1 exclusive."""

Split = Literal["train", "validation", "test"]

REASONS = {
    "answer_not_allowed": "an answer outside the stated choices, or in coordinates of another processor",
    "bbox_disagrees": "two notations of one box, or of the image size, differ",
    "bbox_invalid": "no four finite numbers, inverted, outside the image or too small to show anything",
    "benchmark_image": "a training record shows an image of the test split or of a benchmark",
    "benchmark_question": "a benchmark asks this very question, and only once",
    "benchmark_scene": "the scene is one of a benchmark's",
    "control_character": "a NUL, another control character or a bidirectional override in the text",
    "crop_is_whole_image": "the region is the whole image, so the step image adds nothing",
    "duplicate_content": "same images, question and answer as an earlier record",
    "duplicate_id": "an earlier record has this id",
    "edit_is_identity": "the edited image is the original, so the step image adds nothing",
    "empty_answer": "no answer after removing white space",
    "empty_question": "no question after removing white space and markers",
    "empty_reasoning": "a step without text",
    "frames_unequal": "frames of one scene differ in size",
    "image_aspect": "longer side more than 200 times the shorter one; the processor refuses it",
    "image_missing": "file absent, or bytes absent",
    "image_too_large": "more pixels than data.max_image_pixels",
    "image_too_small": "a side shorter than data.min_image_side",
    "image_unreadable": "not decodable to the last row",
    "image_without_marker": "a step image without the marker that has to stand before it",
    "licence_blocked": "data.license_policy does not allow the licence",
    "marker_without_image": "a marker without the step image that has to follow it",
    "near_duplicate": "same question and answer, and images that look the same, as an earlier record",
    "no_found_path": "no path through the tree of steps reaches an answer",
    "no_images": "the record has no image",
    "no_steps": "no reasoning step found",
    "not_json": "the line is no JSON object",
    "not_utf8": "the text is not valid UTF-8",
    "over_cap": "left out by the cap on the source (data.sources.NAME.cap)",
    "path_escape": "an image path that leaves the source's folder",
    "placeholder_count": "image placeholders and images or texts do not pair up",
    "reserved_token_in_text": "a marker of an image or of a latent is left over in the text",
    "schema_mismatch": "a required key is absent, unknown or of the wrong type",
    "split_not_train": "the record says that it is from another split",
    "step_match_invalid": "a step is matched to an image that the record does not have",
    "step_match_missing": "nobody says which image a step of a multi-view record looks at",
    "step_tree_invalid": "the steps form no tree",
    "too_long": "more text than a record may have",
    "too_many_steps": "more steps than data.max_steps",
    "unbalanced_tags": "tags or image delimiters that do not pair up",
    "uncited_image": "a step image that no step looks at",
    "undefined_variable": "a step names something that no earlier step made",
    "unsafe_pickle": "metadata that asks for more than plain containers, texts and numbers",
    "video_not_allowed": "a record with a video, while data.video_frames is null",
    "video_too_large": "a video of more bytes, frames or pixels than are decoded",
    "video_unreadable": "a video that can't be decoded, or without frames",
}
"""Every reason a record can be left out for, with its rule. Stable: reports and tests name them."""

CHOICES = ("answer_not_allowed", "licence_blocked", "over_cap", "video_not_allowed")
"""Reasons that say nothing about the data: the recipe asked for less."""

RESERVED_TOKENS = (
    "<latent>",
    "</latent>",
    "<|latent_pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
"""Tokens of the chat template and of the latent segments. In a text they are escaped: ``<latent>`` becomes
``&lt;latent>``, which no tokenizer reads as a token."""

LEFT_OVER_MARKERS = (
    "<lvr>",
    "<abs_vis_token>",
    "</abs_vis_token>",
    "<image>",
    "<video>",
    "<image_start>",
    "<image_end>",
)
"""Markers of the public formats. One that a reader left over means that it misread the record, so it is rejected."""

_RESERVED = re.compile("|".join(map(re.escape, RESERVED_TOKENS)), re.IGNORECASE)
_SUSPICIOUS = re.compile(
    "(?P<marker>" + "|".join(map(re.escape, LEFT_OVER_MARKERS)) + ")"
    # Control characters but tab and line breaks; what reorders text on a screen.
    r"|(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069])"
    # Half of a pair of UTF-16.
    r"|(?P<surrogate>[\ud800-\udfff])",
    re.IGNORECASE,
)
# One look at every character of a text that needs no closer one.
_CLOSER_LOOK = re.compile("[<\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Image:
    """One image of a record: encoded bytes as they came (PNG, JPEG ...), decoded once to check them."""

    data: bytes
    digest: str
    """SHA-256 of `data`, hexadecimal."""
    width: int
    """Pixels, after the EXIF orientation was applied."""
    height: int
    """Pixels, after the EXIF orientation was applied."""
    role: Literal["input", "step"]
    """`input` is shown to the model with the question, `step` stands inside the reasoning (an interleaved image)."""


@dataclass(frozen=True)
class Target:
    """What a step looks at."""

    image: int
    """Index into the record's images."""
    box: Box | None = None
    """A region of that image, or all of it."""
    origin: Literal["dataset", "crop", "only_image", "matched"] = "dataset"
    """How it is known: stated, a region that the data names, the only image there is, or matched afterwards."""
    by: str = ""
    """Who matched it: the model, and a digest of what it was asked; empty unless `origin` is matched."""


@dataclass(frozen=True)
class Step:
    """One piece of reasoning text, r(i)."""

    text: str
    target: Target | None = None


@dataclass(frozen=True)
class Record:
    """One training or test example."""

    id: str
    source: str
    license: str
    split: Split
    kind: Literal["single_view", "multi_view", "interleaved"]
    question: str
    images: tuple[Image, ...]
    steps: tuple[Step, ...]
    answer: str
    scene: str | None = None
    """The place that a multi-view record shows, such as ``scannet/scene0011_00``."""


@dataclass(frozen=True)
class Rejection:
    """A record that can't be used: named, with a stable reason code, never dropped silently."""

    id: str
    source: str
    reason: str
    """Stable code such as `image_unreadable`, a key of `REASONS`."""
    detail: str
    """File, row, field and the offending value, shortened."""


class SourceError(ValueError):
    """A source that can't be read at all: what is wrong, where, and how to fix it. Stops the run."""


class BadRecord(Exception):
    """Raised while one record is parsed; the reading loop yields it as a `Rejection`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def shortened(value: object, limit: int = 80) -> str:
    """`value` as one printable ASCII line of at most `limit` characters, for messages."""
    shown = value if isinstance(value, str) else repr(value)
    shown = ascii(shown[: 4 * limit])[1:-1]
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def check_text(text: object, field: str, empty: str) -> str:
    """`text` without surrounding white space, its `RESERVED_TOKENS` escaped.

    Args:
        text: what the source holds in that field.
        field: its name, for the message.
        empty: reason code if nothing is left.

    Raises:
        BadRecord: `schema_mismatch` (no string), `too_long`, `not_utf8` (lone surrogates), `control_character`,
            `reserved_token_in_text` (a marker of another format left over), or `empty`.
    """
    if not isinstance(text, str):
        raise BadRecord("schema_mismatch", f"{field}: expected text, found {type(text).__name__} {shortened(text)}")
    if len(text) > _MAX_CHARACTERS:
        raise BadRecord("too_long", f"{field}: {len(text)} characters, at most {_MAX_CHARACTERS} allowed")
    if _CLOSER_LOOK.search(text):
        text = _looked_at_closely(text, field)
    text = text.strip()
    if not text:
        raise BadRecord(empty, f"{field}: nothing but white space")
    return text


def _looked_at_closely(text: str, field: str) -> str:
    if found := _SUSPICIOUS.search(text):
        shown = f"{shortened(text[max(0, found.start() - 20) : found.end() + 20])!r} at character {found.start()}"
        if found["marker"]:
            raise BadRecord("reserved_token_in_text", f"{field}: {found[0]} in {shown}")
        if found["control"]:
            raise BadRecord("control_character", f"{field}: U+{ord(found[0]):04X} in {shown}")
        raise BadRecord("not_utf8", f"{field}: a lone surrogate in {shown}")
    return escaped(text)


def escaped(text: str) -> str:
    """`text` in which no `RESERVED_TOKENS` is left that a tokenizer would read as a token."""
    return _RESERVED.sub(lambda token: "&lt;" + token[0][1:], text)


def check_box(values: object, width: int, height: int, field: str, min_side: int) -> Box:
    """A region of a `width` x `height` image in whole pixels; fractions are rounded outwards.

    Raises:
        BadRecord: `bbox_invalid`, naming the field, the values and the image size.
    """

    def bad(what: str) -> BadRecord:
        return BadRecord("bbox_invalid", f"{field}: {shortened(values)} in an image of {width}x{height}: {what}")

    if not isinstance(values, list | tuple) or len(values) != 4:
        raise bad("expected four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = values
    if not type(x0) is type(y0) is type(x1) is type(y1) is int:
        if not all(map(is_finite_number, values)):
            raise bad("not four finite numbers")
        x0, y0, x1, y1 = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise bad("inverted, empty or outside")
    if min(x1 - x0, y1 - y0) < min_side:
        raise bad(f"a side below {min_side} px shows nothing (data.min_image_side)")
    return x0, y0, x1, y1


def is_finite_number(value: Any) -> bool:
    """True for a finite int or float; booleans are no numbers here."""
    # An integer of 400 digits is none that a float could hold; math.isfinite raises on it.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_record(record: Record, max_steps: int) -> Record:
    """The record itself, if its parts fit together; the last gate of every reader.

    Raises:
        BadRecord: `no_images`, `no_steps` (a test record may come without steps), `too_many_steps`, `uncited_image`.
    """
    if not any(image.role == "input" for image in record.images):
        raise BadRecord("no_images", "no image is shown with the question")
    if not record.steps and record.split != "test":
        raise BadRecord("no_steps", "no reasoning step to train on")
    if len(record.steps) > max_steps:
        raise BadRecord("too_many_steps", f"{len(record.steps)} steps, at most {max_steps} allowed (data.max_steps)")
    cited = {step.target.image for step in record.steps if step.target is not None}
    uncited = [i for i, image in enumerate(record.images) if image.role == "step" and i not in cited]
    if uncited:
        raise BadRecord("uncited_image", f"step image {uncited[0]} is looked at by no step")
    return record
