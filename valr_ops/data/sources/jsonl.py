"""The project's own format: one JSON object a line, images beside the file.

    {"id": "a/1", "license": "CC-BY-4.0", "images": ["images/1.png"], "question": "...",
     "steps": [{"text": "...", "image": 0, "box": [0, 0, 100, 100]}], "answer": "..."}

In: a folder with ``train.jsonl`` (also ``validation.jsonl``, ``test.jsonl``), or one ``.jsonl`` file whose name says
its split (``train`` for any other name). Out: records in file order.
Always: image paths stay below the folder of the file; a step names a target by ``image`` (an index) and optionally
``box`` in pixels; where a record has one image, a step that names none looks at that one, unless it says
``"image": null``. An image shown inside the reasoning is ``{"path": "...", "role": "step"}``. Unknown keys are refused,
so that a typing error can't remove a target; ``metadata`` is free for anything.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from valr_ops.data.images import ImageLimits, read_image, resolve
from valr_ops.data.records import (
    BadRecord,
    Image,
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

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""Names of the files, without ``.jsonl``."""

_RECORD_KEYS = {"id", "source", "license", "split", "images", "question", "steps", "answer", "metadata"}
_STEP_KEYS = {"text", "image", "box", "metadata"}


def read(folder: Path, source: str, recipe: DataRecipe, split: Split | None = None) -> Iterator[Record | Rejection]:
    """Records and rejections in file order.

    Args:
        folder: a folder with ``train.jsonl``, or a ``.jsonl`` file.
        source: name that every id begins with.
        recipe: limits on images and steps.
        split: only that one; None for all, in the order of `SPLITS`.

    Raises:
        SourceError: no such folder, or no annotation file in it.
    """
    for name, path in annotation_files(folder, source).items():
        if split in (None, name):
            yield from _read_file(path, source, recipe, name)


def annotation_files(folder: Path, source: str) -> dict[Split, Path]:
    """The files to read, by split.

    Raises:
        SourceError: there is none.
    """
    if folder.is_file():
        named = [name for name in SPLITS if folder.stem == name]
        return {named[0] if named else "train": folder}
    found = {name: folder / f"{name}.jsonl" for name in SPLITS if (folder / f"{name}.jsonl").is_file()}
    if not found:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise SourceError(
            f"source {source!r}: no train.jsonl or test.jsonl in {folder} (there: {there or 'nothing'}); put the "
            f"records there, one JSON object a line, or correct data.sources.{source}.path"
        )
    return found


def image_paths(path: Path) -> list[Path]:
    """The image files that a JSONL file names and that exist below its folder, sorted; for an inventory."""
    found = set()
    with path.open("rb") as lines:
        for line in lines:
            try:
                for entry in json.loads(line)["images"]:
                    name = entry["path"] if isinstance(entry, dict) else entry
                    resolve(path.parent, name, "")
                    found.add(path.parent / name)
            except (ValueError, KeyError, TypeError, RecursionError, BadRecord):
                # The reader gives each of these its reason code; an inventory only lists what can be read.
                continue
    return sorted(found)


def _read_file(path: Path, source: str, recipe: DataRecipe, split: Split) -> Iterator[Record | Rejection]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path.name} line {number}"
            if not line.strip():
                continue
            row: dict[str, Any] = {}
            try:
                row = _parse(line)
                yield _record(row, path.parent, source, recipe, split)
            except BadRecord as bad:
                yield Rejection(_identity(row, source, where), source, bad.reason, f"{where}, {bad.detail}")


def _identity(row: Mapping[str, Any], source: str, where: str) -> str:
    try:
        return _record_id(row, source)
    except BadRecord:
        return f"{source}/{where}"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord("not_json", f"column {error.colno}: {error.msg}: {shortened(line.decode())}") from None
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or thousands of nested brackets.
        raise BadRecord("not_json", f"{type(error).__name__}: {shortened(line.decode())}") from None
    if not isinstance(row, dict):
        raise BadRecord("not_json", f"expected an object, found {type(row).__name__} {shortened(row)}")
    return row


def _record(row: dict[str, Any], root: Path, source: str, recipe: DataRecipe, split: Split) -> Record:
    _refuse_unknown(row, _RECORD_KEYS, "the record")
    identity = _record_id(row, source)
    if row.get("split", split) != split:
        raise BadRecord("split_not_train", f"split: {shortened(row['split'])} in the file of split {split}")
    question = check_text(_required(row, "question"), "question", "empty_question")
    answer = check_text(_required(row, "answer"), "answer", "empty_answer")
    limits = ImageLimits(recipe.min_image_side, recipe.max_image_pixels)
    entries = _required(row, "images")
    if not isinstance(entries, list):
        raise BadRecord("schema_mismatch", f"images: expected a list of paths, found {shortened(entries)}")
    steps = row.get("steps", [])
    if not isinstance(steps, list):
        raise BadRecord("schema_mismatch", f"steps: expected a list of objects, found {shortened(steps)}")
    images = tuple(_image(entry, root, limits, f"images[{i}]") for i, entry in enumerate(entries))
    record = Record(
        id=identity,
        source=source,
        license=check_text(row.get("license", "unknown"), "license", "schema_mismatch"),
        split=split,
        kind=_kind(images),
        question=question,
        images=images,
        steps=tuple(_step(step, images, f"steps[{i}]", recipe.min_image_side) for i, step in enumerate(steps)),
        answer=answer,
    )
    return check_record(record, recipe.max_steps)


def _record_id(row: Mapping[str, Any], source: str) -> str:
    identity = _required(row, "id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    identity = check_text(identity, "id", "schema_mismatch")
    return identity if identity.startswith(f"{source}/") else f"{source}/{identity}"


def _required(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise BadRecord("schema_mismatch", f"{key}: missing; the keys are {shortened(', '.join(sorted(row)))}")
    return row[key]


def _refuse_unknown(row: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(row) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "put it under 'metadata'"
        raise BadRecord("schema_mismatch", f"{where} has the unknown key {shortened(unknown[0])!r}; {hint}")


def _image(entry: object, root: Path, limits: ImageLimits, where: str) -> Image:
    if isinstance(entry, dict):
        _refuse_unknown(entry, {"path", "role"}, where)
        role = entry.get("role", "input")
        if role not in ("input", "step"):
            raise BadRecord("schema_mismatch", f"{where}.role: {shortened(role)} is neither 'input' nor 'step'")
        return read_image(root, entry.get("path"), role, limits, where)
    return read_image(root, entry, "input", limits, where)


def _kind(images: tuple[Image, ...]) -> Any:
    if any(image.role == "step" for image in images):
        return "interleaved"
    return "multi_view" if len(images) > 1 else "single_view"


def _step(step: object, images: tuple[Image, ...], where: str, min_side: int) -> Step:
    if not isinstance(step, dict):
        raise BadRecord("schema_mismatch", f"{where}: expected an object with 'text', found {shortened(step)}")
    _refuse_unknown(step, _STEP_KEYS, where)
    text = check_text(_required(step, "text"), f"{where}.text", "empty_reasoning")
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
