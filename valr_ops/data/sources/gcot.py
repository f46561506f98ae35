"""GCoT: questions about indoor scans, answered with chains of thought that are grounded in 3-D boxes.

In: ``*.json``, each one array, or ``*.jsonl``, at any depth, and the frames they name. Their layout is not documented,
so `data.sources.NAME.mapping` says what they call these (by default just so):

    {"id": "gcot_1", "scene": "scannet/scene0011_00", "frames": ["0.jpg", "40.jpg"], "question": "How far apart ...?",
     "reasoning": "Locate the sofa ...\\n\\nLocate the door ...", "targets": [0, null], "answer": "2.4 m"}

``targets``, a frame's index or null for each step, may be absent: then nobody says what the steps look at.
Out: one multi-view record a row, in file order (single-view where there is one frame).
Always: a file whose first rows lack a name is refused with the keys that are there, nothing is guessed. Frames are
looked for as given below the source's folder or, if the first is not there, all of them below ``scene``. Of more than
`data.video_frames` those are taken that a target names, and of the others as many as there is room for, at equal
distances. Steps are the paragraphs of the reasoning or, if it is a single one, its sentences. Numbers, boxes and units
stay as they are written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from valr_ops.data.records import (
    BadRecord,
    Image,
    Record,
    Step,
    Target,
    check_text,
    is_finite_number,
    shortened,
)
from valr_ops.data.sources.reading import Reading, Row, Wanted, mapped_rows

LICENSE = "CC-BY-NC-4.0"
"""Of the annotations, by the authors' repository; the scans have agreements of their own."""

_NEEDED = ("id", "scene", "frames", "question", "reasoning", "answer")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
# White space after a full stop, and before a capital or the number of a list: "2.4" and "approx. 2 m" go on.
_SENTENCE_ENDS = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s+(?=["'(\[<]?[A-Z]|\d{1,3}\.\s)""")
_LIST_NUMBER = re.compile(r"(?:^|:\s)\d{1,3}\.$")
# The header of a PNG says 16 bits a channel, and one channel of grey.
_DEPTH_MAP = re.compile(rb"\x89PNG\r\n\x1a\n.{16}\x10\x00", re.DOTALL)


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The rows of all files; a file named ``test...`` or ``val...`` is of that split. Raises as `mapped_rows`."""
    return mapped_rows(reading, _NEEDED, ("targets",))


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """The row's id behind the source's name."""
    identity = reading.field(raw, "id", {})
    if type(identity) is not int:
        identity = check_text(identity, "id", "schema_mismatch")
    return f"{reading.source}/{identity}"


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The record of one row."""
    value = {ours: reading.field(raw, ours, {}) for ours in _NEEDED}
    question = check_text(value["question"], "question", "empty_question")
    # A number is as good an answer as its text.
    answer = str(value["answer"]) if is_finite_number(value["answer"]) else value["answer"]
    answer = check_text(answer, "answer", "empty_answer")
    scene = check_text(value["scene"], "scene", "schema_mismatch")
    texts = list(_texts(check_text(value["reasoning"], "reasoning", "empty_reasoning")))
    if len(texts) > (limit := reading.recipe.max_steps):
        # Before any of the frames is read.
        raise BadRecord("too_many_steps", f"reasoning: {len(texts)} steps, at most {limit} allowed (data.max_steps)")
    frames = value["frames"]
    if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
        raise BadRecord("schema_mismatch", f"frames: expected a list of paths, found {shortened(frames)}")
    stated = _stated(raw, len(texts), len(frames), reading)
    chosen = _chosen(len(frames), reading, {index for index in stated or () if index is not None})
    images = _images(frames, chosen, scene, reading)
    if stated is not None:
        targets = [None if index is None else Target(chosen.index(index), None, "dataset") for index in stated]
    else:
        targets = [Target(0, None, "only_image") if len(images) == 1 else None] * len(texts)
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSE),
        kind="multi_view" if len(images) > 1 else "single_view",
        question=question,
        images=images,
        steps=tuple(map(Step, texts, targets)),
        answer=answer,
        scene=scene,
    )


def _texts(reasoning: str) -> Iterator[str]:
    """Paragraphs, or the sentences of a single one. The number of a list, "1.", is no sentence."""
    paragraphs = _BLANK_LINES.split(reasoning)
    if len(paragraphs) > 1:
        yield from map(str.strip, paragraphs)
        return
    start = 0
    for end in _SENTENCE_ENDS.finditer(reasoning):
        if not _LIST_NUMBER.search(reasoning[start : end.start()]):
            yield reasoning[start : end.start()]
            start = end.end()
    yield reasoning[start:]


def _stated(raw: Mapping[str, Any], steps: int, frames: int, reading: Reading) -> list[int | None] | None:
    """The frame that each step looks at, where the row says it. None: nobody says it."""
    if "targets" not in reading.settings.mapping and "targets" not in raw:
        return None
    targets = reading.field(raw, "targets", {})
    if targets is None:
        return None
    if not isinstance(targets, list) or not all(one is None or type(one) is int for one in targets):
        raise BadRecord("schema_mismatch", f"targets: expected indices of frames or null, found {shortened(targets)}")
    if len(targets) != steps:
        raise BadRecord("step_match_invalid", f"targets: {len(targets)} for the {steps} steps of the reasoning")
    outside = [one for one in targets if one is not None and not 0 <= one < frames]
    if outside:
        raise BadRecord("step_match_invalid", f"targets: {outside[0]} is no index into the {frames} frames")
    return targets


def _chosen(frames: int, reading: Reading, targets: set[int]) -> list[int]:
    """Indices of the frames that become the record's images, in order."""
    at_most = reading.recipe.video_frames
    if at_most is None or frames <= at_most:
        chosen = list(range(frames))
    elif len(targets) > at_most:
        raise BadRecord(
            "step_match_invalid", f"targets: they name {len(targets)} frames of at most {at_most} (data.video_frames)"
        )
    else:
        others, room = [index for index in range(frames) if index not in targets], at_most - len(targets)
        # The middles of as many equal parts, as of a video.
        chosen = sorted(targets | {others[(2 * i + 1) * len(others) // (2 * room)] for i in range(room)})
    if len(chosen) > (limit := reading.recipe.max_length):
        raise BadRecord("too_long", f"frames: {len(chosen)}, more than the {limit} positions of data.max_length")
    return chosen


def _images(frames: list[str], chosen: list[int], scene: str, reading: Reading) -> tuple[Image, ...]:
    images: list[Image] = []
    folder = ""
    for index in chosen:
        where = f"frames[{index}]"
        try:
            image = reading.image(folder + frames[index], "input", where)
        except BadRecord as bad:
            if images or bad.reason != "image_missing":
                raise
            folder = f"{scene}/"
            try:
                image = reading.image(folder + frames[index], "input", where)
            except BadRecord as also:
                raise BadRecord(also.reason, f"{also.detail}; {bad.detail}") from None
        if _DEPTH_MAP.match(image.data):
            raise BadRecord("schema_mismatch", f"{where}: 16 bits of grey are a depth map, expected a colour frame")
        if images and (image.width, image.height) != (images[0].width, images[0].height):
            raise BadRecord(
                "frames_unequal",
                f"{where}: {image.width}x{image.height}, but the first has {images[0].width}x{images[0].height}",
            )
        images.append(image)
    return tuple(images)
