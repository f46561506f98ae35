"""Features on disk: a few large safetensors shards, written row by row and read without a copy.

In: patch features of targets, in the order of a plan. Out: shards with the tensors

    features   [n, rows, columns, dim]  bfloat16, float16, or int8
    scales     [n, rows, columns]       float32, one a patch; of int8 only, else empty
    checksums  [n] int64                XXH3 of each row's features and scales, compared when it is first read
    states     [n] uint8                whether the row is sound (`SOUND`), or what is wrong with it
    energy     [dim] float64            sum of squares over the patches of the sound rows

and ``targets.parquet``, which says where each target stands. Always: a shard appears under its name when it is whole;
its bytes depend on its rows alone; a row that was altered, or a shard that was cut short, is an error that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from valr_ops.data.sequences import Region

Storage = Literal["bfloat16", "float16", "int8"]

SHARD_BYTES = 256 * 2**20
"""A shard has about so many bytes."""

SOUND, CONSTANT, NOT_FINITE, REJECTED = range(4)
"""States of a row: usable; the same at every patch; not finite; without features, as its image can't be decoded."""

_INDEX, _TARGETS = "index.json", "targets.parquet"
_INDEX_KEYS = {
    *("teacher", "mode", "model", "license", "fingerprint", "weights_sample"),
    *("views", "grid", "dim", "storage", "shards"),
}
_HEADER_BYTES = 4096
_KEY_BYTES = 16
_FACTS = "facts"
_DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "int8": (torch.int8, "I8")}
_TARGETS_SCHEMA = pa.schema(
    [
        ("digest", pa.string()),
        ("box", pa.list_(pa.int32())),
        ("views", pa.list_(pa.string())),
        ("key", pa.binary()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("rejected", pa.bool_()),
    ]
)


class FeatureError(ValueError):
    """Features that can't be made or found: the message names the folder, the target and the fix."""


def key_of(target: Region) -> bytes:
    """Sixteen bytes that stand for a target."""
    return xxhash.xxh3_128_digest(repr(tuple(target)).encode())


def shown(target: Region) -> str:
    """A target in a message."""
    others = len(target.views) - 1
    beside = f" beside {others} other view{'s' if others > 1 else ''}" if target.views else ""
    return f"{target.digest[:12]}{list(target.box) if target.box else ''}{beside}"


def bytes_per_target(grid: tuple[int, int], dim: int, storage: Storage) -> int:
    """Bytes of one target's features, scales included."""
    return math.prod(grid) * (dim * _DTYPES[storage][0].itemsize + (4 if storage == "int8" else 0))


def encode(features: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """`features` ``[..., dim]`` as they are stored, and for int8 the scales ``[...]`` float32, one a patch."""
    if storage != "int8":
        return features.to(_DTYPES[storage][0]), None
    exact = features.float()
    scales = exact.abs().amax(dim=-1) / 127
    steps = exact / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return steps.nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8), scales


def decode(stored: Tensor, scales: Tensor | None) -> Tensor:
    """What `encode` was given, nearly: 16-bit features as they are (no copy), int8 as bfloat16."""
    return stored if scales is None else (stored * scales.unsqueeze(-1)).bfloat16()


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass
class ShardFacts:
    """Figures of the sound rows of a shard, kept in its header."""

    min_cosine: float = 1.0
    """Smallest cosine of a stored patch feature to the one that was computed."""
    other_cosine: float = 0.0
    """Sum over the rows of the mean cosine, patch by patch, to another row."""
    rows: int = 0
    """Their number."""


class ShardWriter:
    """Writes one shard, a few rows at a time, until `finish` gives the file its name.

    Args:
        path: where the finished shard goes; until then the rows are in a file of this process beside it.
        rows: number of rows.
        grid: patches, rows and columns.
        dim: width of a feature.
        storage: of the features.
    """

    def __init__(self, path: Path, rows: int, grid: tuple[int, int], dim: int, storage: Storage) -> None:
        self.path, self._storage = path, storage
        self._part = path.with_name(f"{path.name}.{os.getpid()}.part")
        scale_rows = rows if storage == "int8" else 0
        self._before: dict[str, tuple[str, Tensor]] = {
            "energy": ("F64", torch.zeros(dim, dtype=torch.float64)),
            "checksums": ("I64", torch.zeros(rows, dtype=torch.int64)),
            "scales": ("F32", torch.zeros(scale_rows, *grid)),
        }
        self._shape = (rows, *grid, dim)
        self._states = torch.zeros(rows, dtype=torch.uint8)
        self._at = 0
        self._facts = ShardFacts()
        self._file: BinaryIO = self._part.open("wb")
        # What stands in front of the features is known at the end, but its size is known now.
        self._file.seek(_HEADER_BYTES + sum(tensor.nbytes for _, tensor in self._before.values()))

    def write(self, features: Tensor, rejected: Sequence[bool]) -> None:
        """The next rows.

        Args:
            features: ``[n, rows, columns, dim]`` on any device; whatever stands in a rejected row is left out.
            rejected: [n], rows without features.
        """
        here = slice(self._at, self._at + len(features))
        there = ~torch.tensor(rejected, dtype=torch.bool, device=features.device)
        features = features if there.all() else torch.where(there[:, None, None, None], features, 0)
        stored, scales = encode(features, self._storage)
        self._states[here] = self._judge(features, stored, scales, there).cpu()
        stored = stored.cpu()
        if scales is not None:
            scales = scales.cpu()
            self._before["scales"][1][here] = scales
        rows = _bytes_of_rows(stored)
        checksums = _checksums(rows, None if scales is None else _bytes_of_rows(scales))
        self._before["checksums"][1][here] = torch.from_numpy(checksums.view(np.int64))
        self._file.write(rows.data)
        self._at += len(features)

    def _judge(self, features: Tensor, stored: Tensor, scales: Tensor | None, there: Tensor) -> Tensor:
        """States ``[n]`` of the rows; adds the sound ones to the figures."""
        exact, rounded = features.float(), stored.dtype != features.dtype
        kept = decode(stored, scales).float() if rounded else exact
        # Norms and sums see every value at memory speed, isfinite().all() and any() on a CPU do not.
        lengths, kept_lengths = (torch.linalg.vector_norm(one, dim=-1) for one in (exact, kept))
        finite = (lengths + kept_lengths).isfinite().flatten(1).all(1)
        varies = torch.linalg.vector_norm(exact - exact[:, :1, :1], ord=1, dim=(1, 2, 3)) > 0
        sound = there & finite & varies
        states = torch.full((len(features),), REJECTED, dtype=torch.uint8, device=features.device)
        states[there & ~finite], states[there & finite & ~varies], states[sound] = NOT_FINITE, CONSTANT, SOUND
        if not sound.all():
            exact, kept, lengths, kept_lengths = exact[sound], kept[sound], lengths[sound], kept_lengths[sound]
        if len(exact):
            if rounded:
                # A patch of zeros has no direction, and is stored as what it is.
                cosine = _cosine(exact, kept, lengths, kept_lengths).masked_fill(lengths == 0, 1)
                self._facts.min_cosine = min(self._facts.min_cosine, cosine.min().item())
            self._before["energy"][1].add_(exact.flatten(0, 2).square().sum(0).double().cpu())
            # Neighbours show the same image, so the other row is taken from half the rows away.
            away = len(exact) // 2
            other = _cosine(exact, exact.roll(away, dims=0), lengths, lengths.roll(away, dims=0))
            self._facts.other_cosine += other.mean().item() * len(exact)
            self._facts.rows += len(exact)
        return states

    def abandon(self) -> None:
        """Leave nothing behind."""
        # Closing writes what is buffered, which a full disk refuses once more.
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)

    def finish(self) -> None:
        """The shard stands under its name, whole. Raises `OSError` on a full disk."""
        assert self._at == self._shape[0], (self._at, self._shape)
        self._file.write(self._states.numpy().data)
        sizes = {name: (dtype, list(tensor.shape), tensor.nbytes) for name, (dtype, tensor) in self._before.items()}
        torch_dtype, dtype = _DTYPES[self._storage]
        sizes["features"] = (dtype, list(self._shape), math.prod(self._shape) * torch_dtype.itemsize)
        sizes["states"] = ("U8", [len(self._states)], len(self._states))
        header: dict[str, Any] = {"__metadata__": {_FACTS: json.dumps(vars(self._facts))}}
        begin = 0
        for name, (dtype, shape, size) in sizes.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        self._file.seek(0)
        self._file.write(struct.pack("<Q", _HEADER_BYTES - 8))
        self._file.write(json.dumps(header).encode().ljust(_HEADER_BYTES - 8))
        for _, tensor in self._before.values():
            self._file.write(tensor.numpy().tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)


