"""The corpus on disk: its records and its images in shards, written once by curation, read by everything after it.

In: records whose images were checked. Out: `CorpusRecord`s without bytes, found by number or id, and an `ImageStore`
that gives the bytes or the pixels of an image, or of a region of it, by digest.
Always: each distinct image stands once, in the order of its first use; equal records give equal bytes; reading one
record or one image reads one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import pyarrow as pa

from valr_ops.data.images import decode
from valr_ops.data.records import Box, Image, Record, Split, Step, Target
from valr_ops.data.shards import ShardError, Shards, ShardWriter
from valr_ops.store.objects import Cache, is_remote, open_files

RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("split", pa.string()),
        ("kind", pa.string()),
        ("scene", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("where", pa.string()),
        (
            "images",
            pa.list_(
                pa.struct(
                    [("digest", pa.string()), ("role", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
                )
            ),
        ),
        (
            "steps",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("image", pa.int32()),
                        ("box", pa.list_(pa.int32())),
                        ("origin", pa.string()),
                        ("by", pa.string()),
                    ]
                )
            ),
        ),
    ]
)
"""Columns of the shards called ``records``."""

IMAGE_SCHEMA = pa.schema(
    [("digest", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("data", pa.binary())]
)
"""Columns of the shards called ``images``."""

_TEXTS = ("id", "source", "license", "split", "kind", "scene", "question", "answer", "where")
RECORDS_A_BLOCK = 256
"""Records that are read together."""

_IMAGE_BYTES_A_BLOCK = 1 << 20
_KEYS = "images.keys.npy"
_MEND = "make the corpus with `valr run cot_corpus`, or bring it back with `dvc checkout cot_corpus`"


class CorpusError(ValueError):
    """A corpus that lacks an image; the message says which and what to run."""


@dataclass(frozen=True)
class ImageReference:
    """An image of a record without its bytes."""

    digest: str
    role: Literal["input", "step"]
    width: int
    height: int


@dataclass(frozen=True)
class CorpusRecord:
    """A record of the corpus; its images are in the `ImageStore`."""

    id: str
    source: str
    license: str
    split: Split
    kind: Literal["single_view", "multi_view", "interleaved"]
    question: str
    answer: str
    images: tuple[ImageReference, ...]
    steps: tuple[Step, ...]
    scene: str | None = None
    where: str = ""
    """File and place of the row it was read from."""


def without_bytes(record: Record, where: str = "") -> CorpusRecord:
    """The record as it stands in the corpus."""
    return CorpusRecord(
        id=record.id,
        source=record.source,
        license=record.license,
        split=record.split,
        kind=record.kind,
        question=record.question,
        answer=record.answer,
        images=tuple(ImageReference(image.digest, image.role, image.width, image.height) for image in record.images),
        steps=record.steps,
        scene=record.scene,
        where=where,
    )


class RecordColumns:
    """Records as Arrow columns, filled one by one; several times faster than from dictionaries."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str | None]] = {name: [] for name in _TEXTS}
        self._image_ends, self._step_ends, self._box_ends = [0], [0], [0]
        self._images: tuple[list[Any], ...] = ([], [], [], [])
        self._steps: tuple[list[Any], ...] = ([], [], [], [])
        self._boxes: list[int] = []
        self._boxless: list[bool] = []

    def __len__(self) -> int:
        return len(self._texts["id"])

    def add(self, record: Record | CorpusRecord, where: str | None = None) -> None:
        """One more row; `where` is for a `Record`, which does not know it."""
        for name, column in self._texts.items():
            column.append(where if name == "where" and where is not None else getattr(record, name))
        digests, roles, widths, heights = self._images
        for image in record.images:
            digests.append(image.digest)
            roles.append(image.role)
            widths.append(image.width)
            heights.append(image.height)
        self._image_ends.append(len(digests))
        texts, images, origins, matchers = self._steps
        for step in record.steps:
            target = step.target
            texts.append(step.text)
            images.append(None if target is None else target.image)
            origins.append(None if target is None else target.origin)
            matchers.append(None if target is None else target.by)
            box = None if target is None else target.box
            if box is not None:
                self._boxes += box
            self._boxless.append(box is None)
            self._box_ends.append(len(self._boxes))
        self._step_ends.append(len(texts))

    def arrays(self) -> list[pa.Array]:
        """The columns of `RECORD_SCHEMA`, in its order."""
        image_type, step_type = (RECORD_SCHEMA.field(name).type.value_type for name in ("images", "steps"))
        images = pa.StructArray.from_arrays(
            [pa.array(values, field.type) for values, field in zip(self._images, image_type, strict=True)],
            fields=list(image_type),
        )
        texts, indices, origins, matchers = self._steps
        boxes = pa.ListArray.from_arrays(
            pa.array(self._box_ends, pa.int32()),
            pa.array(self._boxes, pa.int32()),
            type=pa.list_(pa.int32()),
            mask=pa.array(self._boxless, pa.bool_()),
        )
        steps = pa.StructArray.from_arrays(
            [
                pa.array(texts, pa.string()),
                pa.array(indices, pa.int32()),
                boxes,
                pa.array(origins, pa.string()),
                pa.array(matchers, pa.string()),
            ],
            fields=list(step_type),
        )
        return [
            *(pa.array(self._texts[name], pa.string()) for name in _TEXTS),
            pa.ListArray.from_arrays(pa.array(self._image_ends, pa.int32()), images),
            pa.ListArray.from_arrays(pa.array(self._step_ends, pa.int32()), steps),
        ]

    def batch(self) -> pa.RecordBatch:
        """All rows as one batch."""
        return pa.RecordBatch.from_arrays(self.arrays(), schema=RECORD_SCHEMA)


