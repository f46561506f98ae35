"""ReFocus: charts and tables, and copies of them on which a thought drew what it looks at.

In: ``*.json``, each one array, or ``*.jsonl``, at any depth, and the images they name. Their stand-alone layout is not
documented, so `data.sources.NAME.mapping` says what they call these (by default just so):

    {"id": "chart_003", "question": "Which year is highest?", "image": "c/003.png", "answer": "2014",
     "edits": [{"thought": "Focus on the bars after 2010.", "edited_image": "c/003_e1.png"}]}

Out: one interleaved record a row, in file order. An edited image is the target of its thought.
Always: a file whose first rows lack a name is refused with the keys that are there, nothing is guessed. An edited image
shows the original, as large as it is (else `bbox_disagrees`: what is drawn stands elsewhere) and not unchanged (else
`edit_is_identity`). Code where a thought or an image should be is `schema_mismatch`: the mapping names the wrong key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from valr_ops.data.images import decode
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
from valr_ops.data.sources.reading import Reading, Row, Wanted, mapped_rows, mapping_of

LICENSE = "unknown"
"""The public data set names none."""

_NEEDED = ("id", "question", "image", "edits", "answer")
# A fence, the authors' tools (focus_on_columns_with_mask ...), another call in snake case, their head of an action.
_TOOL_SYNTAX = re.compile(r"```|\bfocus_on_\w+|\b[a-z]+(?:_[a-z]+)+\(|\bdisplay\(|\bACTION\s*\d+\s*:")
# A file may be called after a tool, but its name does not end in a bracket.
_CALL = re.compile(r"```|\n|\)[\s;]*$")


def rows(reading: Reading, wanted: Wanted) -> Iterator[Row]:
    """The rows of all files; a file named ``test...`` or ``val...`` is of that split. Raises as `mapped_rows`."""
    return mapped_rows(reading, _NEEDED, ("thought", "edited_image"))


def identity(raw: Mapping[str, Any], row: Row, reading: Reading) -> str:
    """The row's id behind the source's name."""
    identity = reading.field(raw, "id", {})
    if type(identity) is not int:
        identity = check_text(identity, "id", "schema_mismatch")
    return f"{reading.source}/{identity}"


def record(raw: Mapping[str, Any], row: Row, identity: str, reading: Reading) -> Record:
    """The interleaved record of one row."""
    question = check_text(reading.field(raw, "question", {}), "question", "empty_question")
    answer = reading.field(raw, "answer", {})
    # Charts are asked for numbers, and a number is as good an answer as its text.
    answer = check_text(str(answer) if is_finite_number(answer) else answer, "answer", "empty_answer")
    edits = reading.field(raw, "edits", {})
    if not isinstance(edits, list):
        raise BadRecord("schema_mismatch", f"edits: expected a list of objects, found {shortened(edits)}")
    if len(edits) > (limit := reading.recipe.max_steps):
        # Before any of the images is read.
        raise BadRecord("too_many_steps", f"edits: {len(edits)}, at most {limit} allowed (data.max_steps)")
    original = reading.image(reading.field(raw, "image", {}), "input", "image")
    images, steps = [original], []
    for number, edit in enumerate(edits):
        edit = mapping_of(edit)
        thought = reading.field(edit, "thought", {})
        name = reading.field(edit, "edited_image", {})
        _refuse_code(thought, _TOOL_SYNTAX, f"edits[{number}].thought")
        _refuse_code(name, _CALL, f"edits[{number}].edited_image")
        text = check_text(thought, f"edits[{number}].thought", "empty_reasoning")
        edited = reading.image(name, "step", f"edits[{number}].edited_image")
        _compare(original, edited, f"edits[{number}].edited_image")
        steps.append(Step(text, Target(len(images), None, "dataset")))
        images.append(edited)
    return reading.record(
        row,
        identity,
        license=reading.license(LICENSE),
        kind="interleaved",
        question=question,
        images=tuple(images),
        steps=tuple(steps),
        answer=answer,
    )


def _refuse_code(value: object, syntax: re.Pattern[str], field: str) -> None:
    if isinstance(value, str) and (code := syntax.search(value)):
        shown = shortened(value[max(0, code.start() - 20) : code.end() + 40])
        raise BadRecord("schema_mismatch", f"{field}: tool syntax or code in {shown!r}")


def _compare(original: Image, edited: Image, field: str) -> None:
    """Refuse an edit of another size, and one that changed no pixel."""
    if (edited.width, edited.height) != (original.width, original.height):
        raise BadRecord(
            "bbox_disagrees",
            f"{field}: {edited.width}x{edited.height}, but the original has {original.width}x{original.height}",
        )
    if edited.digest == original.digest or decode(edited.data).tobytes() == decode(original.data).tobytes():
        raise BadRecord("edit_is_identity", f"{field}: every pixel is the original's")
