"""Visual-CoT: JSON arrays of questions whose answer lies in a box of the image.

In: a folder with ``*.json`` (each an array) and the images it names, in the data set's own form, or in the form that
VincentLeebang/lvr gives it:

    {"question_id": 9001, "dataset": "textvqa", "split": "train", "width": 1024, "height": 683,
     "image": ["cot/textvqa/abc.jpg", "cot/textvqa/abc.jpg###[412, 130, 655, 298]"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is the brand? Please provide the bounding box ..."},
                       {"from": "gpt", "value": "[0.402, 0.294, 0.640, 0.458]"},
                       {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Acme"}]}
    {"question_id": 9001, "dataset": "textvqa", "split": "train", "image": ["cot/textvqa/abc.jpg"],
     "bboxes": [[0.402, 0.190, 0.640, 0.436]],
     "conversations": [{"from": "human", "value": "<image>\\nWhat is the brand?"},
                       {"from": "gpt", "value": "<lvr>\\n<answer>Acme</answer>"}]}

Out: records in file order, a step a box, whose target is the box's crop.
Always: the box in pixels and the assistant's box, normalised to the image padded to a square, agree, or the record is
rejected; ``bboxes`` are normalised to the image itself. A step's text is ``cot_with_detailed_reasoning_steps``, or what
follows ``<lvr>``, where there is any, else `TEMPLATE_STEP`. The array is read element by element: the public file has
345 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from valr_ops.data.records import (
    BadRecord,
    Box,
    Image,
    Record,
    Split,
    Step,
    Target,
    check_box,
    check_text,
    is_finite_number,
    shortened,
)
from valr_ops.data.sources.reading import Reading, Row, Wanted, json_array, mapping_of, required

LICENSE = "Apache-2.0"
"""Tag of the public data set; its images keep their own terms."""

TEMPLATE_STEP = "I look at the region that answers the question."
"""Text of the step where the source gives none."""

_REQUEST = re.compile(r"please provide the bounding box coordinates? of the region\b.*", re.IGNORECASE | re.DOTALL)
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{1,18})?)\s*"
_BOX = re.compile(rf"\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]\s*")
_UNTAGGED = r"(?:(?!</?answer>).)*"
_ANSWER = re.compile(rf"(?P<reasoning>{_UNTAGGED})<answer>(?P<answer>{_UNTAGGED})</answer>\s*", re.DOTALL)
_SPLITS: dict[str, Split] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The elements of all arrays; each says its split. Raises `SourceError`: no JSON file, or one that is no array."""
    number = 0
    for name in reading.names(".json", deep=False):
        for element_number, raw in enumerate(json_array(reading, name)):
            named = raw.get("split", "train") if isinstance(raw, dict) else None
            split = _SPLITS.get(named, "train") if isinstance(named, str) else "train"
            yield Row(number, f"{name} element {element_number}", split, partial(mapping_of, raw))
            number += 1


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """Data set and question id."""
    names = (required(raw, "dataset"), required(raw, "question_id"))
    parts = (str(name) if type(name) is int else check_text(name, "question_id", "schema_mismatch") for name in names)
    return "/".join((reading.source, *parts))


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The record of one element."""
    if not isinstance(split := raw.get("split", "train"), str) or split not in _SPLITS:
        raise BadRecord("schema_mismatch", f"split: {shortened(split)} is none of {', '.join(_SPLITS)}")
    question, answer, image, steps = (_with_lvr if "bboxes" in raw else _with_padded_box)(raw, reading)
    for step in steps:
        if step.target and step.target.box == (0, 0, image.width, image.height):
            raise BadRecord("crop_is_whole_image", f"image: {list(step.target.box)}")
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSE),
        kind="interleaved",
        question=question,
        images=(image,),
        steps=steps,
        answer=answer,
    )


def _with_padded_box(raw: Mapping[str, Any], reading: Reading) -> tuple[str, str, Image, tuple[Step, ...]]:
    """Question, answer, image and steps of the data set's own form."""
    turns = _turns(raw, ["human", "gpt", "human", "gpt"])
    if turns[0].count("<image>") != 1 or turns[2].strip() != "<image>":
        raise BadRecord("placeholder_count", "conversations: expected one <image> in turn 1 and turn 3 to be <image>")
    question = check_text(_REQUEST.sub("", turns[0].replace("<image>", "")), "question", "empty_question")
    answer = check_text(turns[3], "answer", "empty_answer")
    text = raw.get("cot_with_detailed_reasoning_steps") or TEMPLATE_STEP
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = " ".join(text)
    text = check_text(text, "cot_with_detailed_reasoning_steps", "empty_reasoning")

    path, region = _image_entries(raw)
    image = reading.image(path, "input", "image[0]")
    for key, size in (("width", image.width), ("height", image.height)):
        if raw.get(key, size) != size:
            raise BadRecord("bbox_disagrees", f"{key}: {shortened(raw[key])}, but the file has {size} pixels")
    least = reading.recipe.min_image_side
    box = check_box(_four_numbers(region, "image[1]"), image.width, image.height, "image[1]", least)
    _compare(box, _four_numbers(turns[1], "conversations[1]"), image.width, image.height)
    return question, answer, image, (Step(text, Target(0, box, "crop")),)


