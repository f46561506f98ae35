"""The corpus on disk: `records.parquet` and `images.parquet`, written once by curation, read by everything after it.

In: records whose images were checked. Out: `CorpusRecord`s without bytes, and an `ImageStore` that gives the bytes or
the pixels of an image, or of a region of it, by digest.
Always: each distinct image stands once, rows are in a fixed order, row groups have a fixed size, so that equal
records give equal bytes; reading one image reads one small row group.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.data.images import decode
from valr_ops.data.records import Box, Image, Record, Split, Step, Target

RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("split", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
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
                    ]
                )
            ),
        ),
    ]
)
"""Columns of records.parquet."""

IMAGE_SCHEMA = pa.schema(
    [("digest", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("data", pa.binary())]
)
"""Columns of images.parquet."""

_RECORDS_PER_GROUP = 1024
_IMAGES_PER_GROUP = 16
_CACHED_GROUPS = 128


class CorpusError(ValueError):
    """A corpus file that is missing or lacks an image; the message says which and what to run."""


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


def without_bytes(record: Record) -> CorpusRecord:
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
    )


def write_records(path: Path, records: Sequence[CorpusRecord]) -> None:
    """Write records.parquet, in the order given."""
    rows = [
        {
            "id": record.id,
            "source": record.source,
            "license": record.license,
            "split": record.split,
            "kind": record.kind,
            "question": record.question,
            "answer": record.answer,
            "images": [vars(image) for image in record.images],
            "steps": [
                {
                    "text": step.text,
                    "image": step.target.image if step.target else None,
                    "box": list(step.target.box) if step.target and step.target.box else None,
                    "origin": step.target.origin if step.target else None,
                }
                for step in record.steps
            ],
        }
        for record in records
    ]
    table = pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)
    pq.write_table(table, path, row_group_size=_RECORDS_PER_GROUP, compression="zstd")


def read_records(folder: Path, split: Split | None = None) -> list[CorpusRecord]:
    """The records of a corpus folder, in file order.

    Args:
        folder: the artifact `cot_corpus`.
        split: only that one, or None for all.

    Raises:
        CorpusError: there is no records.parquet.
    """
    path = folder / "records.parquet"
    if not path.is_file():
        raise CorpusError(f"{path} does not exist; make the corpus with `valr run cot_corpus`")
    return [
        _record(row) for row in pq.read_table(path, schema=RECORD_SCHEMA).to_pylist() if split in (None, row["split"])
    ]


def _record(row: dict[str, Any]) -> CorpusRecord:
    return CorpusRecord(
        **{key: row[key] for key in ("id", "source", "license", "split", "kind", "question", "answer")},
        images=tuple(ImageReference(**image) for image in row["images"]),
        steps=tuple(
            Step(
                text=step["text"],
                target=None
                if step["image"] is None
                else Target(step["image"], tuple(step["box"]) if step["box"] else None, step["origin"]),
            )
            for step in row["steps"]
        ),
    )


class ImageSpool:
    """Collects the bytes of distinct images in one scratch file, so that a corpus needs no memory for its pixels."""

    def __init__(self, path: Path) -> None:
        """`path`: scratch file, overwritten, and deleted by `write_parquet`."""
        self._path = path
        self._file = path.open("wb")
        self._places: dict[str, tuple[int, int, int, int]] = {}

    def add(self, images: Iterable[Image]) -> None:
        """Keep the images that are new."""
        for image in images:
            if image.digest not in self._places:
                self._places[image.digest] = (self._file.tell(), len(image.data), image.width, image.height)
                self._file.write(image.data)

    def __len__(self) -> int:
        return len(self._places)

    def write_parquet(self, path: Path) -> None:
        """Write images.parquet sorted by digest, and delete the scratch file."""
        self._file.close()
        digests = sorted(self._places)
        with (
            self._path.open("rb") as spool,
            pq.ParquetWriter(path, IMAGE_SCHEMA, compression="none", use_dictionary=False) as writer,
        ):
            for start in range(0, len(digests), _IMAGES_PER_GROUP):
                rows = []
                for digest in digests[start : start + _IMAGES_PER_GROUP]:
                    offset, size, width, height = self._places[digest]
                    spool.seek(offset)
                    rows.append({"digest": digest, "width": width, "height": height, "data": spool.read(size)})
                writer.write_table(pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA))
        self._path.unlink()


class ImageStore:
    """Random access to images.parquet by digest. One process and one thread at a time."""

    def __init__(self, path: Path) -> None:
        """`path`: the file, or the corpus folder that holds it. Raises `CorpusError` where there is none."""
        self._path = path / "images.parquet" if path.is_dir() else path
        if not self._path.is_file():
            raise CorpusError(f"{self._path} does not exist; make the corpus with `valr run cot_corpus`")
        self._file = pq.ParquetFile(self._path)
        self._places: dict[str, tuple[int, int]] = {}
        for group in range(self._file.num_row_groups):
            column = self._file.read_row_group(group, columns=["digest"])["digest"]
            self._places |= {digest: (group, row) for row, digest in enumerate(column.to_pylist())}
        self._cache: OrderedDict[int, list[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def __iter__(self) -> Iterator[str]:
        """The digests, sorted."""
        return iter(self._places)

    def get(self, digest: str) -> bytes:
        """The encoded bytes. Raises `CorpusError` for an unknown digest."""
        if digest not in self._places:
            raise CorpusError(
                f"{self._path} has no image {digest}; the corpus it belongs to is another one: "
                "make both again with `valr run cot_corpus`"
            )
        group, row = self._places[digest]
        if group not in self._cache:
            self._cache[group] = self._file.read_row_group(group, columns=["data"])["data"].to_pylist()
            if len(self._cache) > _CACHED_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group][row]

    def load(self, digest: str, box: Box | None = None) -> PIL.Image.Image:
        """RGB pixels, EXIF orientation applied, transparency on white, cropped to `box` if one is given.

        Raises:
            CorpusError: an unknown digest.
        """
        return decode(self.get(digest), box)
