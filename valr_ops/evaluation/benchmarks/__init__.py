"""What every benchmark is: items in a fixed order, each with its question, its gold answer and where its pictures are.

In: a data set in its public on-disk layout.
Out: `Item`s. One module a benchmark reads them, and holds the rules that score their answers
(`valr_ops.evaluation.scoring`).
Always: ids are unique within a benchmark; nothing is decoded before an item is asked; an item that can't be asked is
named and counted, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from valr_ops.data.records import Image


class BenchmarkError(ValueError):
    """A benchmark that can't be run: what is missing, where, and how to provide it."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Where the encoded bytes of an image stand, below the benchmark's folder."""

    file: str
    """An image file, or a parquet file."""
    column: str = ""
    """Of the parquet file: bytes, base64 text, or a struct with `bytes`."""
    row: int = 0
    """Of the parquet file, from 0."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark."""

    id: str
    benchmark: str
    """Name under which its scores stand."""
    question: str
    """The words put to the model, options and instructions included, as the authors of the benchmark put them."""
    gold: str
    """The right answer in the data set's own form; of a list its JSON text."""
    options: tuple[str, ...] = ()
    """In the data set's own form."""
    question_type: str = ""
    """What the rules and totals of the benchmark are divided by."""
    cluster: str = ""
    """Items of one scene, pair or rotated question, which share their luck; empty for one that stands by itself."""
    images: tuple[Image | Picture, ...] = ()
    """Shown with the question, in this order."""
    video: str = ""
    """File below the benchmark's folder whose frames are shown."""
    frames: int = 0
    """Frames of the video to show; 0 for as many as are shown of any other."""
    group: str = ""
    """What a user's own benchmark is divided by in its totals; empty for none."""
    subgroup: str = ""
    """Of the group."""
