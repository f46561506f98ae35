"""What a folder or file of records holds, before anything is made of it: the verb ``check-data``.

In: a local folder or file, or an ``s3://`` prefix, in one of the formats. Out: counts by split, every reason with its
first example, and the first usable records, on the screen and as pictures.
Always: what is counted as kept is what the stage `cot_corpus` would keep, before any cap on the source; a place that
the recipe names as a source is read with that source's settings; no model is asked; memory holds keys of records, never
their images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from valr_ops.data import screening, sources
from valr_ops.data.corpus import without_bytes
from valr_ops.data.images import decode
from valr_ops.data.matching import Matcher
from valr_ops.data.records import REASONS, Record, Rejection, SourceError, Split
from valr_ops.data.showing import describe, write_pictures
from valr_ops.data.sources.reading import Reading
from valr_ops.recipe.recipe import DataRecipe, SourceRecipe
from valr_ops.store.objects import is_remote
from valr_ops.store.progress import Progress, ShowingProgress

EXIT_USABLE, EXIT_NOTHING_READ, EXIT_REJECTED = 0, 2, 3

SHOWN_RECORDS = 3
"""Records that are shown in full."""

_NOT_EVEN_DECODED = {"not_json", "not_utf8"}


@dataclass
class SourceCheck:
    """What became of every row."""

    source: str
    """Name that the ids begin with."""
    format: str
    read: Counter[Split] = field(default_factory=Counter)
    """Rows by split."""
    kept: Counter[Split] = field(default_factory=Counter)
    """Records by split that `cot_corpus` would take."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rejected rows by reason code."""
    examples: dict[str, str] = field(default_factory=dict)
    """First rejection of each reason: where, and what is wrong."""
    first: list[Record] = field(default_factory=list)
    """The first kept records, of the training split if there is one."""

    @property
    def exit_status(self) -> int:
        """0 where every row is usable, 3 where some were rejected, 2 where not one row could even be decoded."""
        if not self.kept and set(self.reasons) <= _NOT_EVEN_DECODED:
            return EXIT_NOTHING_READ
        return EXIT_REJECTED if self.reasons else EXIT_USABLE

    def reject(self, reason: str, detail: str) -> None:
        """Count one row that is left out."""
        self.reasons[reason] += 1
        self.examples.setdefault(reason, detail)


def check(
    location: str,
    recipe: DataRecipe,
    format_name: str | None = None,
    shown: int = SHOWN_RECORDS,
    progress: Progress | None = None,
) -> SourceCheck:
    """Read everything at `location` and count what the stage `cot_corpus` would keep.

    Args:
        location: folder, file or ``s3://`` prefix.
        recipe: limits, licence policy and benchmarks; a source with this path gives name, format and mapping.
        format_name: one of `sources.FORMATS`; None to go by the recipe or the file names.
        shown: number of records to keep for a preview.
        progress: where rows are counted while they are read.

    Raises:
        SourceError: nothing to read, or a file that can't be read to its end.
    """
    try:
        return _check(location, recipe, format_name, shown, progress or Progress())
    except PermissionError as error:
        raise SourceError(
            f"{error.filename or location} can't be read: {error.strerror}; give yourself the right to read it"
        ) from None


@dataclass(frozen=True)
class _Place:
    """Where a record that its reader yielded stands."""

    number: int
    where: str
    split: Split
    unmatched: Rejection | None
    """What the recipe says about a multi-view record whose steps name no image."""


def _check(location: str, recipe: DataRecipe, format_name: str | None, shown: int, progress: Progress) -> SourceCheck:
    if not is_remote(location) and not Path(location).exists():
        raise SourceError(f"{location} does not exist; give a folder with train.jsonl, or a .jsonl file")
    name, settings = _source(location, recipe, format_name)
    reading = sources.located(name, location, recipe, settings)
    result = SourceCheck(name, settings.format)
    benchmarks = screening.read_benchmarks(recipe) if recipe.benchmarks else None
    matcher = Matcher(recipe.matching, None) if recipe.matching.by == "data" else None
    keys = screening.Keys()
    places: list[_Place] = []
    tracked = progress.track(sources.read(reading), f"reading {name}")
    with closing(cast("Generator[sources.Read, None, None]", tracked)) as rows:
        for row in rows:
            result.read[row.split] += 1
            if isinstance(row.item, Rejection):
                result.reject(row.item.reason, row.item.detail)
                continue
            try:
                keys.add(row.item)
            except Exception as error:
                # The reader decoded it, but a hostile file may fail only when it is converted to RGB.
                result.reject("image_unreadable", f"{row.where}, an image: {type(error).__name__}")
                continue
            found = matcher.match([without_bytes(row.item, row.where)], _no_bytes)[0] if matcher else None
            unmatched = found if isinstance(found, Rejection) else None
            places.append(_Place(row.number, row.where, row.split, unmatched))
    if not result.read:
        raise SourceError(f"{location} has annotation files of format {result.format}, but no record in them")
    kept: dict[Split, list[int]] = {}
    for place, decision in zip(places, screening.decide(keys, recipe, benchmarks), strict=True):
        if decision is not None:
            result.reject(decision[0], f"{place.where}, {decision[1]}")
        elif place.unmatched is not None:
            result.reject(place.unmatched.reason, place.unmatched.detail)
        else:
            result.kept[place.split] += 1
            kept.setdefault(place.split, []).append(place.number)
    first = kept.get("train") or kept.get("validation") or kept.get("test") or []
    result.first = _again(reading, first[:shown])
    return result


