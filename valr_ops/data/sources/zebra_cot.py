"""Zebra-CoT: parquet with embedded images, reasoning text with images standing in it.

In: a folder with parquet files (one folder a config); columns ``Question``, ``Text Reasoning Trace``,
``Final Answer``, ``problem_image_1`` .., ``reasoning_image_1`` .., an image being ``{"bytes", "path"}`` or null.
Out: one interleaved record a row, in file and row order.
Always: columns are read by name, since their number differs by config. The trace is split at ``THOUGHT n:`` markers
and at image placeholders; a placeholder opens a segment, so its image is the target of the text after it. A problem
image cited in the trace is a target as well. A row that cites an absent image is rejected; thousands are known
(multimodal-reasoning-lab/Bagel-Zebra-CoT#14).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.data.images import ImageLimits, check_image, read_image
from valr_ops.data.records import (
    BadRecord,
    Image,
    Record,
    Rejection,
    SourceError,
    Split,
    Step,
    Target,
    check_record,
    check_text,
    shortened,
)
from valr_ops.recipe.recipe import DataRecipe

LICENSE = "CC-BY-NC-4.0"
"""Of the public data set, by its card."""

_TEXT_COLUMNS = ("Question", "Text Reasoning Trace", "Final Answer")
_IMAGE_COLUMN = re.compile(r"(problem|reasoning)_image_(\d+)")
_PLACEHOLDER = re.compile(r"<image_start>\s*\[((?:problem|reasoning)_image_\d+)\]\s*<image_end>")
_MARKER = re.compile(r"\bTHOUGHT\s+\d+\s*:")
_ROWS_AT_A_TIME = 16


def read(folder: Path, source: str, recipe: DataRecipe, split: Split | None = None) -> Iterator[Record | Rejection]:
    """Records and rejections in file and row order; a file named ``test-...`` or ``val...`` is of that split.

    Args:
        folder: a folder with parquet files, or one parquet file.
        source: name that every id begins with.
        recipe: limits on images and steps.
        split: only that one; None for all.

    Raises:
        SourceError: no parquet file, one that can't be read, or one without the columns above.
    """
    root = folder.parent if folder.is_file() else folder
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    if not paths:
        raise SourceError(
            f"source {source!r}: no parquet file below {folder}; put the configs of Zebra-CoT there or correct "
            f"data.sources.{source}.path"
        )
    for path in paths:
        of = _split(path)
        if split in (None, of):
            yield from _read_file(path, root, source, recipe, of)


def _split(path: Path) -> Split:
    if path.name.startswith("test"):
        return "test"
    return "validation" if path.name.startswith("val") else "train"


def _read_file(path: Path, root: Path, source: str, recipe: DataRecipe, split: Split) -> Iterator[Record | Rejection]:
    shown = path.relative_to(root).as_posix()
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in _TEXT_COLUMNS if name not in names]
            if missing:
                raise SourceError(
                    f"source {source!r}: {shown} has no column {missing[0]!r}, only {', '.join(sorted(names))}; this "
                    "is not the layout of Zebra-CoT (schema_mismatch)"
                )
            columns = [*_TEXT_COLUMNS, *(name for name in names if _IMAGE_COLUMN.fullmatch(name))]
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
                for row in batch.to_pylist():
                    identity = f"{source}/{shown.removesuffix('.parquet')}/{number}"
                    try:
                        yield _record(row, identity, root, source, recipe, split)
                    except BadRecord as bad:
                        yield Rejection(identity, source, bad.reason, f"{shown} row {number}, {bad.detail}")
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"source {source!r}: {shown} can't be read beyond row {number}: {shortened(str(error))} (bad_parquet); "
            "fetch the file again"
        ) from None


def _record(row: Mapping[str, Any], identity: str, root: Path, source: str, recipe: DataRecipe, split: Split) -> Record:
    texts = {name: row[name] if row[name] is not None else "" for name in _TEXT_COLUMNS}
    for name, text in texts.items():
        _refuse_unpaired(text, name)
    limits = ImageLimits(recipe.min_image_side, recipe.max_image_pixels)
    filled = sorted((name for name in row if _IMAGE_COLUMN.fullmatch(name) and row[name] is not None), key=_order)
    asked = list(dict.fromkeys(_cited(texts["Question"])))
    inputs = asked + [name for name in filled if name.startswith("problem") and name not in asked]
    shown = list(dict.fromkeys(name for name in _cited(texts["Text Reasoning Trace"]) if name not in inputs))
    names = inputs + shown
    unused = [name for name in filled if name not in names]
    if unused:
        raise BadRecord("uncited_image", f"{unused[0]} is filled but no text cites it")
    images = tuple(_image(row.get(name), "input" if name in inputs else "step", root, limits, name) for name in names)
    record = Record(
        id=identity,
        source=source,
        license=LICENSE,
        split=split,
        kind="interleaved",
        question=_question(texts["Question"], inputs),
        images=images,
        steps=tuple(_steps(texts["Text Reasoning Trace"], names)),
        answer=check_text(texts["Final Answer"], "Final Answer", "empty_answer"),
    )
    return check_record(record, recipe.max_steps)


def _order(name: str) -> tuple[str, int]:
    kind, number = _IMAGE_COLUMN.fullmatch(name).groups()  # type: ignore[union-attr]
    return kind, int(number)


def _cited(text: str) -> list[str]:
    return [_canonical(name) for name in _PLACEHOLDER.findall(text)]


def _canonical(name: str) -> str:
    kind, number = _order(name)
    return f"{kind}_image_{number}"


def _refuse_unpaired(text: object, field: str) -> None:
    if not isinstance(text, str):
        raise BadRecord("schema_mismatch", f"{field}: expected text, found {type(text).__name__}")
    left = _PLACEHOLDER.sub("", text)
    for delimiter in ("<image_start>", "<image_end>"):
        if delimiter in left:
            at = left.index(delimiter)
            raise BadRecord("unbalanced_tags", f"{field}: {shortened(left[max(0, at - 20) : at + 40])!r}")


def _image(cell: Any, role: Literal["input", "step"], root: Path, limits: ImageLimits, where: str) -> Image:
    if isinstance(cell, bytes):
        return check_image(cell, role, limits, where)
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return check_image(cell["bytes"], role, limits, where)
    if isinstance(cell, dict) and cell.get("path"):
        return read_image(root, cell["path"], role, limits, where)
    raise BadRecord("image_missing", f"{where}: cited, but the column is {'empty' if cell is None else 'no image'}")


def _question(text: str, inputs: list[str]) -> str:
    """The question without placeholders; with several images each place is marked by the image's number."""

    def number(match: re.Match[str]) -> str:
        name, mark = match.groups()
        shown = f" (image {inputs.index(_canonical(name)) + 1})" if len(inputs) > 1 else ""
        return f"{shown}{mark}" if mark else f"{shown} "

    plain = re.sub(rf"[ \t]*{_PLACEHOLDER.pattern}[ \t]*([?.!,;:]?)", number, text)
    return check_text(plain, "Question", "empty_question")


def _steps(trace: str, names: list[str]) -> Iterator[Step]:
    """The trace in pieces; a placeholder's image is the target of the text after it."""
    if not _MARKER.search(trace):
        raise BadRecord("no_steps", f"Text Reasoning Trace: no 'THOUGHT n:' marker in {shortened(trace)!r}")
    target: Target | None = None
    at = 0
    cuts = sorted([*_MARKER.finditer(trace), *_PLACEHOLDER.finditer(trace)], key=re.Match.start)
    for cut in [*cuts, None]:
        text = trace[at : cut.start() if cut else len(trace)].strip()
        if text:
            yield Step(check_text(text, "Text Reasoning Trace", "empty_reasoning"), target)
            target = None
        if cut is not None:
            at = cut.end()
            if cut.re is _PLACEHOLDER:
                if target is not None:
                    raise BadRecord("placeholder_count", f"no text between two images, at {cut[0]}")
                target = Target(names.index(_canonical(cut[1])), None, "dataset")
    if target is not None:
        raise BadRecord("placeholder_count", f"no text follows the last image, {names[target.image]}")
