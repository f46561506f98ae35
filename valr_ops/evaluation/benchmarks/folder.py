"""The files of a benchmark: a folder that the user filled from the public download, read but never written.

In: the folder, and the names that a benchmark's module asks for.
Out: rows of its tables without their pictures, and the encoded bytes of one picture when it is wanted.
Always: a name can't lead out of the folder, not even through a link; a missing or damaged file, or a row that lacks
something, is a `BenchmarkError` that says where it is and how to get the files; what was read is known, so that the
benchmark's revision can be told.
"""

from __future__ import annotations

import base64
import binascii
import builtins
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from valr_ops.evaluation.benchmarks import BenchmarkError, Picture
from valr_ops.store.objects import EscapeError, LocalFiles, MissingError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BLOCK = 1 << 20
_LARGEST_PICTURE = 1 << 28
_LETTER = re.compile(r"\(?([A-Za-z])\)?")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table; every method raises `BenchmarkError`, which names the row, if it is not as it should be."""

    folder: Folder
    table: str
    number: int
    """Counted from 0."""
    values: Mapping[str, Any]
    images: tuple[str, ...] = ()
    """Columns that hold images."""

    def error(self, what: str) -> BenchmarkError:
        """`what`, with where the row stands before it."""
        return self.folder.error(f"{self.table}, row {self.number} (from 0): {what}")

    def text(self, *columns: str) -> str:
        """What the first of these columns that the table has says, which is not nothing; of a number its digits."""
        value = self._value(*columns)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(value)
        raise self.error(f"{columns[0]} is {_shown(value)} where text is expected")

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts, at least one."""
        value = self._value(column)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise self.error(f"{column} is {_shown(value)} where a list of texts is expected")

    def one_of(self, column: str, known: Collection[str]) -> str:
        """A text that is one of the `known` ones."""
        value = self.text(column)
        if value not in known:
            raise self.error(f"{column} is {value!r}, and not one of {', '.join(known)}")
        return value

    def letter(self, column: str, options: int) -> str:
        """The letter of one of so many options, as it stands: ``B``, ``(B)`` or ``(b)``."""
        value = self.text(column)
        stated = _LETTER.fullmatch(value)
        if not stated or ord(stated[1].upper()) - ord("A") >= options:
            raise self.error(f"{column} is {value!r}, which is no letter of its {options} options")
        return value

    def pictures(self) -> tuple[Picture, ...]:
        """Where the images of the row stand, at least one, in the order of their columns."""
        found = tuple(Picture(self.table, column, self.number) for column in self.images if self.values.get(column))
        if not found:
            raise self.error("it has no image")
        return found

    def _value(self, *columns: str) -> Any:
        for column in columns:
            if column in self.values:
                return self.values[column]
        raise self.error(f"there is no column {columns[0]}, but {', '.join(map(str, self.values)) or 'none at all'}")


