"""What must hold of a corpus before it is published, stated and judged with great-expectations.

In: the staged folder of `cot_corpus` or `latent_corpus`. Out: a blocking `Check` that carries the ids of failing rows,
and `data_docs/index.html` in the same folder.
Always: nothing is sent anywhere, nothing is written but the page, and the page holds no clock and no run id, so that
equal artifacts have equal bytes. Shards are streamed and the frames hold numbers and truths, never texts or images, so
that half a million records take seconds. Facts that need a join (an image is stored, a target exists) or a look into
lists are columns of the frames, computed here on Arrow columns; the rules about them are expectations.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from valr_ops.data.corpus import IMAGE_SCHEMA, RECORD_SCHEMA
from valr_ops.data.records import RESERVED_TOKENS
from valr_ops.data.screening import license_allows
from valr_ops.data.sequences import OUTLINE_SCHEMA, SEQUENCE_SCHEMA
from valr_ops.data.shards import ShardError, Shards
from valr_ops.recipe.recipe import DataRecipe, Recipe
from valr_ops.store.artifacts import Check

# Read when the package is imported, hence before it.
os.environ["GX_ANALYTICS_ENABLED"] = "false"

import great_expectations as gx
import great_expectations.expectations as gxe
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)

SAMPLED_IMAGES = 256
"""Images whose stored bytes are digested again, at equal distances. Every image was digested when it was read and every
block has a digest of its own, so that hashing all bytes once more, hours for a large corpus, would find nothing new."""

_SHOWN_ROWS = 20
"""Failing ids that a check carries for each expectation."""

_CHUNK_BYTES = 4 * 2**20
"""Blocks are joined until they are as large as this, so that the columns are long enough to be worth a call."""

_ANY_SIZE = np.iinfo(np.int32).max
_SPLITS = ("train", "validation")
_KINDS = ("single_view", "multi_view", "interleaved")
_ORIGINS = ("dataset", "crop", "only_image", "matched")
_CONTROL_TOKEN = "|".join(map(re.escape, RESERVED_TOKENS))
_MEND = "make it again with `valr run {stage}`, or bring it back with `dvc checkout {stage}`"

Truths = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.integer[Any]]
Keys = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class _Suite:
    """The expectations on one frame."""

    title: str
    frame: pd.DataFrame
    name: Callable[[int], str]
    """What people call the row of a number."""
    expectations: list[Any]
    note: str = ""
    """What the rows are, where the title does not say it."""


@dataclass(frozen=True)
class _Outcome:
    """One expectation's result."""

    table: str
    rule: str
    """The sentence that has to hold."""
    expectation: str
    passed: bool
    rows: int
    failing: int
    ids: list[str]
    observed: str


def corpus_expectations(staged_folder: Path, recipe: Recipe) -> Check:
    """Schema, ranges, uniqueness and references of a staged `cot_corpus`; also writes its data docs.

    Args:
        staged_folder: holds the shards called ``records`` and ``images``; with a ``report.json`` in it, what the report
            says that each source kept is compared with what is there.
        recipe: limits on images and steps, the licence policy, and the names of the sources.

    Returns:
        a check named ``corpus_expectations``; its metadata lists for each failed expectation the ids of failing rows.

    Raises:
        ShardError: shards that are missing or damaged.
    """
    schemas = _schema_suite(staged_folder, "cot_corpus", {"records": RECORD_SCHEMA, "images": IMAGE_SCHEMA})
    if not schemas.frame["schema_holds"].all():
        return _check("corpus_expectations", [schemas], staged_folder)
    sample = _sample_suite(staged_folder)
    images = _StoredImages(staged_folder)
    facts = _CorpusFacts(images, recipe.data)
    for chunk in _chunks(_verified(staged_folder, "records", "cot_corpus")):
        facts.add(chunk)
    suites = [
        schemas,
        facts.records_suite(),
        facts.steps_suite(),
        facts.boxes_suite(),
        facts.scenes_suite(),
        facts.images_suite(),
        sample,
        *facts.sources_suites(staged_folder / "report.json"),
    ]
    return _check("corpus_expectations", suites, staged_folder)


def latent_expectations(staged_folder: Path, recipe: Recipe, corpus: Path | None = None) -> Check:
    """Lengths, marker positions and targets of a staged `latent_corpus`; also writes its data docs.

    Args:
        staged_folder: holds the shards called ``sequences`` and ``outline``.
        recipe: limits on the length.
        corpus: the artifact `cot_corpus`; with it, targets are looked up among its images, boxes compared with the
            image's size and ids and splits with its records, without it only their form is checked.

    Returns:
        a check named ``latent_expectations``; its metadata lists for each failed expectation the ids of failing rows.

    Raises:
        ShardError: shards that are missing or damaged.
    """
    schemas = _schema_suite(staged_folder, "latent_corpus", {"sequences": SEQUENCE_SCHEMA, "outline": OUTLINE_SCHEMA})
    if not schemas.frame["schema_holds"].all():
        return _check("latent_expectations", [schemas], staged_folder)
    facts = _SequenceFacts(None if corpus is None else _StoredImages(corpus), recipe.data)
    for chunk in _chunks(_verified(staged_folder, "sequences", "latent_corpus")):
        facts.add(chunk)
    outline = list(_verified(staged_folder, "outline", "latent_corpus"))
    suites = [schemas, facts.sequences_suite(outline, corpus), facts.segments_suite()]
    return _check("latent_expectations", suites, staged_folder)