def write_records(folder: Path, records: Iterable[CorpusRecord]) -> int:
    """Write the shards called ``records``, in the order given; the number of records."""
    with ShardWriter(folder, "records", RECORD_SCHEMA) as writer:
        columns = RecordColumns()
        for record in records:
            columns.add(record)
            if len(columns) == RECORDS_A_BLOCK:
                writer.write(columns.batch())
                columns = RecordColumns()
        writer.write(columns.batch())
        return len(writer)


class Records:
    """The records of a corpus by number, decoded when they are asked for.

    Args:
        location: the artifact `cot_corpus`, or an ``s3://`` prefix that it was copied to.
        cache: local copies of remote shards.

    Raises:
        ShardError: it is missing or damaged.
    """

    def __init__(self, location: str | Path, cache: Cache | None = None) -> None:
        self._shards = Shards(location, "records", _MEND, cache)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> CorpusRecord:
        """Raises `IndexError`, or `ShardError` where its block is damaged."""
        return record_of(self._shards.row(number).to_pylist()[0])

    def __iter__(self) -> Iterator[CorpusRecord]:
        """All of them in order, a block in memory at a time."""
        for batch in self._shards.batches():
            yield from map(record_of, batch.to_pylist())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The same as Arrow batches of `RECORD_SCHEMA`."""
        return self._shards.batches()

    @property
    def blocks(self) -> int:
        """Number of `batches`."""
        return self._shards.blocks

    @property
    def schema(self) -> pa.Schema:
        """Of the shards as they are."""
        return self._shards.schema


def read_records(location: str | Path, split: Split | None = None) -> list[CorpusRecord]:
    """All records in memory, or those of one split; for corpora that are known to be small.

    Raises:
        ShardError: it is missing or damaged.
    """
    return [record for record in Records(location) if split in (None, record.split)]


def record_of(row: dict[str, Any]) -> CorpusRecord:
    """The record of one row of `RECORD_SCHEMA`."""
    return CorpusRecord(
        **{name: row[name] for name in _TEXTS},
        images=tuple(ImageReference(**image) for image in row["images"]),
        steps=tuple(
            Step(
                text=step["text"],
                target=None
                if step["image"] is None
                else Target(step["image"], tuple(step["box"]) if step["box"] else None, step["origin"], step["by"]),
            )
            for step in row["steps"]
        ),
    )


class ImageWriter:
    """Writes the shards called ``images``: each distinct image once, in the order in which they come.

    Used in a ``with`` block, whose end writes the indices.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards = ShardWriter(folder, "images", IMAGE_SCHEMA, compression=None)
        self._numbers: dict[bytes, int] = {}
        self._block: list[tuple[str, int, int, bytes]] = []
        self._block_bytes = 0

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self._flush()
            write_keys(self._folder, self._numbers)
        self._shards.__exit__(kind, *rest)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, digest: str) -> bool:
        return bytes.fromhex(digest) in self._numbers

    def add(self, digest: str, width: int, height: int, data: bytes) -> None:
        """One image, unless it is there; `data` are its encoded bytes, and `digest` their SHA-256."""
        key = bytes.fromhex(digest)
        if key in self._numbers:
            return
        self._numbers[key] = len(self._numbers)
        self._block.append((digest, width, height, data))
        self._block_bytes += len(data)
        if self._block_bytes >= _IMAGE_BYTES_A_BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._block:
            columns = zip(*self._block, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, IMAGE_SCHEMA, strict=True)]
            self._shards.write(pa.RecordBatch.from_arrays(arrays, schema=IMAGE_SCHEMA))
        self._block, self._block_bytes = [], 0


