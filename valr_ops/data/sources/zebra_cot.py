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
from typing import Any, Literal

from valr_ops.data.records import (
    BadRecord,
    Image,
    Record,
    SourceError,
    Split,
    Step,
    Target,
    check_text,
    shortened,
)
from valr_ops.data.sources.reading import Reading, Row, Wanted, number_places, parquet_rows

LICENSE = "CC-BY-NC-4.0"
"""Of the public data set, by its card."""

_TEXT_COLUMNS = ("Question", "Text Reasoning Trace", "Final Answer")
_IMAGE_COLUMN = re.compile(r"(problem|reasoning)_image_(\d+)")
_PLACEHOLDER = re.compile(r"<image_start>\s*\[((?:problem|reasoning)_image_\d+)\]\s*<image_end>")
_MARKER = re.compile(r"\bTHOUGHT\s+\d+\s*:")


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The rows of all parquet files; a file named ``test-...`` or ``val...`` is of that split.

    Raises:
        SourceError: no parquet file, one that can't be read, or one without the columns above.
    """

    def columns(there: list[str]) -> list[str]:
        missing = [name for name in _TEXT_COLUMNS if name not in there]
        if missing:
            raise SourceError(
                f"source {reading.source!r}: {name} has no column {missing[0]!r}, only {', '.join(sorted(there))}; "
                "this is not the layout of Zebra-CoT (schema_mismatch)"
            )
        return [*_TEXT_COLUMNS, *(one for one in there if _IMAGE_COLUMN.fullmatch(one))]

    number = 0
    for name in reading.names(".parquet"):
        split = _split(name)
        for row_number, load in parquet_rows(reading, name, columns, wanted, first=number):
            yield Row(number, f"{name} row {row_number}", split, load)
            number += 1


def _split(name: str) -> Split:
    file = name.rsplit("/", 1)[-1]
    if file.startswith("test"):
        return "test"
    return "validation" if file.startswith("val") else "train"


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """File and row, for the public rows have no id."""
    name, _, number = row.where.rpartition(" row ")
    return f"{reading.source}/{name.removesuffix('.parquet')}/{number}"


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The interleaved record of one row."""
    texts = {name: raw[name] if raw[name] is not None else "" for name in _TEXT_COLUMNS}
    for name, text in texts.items():
        _refuse_unpaired(text, name)
    filled = sorted((name for name in raw if _IMAGE_COLUMN.fullmatch(name) and raw[name] is not None), key=_order)
    asked = list(dict.fromkeys(_cited(texts["Question"])))
    inputs = asked + [name for name in filled if name.startswith("problem") and name not in asked]
    shown = list(dict.fromkeys(name for name in _cited(texts["Text Reasoning Trace"]) if name not in inputs))
    names = inputs + shown
    unused = [name for name in filled if name not in names]
    if unused:
        raise BadRecord("uncited_image", f"{unused[0]} is filled but no text cites it")
    images = tuple(_image(raw.get(name), "input" if name in inputs else "step", reading, name) for name in names)
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSE),
        kind="interleaved",
        question=_question(texts["Question"], inputs),
        images=images,
        steps=tuple(_steps(texts["Text Reasoning Trace"], names)),
        answer=check_text(texts["Final Answer"], "Final Answer", "empty_answer"),
    )


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


def _image(cell: Any, role: Literal["input", "step"], reading: Reading, where: str) -> Image:
    if isinstance(cell, bytes):
        return reading.embedded(cell, role, where)
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        return reading.embedded(cell["bytes"], role, where)
    if isinstance(cell, dict) and cell.get("path"):
        return reading.image(cell["path"], role, where)
    raise BadRecord("image_missing", f"{where}: cited, but the column is {'empty' if cell is None else 'no image'}")


def _question(text: str, inputs: list[str]) -> str:
    """The question without placeholders; with several images each place is marked by the image's number."""
    shown = [f"image {inputs.index(name) + 1}" if len(inputs) > 1 else "" for name in _cited(text)]
    return check_text(number_places(text, _PLACEHOLDER, shown), "Question", "empty_question")


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