# ------------------------------------------------------------------------------------------------- how a rule is put


def _at_least_one(what: str) -> Any:
    return gxe.ExpectTableRowCountToBeBetween(min_value=1, description=f"There is at least one {what}.")


def _between(column: str, least: int | None, most: int | None, description: str) -> Any:
    return gxe.ExpectColumnValuesToBeBetween(column=column, min_value=least, max_value=most, description=description)


def _holds(column: str, description: str) -> Any:
    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=[True], description=description)


def _one_of(column: str, values: Iterable[str], description: str) -> Any:
    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=sorted(values), description=description)


def _given(column: str, description: str) -> Any:
    return gxe.ExpectColumnValuesToNotBeNull(column=column, description=description)


def _unique(column: str, description: str) -> Any:
    return gxe.ExpectColumnValuesToBeUnique(column=column, description=description)


def _greater(larger: str, smaller: str, description: str, or_equal: bool = False) -> Any:
    return gxe.ExpectColumnPairValuesAToBeGreaterThanB(
        column_A=larger, column_B=smaller, or_equal=or_equal, description=description
    )


def _equal(one: str, other: str, description: str) -> Any:
    return gxe.ExpectColumnPairValuesToBeEqual(column_A=one, column_B=other, description=description)


# ---------------------------------------------------------------------------------------------- columns, chunk by chunk


class _Columns:
    """The columns of one frame, which grow chunk by chunk."""

    def __init__(self) -> None:
        self._parts: defaultdict[str, list[npt.NDArray[Any]]] = defaultdict(list)
        self.rows = 0

    def add(self, **columns: npt.NDArray[Any]) -> None:
        for name, values in columns.items():
            self._parts[name].append(values)
        self.rows += len(values)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        parts = self._parts[name]
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0] if parts else np.zeros(0, dtype=np.int32)

    def frame(self, *names: str) -> pd.DataFrame:
        """Without copies, because a copy is as large as everything else."""
        return pd.DataFrame({name: self[name] for name in names}, copy=False)


class _Vocabulary:
    """Numbers for the distinct values of a text column, in the order in which they come."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    @property
    def words(self) -> list[str]:
        return list(self._codes)

    def codes(self, column: pa.Array) -> npt.NDArray[np.int32]:
        """-1 for what is null."""
        encoded = column.dictionary_encode()
        known = [self._codes.setdefault(word, len(self._codes)) for word in encoded.dictionary.to_pylist()]
        # The last entry is the one that -1 finds.
        return np.array([*known, -1], dtype=np.int32)[_numbers(encoded.indices, -1)]

    def categories(self, codes: npt.NDArray[Any]) -> pd.Categorical[str]:
        return pd.Categorical.from_codes(codes, categories=pd.Index(self.words, dtype=object))


class _Ids:
    """What rows are called. Ids stay in Arrow's memory: as Python objects they are several times as large."""

    def __init__(self) -> None:
        self._parts: list[pa.Array] = []

    def add(self, column: pa.Array) -> None:
        self._parts.append(column)

    def __getitem__(self, row: int) -> str:
        at = row
        for part in self._parts:
            if at < len(part):
                return part[at].as_py() or f"row {row}"
            at -= len(part)
        raise IndexError(row)

    def column(self) -> pa.ChunkedArray:
        return pa.chunked_array(self._parts, pa.string())

    def numbers(self) -> npt.NDArray[np.int32]:
        """Equal numbers for equal ids, -1 for what is null."""
        encoded = self.column().dictionary_encode()
        return np.concatenate([_numbers(chunk.indices, -1) for chunk in encoded.chunks] or [np.zeros(0, np.int32)])


