"""Few large files with random access: how records, images and sequences lie on disk.

In: Arrow record batches. Out: ``NAME-00000.arrow`` ... of at most `SHARD_BYTES`, each a plain Arrow file, and
``NAME.index.arrow``, which says where each block stands and what its digest is.
Always: equal batches give equal bytes; a row is found without reading another block; a block is compared with its
digest when it is first read, so that nothing damaged is ever used; from ``s3://`` a shard is copied once into a bounded
local cache, and again if the copy turns out to be damaged.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from valr_ops.store.objects import Cache, StorageError, is_remote, open_files

SHARD_BYTES = 256 * 2**20
"""A shard is closed when it is larger than this."""

_DIGEST_BYTES = 16
_MAGIC_BYTES = 8
_DECODED_BLOCKS = 64
_INDEX_NUMBERS = {"shard": "int32", "offset": "int64", "length": "int64", "first": "int64", "rows": "int32"}
_INDEX_SCHEMA = pa.schema([*_INDEX_NUMBERS.items(), ("digest", pa.binary(_DIGEST_BYTES))])


class ShardError(ValueError):
    """A shard or its index that is missing or damaged: which, where, and how to bring it back."""


@dataclass(frozen=True)
class ShardFile:
    """One file, as the index knows it."""

    file: str
    bytes: int
    sha256: str


class ShardWriter:
    """Writes batches one behind the other; used in a ``with`` block, whose end writes the index.

    Args:
        folder: where the files go.
        name: what their names begin with.
        schema: of every batch.
        compression: of the columns, ``zstd`` for texts and numbers, None for what is compressed already.
        shard_bytes: a shard that is larger is closed.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        schema: pa.Schema,
        compression: str | None = "zstd",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._folder, self._name, self._schema, self._shard_bytes = folder, name, schema, shard_bytes
        self._options = pa.ipc.IpcWriteOptions(compression=compression)
        self._shards: list[ShardFile] = []
        self._blocks: list[tuple[int, int, int, int, int, bytes]] = []
        self._rows = 0
        self._path: Path | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._path is not None:
            self._close()
        if kind is None:
            self._write_index()

    def __len__(self) -> int:
        """Rows so far."""
        return self._rows

    def write(self, batch: pa.RecordBatch) -> None:
        """One block."""
        if not len(batch):
            return
        if self._path is None:
            self._path = self._folder / f"{self._name}-{len(self._shards):05d}.arrow"
            self._sink = pa.OSFile(str(self._path), "wb")
            self._writer = pa.ipc.new_file(self._sink, self._schema, options=self._options)
            self._at: list[tuple[int, int]] = []
        # The file's head is written together with the first batch.
        before = self._sink.tell() if self._at else _MAGIC_BYTES + self._schema.serialize().size
        self._writer.write_batch(batch)
        after = self._sink.tell()
        self._at.append((before, after - before))
        self._blocks.append((len(self._shards), before, after - before, self._rows, len(batch), b""))
        self._rows += len(batch)
        if after >= self._shard_bytes:
            self._close()

    def _close(self) -> None:
        assert self._path is not None
        self._writer.close()
        self._sink.close()
        # Digests are taken from the file, which is in the page cache, so that they cover what was really written.
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            for number, (offset, length) in enumerate(self._at, start=len(self._blocks) - len(self._at)):
                file.seek(offset)
                self._blocks[number] = (*self._blocks[number][:5], _digest(file.read(length)))
        self._shards.append(ShardFile(self._path.name, self._path.stat().st_size, sha256))
        self._path = None

    def _write_index(self) -> None:
        columns = list(zip(*self._blocks, strict=True)) or [()] * len(_INDEX_SCHEMA)
        metadata = {
            b"shards": json.dumps([asdict(shard) for shard in self._shards]).encode(),
            b"schema": self._schema.serialize().to_pybytes(),
            b"rows": str(self._rows).encode(),
        }
        schema = _INDEX_SCHEMA.with_metadata(metadata)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        with pa.ipc.new_file(self._folder / f"{self._name}.index.arrow", schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


class Shards:
    """Random access to what a `ShardWriter` wrote. One process and one thread at a time.

    Args:
        location: the folder, or an ``s3://`` prefix.
        name: as given to the writer.
        mend: what to type when something is missing or damaged, for messages.
        cache: local copies of remote shards; needed for an ``s3://`` location.

    Raises:
        ShardError: there is no index, or it can't be read.
    """

    def __init__(self, location: str | Path, name: str, mend: str, cache: Cache | None = None) -> None:
        self._location, self._name, self._mend, self._cache = location, name, mend, cache
        if is_remote(location) and cache is None:
            raise ShardError(f"{location} is remote; give a local cache for its shards")
        table = self._read_index(f"{name}.index.arrow")
        metadata = table.schema.metadata
        self.schema: pa.Schema = pa.ipc.read_schema(pa.py_buffer(metadata[b"schema"]))
        self.shards = [ShardFile(**one) for one in json.loads(metadata[b"shards"])]
        self._rows = int(metadata[b"rows"])
        self._digests = table["digest"].combine_chunks()
        # By the buffers: pyarrow's own conversion imports pandas, which takes longer than all else here.
        self._index = {
            name: np.frombuffer(table[name].combine_chunks().buffers()[1] or b"", dtype)
            for name, dtype in _INDEX_NUMBERS.items()
        }
        self._opened: dict[int, mmap.mmap] = {}
        self._verified = np.zeros(len(table), dtype=bool)
        self._decoded: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._verified)

    def row(self, number: int) -> pa.RecordBatch:
        """The row of that number, as a batch of one.

        Raises:
            IndexError: no such row. ShardError: its block is damaged.
        """
        if not 0 <= number < self._rows:
            raise IndexError(f"row {number} of {self._rows} in {self._location}")
        block = int(np.searchsorted(self._index["first"], number, side="right")) - 1
        return self.block(block).slice(number - int(self._index["first"][block]), 1)

    def block(self, number: int) -> pa.RecordBatch:
        """One block, decoded; the last few are remembered. Raises `ShardError` where it is damaged."""
        if number in self._decoded:
            self._decoded.move_to_end(number)
            return self._decoded[number]
        batch = pa.ipc.read_record_batch(pa.py_buffer(self._bytes(number)), self.schema)
        self._decoded[number] = batch
        if len(self._decoded) > _DECODED_BLOCKS:
            self._decoded.popitem(last=False)
        return batch

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All blocks in order. Raises `ShardError` where one is damaged."""
        for number in range(len(self._verified)):
            yield pa.ipc.read_record_batch(pa.py_buffer(self._bytes(number)), self.schema)
            if number and self._index["shard"][number] != self._index["shard"][number - 1]:
                # What was gone through need not stay mapped.
                self._opened.pop(int(self._index["shard"][number - 1]), None)

    def _bytes(self, number: int) -> memoryview:
        shard = int(self._index["shard"][number])
        start = int(self._index["offset"][number])
        end = start + int(self._index["length"][number])
        found = memoryview(self._map(shard))[start:end]
        if not self._verified[number]:
            expected = self._digests[number].as_py()
            if _digest(found) != expected and self._cache is not None:
                # The copy on the local disk went bad, not the object: its digest was checked when it was fetched.
                self._opened.pop(shard, None)
                self._cache.drop(self.shards[shard].sha256)
                found = memoryview(self._map(shard))[start:end]
            if len(found) != end - start or _digest(found) != expected:
                first = int(self._index["first"][number])
                raise ShardError(
                    f"{self._location}/{self.shards[shard].file} is damaged: rows {first} to "
                    f"{first + int(self._index['rows'][number]) - 1} (bytes {start} to {end}) have not the digest that "
                    f"its index gives; {self._mend}"
                )
            self._verified[number] = True
        return found

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._opened:
            known = self.shards[shard]
            try:
                if self._cache is not None:
                    path = self._cache.fetch(open_files(self._location), known.file, known.sha256, known.bytes)
                else:
                    path = Path(self._location) / known.file
                with path.open("rb") as file:
                    self._opened[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (StorageError, OSError, ValueError) as error:
                raise ShardError(f"{self._location}/{known.file} can't be read: {error}; {self._mend}") from None
        return self._opened[shard]

    def _read_index(self, file: str) -> pa.Table:
        try:
            if is_remote(self._location):
                with open_files(self._location).open(file) as stream:
                    return pa.ipc.open_file(pa.py_buffer(stream.read())).read_all()
            return pa.ipc.open_file(pa.memory_map(str(Path(self._location) / file))).read_all()
        except (StorageError, OSError, pa.ArrowException) as error:
            state = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read: {error}"
            raise ShardError(f"{self._location}/{file} {state}; {self._mend}") from None


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