def _no_bytes(digest: str) -> bytes:
    raise AssertionError(f"no model is asked, so nobody looks at image {digest}")


def _source(location: str, recipe: DataRecipe, format_name: str | None) -> tuple[str, SourceRecipe]:
    """The recipe's name and settings for a location, or a name made of it and the settings of a plain source."""
    for name, settings in recipe.sources.items():
        same = settings.path is not None and _place(settings.path) == _place(location)
        if same and format_name in (None, settings.format):
            return name, settings
    path = Path(_place(location))
    # A name that a recipe can have, so that the ids are those of the corpus.
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.parent.name if path.is_file() else path.name).lstrip("_-")
    return name or "data", SourceRecipe.model_validate(
        {"format": format_name or sources.format_of(location), "path": location}
    )


def _place(location: str) -> str:
    return location.rstrip("/") if is_remote(location) else str(Path(location).expanduser().resolve())


def _again(reading: Reading, numbers: Iterable[int]) -> list[Record]:
    """The records of a few rows, read once more rather than held all the time."""
    wanted = set(numbers)
    found: list[Record] = []
    form = sources.FORMATS[reading.settings.format]
    for row in form.rows(reading, wanted.__contains__):
        if len(found) == len(wanted):
            break
        if row.number in wanted and isinstance(record := sources.item_of(row, form, reading), Record):
            found.append(record)
    return found


def check_and_show(
    location: str,
    shown_as: str,
    recipe: DataRecipe,
    last_line: Callable[..., None],
    format_name: str | None = None,
    pictures: Path | None = None,
) -> int:
    """The verb ``check-data``: print counts, reasons and the first records.

    Args:
        location: folder, file or ``s3://`` prefix.
        shown_as: what was typed for it.
        recipe: see `check`.
        last_line: prints the closing line of JSON.
        format_name: see `check`.
        pictures: folder for the images of the first records, with their targets drawn; None for none.

    Returns:
        the exit status, see `SourceCheck.exit_status`.

    Raises:
        SourceError: nothing to read.
    """
    result = check(location, recipe, format_name, progress=ShowingProgress("check-data"))
    console = Console(highlight=False, emoji=False)
    read, kept = result.read.total(), result.kept.total()
    console.print(
        Text.assemble((shown_as, "bold"), f": format {result.format}, {kept} of {read} records would be kept"),
        soft_wrap=True,
    )
    console.print()
    console.print(_splits_table(result))
    if result.reasons:
        console.print()
        console.print(_rejected_table(result))
    for record in result.first:
        console.print()
        console.print(describe(record))
    files = _draw(result.first, pictures) if pictures is not None else []
    if files:
        console.print(Text(f"\n{len(files)} pictures in {pictures}"), soft_wrap=True)
    last_line(
        path=shown_as,
        format=result.format,
        read=read,
        kept=kept,
        splits=dict(sorted(result.kept.items())),
        rejected=dict(sorted(result.reasons.items())),
        **({"pictures": [str(file) for file in files]} if pictures is not None else {}),
    )
    return result.exit_status


def _splits_table(result: SourceCheck) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for name in ("read", "kept", "rejected"):
        table.add_column(name, justify="right")
    for split in sources.SPLITS:
        if read := result.read[split]:
            kept = result.kept[split]
            table.add_row(split, f"{read:,}", f"{kept:,}", f"{read - kept:,}")
    return table


def _rejected_table(result: SourceCheck) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("rejected because", no_wrap=True)
    table.add_column("records", justify="right")
    table.add_column("rule, and the first one", overflow="fold")
    for reason, number in sorted(result.reasons.items(), key=lambda one: (-one[1], one[0])):
        about = Text.assemble(REASONS[reason], "\n", (result.examples[reason], "dim"))
        table.add_row(Text(reason, style="yellow"), f"{number:,}", about)
    return table


def _draw(records: Iterable[Record], folder: Path) -> list[Path]:
    files: list[Path] = []
    for number, record in enumerate(records, start=1):
        pictures = (decode(image.data) for image in record.images)
        files += write_pictures(folder, f"record_{number}_", pictures, record.steps)
    return files