class _StoredImages:
    """Digest and size of every image in a folder's shards; the bytes of the images are not read."""

    def __init__(self, folder: Path) -> None:
        found = _Columns()
        for batch in _selected(folder, "images", "cot_corpus", ("digest", "width", "height")):
            found.add(
                key=_keys(batch["digest"])[0],
                width=_numbers(batch["width"], 0),
                height=_numbers(batch["height"], 0),
            )
        self.width, self.height = found["width"], found["height"]
        keys = found["key"]
        self._order = np.argsort(keys, kind="stable").astype(np.int32)
        self._sorted = keys[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, digests: pa.Array) -> npt.NDArray[np.int32]:
        """The row of each digest, -1 where there is none."""
        keys, well_formed = _keys(digests)
        if not len(self):
            return np.full(len(keys), -1, dtype=np.int32)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        return np.where(well_formed & (self._sorted[places] == keys), self._order[places], np.int32(-1))

    def sizes(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Width and height; of what is not there (-1) the greatest number, so that no box is outside it."""
        return np.append(self.width, _ANY_SIZE)[rows], np.append(self.height, _ANY_SIZE)[rows]

    def copies(self) -> npt.NDArray[np.int32]:
        """How often the digest of each row is there."""
        begins = np.flatnonzero(np.concatenate([[True], self._sorted[1:] != self._sorted[:-1]])[: len(self)])
        times = np.diff(begins, append=len(self))
        copies = np.zeros(len(self), dtype=np.int32)
        copies[self._order] = np.repeat(times, times)
        return copies

    def name(self, row: int) -> str:
        """The digest of a row."""
        return self._sorted[np.flatnonzero(self._order == row)[0]].ljust(32, b"\0").hex()


def _chunks(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in fewer, larger batches."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.nbytes
        if size >= _CHUNK_BYTES:
            yield pa.concat_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def _verified(folder: Path, name: str, stage: str) -> Iterator[pa.RecordBatch]:
    """All rows, each block compared with its digest."""
    return Shards(folder, name, _MEND.format(stage=stage)).batches()


def _selected(folder: Path, name: str, stage: str, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """Some columns of all rows; the others are not read, hence the digests of the blocks are not compared."""
    shards = Shards(folder, name, mend := _MEND.format(stage=stage))
    included = [shards.schema.get_field_index(column) for column in columns]
    for shard in shards.shards:
        try:
            with pa.memory_map(str(folder / shard.file)) as file:
                reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=included))
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{folder / shard.file} can't be read: {error}; {mend}") from None


def _numbers(column: pa.Array, if_null: int) -> npt.NDArray[np.int32]:
    return column.fill_null(if_null).to_numpy(zero_copy_only=False).astype(np.int32)


def _truths(column: pa.Array | pa.ChunkedArray) -> Truths:
    return np.asarray(column.fill_null(False), dtype=np.bool_)


def _lengths(texts: pa.Array) -> npt.NDArray[np.int32]:
    """Characters without surrounding white space; 0 for what is null."""
    return _numbers(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)


def _has_control_token(texts: pa.Array) -> Truths:
    return _truths(pc.match_substring_regex(texts, _CONTROL_TOKEN, ignore_case=True))


def _listed(column: pa.Array) -> tuple[pa.Array, Numbers, Numbers]:
    """The elements of a column of lists, the row of each, and [rows + 1] where each row's elements begin."""
    lengths = _numbers(pc.list_value_length(column), 0)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return column.flatten(), np.repeat(np.arange(len(column)), lengths), starts


def _rows_without(rows: Numbers, bad: Truths, count: int) -> Truths:
    """For each of `count` rows, whether none of its elements is bad."""
    return np.bincount(rows[bad], minlength=count) == 0


_NIBBLES = np.full(256, 16, dtype=np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def _keys(digests: pa.Array) -> tuple[Keys, Truths]:
    """SHA-256 as 32 bytes, and whether the text was one; what was none is all zeros."""
    keys = np.zeros((len(digests), 32), dtype=np.uint8)
    well_formed = _truths(pc.equal(pc.binary_length(digests), 64))
    texts = digests.filter(pa.array(well_formed))
    if len(texts):
        offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)[texts.offset :]
        characters = np.frombuffer(texts.buffers()[2], dtype=np.uint8)[offsets[0] :][: 64 * len(texts)]
        nibbles = _NIBBLES[characters].reshape(-1, 64)
        hexadecimal: Truths = np.all(nibbles < 16, axis=1)
        keys[well_formed] = np.where(hexadecimal[:, None], nibbles[:, ::2] << 4 | nibbles[:, 1::2] & 15, 0)
        well_formed[well_formed] = hexadecimal
    return keys.view("S32")[:, 0], well_formed


# --------------------------------------------------------------------------------------------- the corpus of records


class _CorpusFacts:
    """What is known of every record, step, box, scene and image of a corpus."""

    def __init__(self, images: _StoredImages, recipe: DataRecipe) -> None:
        self._images, self._recipe = images, recipe
        self._records, self._steps, self._boxes = _Columns(), _Columns(), _Columns()
        self._ids = _Ids()
        self._sources, self._splits, self._kinds = _Vocabulary(), _Vocabulary(), _Vocabulary()
        self._licenses, self._scenes, self._origins = _Vocabulary(), _Vocabulary(), _Vocabulary()
        self._uses = np.zeros(len(images), dtype=np.int32)
        self._seen: defaultdict[int, Truths] = defaultdict(lambda: np.zeros(len(images), dtype=np.bool_))

    def add(self, chunk: pa.RecordBatch) -> None:
        """The next records, of `RECORD_SCHEMA`."""
        count = len(chunk)
        images, owners, image_starts = _listed(chunk["images"])
        width = _numbers(pc.struct_field(images, "width"), -1)
        height = _numbers(pc.struct_field(images, "height"), -1)
        roles = pc.struct_field(images, "role")
        rows = self._images.rows(pc.struct_field(images, "digest"))
        stored_width, stored_height = self._images.sizes(rows)
        stored = (rows >= 0) & (width == stored_width) & (height == stored_height)
        splits = self._splits.codes(chunk["split"])
        self._uses += np.bincount(rows[rows >= 0], minlength=len(self._uses)).astype(np.int32)
        for split in np.unique(splits).tolist():
            self._seen[split][rows[(rows >= 0) & (splits[owners] == split)]] = True

        self._add_steps(chunk["steps"], image_starts, width, height)
        self._ids.add(chunk["id"])
        self._records.add(
            source=self._sources.codes(chunk["source"]),
            split=splits,
            kind=self._kinds.codes(chunk["kind"]),
            license=self._licenses.codes(chunk["license"]),
            scene=self._scenes.codes(chunk["scene"]),
            question_length=_lengths(chunk["question"]),
            answer_length=_lengths(chunk["answer"]),
            no_control_token=~(_has_control_token(chunk["question"]) | _has_control_token(chunk["answer"])),
            step_count=_numbers(pc.list_value_length(chunk["steps"]), 0),
            input_images=np.bincount(owners[_truths(pc.equal(roles, "input"))], minlength=count).astype(np.int32),
            roles_known=_rows_without(owners, ~_truths(pc.is_in(roles, pa.array(["input", "step"]))), count),
            images_stored=_rows_without(owners, ~stored, count),
        )

    def _add_steps(self, column: pa.Array, image_starts: Numbers, width: Numbers, height: Numbers) -> None:
        steps, owners, _ = _listed(column)
        texts, images, boxes, origins, matchers = (
            pc.struct_field(steps, name) for name in ("text", "image", "box", "origin", "by")
        )
        looks = _truths(images.is_valid())
        image = _numbers(images, -1)
        exists = (image >= 0) & (image < np.diff(image_starts)[owners])
        sides = _numbers(pc.list_value_length(boxes), -1)
        named = _truths(pc.greater(pc.binary_length(matchers), 0))
        self._steps.add(
            record=owners.astype(np.int32) + np.int32(self._records.rows),
            text_length=_lengths(texts),
            no_control_token=~_has_control_token(texts),
            target_exists=exists | ~looks,
            box_has_corners=(sides == 4) & looks | (sides == -1),
            origin_known=np.where(looks, _truths(pc.is_in(origins, pa.array(_ORIGINS))), _truths(origins.is_null())),
            matcher_named=named == _truths(pc.equal(origins, "matched")),
        )
        boxed = np.flatnonzero(exists & (sides == 4))
        corners = boxes.take(pa.array(boxed)).flatten().fill_null(-1).to_numpy().reshape(-1, 4)
        target = image_starts[owners[boxed]] + image[boxed]
        self._boxes.add(
            step=boxed.astype(np.int32) + np.int32(self._steps.rows - len(steps)),
            **{side: np.ascontiguousarray(corners[:, n]) for n, side in enumerate(("x0", "y0", "x1", "y1"))},
            width=width[target],
            height=height[target],
        )

    def records_suite(self) -> _Suite:
        data = self._recipe
        frame = self._records.frame(
            *("question_length", "answer_length", "no_control_token", "step_count", "input_images"),
            *("roles_known", "images_stored"),
        )
        words = self._licenses.words
        # The last entry is the one that -1, no licence, finds.
        lengths = np.array([len(word.strip()) for word in (*words, "")])
        allowed = np.array([license_allows(word, data.license_policy) for word in (*words, "")])
        frame["license_length"] = lengths[self._records["license"]]
        frame["license_allowed"] = allowed[self._records["license"]]
        frame["id"] = self._ids.numbers()
        for name, vocabulary in (("source", self._sources), ("split", self._splits), ("kind", self._kinds)):
            frame[name] = vocabulary.categories(self._records[name])
        return _Suite(
            "records",
            frame,
            self._ids.__getitem__,
            [
                _at_least_one("record"),
                _between("id", 0, None, "Every record has an id."),
                _unique("id", "No two records have the same id."),
                _given("source", "Every record has a source."),
                _one_of("source", data.sources, "Every source is in the recipe."),
                _given("split", "Every record has a split."),
                _one_of("split", _SPLITS, "No test record is in the corpus."),
                _given("kind", "Every record has a kind."),
                _one_of("kind", _KINDS, "The kind of record is known."),
                _between("license_length", 1, None, "Every record carries a licence."),
                _holds("license_allowed", f"data.license_policy={data.license_policy} allows every licence."),
                _between("question_length", 1, None, "No question is empty."),
                _between("answer_length", 1, None, "No answer is empty."),
                _holds("no_control_token", "No question or answer holds a control token."),
                _between("step_count", 1, data.max_steps, "Records have 1 to data.max_steps steps."),
                _between("input_images", 1, None, "Every record shows an image with the question."),
                _holds("roles_known", "Images are shown with the question or inside the reasoning."),
                _holds("images_stored", "Every image of a record is stored, with the same size."),
            ],
        )

    def steps_suite(self) -> _Suite:
        frame = self._steps.frame(
            *("text_length", "no_control_token", "target_exists", "box_has_corners", "origin_known", "matcher_named")
        )
        return _Suite(
            "steps",
            frame,
            self._step_name,
            [
                _between("text_length", 1, None, "No step is empty."),
                _holds("no_control_token", "No step holds a control token."),
                _holds("target_exists", "A step's target is one of its record's images."),
                _holds("box_has_corners", "A box has four numbers and belongs to a target."),
                _holds("origin_known", "Every target says how it is known, and nothing else does."),
                _holds("matcher_named", "A matched target names what matched it, and no other does."),
            ],
        )

    def boxes_suite(self) -> _Suite:
        return _Suite(
            "boxes",
            self._boxes.frame("x0", "y0", "x1", "y1", "width", "height"),
            lambda row: self._step_name(int(self._boxes["step"][row])),
            [
                _between("x0", 0, None, "Boxes begin inside the image (left)."),
                _between("y0", 0, None, "Boxes begin inside the image (top)."),
                _greater("x1", "x0", "Boxes are not inverted or empty (width)."),
                _greater("y1", "y0", "Boxes are not inverted or empty (height)."),
                _greater("width", "x1", "Boxes end inside the image (right).", or_equal=True),
                _greater("height", "y1", "Boxes end inside the image (bottom).", or_equal=True),
            ],
            note="steps whose target is a region of an image",
        )

    def scenes_suite(self) -> _Suite:
        scenes, splits = self._records["scene"], self._records["split"]
        names = self._scenes.words
        seen = np.zeros((len(names), len(self._splits.words)), dtype=np.bool_)
        inside = (scenes >= 0) & (splits >= 0)
        seen[scenes[inside], splits[inside]] = True
        records = np.bincount(scenes[scenes >= 0], minlength=len(names))
        return _Suite(
            "scenes",
            pd.DataFrame({"records": records, "sides": seen.sum(axis=1)}),
            names.__getitem__,
            [_between("sides", None, 1, "No scene stands in both the training and the validation split.")],
            note="places that multi-view records show",
        )

    def images_suite(self) -> _Suite:
        data, images = self._recipe, self._images
        frame = pd.DataFrame(
            {
                "width": images.width,
                "height": images.height,
                "pixels": images.width.astype(np.int64) * images.height,
                "copies": images.copies(),
                "uses": self._uses,
                "sides": sum((seen.astype(np.int8) for seen in self._seen.values()), np.zeros(len(images), np.int8)),
            },
            copy=False,
        )
        return _Suite(
            "images",
            frame,
            images.name,
            [
                _between("copies", 1, 1, "Each distinct image stands once."),
                _between("width", data.min_image_side, None, "Images are at least data.min_image_side wide."),
                _between("height", data.min_image_side, None, "Images are at least data.min_image_side high."),
                _between("pixels", 1, data.max_image_pixels, "Images have at most data.max_image_pixels pixels."),
                _between("uses", 1, None, "Every image belongs to a record."),
                _between("sides", None, 1, "No image stands in both the training and the validation split."),
            ],
        )

    def sources_suites(self, report: Path) -> list[_Suite]:
        """None where there is no report to compare with."""
        if not report.is_file():
            return []
        sources = json.loads(report.read_text(encoding="utf-8"))["sources"]
        counts = np.bincount(self._records["source"] + 1, minlength=len(self._sources.words) + 1)[1:]
        found = dict(zip(self._sources.words, counts.tolist(), strict=True))
        names = sorted({*self._recipe.sources, *sources})
        kept = [sources.get(name, {}).get("kept", 0) for name in names]
        frame = pd.DataFrame({"records": [found.get(name, 0) for name in names], "kept": kept})
        rule = "The corpus holds as many records of every source as the report says were kept."
        return [_Suite("sources", frame, names.__getitem__, [_equal("records", "kept", rule)])]

    def _step_name(self, row: int) -> str:
        record = int(self._steps["record"][row])
        number = row - int(np.searchsorted(self._steps["record"], record))
        return f"{self._ids[record]}#step{number}"


def _schema_suite(folder: Path, stage: str, schemas: dict[str, pa.Schema]) -> _Suite:
    found = {name: Shards(folder, name, _MEND.format(stage=stage)) for name in schemas}
    names = [f"{name}{_difference(shards.schema, schemas[name])}" for name, shards in found.items()]
    holds = [shards.schema.equals(schemas[name]) for name, shards in found.items()]
    return _Suite(
        "shards",
        pd.DataFrame({"rows": [len(shards) for shards in found.values()], "schema_holds": holds}),
        names.__getitem__,
        [_holds("schema_holds", "The shards have exactly the columns of the contract.")],
        note="the files called " + " and ".join(schemas),
    )


def _difference(found: pa.Schema, wanted: pa.Schema) -> str:
    missing = [field.name for field in wanted if field not in found]
    unknown = [field.name for field in found if field not in wanted]
    said = [f"{name} is missing or of another type" for name in missing]
    return "".join(f" ({one})" for one in [*said, *(f"{name} is unknown" for name in unknown if name not in missing)])


def _sample_suite(folder: Path) -> _Suite:
    """The digest of some images' bytes, blocks verified."""
    shards = Shards(folder, "images", _MEND.format(stage="cot_corpus"))
    numbers = np.unique(np.linspace(0, max(len(shards) - 1, 0), min(len(shards), SAMPLED_IMAGES)).astype(np.int64))
    digests, holds = [], []
    for number in numbers.tolist():
        row = shards.row(number)
        digests.append(row["digest"][0].as_py() or f"row {number}")
        holds.append(hashlib.sha256(row["data"][0].as_py() or b"").hexdigest() == digests[-1])
    return _Suite(
        "stored bytes",
        pd.DataFrame({"digest_holds": np.array(holds, dtype=np.bool_)}),
        digests.__getitem__,
        [_holds("digest_holds", "The stored bytes have the digest they are stored under.")],
        note=f"at equal distances among {len(shards)} images",
    )


# ------------------------------------------------------------------------------------------- the corpus of sequences


class _SequenceFacts:
    """What is known of every sequence and segment of a rewritten corpus.

    The ids of the control tokens are not stored in the artifact: they are what most of the first segments' positions
    hold.
    """

    def __init__(self, images: _StoredImages | None, recipe: DataRecipe) -> None:
        self._images, self._recipe = images, recipe
        self._sequences, self._segments = _Columns(), _Columns()
        self._ids = _Ids()
        self._splits = _Vocabulary()
        self._pair: tuple[int, int] | None = None

    def add(self, chunk: pa.RecordBatch) -> None:
        """The next sequences."""
        count = len(chunk)
        ids, _, starts = _listed(chunk["input_ids"])
        # Two more than there are, so that every position has one behind it.
        tokens = np.append(_numbers(ids, -1), [-1, -1])
        lengths = np.diff(starts)
        prompts = _numbers(chunk["prompt_length"], 0)
        segments, owners, segment_starts = _listed(chunk["segments"])
        position = _numbers(pc.struct_field(segments, "position"), -1)
        inside = (position >= 0) & (position < lengths[owners] - 1)
        place = np.where(inside, starts[owners] + position, 0)
        pairs = np.stack([tokens[place], tokens[place + 1]])
        if self._pair is None and inside.any():
            values, times = np.unique(pairs[:, inside], axis=1, return_counts=True)
            self._pair = (int(values[0, times.argmax()]), int(values[1, times.argmax()]))
        latent, latent_end = self._pair or (-2, -2)

        expected = np.zeros(len(tokens), dtype=np.bool_)
        expected[place[inside]] = expected[place[inside] + 1] = True
        marked = (tokens == latent) | (tokens == latent_end)
        stray = np.searchsorted(starts, np.flatnonzero(marked != expected), side="right") - 1
        grids, grid_owners, _ = _listed(chunk["image_grids"])
        # A grid is (frames, height, width).
        flat = np.bincount(grid_owners[_numbers(pc.list_value_length(grids), 0) == 3], minlength=count)
        shown = _numbers(pc.list_value_length(chunk["image_digests"]), 0)
        resolvable, box_holds = self._targets(segments)
        # The first segment of a sequence comes after nothing.
        before = np.concatenate([[-1], position[:-1]])
        before[segment_starts[:-1][np.diff(segment_starts) > 0]] = -1
        self._segments.add(
            sequence=owners.astype(np.int32) + np.int32(self._sequences.rows),
            after_prompt=inside & (position >= prompts[owners]),
            in_order=position > before,
            pair_holds=inside & (pairs[0] == latent) & (pairs[1] == latent_end),
            target_resolvable=resolvable,
            box_holds=box_holds,
        )
        self._ids.add(chunk["id"])
        self._sequences.add(
            split=self._splits.codes(chunk["split"]),
            segments=np.diff(segment_starts).astype(np.int32),
            length=lengths.astype(np.int32),
            length_with_slots=(lengths + self._recipe.reserved_slots * np.diff(segment_starts)).astype(np.int32),
            prompt_length=prompts,
            markers_match=(np.bincount(stray, minlength=count) == 0) & _rows_without(owners, ~inside, count),
            grids_match=(flat == shown) & (_numbers(pc.list_value_length(chunk["image_grids"]), 0) == shown),
        )

    def _targets(self, segments: pa.Array) -> tuple[Truths, Truths]:
        """Whether each segment's target can be found, and whether its box has an area inside it."""
        digests, boxes = pc.struct_field(segments, "digest"), pc.struct_field(segments, "box")
        looks = _truths(digests.is_valid())
        sides = _numbers(pc.list_value_length(boxes), -1)
        box_holds = (sides == -1) | (sides == 4) & looks
        boxed = np.flatnonzero((sides == 4) & looks)
        x0, y0, x1, y1 = boxes.take(pa.array(boxed)).flatten().fill_null(-1).to_numpy().reshape(-1, 4).T
        sound = (x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0)
        if self._images is None:
            resolvable = _keys(digests)[1]
        else:
            rows = self._images.rows(digests)
            resolvable = rows >= 0
            width, height = self._images.sizes(rows[boxed])
            sound &= (x1 <= width) & (y1 <= height)
        box_holds[boxed] = sound
        return resolvable | ~looks, box_holds

    def sequences_suite(self, outline: list[pa.RecordBatch], corpus: Path | None) -> _Suite:
        frame = self._sequences.frame("length", "length_with_slots", "prompt_length", "markers_match", "grids_match")
        frame["id"] = self._ids.numbers()
        frame["split"] = self._splits.categories(self._sequences["split"])
        frame["outlined"] = self._are_outlined(outline)
        rules = [
            _at_least_one("sequence"),
            _between("id", 0, None, "Every sequence has an id."),
            _unique("id", "No two sequences have the same id."),
            _given("split", "Every sequence has a split."),
            _one_of("split", _SPLITS, "No test record is in the corpus."),
            _between(
                "length_with_slots",
                1,
                self._recipe.max_length,
                "Sequences fit data.max_length, data.reserved_slots for every segment included.",
            ),
            _between("prompt_length", 1, None, "Every sequence begins with a prompt."),
            _greater("length", "prompt_length", "Something follows the prompt, so there is something to learn."),
            _holds("markers_match", "Control tokens stand at the segments and nowhere else."),
            _holds("grids_match", "Every input image has its patch grid."),
            _holds("outlined", "The outline says of every row what the sequence is."),
        ]
        if corpus is not None:
            frame["record_found"] = self._are_records_of(corpus)
            rules.append(_holds("record_found", "Every sequence is a record of the corpus, in the same split."))
        return _Suite("sequences", frame, self._ids.__getitem__, rules)

    def segments_suite(self) -> _Suite:
        return _Suite(
            "segments",
            self._segments.frame("after_prompt", "in_order", "pair_holds", "target_resolvable", "box_holds"),
            self._segment_name,
            [
                _holds("after_prompt", "Segments stand behind the prompt and inside the sequence."),
                _holds("in_order", "Segments stand in reading order."),
                _holds("pair_holds", "A segment's position is that of <latent>, with </latent> behind it."),
                _holds("target_resolvable", "A segment's target is an image of the corpus, or it has none."),
                _holds("box_holds", "A segment's box has an area inside its image."),
            ],
        )

    def _are_outlined(self, outline: list[pa.RecordBatch]) -> Truths:
        """Of each sequence whether the outline's row has its id, split, length and number of segments."""
        said = _Columns()
        ids = _Ids()
        for batch in outline:
            ids.add(batch["id"])
            numbers = {name: _numbers(batch[name], -1) for name in ("length", "segments")}
            said.add(split=self._splits.codes(batch["split"]), **numbers)
        rows = min(said.rows, self._sequences.rows)
        outlined = np.zeros(self._sequences.rows, dtype=np.bool_)
        same_id = pc.equal(self._ids.column().slice(0, rows), ids.column().slice(0, rows))
        outlined[:rows] = _truths(same_id) & (said.rows == self._sequences.rows)
        for name in ("split", "length", "segments"):
            outlined[:rows] &= said[name][:rows] == self._sequences[name][:rows]
        return outlined

    def _are_records_of(self, corpus: Path) -> Truths:
        ids, splits = _Ids(), []
        for batch in _selected(corpus, "records", "cot_corpus", ("id", "split")):
            ids.add(batch["id"])
            splits.append(self._splits.codes(batch["split"]))
        found = pc.index_in(self._ids.column(), ids.column().combine_chunks())
        rows = found.fill_null(-1).to_numpy()
        # The last entry is the one that -1 finds.
        return np.concatenate([*splits, [-2]])[rows] == self._sequences["split"]

    def _segment_name(self, row: int) -> str:
        sequence = int(self._segments["sequence"][row])
        number = row - int(np.searchsorted(self._segments["sequence"], sequence))
        return f"{self._ids[sequence]}#segment{number}"


# ------------------------------------------------------------------------------------------------ judging and showing


def _check(name: str, suites: list[_Suite], folder: Path) -> Check:
    outcomes = _validate(suites)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    _write_docs(name, suites, outcomes, folder / "data_docs" / "index.html")
    if failed:
        worst = max(failed, key=lambda outcome: outcome.failing)
        which = f", first in {worst.ids[0]}" if worst.ids else ""
        others = " and others" if len({outcome.table for outcome in failed}) > 1 else ""
        detail = (
            f"{len(failed)} of {len(outcomes)} expectations failed on {worst.table}{others}: {worst.rule} "
            f"({worst.failing} of {worst.rows} rows{which}). The artifact was not published; correct the stage's "
            "input, or the limit in the recipe that the rule names"
        )
    else:
        rows = ", ".join(f"{len(suite.frame)} {suite.title}" for suite in suites)
        detail = f"all {len(outcomes)} expectations hold on {rows}"
    return Check(
        name=name,
        passed=not failed,
        detail=detail,
        metadata={
            "expectations": len(outcomes),
            "rows": {suite.title: len(suite.frame) for suite in suites},
            "failed": [
                {
                    "table": outcome.table,
                    "rule": outcome.rule,
                    "expectation": outcome.expectation,
                    "failing_rows": outcome.failing,
                    "ids": outcome.ids,
                    "observed": outcome.observed,
                }
                for outcome in failed
            ],
        },
    )


def _validate(suites: list[_Suite]) -> list[_Outcome]:
    """Run great-expectations on every frame, without its bars, log lines and files."""
    # The frames are numpy's; what Arrow keeps for later would stand beside their copies.
    pa.default_memory_pool().release_unused()
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = gx.get_context(
            mode="ephemeral",
            project_config=DataContextConfig(
                # The default makes a folder for pages below /tmp and leaves it there.
                store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
                progress_bars=ProgressBarsConfig(globally=False),
                analytics_enabled=False,
            ),
        )
        source = context.data_sources.add_pandas("staged")
        for suite in suites:
            batch = source.add_dataframe_asset(suite.title).add_batch_definition_whole_dataframe("all")
            result = batch.get_batch(batch_parameters={"dataframe": suite.frame}).validate(
                gx.ExpectationSuite(name=suite.title, expectations=suite.expectations),
                result_format={
                    "result_format": "SUMMARY",
                    "partial_unexpected_count": _SHOWN_ROWS,
                    # It would list all failing rows in one text.
                    "return_unexpected_index_query": False,
                },
            )
            outcomes += [_outcome(suite, one.to_json_dict()) for one in result.results]
    return outcomes


def _outcome(suite: _Suite, result: dict[str, Any]) -> _Outcome:
    configuration, values = result["expectation_config"], result["result"]
    passed = bool(result["success"])
    observed = [values["observed_value"]] if "observed_value" in values else values.get("partial_unexpected_list", [])
    # That a truth is false or a value absent is what the rule says already, and the numbers of ids mean nothing.
    told = () if configuration["kwargs"].get("column") == "id" else observed
    shown = dict.fromkeys(str(value) for value in told if value is not None and not isinstance(value, bool))
    problem = result.get("exception_info", {}).get("exception_message")
    return _Outcome(
        table=suite.title,
        rule=configuration["description"],
        expectation=configuration["type"],
        passed=passed,
        rows=len(suite.frame),
        failing=int(values.get("unexpected_count", 0 if passed else len(suite.frame))),
        ids=[suite.name(int(row)) for row in values.get("partial_unexpected_index_list") or []],
        observed="" if passed else problem or ", ".join(shown),
    )


def _write_docs(name: str, suites: list[_Suite], outcomes: list[_Outcome], path: Path) -> None:
    """The page; great-expectations' own renderer puts clocks and run ids into it, hence a template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("data_docs.html.j2").render(
        name=name.replace("_", " "),
        version=gx.__version__,
        expectations=len(outcomes),
        failed=sum(not outcome.passed for outcome in outcomes),
        tables=[
            {
                "title": suite.title,
                "note": suite.note,
                "rows": len(suite.frame),
                "failed": sum(not outcome.passed for outcome in outcomes if outcome.table == suite.title),
                "outcomes": [outcome for outcome in outcomes if outcome.table == suite.title],
                "summary": _describe(suite),
            }
            for suite in suites
        ],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _describe(suite: _Suite) -> list[dict[str, str]]:
    """Least, mean and greatest value of every number in a frame."""
    numbers = suite.frame.drop(columns="id", errors="ignore").select_dtypes("number")
    return [
        {
            "column": str(column).replace("_", " "),
            "least": f"{numbers[column].min():,}",
            "mean": f"{numbers[column].mean():,.4g}",
            "greatest": f"{numbers[column].max():,}",
        }
        for column in numbers
        if len(numbers)
    ]
