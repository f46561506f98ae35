"""What every reader is given, what it gives, and the containers that the public formats come in.

A format is a module with three functions:

    rows(reading, wanted) -> Iterator[Row]           the elements of its files, in order, cheap for those not `wanted`
    identity(raw, row, reading) -> str               the id of a decoded element
    record(raw, row, identity, reading) -> Record    its record; raises `BadRecord` with a reason code

In: files below a local folder or an ``s3://`` prefix. Out: rows, one at a time.
Always: a bad row is a `BadRecord` and reading goes on; a bad container (a truncated array, parquet or tar) is a
`SourceError` and stops the run; no container is held in memory; a file that changes while it is read is noticed.
"""

from __future__ import annotations

import codecs
import json
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Literal, Protocol

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.data.images import ImageLimits, check_image, read_bytes, read_image
from valr_ops.data.records import BadRecord, Image, Record, SourceError, Split, Step, check_record, shortened
from valr_ops.recipe.recipe import DataRecipe, SourceRecipe
from valr_ops.store.objects import EscapeError, Files, StorageError, checked, open_files, refuse_links

MAX_ROW_BYTES = 32 * 2**20
"""Of one line or element of JSON, and of one metadata member of a tar; more is no record."""

_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")
_CACHED_IMAGE_BYTES = 64 * 2**20
_ROWS_AT_A_TIME = 16
_PROBED_ROWS = 8
# What tarfile raises for a damaged archive; ValueError for the numbers in its headers.
_BAD_TAR = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)

Wanted = Callable[[int], bool]
"""Whether this process works on the row of that number; it may skip the costly part of the others."""


@dataclass(frozen=True)
class Row:
    """One element of a source's files, before anything is known about it."""

    number: int
    """Counted over all files of the source."""
    where: str
    """File and place, for people: ``train.jsonl line 17``."""
    split: Split
    """What the file or the row says it belongs to."""
    load: Callable[[], Any]
    """Decodes the element; only called for a row that is wanted, before the next row is asked for. Raises
    `BadRecord`."""


class Format(Protocol):
    """What a module of this package has to have."""

    LICENSE: str

    def rows(self, reading: Reading, wanted: Wanted) -> Iterator[Row]:
        """The elements of the files in order. Raises `SourceError` for files that can't be read."""

    def identity(self, raw: Any, row: Row, reading: Reading) -> str:
        """The record's id, the source's name in front. Raises `BadRecord` where there is none."""

    def record(self, raw: Any, row: Row, identity: str, reading: Reading) -> Record:
        """The record. Raises `BadRecord`."""


