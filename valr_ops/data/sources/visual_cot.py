"""Visual-CoT: one JSON array, four conversation turns, one box.

In: a folder with ``*.json`` (each an array) and the images it names:

    {"question_id": 9001, "dataset": "textvqa", "split": "train", "width": 1024, "height": 683,
     "image": ["cot/textvqa/abc.jpg", "cot/textvqa/abc.jpg###[412, 130, 655, 298]"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is the brand? Please provide the bounding box ..."},
                       {"from": "gpt", "value": "[0.402, 0.294, 0.640, 0.458]"},
                       {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Acme"}]}

Out: records of one step in file order; its target is the box's crop.
Always: the box in pixels and the assistant's box, normalised to the image padded to a square, agree, or the record is
rejected. The step's text is ``cot_with_detailed_reasoning_steps`` where there is one, else `TEMPLATE_STEP`. The array
is read element by element: the public file has 345 MB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from valr_ops.data.images import ImageLimits, read_image
from valr_ops.data.records import (
    BadRecord,
    Box,
    Record,
    Rejection,
    SourceError,
    Split,
    Step,
    Target,
    check_box,
    check_record,
    check_text,
    shortened,
)
from valr_ops.recipe.recipe import DataRecipe

LICENSE = "Apache-2.0"
"""Tag of the public data set; its images keep their own terms."""

TEMPLATE_STEP = "I look at the region that answers the question."
"""Text of the step where the source gives none."""

_REQUEST = re.compile(r"\s*please provide the bounding box coordinates? of the region\b.*", re.IGNORECASE | re.DOTALL)
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,18})?)\s*"
_BOX = re.compile(rf"\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]\s*")
_CHUNK = 1 << 20
_SPLITS: dict[str, Split] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def read(folder: Path, source: str, recipe: DataRecipe, split: Split | None = None) -> Iterator[Record | Rejection]:
    """Records and rejections in file order.

    Args:
        folder: a folder with ``*.json``, or one such file; image paths are relative to it.
        source: name that every id begins with.
        recipe: limits on images and steps.
        split: only that one; None for all. For ``train``, a record of another split is a rejection.

    Raises:
        SourceError: no JSON file, or one that is no array.
    """
    root = folder.parent if folder.is_file() else folder
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.json"))
    if not paths:
        raise SourceError(
            f"source {source!r}: no .json file in {folder}; put the annotations of Visual-CoT there or correct "
            f"data.sources.{source}.path"
        )
    for path in paths:
        for number, row in enumerate(_elements(path, source)):
            where = f"{path.name} element {number}"
            identity = f"{source}/{where}"
            try:
                if not isinstance(row, dict):
                    raise BadRecord("schema_mismatch", f"expected an object, found {shortened(row)}")
                of = _split(row)
                if split in ("validation", "test") and of != split:
                    continue
                identity = f"{source}/{_text(row, 'dataset')}/{_question_id(row)}"
                if split == "train" and of != "train":
                    raise BadRecord("split_not_train", f"split: {of}")
                yield _record(row, identity, root, source, recipe, of)
            except BadRecord as bad:
                yield Rejection(identity, source, bad.reason, f"{where}, {bad.detail}")


def _elements(path: Path, source: str) -> Iterator[Any]:
    """The elements of a JSON array, one at a time."""
    decoder = json.JSONDecoder()
    number = 0

    def broken(what: str) -> SourceError:
        return SourceError(
            f"source {source!r}: {path.name}, element {number}: {what} (not_json); Visual-CoT is one JSON array: fetch "
            "the file again, or correct the path"
        )

    try:
        with path.open(encoding="utf-8-sig") as file:
            chunk = _CHUNK
            buffer = file.read(chunk).lstrip()
            if not buffer.startswith("["):
                raise broken(f"expected '[', found {shortened(buffer[:20])!r}")
            buffer = buffer[1:].lstrip()
            while True:
                try:
                    if buffer.startswith("]"):
                        return
                    value, end = decoder.raw_decode(buffer)
                    if end == len(buffer):
                        raise json.JSONDecodeError("the element may go on", buffer, end)
                except json.JSONDecodeError as error:
                    more = file.read(chunk)
                    if not more:
                        raise broken(error.msg) from None
                    # Doubling keeps the retries on one long element, or up to the end of a broken file, linear.
                    chunk *= 2
                    buffer = (buffer + more).lstrip()
                    continue
                chunk = _CHUNK
                yield value
                number += 1
                buffer = buffer[end:].lstrip() or file.read(chunk).lstrip()
                if buffer.startswith(","):
                    buffer = buffer[1:].lstrip()
                elif not buffer.startswith("]"):
                    raise broken(f"expected ',' or ']', found {shortened(buffer[:20])!r}")
    except (UnicodeDecodeError, RecursionError) as error:
        raise broken(type(error).__name__) from None


def _split(row: Mapping[str, Any]) -> Split:
    name = row.get("split", "train")
    if not isinstance(name, str) or name not in _SPLITS:
        raise BadRecord("schema_mismatch", f"split: {shortened(name)} is none of {', '.join(_SPLITS)}")
    return _SPLITS[name]


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise BadRecord("schema_mismatch", f"{key}: missing; the keys are {shortened(', '.join(sorted(row)))}")
    return check_text(row[key], key, "schema_mismatch")


def _question_id(row: Mapping[str, Any]) -> str:
    identity = row.get("question_id")
    return str(identity) if type(identity) is int else _text(row, "question_id")


def _record(row: Mapping[str, Any], identity: str, root: Path, source: str, recipe: DataRecipe, split: Split) -> Record:
    turns = _turns(row)
    asked = turns[0]
    if asked.count("<image>") != 1 or turns[2].strip() != "<image>":
        raise BadRecord("placeholder_count", "conversations: expected one <image> in turn 1 and turn 3 to be <image>")
    question = check_text(_REQUEST.sub("", asked.replace("<image>", "")), "question", "empty_question")
    answer = check_text(turns[3], "answer", "empty_answer")
    text = row.get("cot_with_detailed_reasoning_steps") or TEMPLATE_STEP
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = " ".join(text)
    text = check_text(text, "cot_with_detailed_reasoning_steps", "empty_reasoning")

    path, region = _image_entries(row)
    limits = ImageLimits(recipe.min_image_side, recipe.max_image_pixels)
    image = read_image(root, path, "input", limits, "image[0]")
    for key, size in (("width", image.width), ("height", image.height)):
        if row.get(key, size) != size:
            raise BadRecord("bbox_disagrees", f"{key}: {shortened(row[key])}, but the file has {size} pixels")
    box = check_box(_four_numbers(region, "image[1]"), image.width, image.height, "image[1]", recipe.min_image_side)
    _compare(box, _four_numbers(turns[1], "conversations[1]"), image.width, image.height)
    if box == (0, 0, image.width, image.height):
        raise BadRecord("crop_is_whole_image", f"image[1]: {list(box)}")
    record = Record(
        id=identity,
        source=source,
        license=LICENSE,
        split=split,
        kind="interleaved",
        question=question,
        images=(image,),
        steps=(Step(text, Target(0, box, "crop")),),
        answer=answer,
    )
    return check_record(record, recipe.max_steps)


def _turns(row: Mapping[str, Any]) -> list[str]:
    turns = row.get("conversations")
    speakers = ["human", "gpt", "human", "gpt"]
    if (
        not isinstance(turns, list)
        or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        or [turn.get("from") for turn in turns] != speakers
    ):
        raise BadRecord("schema_mismatch", f"conversations: expected four turns {speakers}, found {shortened(turns)}")
    return [turn["value"] for turn in turns]


def _image_entries(row: Mapping[str, Any]) -> tuple[str, str]:
    entries = row.get("image")
    if isinstance(entries, list) and len(entries) == 2 and all(isinstance(entry, str) for entry in entries):
        path, separator, region = entries[1].partition("###")
        if separator and path == entries[0]:
            return path, region
    raise BadRecord("schema_mismatch", f"image: expected [path, path###[x1, y1, x2, y2]], found {shortened(entries)}")


def _four_numbers(text: str, field: str) -> list[float]:
    match = _BOX.fullmatch(text)
    if match is None:
        raise BadRecord("bbox_invalid", f"{field}: expected [x1, y1, x2, y2], found {shortened(text)!r}")
    return [float(number) for number in match.groups()]


def _compare(box: Box, normalised: list[float], width: int, height: int) -> None:
    """Undo the padding to a square; the source rounds to three decimals, and centres to a whole pixel."""
    side = max(width, height)
    tolerance = 0.001 + 1.0 / side
    padding = ((side - width) / 2, (side - height) / 2) * 2
    expected = [(value + pad) / side for value, pad in zip(box, padding, strict=True)]
    if any(abs(value - given) > tolerance for value, given in zip(expected, normalised, strict=True)):
        raise BadRecord(
            "bbox_disagrees",
            f"conversations[1]: {normalised}, but {list(box)} in {width}x{height} padded to a square is "
            f"{[round(value, 3) for value in expected]}",
        )