def _with_lvr(raw: Mapping[str, Any], reading: Reading) -> tuple[str, str, Image, tuple[Step, ...]]:
    """Question, answer, image and steps of the form with ``<lvr>`` where a box is looked at."""
    asked, told = _turns(raw, ["human", "gpt"])
    if asked.count("<image>") > 1:
        raise BadRecord("placeholder_count", "conversations[0]: more than one <image> for one image")
    question = check_text(asked.replace("<image>", ""), "question", "empty_question")
    if (spans := _ANSWER.fullmatch(told)) is None:
        raise BadRecord("unbalanced_tags", f"conversations[1]: expected one <answer> at the end of {shortened(told)!r}")
    answer = check_text(spans["answer"], "answer", "empty_answer")
    paths, boxes = raw.get("image"), raw["bboxes"]
    if not isinstance(paths, list) or len(paths) != 1 or not isinstance(boxes, list):
        raise BadRecord("schema_mismatch", f"image, bboxes: expected one path and a list, found {shortened(paths)}")
    before, *texts = spans["reasoning"].split("<lvr>")
    if len(texts) != len(boxes):
        raise BadRecord("placeholder_count", f"conversations[1]: {len(texts)} <lvr> for {len(boxes)} boxes")
    image = reading.image(paths[0], "input", "image[0]")
    steps = [Step(check_text(before, "conversations[1]", "empty_reasoning"))] if before.strip() else []
    for number, (text, values) in enumerate(zip(texts, boxes, strict=True)):
        box = _true_box(values, image, f"bboxes[{number}]", reading.recipe.min_image_side)
        text = check_text(text.strip() or TEMPLATE_STEP, "conversations[1]", "empty_reasoning")
        steps.append(Step(text, Target(0, box, "crop")))
    return question, answer, image, tuple(steps)


def _turns(row: Mapping[str, Any], speakers: list[str]) -> list[str]:
    turns = row.get("conversations")
    if (
        not isinstance(turns, list)
        or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns)
        or [turn.get("from") for turn in turns] != speakers
    ):
        raise BadRecord("schema_mismatch", f"conversations: expected the turns {speakers}, found {shortened(turns)}")
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


def _true_box(values: object, image: Image, field: str, min_side: int) -> Box:
    """A box normalised to the image as it is, in pixels."""
    if not isinstance(values, list) or len(values) != 4 or not all(map(is_finite_number, values)):
        raise BadRecord("bbox_invalid", f"{field}: expected four finite numbers, found {shortened(values)}")
    sides = (image.width, image.height) * 2
    # A pixel that was divided by the side must not become its neighbour for the last bit of a float.
    pixels = [round(value * side, 3) for value, side in zip(values, sides, strict=True)]
    return check_box(pixels, image.width, image.height, field, min_side)


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
