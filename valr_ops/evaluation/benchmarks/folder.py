"""The files of a benchmark: a folder that the user filled from the public download, read but never written.

In: the folder, and the names that a benchmark's module asks for.
Out: rows of its tables without their pictures, and the encoded bytes of one picture when it is wanted.
Always: a name can't lead out of the folder; a missing or damaged file is a `BenchmarkError` that says how to get it;
what was read is known, so that the benchmark's revision can be told.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from valr_ops.evaluation.benchmarks import BenchmarkError, Picture
from valr_ops.store.objects import EscapeError, Files, MissingError, StorageError, open_files

_BLOCK = 1 << 20
_LARGEST_PICTURE = 1 << 28


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
        self._column: tuple[tuple[str, str, int], pa.ChunkedArray] | None = None
        if not root.is_dir():
            raise self.error(f"{root} is no folder")
        self._files: Files = open_files(str(root))

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
        """Whether there is such a file."""
        return (self.root / name).is_file()

    def require(self, names: Iterable[str], what: str) -> None:
        """Raise `BenchmarkError` unless all the files are there; it names the first three that are not."""
        missing = [name for name in dict.fromkeys(names) if not (self.root / name).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise self.error(f"{what} missing below {self.root}: {', '.join(missing[:3])}{more}")

    def parquet(self, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of a parquet file, only these columns; one that the file has not is None in every row.

        Raises:
            BenchmarkError: no such file, or it is no parquet file.
        """
        opened = self._parquet(name)
        self.tables.append(name)
        known = [column for column in columns if column in opened.schema_arrow.names]
        try:
            rows = opened.read(columns=known).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise self.error(f"{name} is damaged ({error})") from None
        absent = dict.fromkeys(column for column in columns if column not in known)
        return [row | absent for row in rows] if absent else rows

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
        try:
            data = self._files.read(name, _LARGEST_PICTURE)
        except EscapeError:
            raise self.error(f"{name!r} leads out of {self.root}") from None
        except MissingError:
            raise self.error(f"{self.root} holds no file {name!r}") from None
        except StorageError as error:
            raise self.error(f"{name!r} can't be read ({error})") from None
        if table:
            self.tables.append(name)
        return data

    def picture(self, picture: Picture) -> bytes:
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
            raise self.error(f"{picture.file}, row {picture.row}: {picture.column} holds no image")
        return value

    def digest(self, media: Iterable[str]) -> str:
        """The revision: SHA-256 over the content of the files that were read, and names and sizes of `media`."""
        digest = hashlib.sha256()
        for name in sorted(set(self.tables)):
            digest.update(name.encode() + b"\0")
            with (self.root / name).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        sizes = {name: (self.root / name).stat().st_size for name in set(media) if (self.root / name).is_file()}
        digest.update(json.dumps(sizes, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def _parquet(self, name: str) -> pq.ParquetFile:
        if name not in self._opened:
            self.require([name], "a table is")
            try:
                self._opened[name] = pq.ParquetFile(self.root / name)
            except (pa.ArrowException, OSError) as error:
                raise self.error(f"{name} is no parquet file ({error})") from None
        return self._opened[name]

    def _cell(self, picture: Picture) -> Any:
        """One cell; the row group that it is in stays in memory for its neighbours."""
        opened = self._parquet(picture.file)
        row = picture.row
        for group in range(opened.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if row < rows:
                key = (picture.file, picture.column, group)
                if self._column is None or self._column[0] != key:
                    try:
                        self._column = key, opened.read_row_group(group, columns=[picture.column]).column(0)
                    except (pa.ArrowException, OSError) as error:
                        raise self.error(f"{picture.file} is damaged ({error})") from None
                return self._column[1][row].as_py()
            row -= rows
        raise self.error(f"{picture.file} has no row {picture.row}")