def write_images(folder: Path, images: Iterable[Image]) -> None:
    """Write the distinct ones of `images` as the shards called ``images``."""
    with ImageWriter(folder) as writer:
        for image in images:
            writer.add(image.digest, image.width, image.height, image.data)


def write_keys(folder: Path, numbers: dict[bytes, int]) -> None:
    """The digests in order with their row numbers, for a binary search on the memory-mapped file."""
    keys = np.array(sorted(numbers.items()), dtype=_KEY) if numbers else np.zeros(0, dtype=_KEY)
    np.save(folder / _KEYS, keys, allow_pickle=False)


_KEY = np.dtype([("digest", "S32"), ("row", "<i8")])


class ImageStore:
    """Random access to the images of a corpus by digest. One process and one thread at a time.

    Args:
        location: the artifact `cot_corpus`, or an ``s3://`` prefix that it was copied to.
        cache: local copies of remote shards.

    Raises:
        ShardError: it is missing or damaged.
    """

    def __init__(self, location: str | Path, cache: Cache | None = None) -> None:
        self._location = location
        self._shards = Shards(location, "images", _MEND, cache)
        self._keys = self._read_keys()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, digest: str) -> bool:
        return self._number(digest) is not None

    def __iter__(self) -> Iterator[str]:
        """The digests, sorted."""
        return (key.ljust(32, b"\0").hex() for key in self._keys["digest"].tolist())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All images as Arrow batches of `IMAGE_SCHEMA`, in the order of their first use."""
        return self._shards.batches()

    def get(self, digest: str) -> bytes:
        """The encoded bytes.

        Raises:
            CorpusError: an unknown digest. ShardError: its block is damaged.
        """
        number = self._number(digest)
        if number is None:
            raise CorpusError(
                f"{self._location} has no image {digest}; the corpus it belongs to is another one: "
                "make both again with `valr run cot_corpus`"
            )
        row = self._shards.row(number)
        if row.column("digest")[0].as_py() != digest:
            raise ShardError(f"{self._location}/{_KEYS} is damaged: it leads to another image than {digest}; {_MEND}")
        return row.column("data")[0].as_py()

    def load(self, digest: str, box: Box | None = None) -> PIL.Image.Image:
        """RGB pixels, EXIF orientation applied, transparency on white, cropped to `box` if one is given.

        Raises:
            CorpusError: an unknown digest. ShardError: its block is damaged.
        """
        return decode(self.get(digest), box)

    def _number(self, digest: str) -> int | None:
        try:
            wanted = bytes.fromhex(digest)
        except ValueError:
            return None
        place = int(np.searchsorted(self._keys["digest"], np.bytes_(wanted)))
        found = place < len(self._keys) and self._keys["digest"][place] == wanted.rstrip(b"\0")
        return int(self._keys["row"][place]) if found else None

    def _read_keys(self) -> np.ndarray:
        if is_remote(self._location):
            with open_files(self._location).open(_KEYS) as stream:
                return np.load(stream, allow_pickle=False)
        return np.load(Path(self._location) / _KEYS, mmap_mode="r", allow_pickle=False)
