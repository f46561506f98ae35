"""The rewritten corpus on disk, and which of its sequences are read when.

In: sequences (token ids with marker pairs) and how often an epoch visits those of each source. Out: the shards called
``sequences``, and the narrow shards called ``outline`` that say what scheduling needs to know of each. `Sequences`
reads both, `Visits` puts them in order.
Always: memory holds a few numbers a sequence, and token ids only of those that were asked for; the order depends on
seed, epoch and weights, never on ranks or workers; the n-th visit of a run is found without those before it.
"""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from valr_ops.data.records import Box
from valr_ops.data.shards import ShardError, Shards, ShardWriter
from valr_ops.store.objects import Cache

SEQUENCE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("kind", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        (
            "segments",
            pa.list_(
                pa.struct(
                    [
                        ("position", pa.int32()),
                        ("digest", pa.string()),
                        ("box", pa.list_(pa.int32())),
                        ("step", pa.int32()),
                    ]
                )
            ),
        ),
        ("image_digests", pa.list_(pa.string())),
        ("image_grids", pa.list_(pa.list_(pa.int32()))),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)
"""Columns of the shards called ``sequences``."""

OUTLINE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("weight", pa.float64()),
        ("length", pa.int32()),
        ("segments", pa.int32()),
    ]
)
"""Columns of the shards called ``outline``, a row a sequence: `weight` is that of its source, `length` its number of
token ids, `segments` its number of segments."""

ROWS_A_BLOCK = 64
"""One sequence is read by decoding as many, about 64,000 ids."""

_OUTLINES_A_BLOCK = 65536
_MEND = "make the sequences with `valr run latent_corpus`, or bring them back with `dvc checkout latent_corpus`"


class Region(NamedTuple):
    """What a segment looks at: its target, by digest instead of by place in the record."""

    digest: str
    """Of an image."""
    box: Box | None = None
    """A region of it, or all of it."""
    views: tuple[str, ...] = ()
    """Digests, sorted, of all images of the question, if this is one of several; empty where it stands alone."""

    @classmethod
    def of(cls, digest: str, box: Listed[int] | None, images: Iterable[str]) -> Region:
        """The target of a segment whose record shows `images`.

        A region of an image is no view of the scene, and neither is an image that was taken out of the input.
        """
        shown = set(images)
        together = box is None and digest in shown and len(shown) > 1
        return cls(digest, _box(box), tuple(sorted(shown)) if together else ())

    def seen(self, *, joint: bool) -> Region:
        """This target as an encoder sees it: together with the other views, or each image for itself."""
        return self if joint or not self.views else Region(self.digest, self.box)


