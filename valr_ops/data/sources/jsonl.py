"""The project's own format: one JSON object a line, images beside the file.

    {"id": "a/1", "license": "CC-BY-4.0", "images": ["images/1.png"], "question": "...",
     "steps": [{"text": "...", "image": 0, "box": [0, 0, 100, 100]}], "answer": "..."}

In: a folder with ``train.jsonl`` (also ``validation.jsonl``, ``test.jsonl``), or one ``.jsonl`` file whose name says
its split (``train`` for any other name). Out: records in file order, the test split first.
Always: image paths stay below the folder of the file; a step names a target by ``image`` (an index) and optionally
``box`` in pixels; where a record has one image, a step that names none looks at that one, unless it says
``"image": null``. An image shown inside the reasoning is ``{"path": "...", "role": "step"}``. Unknown keys are refused,
so that a typing error can't remove a target; ``metadata`` is free for anything.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from valr_ops.data.records import (
    BadRecord,
    Image,
    Record,
    SourceError,
    Split,
    Step,
    Target,
    check_box,
    check_text,
    shortened,
)
from valr_ops.data.sources.reading import Reading, Row, Wanted, json_lines, required
from valr_ops.store.objects import StorageError, refuse_links

LICENSE = "unknown"
"""Of a record that names none."""

SPLITS: tuple[Split, ...] = ("test", "train", "validation")
"""Names of the files, without ``.jsonl``, in the order in which they are read."""

_RECORD_KEYS = {"id", "source", "license", "split", "images", "question", "steps", "answer", "scene", "metadata"}
_STEP_KEYS = {"text", "image", "box", "metadata"}


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The lines of all splits. Raises `SourceError` where there is no annotation file."""
    number = 0
    for split, name in annotation_files(reading).items():
        for line_number, load in json_lines(reading, name):
            yield Row(number, f"{name} line {line_number}", split, load)
            number += 1


def annotation_files(reading: Reading) -> dict[Split, str]:
    """The files to read, by split.

    Raises:
        SourceError: there is none, or one is a link that would be left out.
    """
    if reading.only is not None:
        stem = reading.only.removesuffix(".jsonl")
        return {next((split for split in SPLITS if split == stem), "train"): reading.only}
    wanted = {split: f"{split}.jsonl" for split in SPLITS}
    try:
        there, left_out = reading.files.listed(".jsonl")
        refuse_links(reading.files.location, [name for name in wanted.values() if name in left_out])
    except StorageError as error:
        raise SourceError(f"source {reading.source!r}: {error}; {reading.mend}") from None
    found = {split: name for split, name in wanted.items() if name in there}
    if not found:
        shown = ", ".join(reading.files.names()[:8]) or "nothing"
        raise SourceError(
            f"source {reading.source!r}: no train.jsonl or test.jsonl in {reading.files.location} (there: {shown}); "
            f"put the records there, one JSON object a line, or correct data.sources.{reading.source}.path"
        )
    return found


def image_names(raw: dict[str, Any]) -> list[str]:
    """The image files that a line names, for an inventory; what can't be read the reader rejects with its reason."""
    entries = raw.get("images")
    named = (
        [entry.get("path") if isinstance(entry, dict) else entry for entry in entries if entry]
        if (isinstance(entries, list))
        else []
    )
    return [name for name in named if isinstance(name, str)]


def identity(raw: dict[str, Any], row: Row, reading: Reading) -> str:
    """The line's ``id`` behind the source's name."""
    identity = required(raw, "id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    identity = check_text(identity, "id", "schema_mismatch")
    return identity if identity.startswith(f"{reading.source}/") else f"{reading.source}/{identity}"


def record(raw: dict[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The record of one line."""
    if not raw.keys() <= _RECORD_KEYS:
        _refuse_unknown(raw, _RECORD_KEYS, "the record")
    if raw.get("split", row.split) != row.split:
        raise BadRecord("split_not_train", f"split: {shortened(raw['split'])} in the file of split {row.split}")
    question = check_text(required(raw, "question"), "question", "empty_question")
    answer = check_text(required(raw, "answer"), "answer", "empty_answer")
    entries = required(raw, "images")
    if not isinstance(entries, list):
        raise BadRecord("schema_mismatch", f"images: expected a list of paths, found {shortened(entries)}")
    steps = raw.get("steps", [])
    if not isinstance(steps, list):
        raise BadRecord("schema_mismatch", f"steps: expected a list of objects, found {shortened(steps)}")
    images = tuple(_image(entry, reading, f"images[{i}]") for i, entry in enumerate(entries))
    scene = raw.get("scene")
    least = reading.recipe.min_image_side
    return reading.record(
        row,
        identity,
        license=check_text(raw.get("license", reading.license(LICENSE)), "license", "schema_mismatch"),
        kind=_kind(images),
        question=question,
        images=images,
        steps=tuple(_step(step, images, f"steps[{i}]", least) for i, step in enumerate(steps)),
        answer=answer,
        scene=None if scene is None else check_text(scene, "scene", "schema_mismatch"),
    )


def _refuse_unknown(row: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(row) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "put it under 'metadata'"
        raise BadRecord("schema_mismatch", f"{where} has the unknown key {shortened(unknown[0])!r}; {hint}")


def _image(entry: object, reading: Reading, where: str) -> Image:
    if isinstance(entry, dict):
        _refuse_unknown(entry, {"path", "role"}, where)
        role = entry.get("role", "input")
        if role not in ("input", "step"):
            raise BadRecord("schema_mismatch", f"{where}.role: {shortened(role)} is neither 'input' nor 'step'")
        return reading.image(entry.get("path"), role, where)
    return reading.image(entry, "input", where)


def _kind(images: tuple[Image, ...]) -> Any:
    if any(image.role == "step" for image in images):
        return "interleaved"
    return "multi_view" if len(images) > 1 else "single_view"


def _step(step: object, images: tuple[Image, ...], where: str, min_side: int) -> Step:
    if not isinstance(step, dict):
        raise BadRecord("schema_mismatch", f"{where}: expected an object with 'text', found {shortened(step)}")
    _refuse_unknown(step, _STEP_KEYS, where)
    text = check_text(required(step, "text"), f"{where}.text", "empty_reasoning")
    index, box = step.get("image"), step.get("box")
    only_image = "image" not in step and len(images) == 1
    if only_image:
        index = 0
    if index is None:
        if box is not None:
            raise BadRecord("schema_mismatch", f"{where}: a box without the image it lies in; add 'image'")
        return Step(text)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(images):
        raise BadRecord(
            "schema_mismatch", f"{where}.image: {shortened(index)} is no index into the {len(images)} images"
        )
    image = images[index]
    region = None if box is None else check_box(box, image.width, image.height, f"{where}.box", min_side)
    return Step(text, Target(index, region, "only_image" if only_image else "dataset"))
