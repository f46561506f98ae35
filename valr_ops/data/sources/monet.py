"""Monet-SFT-125K: interleaved conversations of three turns, one array a subset.

In: ``SUBSET/train.json``, and the images, whose names count from the folder that holds the subsets:

    {"metadata": {"dataset_name": "CogCoM", "sample_id": 17},
     "data": [{"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
              {"role": "user", "content": [{"type": "image", "image": "CogCoM/images/000017_0.png"},
                                           {"type": "text", "text": "What does the sign say?"}]},
              {"role": "assistant", "content": [
                  {"type": "text", "text": "I zoom in on the sign. <abs_vis_token></abs_vis_token>"},
                  {"type": "image", "image": "CogCoM/images/000017_1.png"},
                  {"type": "text", "text": "<observation>It reads OPEN.</observation> \\\\boxed{OPEN}"}]}]}

Out: one interleaved record an element, subsets by name and elements in file order.
Always: marker and image of the assistant open a segment, so the image is the target of the text after it; the text
before the first is a step without a target. An assistant's image that the user showed as well is not held twice. In
the user's turn the marker is only the place of a question's image. The answer is what the last ``\\boxed{}`` holds, and
the steps keep it. The folder says the licence; ``dataset_name`` may be any name but another subset's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from valr_ops.data.records import (
    BadRecord,
    Record,
    SourceError,
    Step,
    Target,
    check_text,
    shortened,
)
from valr_ops.data.sources.reading import Reading, Row, Wanted, json_array, mapping_of, number_places, required

LICENSE = "unknown"
"""Of a subset that is not in `LICENSES`."""

LICENSES = {
    "CogCoM": "unknown",
    "ReFocus": "unknown",
    "Visual_CoT": "Apache-2.0",
    "Zebra_CoT_count": "CC-BY-NC-4.0",
    "Zebra_CoT_geometry": "CC-BY-NC-4.0",
    "Zebra_CoT_visual_search": "CC-BY-NC-4.0",
}
"""Of the data set that each public subset was made from; the images keep their own terms."""

_ROLES = ["system", "user", "assistant"]
_MARKER = "<abs_vis_token></abs_vis_token>"
_PLACE = re.compile(_MARKER)
_HALF_MARKER = re.compile(r"</?abs_vis_token>")
_OBSERVATION = re.compile(r"</?observation>")
_SENTENCE_END = re.compile(r"(?<=[.?!\n])")
_BOXED = "\\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The elements of all subsets; all are for training.

    Raises:
        SourceError: no ``SUBSET/train.json``, one at another depth, or one that is no array.
    """
    names = reading.names("/train.json")
    for name in names:
        if name.count("/") != 1:
            raise SourceError(
                f"source {reading.source!r}: {name} lies too deep, expected SUBSET/train.json; image names count from "
                f"the folder that holds the subsets, so let data.sources.{reading.source}.path name that folder"
            )
    number = 0
    for name in names:
        for element_number, raw in enumerate(json_array(reading, name)):
            yield Row(number, f"{name} element {element_number}", "train", partial(mapping_of, raw))
            number += 1


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """Data set and sample, for a sample's number is unique only in its data set."""
    metadata = mapping_of(required(raw, "metadata"))
    sample = required(metadata, "sample_id")
    if type(sample) is not int:
        sample = check_text(sample, "metadata.sample_id", "schema_mismatch")
    return f"{reading.source}/{_data_set(metadata, row)}/{sample}"


def _data_set(metadata: Mapping[str, Any], row: Row) -> str:
    name = check_text(required(metadata, "dataset_name"), "metadata.dataset_name", "schema_mismatch")
    if name != _subset(row) and name in LICENSES:
        # Its licence would be another one, and its id could be another record's.
        raise BadRecord("schema_mismatch", f"metadata.dataset_name: {name} in the file of {shortened(_subset(row))}")
    return name


