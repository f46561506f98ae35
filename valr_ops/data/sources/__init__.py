"""Sources of records: one reader a format, one way to read them all.

In: the recipe's sources, and the artifact `sources` that holds the drawn ones.
Out: a stream of `Record | Rejection` in the order of the files.
Always: a reader never stops at a bad record; it stops with a `SourceError` where there is nothing to read. Several
processes share a source by blocks of rows, and together they read what one would.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from valr_ops.data.records import BadRecord, Record, Rejection, SourceError, Split
from valr_ops.data.sources import cogcom, gcot, jsonl, monet, onethinker, refocus, visual_cot, zebra_cot
from valr_ops.data.sources.reading import Format, Reading, Row
from valr_ops.recipe.recipe import DataRecipe, Recipe, SourceRecipe
from valr_ops.store.objects import StorageError, is_remote

FORMATS: Mapping[str, Format] = {
    "zebra_cot": zebra_cot,
    "monet": monet,
    "cogcom": cogcom,
    "refocus": refocus,
    "visual_cot": visual_cot,
    "gcot": gcot,
    "onethinker": onethinker,
    "jsonl": jsonl,
}
"""The module of each format."""

SPLITS: tuple[Split, ...] = ("test", "train", "validation")
"""In the order in which a report names them."""

BLOCK_ROWS = 256
"""Rows that one process takes at a time."""

DRAWN_LICENSE = "Apache-2.0"
"""Licence of drawn scenes, whatever public format they are written in: the project's own."""


@dataclass(frozen=True)
class Share:
    """The blocks of rows that one of several processes reads."""

    index: int = 0
    count: int = 1

    def has(self, number: int) -> bool:
        """Whether the row of that number is in it."""
        return number // BLOCK_ROWS % self.count == self.index


@dataclass(frozen=True)
class Read:
    """One row, and what became of it."""

    number: int
    """Of the row in its source."""
    where: str
    """File and place, for people."""
    split: Split
    item: Record | Rejection


def folder(name: str, recipe: Recipe, sources_artifact: Path) -> str:
    """Location of a source: the user's where the recipe gives a path, else the folder drawn by stage `sources`.

    Raises:
        SourceError: the recipe has no such source.
    """
    if name not in recipe.data.sources:
        known = ", ".join(sorted(recipe.data.sources)) or "none"
        raise SourceError(f"there is no source {name!r} in data.sources; known: {known}")
    path = recipe.data.sources[name].path
    if path is None:
        return str(sources_artifact / name)
    return path if is_remote(path) else str(Path(path).expanduser())


def opened(name: str, recipe: Recipe, sources_artifact: Path) -> Reading:
    """One of the recipe's sources, ready to be read. Raises `SourceError`: no such source, or no such location."""
    settings = recipe.data.sources[name] if name in recipe.data.sources else SourceRecipe(format="jsonl")
    location = folder(name, recipe, sources_artifact)
    if settings.path is None:
        settings = settings.model_copy(update={"license": DRAWN_LICENSE})
    return located(name, location, recipe.data, settings)


def located(name: str, location: str, recipe: DataRecipe, settings: SourceRecipe) -> Reading:
    """A location as a source called `name`. Raises `SourceError` where there is nothing."""
    mend = f"put the data there or correct data.sources.{name}.path (a relative path counts from the folder in which "
    mend += "the command runs)"
    if not is_remote(location):
        path = Path(location)
        if not path.exists() or (path.is_dir() and next(path.iterdir(), None) is None):
            state = "is empty" if path.exists() else "does not exist"
            raise SourceError(f"source {name!r}: {location} {state}; {mend}")
    try:
        return Reading.of(name, location, recipe, settings)
    except StorageError as error:
        raise SourceError(f"source {name!r}: {error}; {mend}") from None


def read(reading: Reading, share: Share = Share(), splits: tuple[Split, ...] = SPLITS) -> Iterator[Read]:
    """What became of every row of a share, in order; at most `limit` rows of each split.

    Raises:
        SourceError: no file of the format, or one that can't be read to its end.
    """
    form, limit = FORMATS[reading.settings.format], reading.settings.limit
    seen: Counter[Split] = Counter()
    try:
        for row in form.rows(reading, share.has):
            seen[row.split] += 1
            over = limit is not None and seen[row.split] > limit
            if not over and row.split in splits and share.has(row.number):
                yield Read(row.number, row.where, row.split, item_of(row, form, reading))
    except StorageError as error:
        raise SourceError(f"source {reading.source!r}: {error}") from None


def item_of(row: Row, form: Format, reading: Reading) -> Record | Rejection:
    """What the reader makes of one row."""
    identity = f"{reading.source}/{row.where}"
    try:
        raw = row.load()
        identity = form.identity(raw, row, reading)
        record = form.record(raw, row, identity, reading)
    except BadRecord as bad:
        return Rejection(identity, reading.source, bad.reason, f"{row.where}, {bad.detail}")
    # What is drawn carries the project's licence, whatever the public format's data set has.
    drawn = reading.settings.path is None and reading.settings.license
    return dataclasses.replace(record, license=drawn) if drawn and record.license != drawn else record


def read_source(name: str, recipe: Recipe, sources_artifact: Path, split: Split) -> Iterator[Record | Rejection]:
    """Records and rejections of one split of one of the recipe's sources, at most its `limit`.

    Raises:
        SourceError: no such source, or nothing to read in it.
    """
    return (one.item for one in read(opened(name, recipe, sources_artifact), splits=(split,)))


def probe(name: str, recipe: Recipe, sources_artifact: Path) -> None:
    """Read the first row of a source, so that a wrong path or format stops the run at once.

    Raises:
        SourceError: nothing to read.
    """
    opening = opened(name, recipe, sources_artifact)
    if next(read(opening), None) is None:
        raise SourceError(
            f"source {name!r}: {opening.files.location} has annotation files of format {opening.settings.format}, but "
            "no record in them"
        )


def format_of(location: str) -> str:
    """The format that the file names below a location suggest; the reader then checks every record.

    Raises:
        SourceError: nothing that looks like one of the formats.
    """
    path = Path(location)
    if not is_remote(location) and not path.exists():
        raise SourceError(f"{location} does not exist; give a folder with train.jsonl, or a .jsonl file")
    try:
        files = Reading.of("data", location, DataRecipe(), _ANY).files
        found, left_out = ([path.name], []) if path.is_file() else files.listed()
    except StorageError as error:
        raise SourceError(str(error)) from None
    # A link that is left out still tells the format, and its reader then names it.
    names = [*found, *left_out]
    tests = (
        ("jsonl", lambda name: name.endswith(".jsonl") and "/" not in name),
        ("onethinker", lambda name: name.rsplit("/", 1)[-1].startswith("onethinker") and name.endswith(".json")),
        ("monet", lambda name: name.count("/") == 1 and name.endswith("/train.json")),
        ("zebra_cot", lambda name: name.endswith(".parquet")),
        ("cogcom", lambda name: name.endswith((".tar", ".tar.gz", ".tgz"))),
        ("refocus", lambda name: name.endswith(".json") and "refocus" in name.lower()),
        ("gcot", lambda name: name.endswith(".json") and "gcot" in name.lower()),
        ("visual_cot", lambda name: name.endswith(".json") and "/" not in name),
    )
    for format_name, fits in tests:
        if any(map(fits, names)):
            return format_name
    raise SourceError(
        f"{location} holds no .jsonl, .json, .parquet or .tar file (linked folders are not followed); give a folder "
        "with train.jsonl, a .jsonl file, or one of the public layouts"
    )


_ANY = SourceRecipe(format="jsonl")