@dataclass(frozen=True)
class Reading:
    """A source while it is read: its files, what the recipe says about it, and the images seen last."""

    source: str
    """Name that every id begins with."""
    files: Files
    recipe: DataRecipe
    settings: SourceRecipe
    only: str | None = None
    """The one file to read, where the location is a file."""
    _images: OrderedDict[tuple[str, str], Image] = field(default_factory=OrderedDict, compare=False, repr=False)
    _held: list[int] = field(default_factory=lambda: [0], compare=False, repr=False)

    @classmethod
    def of(cls, source: str, location: str, recipe: DataRecipe, settings: SourceRecipe) -> Reading:
        """`location` is a folder, a file, or an ``s3://`` prefix."""
        files = open_files(location)
        root = getattr(files, "root", None)
        if root is not None and root.is_file():
            return cls(source, open_files(root.parent), recipe, settings, only=root.name)
        return cls(source, files, recipe, settings)

    @property
    def limits(self) -> ImageLimits:
        """Bounds on images."""
        return ImageLimits(self.recipe.min_image_side, self.recipe.max_image_pixels)

    def license(self, of_the_data_set: str) -> str:
        """The licence of a record that names none itself."""
        return self.settings.license or of_the_data_set

    def record(
        self,
        row: Row,
        identity: str,
        *,
        license: str,
        kind: Literal["single_view", "multi_view", "interleaved"],
        question: str,
        images: tuple[Image, ...],
        steps: tuple[Step, ...],
        answer: str,
        scene: str | None = None,
    ) -> Record:
        """The record of a row, if its parts fit together. Raises `BadRecord` as `check_record`."""
        record = Record(identity, self.source, license, row.split, kind, question, images, steps, answer, scene)
        return check_record(record, self.recipe.max_steps)

    def names(self, *suffixes: str, deep: bool = True) -> list[str]:
        """Names of the source's files with one of these endings, sorted.

        Raises:
            SourceError: there is none, a link to one would be left out, or the location can't be listed.
        """
        if self.only is not None:
            found = [self.only] if self.only.endswith(suffixes) else []
        else:
            try:
                found, left_out = self.files.listed(*suffixes)
                if not deep:
                    found, left_out = ([name for name in names if "/" not in name] for names in (found, left_out))
                refuse_links(self.files.location, left_out)
            except StorageError as error:
                raise SourceError(f"source {self.source!r}: {error}; {self.mend}") from None
        if not found:
            raise SourceError(
                f"source {self.source!r}: no {' or '.join(suffixes)} file in {self.files.location}; {self.mend}"
            )
        return found

    @property
    def mend(self) -> str:
        """What to do about a location in which nothing can be read."""
        return f"put the data there or correct data.sources.{self.source}.path"

    def image(self, name: object, role: Literal["input", "step"], where: str) -> Image:
        """The checked image that an annotation names; one that was read a moment ago is not read again.

        Raises:
            BadRecord: see `valr_ops.data.images.read_image`.
        """
        key = (str(name), role)
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        image = read_image(self.files, name, role, self.limits, where)
        self._images[key] = image
        self._held[0] += len(image.data)
        while self._held[0] > _CACHED_IMAGE_BYTES and len(self._images) > 1:
            self._held[0] -= len(self._images.popitem(last=False)[1].data)
        return image

    def embedded(self, data: object, role: Literal["input", "step"], where: str) -> Image:
        """The checked image whose encoded bytes stand in the row. Raises `BadRecord`."""
        if not isinstance(data, bytes):
            raise BadRecord("image_missing", f"{where}: no image")
        return check_image(data, role, self.limits, where)

    def bytes(self, name: object, at_most: int, where: str) -> bytes:
        """A file that an annotation names and that is no image, such as a video. Raises `BadRecord`."""
        return read_bytes(self.files, name, at_most, where)

    def broken(self, name: str, at: str, what: str, reason: str) -> SourceError:
        """A container that can't be read to its end."""
        return SourceError(
            f"source {self.source!r}: {name}, {at}: {what} ({reason}); fetch the file again, or correct "
            f"data.sources.{self.source}"
        )

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """One annotation file as a seekable stream.

        Raises:
            SourceError: it can't be opened, or it changed until the end of the block.
        """
        try:
            before = self.files.stamp(name)
            with self.files.open(name) as stream:
                yield stream
            changed = self.files.stamp(name) != before
        except StorageError as error:
            raise SourceError(f"source {self.source!r}: {error}") from None
        if changed:
            raise SourceError(
                f"source {self.source!r}: {name} changed while it was read; run the same command again when nothing "
                "writes into the source any more"
            )

    def field(self, row: Mapping[str, Any], ours: str, defaults: Mapping[str, str]) -> Any:
        """The value that the source keeps under another name, by the recipe's mapping, else by `defaults`.

        Raises:
            BadRecord: `schema_mismatch`, naming the keys that are there.
        """
        theirs = self.settings.mapping.get(ours, defaults.get(ours, ours))
        return required(row, theirs)


def split_of(name: str) -> Split:
    """What a file belongs to by its name: one called ``test...`` or ``val...`` to that split, others to train."""
    file = name.rsplit("/", 1)[-1]
    if file.startswith("test"):
        return "test"
    return "validation" if file.startswith("val") else "train"


def required(row: Mapping[str, Any], key: str) -> Any:
    """``row[key]``. Raises `BadRecord` `schema_mismatch`, naming the keys that are there."""
    if key not in row:
        there = shortened(", ".join(sorted(map(str, row))))
        raise BadRecord("schema_mismatch", f"{key}: missing; the keys are {there}")
    return row[key]


def mapping_of(raw: object) -> dict[str, Any]:
    """`raw` itself if it is an object. Raises `BadRecord`."""
    if not isinstance(raw, dict):
        raise BadRecord("schema_mismatch", f"expected an object, found {type(raw).__name__} {shortened(raw)}")
    return raw


def number_places(text: str, placeholder: re.Pattern[str], shown: Sequence[str]) -> str:
    """`text` without its placeholders of images: each leaves a space, or ``(image 2)`` where `shown` says so.

    Args:
        text: of a question.
        placeholder: one place.
        shown: what stood at each place in order, such as ``image 2``; empty where the record has only one image.
    """
    parts, at = [], 0
    # Blanks before a place are cut off, not matched: a pattern that begins with them is quadratic in a run of them.
    places = re.finditer(rf"(?:{placeholder.pattern})[ \t]*(?P<stop>[?.!,;:]?)", text)
    for place, one in zip(places, shown, strict=True):
        gap = "" if placeholder.match(text, place.end()) else " "
        parts += [text[at : place.start()].rstrip(" \t"), f" ({one})" if one else "", place["stop"] or gap]
        at = place.end()
    return "".join(parts) + text[at:]


