"""Artifacts in object storage, under the digest and in the layout that DVC gives them.

In: a folder and an S3 prefix, the URL of a DVC remote. Out: objects ``files/md5/ab/cdef...`` as ``dvc push`` writes and
``dvc pull`` finds them, and from a digest the folder again. Needs no DVC, so that a pod can do without it.
Always: the ``.dir`` object, which lists an artifact's files, is written last and only where there is none, so whoever
finds it finds all of the files; what comes back has its digest or is an error; a folder is there whole or not at all;
while the store is away both directions wait and go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valr_ops.store.objects import (
    Cache,
    ChangedError,
    MissingError,
    S3Files,
    StorageError,
    TakenError,
    checked,
    disk_full,
    download,
    patiently,
)

_FILES_AT_ONCE = 4
_MAX_INDEX_BYTES = 256 << 20


@dataclass(frozen=True)
class Stored:
    """An artifact in the store."""

    digest: str
    """DVC's digest of the folder, with ``.dir`` behind."""
    size: int
    """Bytes of all files."""
    files: int
    first: bool
    """Whether this call stored it; False where it was there, from an earlier call or another writer."""


class Remote:
    """The artifacts below one S3 prefix.

    Args:
        location: ``s3://bucket/prefix``, the URL of the DVC remote.
        cache: local copies that `fetch` takes files from and leaves them in; without one it copies straight.
    """

    def __init__(self, location: str, cache: Cache | None = None) -> None:
        self.location = location.rstrip("/")
        self._objects, self._cache = S3Files(f"{self.location}/files/md5"), cache

    def push(self, folder: Path) -> Stored:
        """Store a folder; files that the store has are not sent again.

        Any number of writers may push at once: an object's name is its content's digest, so none can harm another.

        Raises:
            ChangedError: the store holds an object of this artifact that is not what its name says, or a file was
                written to meanwhile.
            StorageError: no access, or the store is away for longer than `patiently` waits.
        """
        with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            held = list(threads.map(_File.of, paths))
            entries = [{"md5": file.md5, "relpath": file.path.relative_to(folder).as_posix()} for file in held]
            index = json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True).encode()
            digest = f"{hashlib.md5(index).hexdigest()}.dir"
            list(threads.map(self._store, {file.md5: file for file in held}.values()))
        first = True
        try:
            patiently(self._objects.put, _name(digest), index, only_new=True)
        except TakenError:
            # Equal, or `_entries` raises: the list is checked against its digest, which is ours.
            self._entries(digest)
            first = False
        return Stored(digest, sum(file.size for file in held), len(held), first)

    def holds(self, digest: str) -> bool:
        """Whether the artifact was stored whole. Raises `StorageError`."""
        return patiently(self._objects.size, _name(digest)) is not None

    def fetch(self, digest: str, to: Path) -> None:
        """Bring an artifact back as the folder `to`, which must not exist yet.

        Raises:
            MissingError: it is not in the store, or one of its files is not.
            ChangedError: an object in the store is not what its digest says.
            DiskFullError: it does not fit; said before anything is fetched where that can be known.
            StorageError: `to` exists, no access, or the store is away for longer than `patiently` waits.
        """
        if to.exists():
            raise StorageError(f"{to} exists; delete or move it, then fetch {digest} again")
        entries = self._entries(digest)
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}-"))
        try:
            with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
                md5s = sorted({entry["md5"] for entry in entries})
                sizes = dict(zip(md5s, threads.map(self._size, md5s), strict=True))
                if self._cache is None:
                    needed = sum(sizes[entry["md5"]] for entry in entries)
                else:
                    needed = sum(size for md5, size in sizes.items() if not self._cache.holds(md5, size))
                if needed > shutil.disk_usage(partial).free:
                    raise disk_full(to.parent, f"{self.location}, artifact {digest}", needed)
                places = {partial / checked(entry["relpath"]): entry["md5"] for entry in entries}
                for parent in {place.parent for place in places}:
                    parent.mkdir(parents=True, exist_ok=True)
                list(threads.map(lambda one: self._place(one[1], sizes[one[1]], one[0]), places.items()))
            partial.chmod(0o755)
            partial.rename(to)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def forget(self, digest: str, but: Iterable[str] = ()) -> None:
        """Delete an artifact, its list first, and those of its files that none of the artifacts `but` has.

        Only below a prefix of which the caller knows all artifacts, such as a job's checkpoints.
        """
        files: dict[str, set[str]] = {}
        for one in (digest, *but):
            # A list that is gone or altered names no file for certain.
            with contextlib.suppress(MissingError, ChangedError):
                files[one] = {entry["md5"] for entry in self._entries(one)}
        kept = set().union(*(files.get(one, ()) for one in but))
        for name in (digest, *sorted(files.get(digest, set()) - kept)):
            patiently(self._objects.delete, _name(name))

    def _entries(self, digest: str) -> list[dict[str, Any]]:
        """The files of an artifact: md5 and relpath each."""
        try:
            index = patiently(self._objects.read, _name(digest), _MAX_INDEX_BYTES)
        except MissingError:
            raise MissingError(
                f"{self.location} has no artifact {digest}; push it from where it was made: dvc push"
            ) from None
        if f"{hashlib.md5(index).hexdigest()}.dir" != digest:
            raise self._altered(digest)
        entries: list[dict[str, Any]] = json.loads(index)
        return entries

    def _size(self, md5: str) -> int:
        size = patiently(self._objects.size, _name(md5))
        if size is None:
            raise MissingError(
                f"{self.location}/files/md5/{_name(md5)} was deleted, though an artifact needs it; push the artifact "
                "again: dvc push"
            )
        return size

    def _store(self, file: _File) -> None:
        size = patiently(self._objects.size, _name(file.md5))
        if size is None:
            patiently(self._objects.upload, _name(file.md5), file.path)
            if _File.stamp_of(file.path) != file.stamp:
                patiently(self._objects.delete, _name(file.md5))
                raise ChangedError(
                    f"{file.path} was written to while it was pushed; push again when nothing writes there"
                )
        elif size != file.size:
            raise self._altered(file.md5)

    def _place(self, md5: str, size: int, to: Path) -> None:
        if self._cache is None:
            patiently(download, self._objects, _name(md5), to, md5, "md5")
            return
        while not to.exists():
            copy = patiently(self._cache.fetch, self._objects, _name(md5), size=size, digest=md5, algorithm="md5")
            # Another process may have made room in the meantime; then it is fetched again.
            with contextlib.suppress(FileNotFoundError):
                os.link(copy, to)

    def _altered(self, digest: str) -> ChangedError:
        return ChangedError(
            f"{self.location}/files/md5/{_name(digest)} is not what its name says: it was altered or replaced in the "
            "store. Delete that object, then push the artifact again: dvc push"
        )


@dataclass(frozen=True)
class _File:
    path: Path
    md5: str
    stamp: tuple[int, int]
    """Bytes, and time of the last change."""

    @classmethod
    def of(cls, path: Path) -> _File:
        stamp = cls.stamp_of(path)
        with path.open("rb") as stream:
            return cls(path, hashlib.file_digest(stream, "md5").hexdigest(), stamp)

    @staticmethod
    def stamp_of(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_size, status.st_mtime_ns

    @property
    def size(self) -> int:
        return self.stamp[0]


def _name(digest: str) -> str:
    """The object of a digest below ``files/md5``."""
    return f"{digest[:2]}/{digest[2:]}"