@dataclass(frozen=True)
class Segment:
    """One latent segment of a sequence."""

    position: int
    """Index of ``<latent>`` in `Sequence.input_ids`; ``</latent>`` is the next one."""
    digest: str | None
    """The image it looks at; None for a step without a target, which has cross-entropy only."""
    box: Box | None
    """A region of that image, or all of it."""
    step: int
    """Index of the step that follows."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """One record as token ids."""

    id: str
    source: str
    split: str
    kind: str
    input_ids: np.ndarray
    """[length] int32, with image pads expanded and every segment as two adjacent tokens without slots."""
    prompt_length: int
    """Ids before this index are not supervised."""
    segments: tuple[Segment, ...]
    """In reading order."""
    image_digests: tuple[str, ...]
    """Input images in the order of their pads."""
    image_grids: tuple[tuple[int, int, int], ...]
    """(1, height, width) of each input image in patches, as in `image_grid_thw`."""
    question: str
    answer: str

    @property
    def targets(self) -> list[Region | None]:
        """What each segment looks at, None for one without a target."""
        return [
            None if segment.digest is None else Region.of(segment.digest, segment.box, self.image_digests)
            for segment in self.segments
        ]


# ---------------------------------------------------------------------------------------------------------- on disk


def batch_of(sequences: Listed[Sequence]) -> pa.RecordBatch:
    """`sequences` as one block of `SEQUENCE_SCHEMA`."""
    ends = np.cumsum([0, *(len(one.input_ids) for one in sequences)], dtype=np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(one.input_ids for one in sequences)])
    columns: dict[str, pa.Array] = {"input_ids": pa.ListArray.from_arrays(pa.array(ends), pa.array(ids, pa.int32()))}
    for field in SEQUENCE_SCHEMA:
        if field.name == "segments":
            # vars() of a frozen dataclass is a dictionary of its fields, and thirty times cheaper than asdict().
            rows = [[vars(segment) for segment in one.segments] for one in sequences]
            columns[field.name] = pa.array(rows, field.type)
        elif field.name not in columns:
            columns[field.name] = pa.array([getattr(one, field.name) for one in sequences], field.type)
    return pa.RecordBatch.from_arrays([columns[name] for name in SEQUENCE_SCHEMA.names], schema=SEQUENCE_SCHEMA)


def sequence_of(row: pa.RecordBatch) -> Sequence:
    """The sequence of a batch of one row; its ids are a view of the batch."""
    values: dict[str, Any] = row.drop_columns(["input_ids"]).to_pylist()[0]
    segments = tuple(
        Segment(one["position"], one["digest"], _box(one["box"]), one["step"]) for one in values.pop("segments")
    )
    return Sequence(
        image_digests=tuple(values.pop("image_digests")),
        image_grids=tuple(tuple(grid) for grid in values.pop("image_grids")),
        input_ids=row["input_ids"][0].values.to_numpy(),
        segments=segments,
        **values,
    )


def targets_of(batch: pa.RecordBatch) -> Iterator[tuple[int, Region]]:
    """What the segments of a batch look at, in reading order, each with its row; those without a target left out."""
    segments = batch["segments"].flatten()
    rows = pc.list_parent_indices(batch["segments"]).to_pylist()
    digests, boxes = segments.field("digest").to_pylist(), segments.field("box").to_pylist()
    images = batch["image_digests"].to_pylist()
    for row, digest, box in zip(rows, digests, boxes, strict=True):
        if digest is not None:
            yield row, Region.of(digest, box, images[row])


def _box(values: Listed[int] | None) -> Box | None:
    if values is None:
        return None
    x0, y0, x1, y1 = values
    return x0, y0, x1, y1


def write_sequences(folder: Path, batches: Iterable[pa.RecordBatch], weights: Mapping[str, float]) -> None:
    """Write the shards called ``sequences``, a block for each batch, and ``outline`` beside them.

    Args:
        folder: where they go.
        batches: of `SEQUENCE_SCHEMA` and at most `ROWS_A_BLOCK` rows; held in memory one at a time.
        weights: how often an epoch visits each sequence of a source; once, where it is not named.
    """
    with (
        ShardWriter(folder, "sequences", SEQUENCE_SCHEMA) as sequences,
        ShardWriter(folder, "outline", OUTLINE_SCHEMA) as outline,
    ):
        waiting: list[pa.RecordBatch] = []
        for batch in batches:
            sequences.write(batch)
            waiting.append(_outline(batch, weights))
            if sum(map(len, waiting)) >= _OUTLINES_A_BLOCK:
                outline.write(_one(waiting))
                waiting = []
        if waiting:
            outline.write(_one(waiting))


def _outline(batch: pa.RecordBatch, weights: Mapping[str, float]) -> pa.RecordBatch:
    columns = [
        *(batch[name] for name in ("id", "source", "split")),
        pa.array([weights.get(name, 1.0) for name in batch["source"].to_pylist()], pa.float64()),
        *(pc.list_value_length(batch[name]) for name in ("input_ids", "segments")),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=OUTLINE_SCHEMA)


def _one(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


class Sequences:
    """The sequences of a rewritten corpus by place, decoded when they are asked for. One process and thread at a time.

    Args:
        location: the artifact `latent_corpus`, or an ``s3://`` prefix that it was copied to.
        split: only those of this split; None for all.
        cache: local copies of remote shards; needed for an ``s3://`` location.

    Raises:
        ShardError: it is missing or damaged.
    """

    def __init__(self, location: str | Path, split: str | None = None, cache: Cache | None = None) -> None:
        self._shards = Shards(location, "sequences", _MEND, cache)
        narrow = Shards(location, "outline", _MEND, cache)
        if len(narrow) != len(self._shards):
            raise ShardError(
                f"{location} has {len(self._shards)} sequences but an outline of {len(narrow)}: they are of two runs; "
                f"{_MEND}"
            )
        outline = pa.Table.from_batches(narrow.batches(), schema=narrow.schema)
        outline = outline.append_column("row", pa.array(np.arange(len(outline), dtype=np.int64)))
        self._hold(outline if split is None else outline.filter(pc.field("split") == split))

    def _hold(self, outline: pa.Table) -> None:
        self._outline = outline.combine_chunks()
        self._rows = outline["row"].to_numpy()
        self.lengths: np.ndarray = outline["length"].to_numpy()
        """[n] int32, number of token ids of each, markers included."""
        self.segments: np.ndarray = outline["segments"].to_numpy()
        """[n] int32, number of segments of each."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Sequence:
        """Raises `IndexError`, or `ShardError` where its block is damaged."""
        return sequence_of(self._shards.row(int(self._rows[place])))

    def __iter__(self) -> Iterator[Sequence]:
        """All of them in order, a few blocks in memory at a time."""
        return (self[place] for place in range(len(self)))

    def id(self, place: int) -> str:
        """The record's id, from memory."""
        return self._outline["id"][int(place)].as_py()

    def likeness(self, place: int) -> tuple[int, int, str]:
        """What sequences are sorted by to find others of like size: segments, tokens, id."""
        return int(self.segments[place]), int(self.lengths[place]), self.id(place)

    def taken(self, places: Listed[int]) -> Sequences:
        """Those at `places`, in this order."""
        part = copy.copy(self)
        part._hold(self._outline.take(pa.array(places, pa.int64())))
        return part

    def without(self, ids: Set[str]) -> Sequences:
        """All but those of `ids`."""
        if not ids:
            return self
        return self.taken([place for place in range(len(self)) if self.id(place) not in ids])

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The whole artifact as batches of `SEQUENCE_SCHEMA`, every split and whatever was taken.

        Raises:
            ShardError: a block is damaged.
        """
        return self._shards.batches()

    def visits(self, seed: int) -> Visits:
        """In which order, and how often, training reads them."""
        sources, weights = self._outline["source"].to_numpy(), self._outline["weight"].to_numpy()
        places = {name: np.flatnonzero(sources == name) for name in sorted(set(sources))}
        return Visits(places, {name: float(weights[of_source[0]]) for name, of_source in places.items()}, seed)


# ------------------------------------------------------------------------------------------------------------- order


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A shuffle of 0..n-1 that depends on nothing but its arguments."""
    return _permutation(n, seed, epoch).tolist()