class Folder:
    """The files of one benchmark."""

    def __init__(self, root: Path, benchmark: str, source: str):
        """The folder `root`.

        Args:
            root: the folder; it must be there.
            benchmark: its name, for messages.
            source: how to get its files, as a half sentence for messages: ``get it with hf download ...``.

        Raises:
            BenchmarkError: there is no such folder.
        """
        self.root, self.benchmark, self.source = root, benchmark, source
        self.tables: list[str] = []
        """Names of the files that questions were read from, in the order of reading."""
        self._opened: dict[str, pq.ParquetFile] = {}
        self._group: tuple[str, int] | None = None
        self._cells: dict[str, pa.ChunkedArray] = {}
        if not root.is_dir():
            raise self.error(f"{root} is no folder")
        self._files = LocalFiles(root)

    def error(self, what: str) -> BenchmarkError:
        """`what`, with the benchmark's name before it and how to get its files after it."""
        return BenchmarkError(f"benchmark {self.benchmark}: {what}; {self.source}")

    def find(self, *patterns: str) -> list[str]:
        """Names below the folder that match the first of the glob patterns with a match, sorted.

        Raises:
            BenchmarkError: none matches.
        """
        for pattern in patterns:
            found = sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern) if path.is_file())
            if found:
                return found
        raise self.error(f"{self.root} holds no file {' or '.join(patterns)}")

    def has(self, name: str) -> bool:
        """Whether there is such a file. Raises `BenchmarkError` for a name that leads out."""
        try:
            self._files.path(name)
        except MissingError:
            return False
        except EscapeError:
            raise self.error(f"{name!r} leads out of {self.root}") from None
        return True

    def require(self, names: Iterable[str], what: str) -> None:
        """Raise `BenchmarkError` unless all the files are there; it names the first three that are not."""
        missing = [name for name in dict.fromkeys(names) if not self.has(name)]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise self.error(f"{what} missing below {self.root}: {', '.join(missing[:3])}{more}")

    def rows(self, name: str, columns: Sequence[str], images: Sequence[str] = ()) -> Iterator[Row]:
        """The rows of a table: a parquet file, JSON lines or comma-separated values, by the end of its name.

        Args:
            name: of the file.
            columns: what will be asked of a row; no other column of a parquet file is read.
            images: columns of a parquet file that hold images or null; their bytes are not read.

        Raises:
            BenchmarkError: no such file, or it is damaged.
        """
        if name.endswith(".parquet"):
            yield from self._parquet_rows(name, columns, images)
        else:
            lines = self._separated(name) if name.endswith(".csv") else self.lines(name)
            for number, values in enumerate(lines):
                yield Row(self, name, number, values)

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a file of JSON lines. Raises `BenchmarkError`, which names the line."""
        for number, line in enumerate(self.bytes(name).removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise self.error(f"{name}:{number} is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise self.error(f"{name}:{number} is no JSON object")
            yield row

    def json(self, name: str) -> Any:
        """The content of a JSON file. Raises `BenchmarkError`."""
        try:
            return orjson.loads(self.bytes(name))
        except orjson.JSONDecodeError as error:
            raise self.error(f"{name} is not JSON ({error})") from None

    def bytes(self, name: str, table: bool = True) -> bytes:
        """The content of a file; `table` where questions are in it. Raises `BenchmarkError`."""
        with self._named(name):
            data = self._files.read(name, _LARGEST_PICTURE)
        if table:
            self.tables.append(name)
        return data

    def picture(self, picture: Picture) -> builtins.bytes:
        """The encoded bytes of an image. Raises `BenchmarkError`."""
        if not picture.column:
            return self.bytes(picture.file, table=False)
        value = self._cell(picture)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if isinstance(value, str):
            try:
                value = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                value = None
        if not isinstance(value, bytes) or not value:
            raise self.error(f"{picture.file}, row {picture.row} (from 0): {picture.column} holds no image")
        return value

    def digest(self, media: Iterable[str]) -> str:
        """The revision: SHA-256 over the content of the files that were read, and names and sizes of `media`."""
        digest = hashlib.sha256()
        for name in sorted(set(self.tables)):
            digest.update(name.encode() + b"\0")
            with self._named(name), self._files.open(name) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        sizes = {name: self._files.stamp(name).size for name in set(media) if self.has(name)}
        digest.update(json.dumps(sizes, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Turns what goes wrong with a file into a `BenchmarkError` that names it."""
        try:
            yield
        except EscapeError:
            raise self.error(f"{name!r} leads out of {self.root}") from None
        except MissingError:
            raise self.error(f"{self.root} holds no file {name!r}") from None
        except StorageError as error:
            raise self.error(f"{name!r} can't be read ({error})") from None

    def _separated(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a file of comma-separated values whose first line names the columns."""
        try:
            text = self.bytes(name).decode("utf-8-sig")
            yield from csv.DictReader(io.StringIO(text, newline=""), strict=True)
        except (UnicodeDecodeError, csv.Error) as error:
            raise self.error(f"{name} is damaged ({_line(error)})") from None

    def _parquet(self, name: str) -> pq.ParquetFile:
        # Here and below: scoring imports this module and reads no table.
        import pyarrow as pa
        import pyarrow.parquet as pq

        if name not in self._opened:
            with self._named(name):
                path = self._files.path(name)
            try:
                self._opened[name] = pq.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                raise self.error(f"{name} is no parquet file ({_line(error)})") from None
        return self._opened[name]

    def _parquet_rows(self, name: str, columns: Sequence[str], images: Sequence[str]) -> Iterator[Row]:
        import pyarrow as pa

        opened = self._parquet(name)
        schema = opened.schema_arrow
        known = [column for column in columns if column in schema.names]
        # The path beside the bytes tells a null from an image; where there is none, each row is taken to have one.
        told, untold = [], {}
        for image in images:
            if image in schema.names:
                kind = schema.field(image).type
                if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                    told.append(f"{image}.path")
                else:
                    untold[image] = True
        self.tables.append(name)
        try:
            rows = opened.read(columns=[*known, *told]).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"{name} is damaged ({_line(error)})") from None
        for number, values in enumerate(rows):
            yield Row(self, name, number, values | untold, tuple(images))

    def _cell(self, picture: Picture) -> Any:
        """One cell; the row group that it is in stays in memory for its neighbours, column by column."""
        import pyarrow as pa

        opened = self._parquet(picture.file)
        row = picture.row
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if row < rows:
                if self._group != (picture.file, group):
                    self._group, self._cells = (picture.file, group), {}
                if picture.column not in self._cells:
                    try:
                        read = opened.read_row_group(group, columns=[picture.column])
                    except (pa.ArrowException, OSError) as error:
                        raise self.error(f"{picture.file} is damaged ({_line(error)})") from None
                    self._cells[picture.column] = read.column(0)
                return self._cells[picture.column][row].as_py()
            row -= rows
        raise self.error(f"{picture.file} has no row {picture.row}")


def _shown(value: object) -> str:
    return "null" if value is None else repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())