def parsed_line(line: bytes) -> dict[str, Any]:
    """One line of JSON lines as an object.

    Raises:
        BadRecord: `not_utf8`, `not_json`.
    """
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = _parsed_slowly(line)
    if not isinstance(row, dict):
        raise BadRecord("not_json", f"expected an object, found {type(row).__name__} {shortened(row)}")
    return row


def _parsed_slowly(line: bytes) -> Any:
    """By the standard library, which knows more numbers and says more about an error."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRecord("not_json", f"column {error.colno}: {error.msg}: {shortened(line.decode())}") from None
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or thousands of nested brackets.
        raise BadRecord("not_json", f"{type(error).__name__}: {shortened(line.decode())}") from None


def json_lines(reading: Reading, name: str) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Number, from 1, of every line that is not blank, and a function that parses it."""
    with reading.open(name) as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while not line.endswith(b"\n") and (line := stream.readline(MAX_ROW_BYTES)):
                    pass
                yield number, _line_too_long
            elif line.strip():
                yield number, partial(parsed_line, line)


def _line_too_long() -> dict[str, Any]:
    raise BadRecord("not_json", f"a line of more than {MAX_ROW_BYTES} bytes")


def json_array(reading: Reading, name: str) -> Iterator[Any]:
    """The elements of a file that is one JSON array, one at a time; the public files have hundreds of megabytes.

    Raises:
        SourceError: it is no array, or ends within one (`not_json`).
    """
    number = 0

    def broken(what: str) -> SourceError:
        return reading.broken(name, f"element {number}", f"{what}; expected one JSON array", "not_json")

    def unexpected(wanted: str) -> SourceError:
        found = repr(shortened(text.ahead())) if text.ahead() else "the end of the file"
        return broken(f"expected {wanted}, found {found}")

    with reading.open(name) as stream:
        text = _JsonText(stream)
        try:
            if text.mark() != "[":
                raise unexpected("'['")
            text.skip()
            empty = text.mark() == "]"
            while not empty:
                yield text.element()
                number += 1
                if text.mark() == "]":
                    break
                if text.mark() != ",":
                    raise unexpected("',' or ']'")
                text.skip()
            text.skip()
            if text.mark():
                raise unexpected("the end of the file")
        except json.JSONDecodeError as error:
            raise broken(error.msg) from None
        except (UnicodeDecodeError, RecursionError) as error:
            raise broken(type(error).__name__) from None
        except ValueError as error:
            if isinstance(error, SourceError):
                raise
            # An integer of thousands of digits.
            raise broken(str(error)) from None


class _JsonText:
    """A stream of JSON, of which a window is in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()
        self._window, self._at, self._ended = "", 0, False

    def mark(self) -> str:
        """The next character that is no blank; empty at the end of the stream."""
        while True:
            self._at = _BLANKS.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window) or self._ended:
                return self._window[self._at : self._at + 1]
            self._load(_CHUNK)

    def skip(self) -> None:
        """Go behind the mark."""
        self._at += 1

    def ahead(self) -> str:
        """A few characters from here on, for a message."""
        return self._window[self._at : self._at + 20]

    def element(self) -> Any:
        """The value that begins here. Raises `json.JSONDecodeError`."""
        chunk = _CHUNK
        self.mark()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
                # A number that ends with the window may go on behind it.
                if end < len(self._window) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError:
                if self._ended or len(self._window) - self._at > MAX_ROW_BYTES:
                    raise
            # Doubling keeps the retries on one long element, or up to the end of a broken file, linear.
            self._load(chunk)
            chunk *= 2

    def _load(self, size: int) -> None:
        block = self._stream.read(size)
        self._ended = not block
        self._window = self._window[self._at :] + self._characters.decode(block, final=self._ended)
        self._at = 0


def json_rows(reading: Reading, name: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Place of every row of a JSON file, and a function that gives the row.

    A ``.jsonl`` file has a row a line, any other is one array.

    Raises:
        SourceError: as `json_array`.
    """
    if name.endswith(".jsonl"):
        for number, load in json_lines(reading, name):
            yield f"line {number}", load
    else:
        for number, raw in enumerate(json_array(reading, name)):
            yield f"element {number}", partial(mapping_of, raw)