def _permutation(n: int, *numbers: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(numbers)).permutation(n)


class Visits:
    """Which place is visited as number 0, 1, 2 ... of a run: the epochs one behind the other.

    A source's places lie in a row that never ends, one shuffle of them behind the other. An epoch takes ``weight``
    times their number from it, where the epoch before stopped, so that each place had its turn as often as any other,
    give or take one. What all sources gave is shuffled by `order`.

    Args:
        places: of each source.
        weights: how often an epoch visits each place of a source.
        seed: of every shuffle.
    """

    def __init__(self, places: Mapping[str, np.ndarray], weights: Mapping[str, float], seed: int) -> None:
        # The decimal number that was written, so that 0.1 is a tenth.
        self._sources = [
            (places[name], Fraction(repr(float(weights[name]))) * len(places[name]), zlib.crc32(name.encode()))
            for name in sorted(places)
        ]
        self._seed = seed
        self.per_epoch = float(sum(share for _, share, _ in self._sources))
        """Visits of an epoch on average; a fraction where a weight leaves one."""
        self._shuffled = functools.lru_cache(2)(self.epoch)

    def epoch(self, epoch: int) -> list[int]:
        """The places that an epoch visits, in order."""
        drawn = [np.zeros(0, dtype=np.int64)]
        for places, share, name in self._sources:
            first, last = math.floor(epoch * share), math.floor((epoch + 1) * share)
            for turn in range(first // len(places), -(-last // len(places))):
                start = turn * len(places)
                shuffled = places[_permutation(len(places), self._seed, turn, name)]
                drawn.append(shuffled[max(first - start, 0) : last - start])
        visited = np.sort(np.concatenate(drawn))
        return visited[order(len(visited), self._seed, epoch)].tolist()

    def between(self, start: int, stop: int) -> list[int]:
        """The places of the visits `start` .. `stop` - 1."""
        visited: list[int] = []
        epoch = int(start / self.per_epoch)
        # The closed form is off by a visit or two, because each source is rounded for itself.
        while self._before(epoch) > start:
            epoch -= 1
        while len(visited) < stop - start:
            at, end = start + len(visited) - self._before(epoch), stop - self._before(epoch)
            if at < self._before(epoch + 1) - self._before(epoch):
                visited += self._shuffled(epoch)[at:end]
            epoch += 1
        return visited

    def _before(self, epoch: int) -> int:
        """Number of visits before an epoch."""
        return sum(math.floor(epoch * share) for _, share, _ in self._sources)