def _subset(row: Row) -> str:
    return row.where.partition("/")[0]


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The interleaved record of one element."""
    turns = required(raw, "data")
    roles = [mapping_of(turn).get("role") for turn in turns] if isinstance(turns, list) else None
    if roles != _ROLES:
        raise BadRecord("schema_mismatch", f"data: expected the turns {', '.join(_ROLES)}, found {shortened(roles)}")
    asked_texts, asked = _split_at_images(turns[1], "data[1].content")
    texts, shown = _split_at_images(turns[2], "data[2].content")
    if len(shown) > (limit := reading.recipe.max_steps):
        # Before any of the images is read.
        raise BadRecord("too_many_steps", f"data[2]: {len(shown)} images, at most {limit} allowed (data.max_steps)")
    inputs = list(dict.fromkeys(asked))
    names = list(dict.fromkeys(inputs + shown))
    question = _question(asked_texts, asked, inputs)
    steps = tuple(_steps(texts, shown, names))
    answer = check_text(_boxed("".join(texts)), "data[2].content, \\boxed{}", "empty_answer")
    images = (reading.image(name, "input" if name in inputs else "step", "data") for name in names)
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSES.get(_subset(row), LICENSE)),
        kind="interleaved",
        question=question,
        images=tuple(images),
        steps=steps,
        answer=answer,
    )


def _split_at_images(turn: Mapping[str, Any], field: str) -> tuple[list[str], list[str]]:
    """The text before, between and after a turn's images, and the images' names: one text more than images."""
    content = required(turn, "content")
    if not isinstance(content, list):
        raise BadRecord("schema_mismatch", f"{field}: expected a list of parts, found {shortened(content)}")
    texts: list[list[str]] = [[]]
    names: list[str] = []
    for number, part in enumerate(content):
        kind = mapping_of(part).get("type")
        if kind not in ("text", "image"):
            raise BadRecord("schema_mismatch", f"{field}[{number}].type: {shortened(kind)} is neither text nor image")
        value = required(part, kind)
        if not isinstance(value, str):
            raise BadRecord("schema_mismatch", f"{field}[{number}].{kind}: expected text, found {shortened(value)}")
        if kind == "text":
            texts[-1].append(value)
        else:
            names.append(value)
            texts.append([])
    joined = ["".join(parts) for parts in texts]
    for text in joined:
        if half := _HALF_MARKER.search(text.replace(_MARKER, "")):
            raise BadRecord("unbalanced_tags", f"{field}: {half[0]} without its other half in {shortened(text)!r}")
    return joined, names


def _question(texts: list[str], asked: list[str], inputs: list[str]) -> str:
    """The question without the request for a box; where it has several images, each place says which one stood there.

    Args:
        texts: before, between and after the images. A marker in them is the place of an image; where there is none,
            the image's own place is.
        asked: names of the images in their order.
        inputs: the same, each once.
    """
    text = ("" if any(_MARKER in text for text in texts) else _MARKER).join(map(_without_box_request, texts))
    if text.count(_MARKER) != len(asked):
        raise BadRecord("placeholder_count", f"data[1]: {text.count(_MARKER)} markers and {len(asked)} images")
    shown = [f"image {inputs.index(name) + 1}" if len(inputs) > 1 else "" for name in asked]
    return check_text(number_places(text, _PLACE, shown), "data[1]", "empty_question")


def _without_box_request(text: str) -> str:
    """The text without sentences like ``Put your final answer within \\boxed{}.``; a question is never left out."""
    if _BOXED not in text:
        return text
    sentences = _SENTENCE_END.split(text)
    asks = (_BOXED in one and "answer" in one.lower() and not one.endswith("?") for one in sentences)
    return "".join(one for one, is_request in zip(sentences, asks, strict=True) if not is_request)


def _steps(texts: list[str], shown: list[str], names: list[str]) -> Iterator[Step]:
    """The assistant's text in pieces; an image is the target of the text after it.

    Args:
        texts: before, between and after the images.
        shown: names of the assistant's images in their order.
        names: names of the record's images.
    """
    target: Target | None = None
    for text, name in zip(texts, [*shown, None], strict=True):
        markers = text.count(_MARKER)
        if name is not None and not markers:
            raise BadRecord("image_without_marker", f"data[2]: no {_MARKER} before {shortened(name)!r}")
        if markers != (name is not None) or (markers and not text.rstrip().endswith(_MARKER)):
            raise BadRecord("marker_without_image", f"data[2]: no image just after a marker in {shortened(text)!r}")
        tags = _OBSERVATION.findall(text)
        if tags != ["<observation>", "</observation>"] * (len(tags) // 2):
            raise BadRecord("unbalanced_tags", f"data[2]: {shortened(' '.join(tags))} in {shortened(text)!r}")
        plain = _OBSERVATION.sub("", text.replace(_MARKER, "")).strip()
        if plain:
            yield Step(check_text(plain, "data[2]", "empty_reasoning"), target)
        elif target is not None:
            raise BadRecord("placeholder_count", f"data[2]: no text follows {shortened(names[target.image])!r}")
        target = None if name is None else Target(names.index(name), None, "dataset")
    if not shown:
        raise BadRecord("no_steps", "data[2]: the assistant shows no image, so there is nothing to cut the text at")


def _boxed(text: str) -> str:
    """What the last ``\\boxed{...}`` holds; braces in it nest, escaped ones do not count."""
    start = text.rfind(_BOXED)
    if start < 0:
        raise BadRecord("empty_answer", f"data[2]: no \\boxed{{}} in {shortened(text[-60:])!r}")
    start += len(_BOXED)
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()]
    raise BadRecord("empty_answer", f"data[2]: \\boxed{{ is never closed in {shortened(text[start - 7 :])!r}")