def mapped_rows(reading: Reading, needed: Collection[str], optional: Collection[str] = ()) -> Iterator[Row]:
    """The rows of all JSON files of a format whose layout is not documented, so that the recipe may map its names.

    Args:
        needed: our names for what every row has.
        optional: our names for what it may have, and for what lies deeper in it.

    Raises:
        SourceError: no such file, one that can't be read, a mapping of other names, or a file none of whose first rows
            has the names that are needed.
    """
    mapping = f"data.sources.{reading.source}.mapping"
    unknown = [name for name in reading.settings.mapping if name not in (*needed, *optional)]
    if unknown:
        raise SourceError(
            f"source {reading.source!r}: {mapping} names {unknown[0]!r}, but {reading.settings.format} knows "
            f"{', '.join((*needed, *optional))}; correct that name"
        )
    theirs = {reading.settings.mapping.get(name, name) for name in needed}
    number = 0
    for name in reading.names(".json", ".jsonl"):
        _probe(reading, name, theirs, mapping)
        for place, load in json_rows(reading, name):
            yield Row(number, f"{name} {place}", split_of(name), load)
            number += 1


def _probe(reading: Reading, name: str, theirs: set[str], mapping: str) -> None:
    refused = None
    for place, load in islice(json_rows(reading, name), _PROBED_ROWS):
        try:
            row = load()
        except BadRecord:
            continue
        if theirs <= row.keys():
            return
        refused = refused or (place, row)
    if refused:
        place, row = refused
        missing, there = " and no ".join(sorted(theirs - row.keys())), shortened(", ".join(sorted(row)), 300)
        raise SourceError(
            f"source {reading.source!r}: {name} {place} has no {missing}; its keys are {there}; say which of them are "
            f"meant in {mapping}, e.g. {{question: prompt}} (schema_mismatch)"
        )


def parquet_rows(
    reading: Reading, name: str, columns: Callable[[list[str]], list[str]], wanted: Wanted, first: int
) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Number of every row within the file, and a function that gives a wanted row by column name.

    Args:
        columns: picks from the names of the file's columns those to read; may raise `SourceError`.
        first: number of the file's first row in the source, for `wanted`.

    Raises:
        SourceError: no parquet, or one that ends early (`bad_parquet`).
    """
    number = 0
    with reading.open(name) as stream:
        try:
            with pq.ParquetFile(stream) as file:
                chosen = columns(file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=chosen):
                    here = range(first + number, first + number + len(batch))
                    rows: list[dict[str, Any]] = batch.to_pylist() if any(map(wanted, here)) else [{}] * len(batch)
                    for row in rows:
                        yield number, partial(mapping_of, row)
                        number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise reading.broken(name, f"row {number}", shortened(str(error)), "bad_parquet") from None


def tar_members(reading: Reading, name: str) -> Iterator[tuple[str, Callable[[int, str], bytes]]]:
    """Names of a tar's members but folders, in its order, each with a function that reads it while it is the newest.

    The function takes the bytes that are allowed at most and the reason code beyond them. It raises `BadRecord` for
    that, and `path_escape` for a link, a device, or a name that leaves the archive.

    Raises:
        SourceError: no tar, or one that ends early or goes on after its end (`bad_tar`); also from the function.
    """
    at = "its first member"

    def broken(what: object) -> SourceError:
        return reading.broken(name, f"member {at}", shortened(str(what)), "bad_tar")

    def read(member: tarfile.TarInfo, tar: tarfile.TarFile, at_most: int, reason: str) -> bytes:
        try:
            checked(member.name)
        except EscapeError:
            raise BadRecord("path_escape", f"{shortened(member.name)} leaves the archive") from None
        if not member.isreg():
            raise BadRecord("path_escape", f"{shortened(member.name)} is a link or a device")
        if member.size > at_most:
            raise BadRecord(reason, f"{shortened(member.name)} has {member.size} bytes, at most {at_most} allowed")
        try:
            file = tar.extractfile(member)
            data = file.read() if file else b""
        except _BAD_TAR as error:
            raise (error if isinstance(error, StorageError) else broken(error)) from None
        if len(data) != member.size:
            raise broken("unexpected end of data")
        return data

    with reading.open(name) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_CompleteTarInfo) as tar:
                while (member := tar.next()) is not None:
                    at = shortened(member.name)
                    if not member.isdir():
                        yield member.name, partial(read, member, tar)
                    # tarfile keeps every header that it has seen.
                    tar.members.clear()  # type: ignore[attr-defined]
                while rest := tar.fileobj.read(_CHUNK):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("data after the end of the archive")
        except _BAD_TAR as error:
            raise (error if isinstance(error, StorageError | SourceError) else broken(error)) from None


class _CompleteTarInfo(tarfile.TarInfo):
    """A header. Where one is damaged or missing, tarfile takes the archive for complete; here it is an error."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _CompleteTarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} after {tarfile_.offset} bytes, and no end mark") from None
