"""Sources of records: one reader a format, one way to read them all.

In: the recipe's sources, and the artifact `sources` that holds the drawn ones.
Out: a stream of `Record | Rejection` in the order of the files.
Always: a reader never stops at a bad record; it stops with a `SourceError` where there is nothing to read. Ids begin
with the source's name and are unique in a stream that went through a `Screen`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from valr_ops.data.records import REASONS, Record, Rejection, SourceError, Split, Step
from valr_ops.data.sources import jsonl, visual_cot, zebra_cot
from valr_ops.recipe.recipe import DataRecipe, Recipe

__all__ = [
    "SPLITS",
    "Screen",
    "SourceCheck",
    "SourceError",
    "check",
    "folder",
    "format_of",
    "probe",
    "read",
    "read_source",
]

READERS = {"jsonl": jsonl.read, "visual_cot": visual_cot.read, "zebra_cot": zebra_cot.read}
"""Reader of each format: ``read(folder, source, recipe, split)``."""

SPLITS: tuple[Split, ...] = ("test", "train", "validation")
"""In the order in which they have to be read, see `Screen`."""

DRAWN_LICENSE = "Apache-2.0"
"""Licence of drawn scenes, whatever public format they are written in: the project's own."""


def folder(name: str, recipe: Recipe, sources_artifact: Path) -> Path:
    """Folder (or file) of a source: the user's where the recipe gives a path, else the one drawn by stage `sources`.

    Raises:
        SourceError: the recipe has no such source.
    """
    if name not in recipe.data.sources:
        known = ", ".join(sorted(recipe.data.sources)) or "none"
        raise SourceError(f"there is no source {name!r} in data.sources; known: {known}")
    path = recipe.data.sources[name].path
    return sources_artifact / name if path is None else Path(path).expanduser()


def read(
    path: Path, source: str, format_name: str, recipe: DataRecipe, split: Split | None = None
) -> Iterator[Record | Rejection]:
    """Records and rejections of one folder or file in its format, in order.

    Raises:
        SourceError: the path is missing or empty, or holds nothing in that format.
    """
    if not path.exists() or (path.is_dir() and next(path.iterdir(), None) is None):
        state = "is empty" if path.exists() else "does not exist"
        raise SourceError(
            f"source {source!r}: {path} {state}; put the data there or correct data.sources.{source}.path "
            "(a relative path counts from the folder in which the command runs)"
        )
    yield from READERS[format_name](path, source, recipe, split)


def read_source(name: str, recipe: Recipe, sources_artifact: Path, split: Split) -> Iterator[Record | Rejection]:
    """Records and rejections of one split of one of the recipe's sources, at most its `limit`.

    Raises:
        SourceError: no such source, or nothing to read in it.
    """
    path = folder(name, recipe, sources_artifact)
    settings = recipe.data.sources[name]
    for item in islice(read(path, name, settings.format, recipe.data, split), settings.limit):
        if isinstance(item, Record) and settings.path is None:
            item = dataclasses.replace(item, license=DRAWN_LICENSE)
        yield item


def probe(name: str, recipe: Recipe, sources_artifact: Path) -> None:
    """Read the first item of a source, so that a wrong path or format stops the run at once.

    Raises:
        SourceError: nothing to read.
    """
    path = folder(name, recipe, sources_artifact)
    format_name = recipe.data.sources[name].format
    if next(read(path, name, format_name, recipe.data), None) is None:
        raise SourceError(
            f"source {name!r}: {path} has annotation files of format {format_name}, but no record in them"
        )


class Screen:
    """What a record can't tell about itself: whether it was seen before, and whether a benchmark shows its image.

    Test records have to be shown first. Duplicates are looked for among all training and validation records, and among
    the test records of each source.
    """

    def __init__(self) -> None:
        self._ids: set[tuple[str, str]] = set()
        self._contents: dict[tuple[str, bytes], str] = {}
        self._test_images: set[str] = set()

    def check(self, item: Record | Rejection) -> Record | Rejection:
        """`item`, or a `Rejection` (`benchmark_image`, `duplicate_id`, `duplicate_content`) in its place."""
        if isinstance(item, Rejection):
            return item
        among = f"test of {item.source}" if item.split == "test" else "corpus"
        if item.split == "test":
            self._test_images |= {image.digest for image in item.images}
        else:
            for number, image in enumerate(item.images):
                if image.digest in self._test_images:
                    detail = f"image {number} ({image.digest[:12]}) stands in a test split as well"
                    return Rejection(item.id, item.source, "benchmark_image", detail)
        if (among, item.id) in self._ids:
            return Rejection(item.id, item.source, "duplicate_id", "an earlier record has this id")
        content = (among, _content_digest(item))
        if content in self._contents:
            same = self._contents[content]
            return Rejection(item.id, item.source, "duplicate_content", f"same images, question and answer as {same}")
        self._ids.add((among, item.id))
        self._contents[content] = item.id
        return item


