"""OneThinker-SFT: JSON arrays of conversations about images or about a video.

In: files ``onethinker*.json`` at any depth, and the images and videos they name, counted from the source's folder:

    {"messages": [{"role": "user", "content": "<image>How many cups are on the table?"},
                  {"role": "assistant", "content": "<think>Two here.\\n\\nThree there.</think><answer>5</answer>"}],
     "images": ["img/0001.jpg"]}                                                     or "videos": ["vid/0001.mp4"]

Out: one record an element, in file order. A step is a paragraph of the thoughts; there are no other marks in them.
With one image all steps look at it; with several, or the frames of a video, the source does not say which.
Always: a video becomes `data.video_frames` images at equal distances, or is `video_not_allowed` while that is null.
The tags stand once and in order, with nothing outside. An answer in coordinates (`in_coordinates`) is
`answer_not_allowed` while `data.coordinate_answers` is ``exclude``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from valr_ops.data.records import (
    BadRecord,
    Image,
    Record,
    SourceError,
    Split,
    Step,
    Target,
    check_text,
    is_finite_number,
    shortened,
)
from valr_ops.data.sources.reading import Reading, Row, Wanted, json_array, mapping_of, number_places, required
from valr_ops.data.videos import MAX_BYTES, read_frames

LICENSE = "unknown"
"""The public data set names none."""

COORDINATE_KEYS = frozenset(
    (
        *("box", "boxes", "bbox", "bboxes", "bbox_2d", "coordinates"),
        *("point", "points", "point_2d", "positive_points", "negative_points"),
        *("mask", "masks", "polygon", "polygons", "segmentation"),
        *("time", "times", "timestamp", "timestamps", "segments"),
    )
)
"""Of a JSON answer: what stands under them says where in the picture, or when in the video."""

_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
_TAG = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_PLACE = re.compile("<image>|<video>")
_FILE = re.compile(r"(?:.*/)?onethinker[^/]*\.json")
_SPLITS: dict[str, Split] = {"test": "test", "val": "validation", "validation": "validation"}


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The elements of all arrays; a file named ``..._test.json`` or ``..._val.json`` is of that split.

    Raises:
        SourceError: no such file, or one that is no array.
    """
    # A file that was named itself may have any name.
    names = [name for name in reading.names(".json") if reading.only or _FILE.fullmatch(name)]
    if not names:
        raise SourceError(
            f"source {reading.source!r}: no onethinker*.json file in {reading.files.location}; {reading.mend}"
        )
    number = 0
    for name in names:
        split = _SPLITS.get(name.removesuffix(".json").rpartition("_")[2], "train")
        for element_number, raw in enumerate(json_array(reading, name)):
            yield Row(number, f"{name} element {element_number}", split, partial(mapping_of, raw))
            number += 1


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """File, and ``id`` or ``problem_id`` where the element has one, else its number; both count anew in each file."""
    name, _, number = row.where.rpartition(" element ")
    given = raw.get("id", raw.get("problem_id", number))
    if not isinstance(given, str):
        if type(given) is not int:
            raise BadRecord("schema_mismatch", f"id: expected a text or a whole number, found {shortened(given)}")
        given = str(given)
    return f"{reading.source}/{name.removesuffix('.json')}/{check_text(given, 'id', 'schema_mismatch')}"


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The record of one element."""
    pictures, videos = _paths(raw, "images"), _paths(raw, "videos")
    if pictures and videos:
        raise BadRecord("schema_mismatch", f"{len(pictures)} images and {len(videos)} videos; expected one kind only")
    frames = reading.recipe.video_frames
    if videos and frames is None:
        raise BadRecord("video_not_allowed", f"videos: {shortened(videos[0])!r} (data.video_frames is null)")
    asked, replied = _turns(raw)
    for place, paths in (("<image>", pictures), ("<video>", videos)):
        if asked.count(place) != len(paths):
            raise BadRecord(
                "placeholder_count", f"messages[0]: {asked.count(place)} {place} in the question for {len(paths)} files"
            )
    thoughts, answer = _thoughts_and_answer(replied)
    if reading.recipe.coordinate_answers == "exclude" and in_coordinates(answer):
        detail = f"answer: {shortened(answer)!r} is in coordinates (data.coordinate_answers)"
        raise BadRecord("answer_not_allowed", detail)
    # Before anything is decoded, so that an empty question costs nothing.
    check_text(_PLACE.sub("", asked), "question", "empty_question")

    images: list[Image] = [reading.image(path, "input", f"images[{i}]") for i, path in enumerate(pictures)]
    places = [f"image {i + 1}" for i in range(len(pictures))]
    for i, path in enumerate(videos):
        shown = _frames(path, frames or 0, reading, f"videos[{i}]")
        places.append(f"images {len(images) + 1} to {len(images) + len(shown)}")
        images.extend(shown)
    question = number_places(asked, _PLACE, places if len(places) > 1 else [""] * len(places))
    target = Target(0, None, "only_image") if len(images) == 1 else None
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSE),
        kind="single_view" if len(images) == 1 else "multi_view",
        question=check_text(question, "question", "empty_question"),
        images=tuple(images),
        steps=tuple(Step(text, target) for text in thoughts),
        answer=answer,
    )


def in_coordinates(answer: str) -> bool:
    """Whether an answer is a place in a picture or a time in a video, which mean nothing after the processor changed.

    It is if it is JSON, also between code fences, and holds at any depth one of `COORDINATE_KEYS` with a list or an
    object, or a list of exactly two or four numbers: a point, an interval, a box. Prose with numbers in it, a single
    number, and three or five numbers are not.
    """
    try:
        parts = [json.loads(answer.removeprefix("```json").removeprefix("```").removesuffix("```"))]
    except (ValueError, RecursionError):
        return False
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if any(key.lower() in COORDINATE_KEYS and isinstance(value, list | dict) for key, value in part.items()):
                return True
            parts.extend(part.values())
        elif isinstance(part, list):
            if len(part) in (2, 4) and all(map(is_finite_number, part)):
                return True
            parts.extend(part)
    return False


def _paths(raw: Mapping[str, Any], key: str) -> list[str]:
    paths = raw.get(key)
    if paths is None:
        return []
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BadRecord("schema_mismatch", f"{key}: expected a list of paths, found {shortened(paths)}")
    return paths


def _turns(raw: Mapping[str, Any]) -> list[str]:
    turns, roles = required(raw, "messages"), ["user", "assistant"]
    if (
        not isinstance(turns, list)
        or not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns)
        or [turn.get("role") for turn in turns] != roles
    ):
        raise BadRecord("schema_mismatch", f"messages: expected two turns {roles}, found {shortened(turns)}")
    return [turn["content"] for turn in turns]


def _thoughts_and_answer(replied: str) -> tuple[list[str], str]:
    tags = _TAG.findall(replied)
    if [tag.lower() for tag in tags] != _TAGS:
        found = shortened("".join(tags)) or "none"
        raise BadRecord("unbalanced_tags", f"messages[1]: expected {''.join(_TAGS)}, found {found}")
    before, thoughts, between, answer, after = _TAG.split(replied)
    for outside in (before, between, after):
        if outside.strip():
            raise BadRecord("schema_mismatch", f"messages[1]: {shortened(outside.strip())!r} stands outside the tags")
    thoughts = check_text(thoughts, "think", "empty_reasoning")
    paragraphs = [paragraph.strip() for paragraph in _PARAGRAPH_END.split(thoughts)]
    return paragraphs, check_text(answer, "answer", "empty_answer")


def _frames(path: str, count: int, reading: Reading, where: str) -> tuple[Image, ...]:
    shown = f"{where}: {shortened(path)!r}"
    try:
        data = reading.bytes(path, MAX_BYTES, where)
    except BadRecord as bad:
        # What is said of any file in the words for an image.
        if bad.reason == "image_too_large":
            raise BadRecord("video_too_large", f"{shown} has more than {MAX_BYTES} bytes") from None
        if bad.reason == "image_unreadable":
            raise BadRecord("video_unreadable", bad.detail) from None
        raise
    return read_frames(data, count, reading.limits, shown)