def _cosine(ones: Tensor, others: Tensor, lengths: Tensor, other_lengths: Tensor) -> Tensor:
    """Cosines ``[...]`` of vectors ``[..., dim]`` whose lengths are known; zero where one has none."""
    return torch.linalg.vecdot(ones, others) / (lengths * other_lengths).clamp_min(torch.finfo(torch.float32).tiny)


def _bytes_of_rows(values: Tensor) -> np.ndarray:
    """``[n, bytes]`` uint8, a view of `values` ``[n, ...]``."""
    return values.contiguous().flatten(1).view(torch.uint8).numpy()


def _checksums(features: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """[n] uint64 of rows of bytes; scales, where there are some, are the seed of what they belong to."""
    seeds = repeat(0, len(features)) if scales is None else map(xxhash.xxh3_64_intdigest, scales)
    return np.array([xxhash.xxh3_64_intdigest(row, seed) for row, seed in zip(features, seeds, strict=True)], np.uint64)


def is_whole(path: Path) -> bool:
    """Whether `path` is a shard of full length; a power cut can leave a part of one."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


# ---------------------------------------------------------------------------------------------------------- reading


class Shard:
    """One shard, mapped into memory. Raises `FeatureError` where it can't be opened."""

    def __init__(self, path: Path, mend: str) -> None:
        self.path, self._mend = path, mend
        try:
            with safe_open(path, framework="pt") as opened:
                self.facts = ShardFacts(**json.loads(opened.metadata()[_FACTS]))
                self._features, self._scales = opened.get_tensor("features"), opened.get_tensor("scales")
                self._checksums = opened.get_tensor("checksums").numpy().view(np.uint64)
                self.states: Tensor = opened.get_tensor("states")
                self.energy: Tensor = opened.get_tensor("energy")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FeatureError(f"{path} can't be read: {error}; {mend}") from error
        self._feature_bytes = _bytes_of_rows(self._features)
        self._scale_bytes = _bytes_of_rows(self._scales) if len(self._scales) else None
        self._verified = np.zeros(len(self._features), dtype=bool)

    @property
    def digest(self) -> dict[str, Any]:
        """Bytes and SHA-256 of the file, computed now."""
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": self.path.stat().st_size, "sha256": sha256}

    def __getitem__(self, row: int) -> Tensor:
        """``[rows, columns, dim]``, a view of the mapped file, or for int8 its values. Raises `FeatureError`."""
        if not self._verified[row]:
            one = slice(row, row + 1)
            scales = None if self._scale_bytes is None else self._scale_bytes[one]
            if _checksums(self._feature_bytes[one], scales)[0] != self._checksums[row]:
                raise FeatureError(
                    f"{self.path} is damaged: row {row} has not the checksum that was written; {self._mend}"
                )
            self._verified[row] = True
        return decode(self._features[row], None if self._scale_bytes is None else self._scales[row])


class FeatureStore:
    """Random access to the stored features of one teacher. One process and one thread at a time.

    Args:
        folder: the artifact `teacher_features_<teacher>`.

    Raises:
        FeatureError: there is none, it is of another version, or its features are computed online.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._mend = folder, f"make it again with `valr run {folder.name} --force`"
        self.index = read_index(folder)
        if self.index["mode"] != "stored":
            raise FeatureError(f"the features of {folder.name} are computed online; none are stored")
        self.teacher: str = self.index["teacher"]
        self.dim: int = self.index["dim"]
        """Width of a patch feature."""
        self.fingerprint: str = self.index["fingerprint"]
        """Of the teacher: weights, architecture and preprocessing."""
        self._joint: bool = self.index["views"] == "joint"
        columns = self._columns("key", "shard", "row", "rejected")
        there = ~np.array(columns["rejected"].to_pylist(), dtype=bool)
        keys = np.array(columns["key"].to_pylist(), dtype=f"S{_KEY_BYTES}")[there]
        places = np.array([columns["shard"].to_pylist(), columns["row"].to_pylist()], dtype=np.int32).T[there]
        # Arrays, as there are millions of targets in every process that trains.
        order = np.argsort(keys)
        self._keys, self._places = keys[order], places[order]
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        """Targets that have features."""
        return len(self._keys)

    def __iter__(self) -> Iterator[Region]:
        """The targets that have features, in the order of the shards."""
        return (target for target, rejected in self._targets() if not rejected)

    def __contains__(self, target: Region) -> bool:
        return self._located([target]) != [None]

    @property
    def rejected(self) -> list[Region]:
        """Targets whose image could not be decoded."""
        return [target for target, rejected in self._targets() if rejected]

    def get(self, target: Region) -> Tensor:
        """``[rows, columns, dim]``: a view of the mapped file in its own type, or the values of int8 in bfloat16.

        Raises:
            FeatureError: the target has no stored features, or its shard is missing, cut short or altered.
        """
        return self.features([target])[0]

    def features(self, targets: Sequence[Region]) -> list[Tensor]:
        """`get` of each of `targets`, in less time than one by one."""
        found = []
        for target, place in zip(targets, self._located(targets), strict=True):
            if place is None:
                raise FeatureError(f"{self._folder.name} has no features of {shown(target)}, {self._why(target)}")
            shard, row = place
            found.append(self.shard(shard)[row])
        return found

    def shard(self, number: int) -> Shard:
        """A shard by its number. Raises `FeatureError`."""
        if number not in self._shards:
            self._shards[number] = Shard(self._folder / shard_name(number), self._mend)
        return self._shards[number]

    def shards(self) -> Iterator[Shard]:
        """All shards in order. Raises `FeatureError`."""
        return (self.shard(number) for number in range(len(self.index["shards"])))

    def _why(self, target: Region) -> str:
        """Why there are no features of `target`, and what to do."""
        if target.seen(joint=self._joint) in self.rejected:
            return (
                f"because its image could not be decoded, see {self._folder.name}/rejects.jsonl; training leaves its "
                "records out, until the image is mended in its source"
            )
        return f"because it belongs to another latent_corpus; {self._mend}"

    def _located(self, targets: Sequence[Region]) -> list[tuple[int, int] | None]:
        """Shard and row of each, None where it has no features."""
        wanted = np.array([key_of(target.seen(joint=self._joint)) for target in targets], dtype=self._keys.dtype)
        at = np.searchsorted(self._keys, wanted)
        there = at < len(self._keys)
        there[there] = self._keys[at[there]] == wanted[there]
        places = iter(self._places[at[there]].tolist())
        return [tuple(next(places)) if here else None for here in there.tolist()]

    def _targets(self) -> Iterator[tuple[Region, bool]]:
        columns = self._columns("digest", "box", "views", "rejected")
        rows = zip(*(columns[name].to_pylist() for name in columns), strict=True)
        return ((Region.of(digest, box, views), rejected) for digest, box, views, rejected in rows)

    def _columns(self, *names: str) -> dict[str, pa.ChunkedArray]:
        try:
            table = pq.read_table(self._folder / _TARGETS, columns=list(names))
        except (OSError, pa.ArrowException) as error:
            raise FeatureError(f"{self._folder / _TARGETS} can't be read: {error}; {self._mend}") from error
        return {name: table[name] for name in names}


def shard_name(number: int) -> str:
    """Name of a shard in the artifact."""
    return f"features-{number:05d}.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """What a `teacher_features_<teacher>` artifact says of itself. Raises `FeatureError`."""
    path = folder / _INDEX
    if not path.is_file():
        raise FeatureError(f"{path} does not exist; make the features with `valr run {folder.name}`")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = _INDEX_KEYS - index.keys()
    except (ValueError, AttributeError) as error:
        raise FeatureError(f"{path} can't be read: {error}; make it again with `valr run {folder.name}`") from error
    if missing:
        raise FeatureError(
            f"{path} is of another version, it lacks {', '.join(sorted(missing))}; "
            f"make it again with `valr run {folder.name}`"
        )
    return index


def write_index(folder: Path, head: dict[str, Any]) -> None:
    """Write index.json."""
    (folder / _INDEX).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def write_targets(folder: Path, shards: Iterable[tuple[Sequence[Region], Tensor]]) -> None:
    """Write targets.parquet: of every shard in order, its targets and their states."""
    with pq.ParquetWriter(folder / _TARGETS, _TARGETS_SCHEMA, compression="zstd") as writer:
        for number, (targets, states) in enumerate(shards):
            columns = [
                [target.digest for target in targets],
                [target.box for target in targets],
                [target.views for target in targets],
                [key_of(target) for target in targets],
                [number] * len(targets),
                range(len(targets)),
                (states == REJECTED).tolist(),
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _TARGETS_SCHEMA, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_TARGETS_SCHEMA))