def _content_digest(record: Record) -> bytes:
    digest = hashlib.sha256()
    for part in (*(image.digest for image in record.images), record.question, record.answer):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.digest()


@dataclass
class SourceCheck:
    """What a folder or file holds, without making anything of it."""

    format: str
    read: int = 0
    kept: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    """Kept records by split."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected records by reason code."""
    examples: dict[str, str] = field(default_factory=dict)
    """First rejection of each reason: where, and what is wrong."""
    first: list[Record] = field(default_factory=list)
    """The first kept records, of the training split if there is one."""


def format_of(path: Path) -> str:
    """The format that the file names below `path` suggest; the reader then checks every record.

    Raises:
        SourceError: nothing that looks like one of the formats.
    """
    for format_name, suffix, deep in (
        ("jsonl", ".jsonl", ""),
        ("visual_cot", ".json", ""),
        ("zebra_cot", ".parquet", "**/"),
    ):
        if path.suffix == suffix if path.is_file() else any(path.glob(f"{deep}*{suffix}")):
            return format_name
    state = "holds no .jsonl, .json or .parquet file" if path.exists() else "does not exist"
    raise SourceError(f"{path} {state}; give a folder with train.jsonl, a .jsonl file, or one of the public layouts")


def check(path: Path, recipe: DataRecipe, format_name: str | None = None, shown: int = 3) -> SourceCheck:
    """Read everything below `path` and count what the stage `cot_corpus` would keep; for the verb ``check-data``.

    Args:
        path: folder or file.
        recipe: limits on images and steps.
        format_name: one of `READERS`; None to go by the file names.
        shown: number of records to keep for a preview.

    Raises:
        SourceError: nothing to read.
    """
    result = SourceCheck(format=format_name or format_of(path))
    source = path.resolve().parent.name if path.is_file() else path.resolve().name
    screen = Screen()
    kept: dict[Split, list[Record]] = {}
    for split in SPLITS:
        for item in map(screen.check, read(path, source, result.format, recipe, split)):
            result.read += 1
            if isinstance(item, Rejection):
                result.reasons[item.reason] += 1
                result.examples.setdefault(item.reason, item.detail)
                continue
            result.kept += 1
            result.splits[split] += 1
            if len(kept.setdefault(split, [])) < shown:
                kept[split].append(item)
    result.first = kept.get("train") or kept.get("validation") or kept.get("test") or []
    if not result.read:
        raise SourceError(f"{path} has annotation files of format {result.format}, but no record in them")
    return result


def check_and_show(path: Path, recipe: Recipe, last_line: Callable[..., None]) -> int:
    """The verb ``check-data``: print counts, reasons and the first records.

    Args:
        path: folder or file.
        recipe: its `data` part gives the limits.
        last_line: prints the closing line of JSON.

    Returns:
        the exit status: 0, or 3 where a record was rejected.

    Raises:
        SourceError: nothing to read.
    """
    result = check(path, recipe.data)
    console = Console()
    counts = Table(
        "split", "kept", title=f"{path}: format {result.format}, {result.kept} of {result.read} records kept"
    )
    for split, number in sorted(result.splits.items()):
        counts.add_row(split, str(number))
    console.print(counts)
    if result.reasons:
        rejected = Table("reason", "records", "rule", "first", title="Rejected")
        for reason, number in result.reasons.most_common():
            rejected.add_row(reason, str(number), REASONS[reason], escape(result.examples[reason]))
        console.print(rejected)
    if result.first:
        records = Table("id", "images", "question", "steps", "answer", title="First records")
        for record in result.first:
            images = ", ".join(f"{image.width}x{image.height}" for image in record.images)
            steps = "\n".join(_with_target(step) for step in record.steps)
            records.add_row(*map(escape, (record.id, images, record.question, steps, record.answer)))
        console.print(records)
    last_line(
        path=str(path),
        format=result.format,
        read=result.read,
        kept=result.kept,
        splits=dict(sorted(result.splits.items())),
        rejected=dict(sorted(result.reasons.items())),
    )
    return 3 if result.reasons else 0


def _with_target(step: Step) -> str:
    if step.target is None:
        return step.text
    box = f" {list(step.target.box)}" if step.target.box else ""
    return f"{step.text} → image {step.target.image}{box}"
