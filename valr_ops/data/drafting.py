"""Reading all sources with all cores: from files to drafts of the corpus on the local disk.

In: the recipe's sources. Out: for every source a stream of Arrow batches in the order of its rows, one a block of
`sources.BLOCK_ROWS` rows, with the record or the rejection of each row and the digests by which records are compared;
and the bytes of the images, each once a process, in a scratch file.
Always: what comes out does not depend on the number of processes; memory holds one block and the last images a process;
a process ends by itself when the one that started it is gone.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from valr_ops.data import sources
from valr_ops.data.corpus import RECORD_SCHEMA, RecordColumns
from valr_ops.data.likeness import look_of
from valr_ops.data.records import BadRecord, Image, Record, Rejection
from valr_ops.data.screening import record_key
from valr_ops.data.sources.reading import Reading
from valr_ops.workers import workers

_KEY_FIELDS = [
    ("content", pa.binary(16)),
    ("question_digest", pa.binary(16)),
    ("asked", pa.binary(16)),
]
KEPT_SCHEMA = pa.schema([*RECORD_SCHEMA, *(pa.field(*one) for one in _KEY_FIELDS)])
"""Columns of a block's records."""

REJECTED_SCHEMA = pa.schema(
    [("split", pa.string()), ("id", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
"""Columns of a block's rejections."""

IMAGE_PLACES = pa.schema(
    [
        ("digest", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("look", pa.binary(24)),
    ]
)
"""Columns of the list of images that one process met."""

_MANY_BYTES = 32 * 2**20
"""Sources smaller than this are read by one process: starting others would take longer."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Draft:
    """What one process made of its share of one source."""

    source: str
    folder: Path
    blocks: tuple[int, ...]
    """Numbers of the blocks that it read, in order."""

    def kept(self) -> Iterator[pa.RecordBatch]:
        """A batch of `KEPT_SCHEMA` for every block, in order."""
        return _stream(self.folder / "kept.arrows")

    def rejected(self) -> Iterator[pa.RecordBatch]:
        """A batch of `REJECTED_SCHEMA` for every block, in order."""
        return _stream(self.folder / "rejected.arrows")

    def images(self) -> Iterator[pa.RecordBatch]:
        """Batches of `IMAGE_PLACES`; the offsets count in the file `spool`."""
        return _stream(self.folder / "images.arrows")

    @property
    def spool(self) -> Path:
        """The encoded bytes of the images, one behind the other."""
        return self.folder / "images.spool"


def draft(readings: Iterable[Reading], work: Path, source_bytes: int | None, processes: int | None = None) -> _Drafting:
    """Start reading.

    Args:
        readings: the sources, in corpus order.
        work: scratch folder.
        source_bytes: size of all their files, where it is known: small sources are read in this process.
        processes: how many; None for as many as there are cores, at most 8.
    """
    many = source_bytes is None or source_bytes > _MANY_BYTES
    count = processes or (min(8, os.cpu_count() or 1) if many else 1)
    return _Drafting(list(readings), work, count)


class _Drafting:
    """Iterate over it for the number of rows read since the last time; then `drafts` holds the result."""

    def __init__(self, readings: list[Reading], work: Path, count: int) -> None:
        self._readings, self._work, self._count = readings, work, count
        self.drafts: dict[str, list[Draft]] = {reading.source: [] for reading in readings}

    def __iter__(self) -> Iterator[int]:
        tasks = [
            (reading, sources.Share(index, self._count)) for reading in self._readings for index in range(self._count)
        ]
        if self._count == 1:
            for reading, share in tasks:
                share_work = _Share(reading, share, self._work)
                yield from share_work
                self.drafts[reading.source].append(share_work.draft)
            return
        done = multiprocessing.get_context("forkserver").SimpleQueue()
        with workers(self._count, __name__, _begin, (done,)) as pool:
            futures = [pool.submit(_read_share, reading, share, self._work) for reading, share in tasks]
            yield from _counted(futures, done)
        for future in futures:
            made = future.result()
            self.drafts[made.source].append(made)


def _counted(futures: list[Future[Draft]], done: Any) -> Iterator[int]:
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
        for future in finished:
            future.result()
        while not done.empty():
            yield done.get()
    while not done.empty():
        yield done.get()


_done: Any = None


def _begin(done: Any) -> None:
    """In every process: where it tells how many rows it has read."""
    global _done
    _done = done


def _read_share(reading: Reading, share: sources.Share, work: Path) -> Draft:
    share_work = _Share(reading, share, work)
    for rows in share_work:
        _done.put(rows)
    return share_work.draft


class _Share:
    """Reads one share of one source; iterate over it for the number of rows of each block."""

    def __init__(self, reading: Reading, share: sources.Share, work: Path) -> None:
        self._reading, self._share = reading, share
        folder = work / f"{reading.source}.{share.index}"
        folder.mkdir(parents=True, exist_ok=True)
        self.draft = Draft(reading.source, folder, ())

    def __iter__(self) -> Iterator[int]:
        folder = self.draft.folder
        numbers: list[int] = []
        with (
            pa.ipc.new_stream(folder / "kept.arrows", KEPT_SCHEMA) as kept,
            pa.ipc.new_stream(folder / "rejected.arrows", REJECTED_SCHEMA) as rejected,
            _ImageSpool(folder) as images,
        ):
            for block in _blocks(sources.read(self._reading, self._share)):
                records, rejections = _Block(), _Rejections()
                for one in block:
                    if isinstance(one.item, Rejection):
                        rejections.add(one.split, one.item)
                        continue
                    try:
                        images.add(one.item.images)
                    except BadRecord as bad:
                        detail = f"{one.where}, {bad.detail}"
                        rejections.add(one.split, Rejection(one.item.id, one.item.source, bad.reason, detail))
                        continue
                    records.add(one.item, one.where)
                kept.write_batch(records.batch())
                rejected.write_batch(rejections.batch())
                images.flush()
                numbers.append(block[0].number // sources.BLOCK_ROWS)
                yield len(block)
        self.draft = Draft(self.draft.source, folder, tuple(numbers))


def _blocks(items: Iterable[sources.Read]) -> Iterator[list[sources.Read]]:
    """The rows of each block that has any."""
    for _, rows in groupby(items, key=lambda one: one.number // sources.BLOCK_ROWS):
        yield list(rows)


class _Block:
    """The records of a block with their keys."""

    def __init__(self) -> None:
        self._records = RecordColumns()
        self._keys: tuple[list[Any], ...] = ([], [], [])

    def add(self, record: Record, where: str) -> None:
        self._records.add(record, where)
        key = record_key(record)
        for column, value in zip(self._keys, (key.content, key.question, key.asked), strict=True):
            column.append(value)

    def batch(self) -> pa.RecordBatch:
        keys = [pa.array(values, kind) for values, (_, kind) in zip(self._keys, _KEY_FIELDS, strict=True)]
        return pa.RecordBatch.from_arrays([*self._records.arrays(), *keys], schema=KEPT_SCHEMA)


class _Rejections:
    def __init__(self) -> None:
        self._rows: tuple[list[str], ...] = ([], [], [], [])

    def add(self, split: str, rejection: Rejection) -> None:
        for column, value in zip(self._rows, (split, rejection.id, rejection.reason, rejection.detail), strict=True):
            column.append(value)

    def batch(self) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([pa.array(row, pa.string()) for row in self._rows], schema=REJECTED_SCHEMA)


class _ImageSpool:
    """The bytes of the images that this process met, each once, and where they stand."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "images.spool").open("wb")
        self._places = pa.ipc.new_stream(folder / "images.arrows", IMAGE_PLACES)
        self._known: set[bytes] = set()
        self._new: list[tuple[str, int, int, int, int, bytes | None]] = []

    def __enter__(self) -> _ImageSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.close()
        self._file.close()

    def add(self, images: Iterable[Image]) -> None:
        for image in images:
            digest = bytes.fromhex(image.digest)
            if digest not in self._known:
                try:
                    seen = look_of(image.data)
                except Exception as error:
                    # The reader decoded it, but a hostile file may fail only when it is converted to RGB.
                    raise BadRecord("image_unreadable", f"an image: {type(error).__name__}") from None
                self._known.add(digest)
                place = self._file.tell(), len(image.data)
                self._new.append((image.digest, *place, image.width, image.height, seen))
                self._file.write(image.data)

    def flush(self) -> None:
        if self._new:
            columns = zip(*self._new, strict=True)
            arrays = [pa.array(column, one.type) for column, one in zip(columns, IMAGE_PLACES, strict=True)]
            self._places.write_batch(pa.RecordBatch.from_arrays(arrays, schema=IMAGE_PLACES))
            self._new = []


def in_turn(drafts: list[Draft], part: Literal["kept", "rejected"]) -> Iterator[tuple[Draft, pa.RecordBatch]]:
    """One source's blocks in the order of its rows, each with the draft that it stands in."""
    streams = {one: getattr(one, part)() for one in drafts}
    for _, one in heapq.merge(*([(number, one) for number in one.blocks] for one in drafts), key=itemgetter(0)):
        yield one, next(streams[one])


def _stream(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader
